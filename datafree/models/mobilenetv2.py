"""MobileNetV2 of width 1.0 (Sandler et al., CVPR 2018) for 32-px images."""

from torch import nn
from torchvision import models

from .layers import conv3x3, he_init, out_of_place


def mobilenetv2(num_classes: int, in_channels: int = 3) -> nn.Module:
    """torchvision's network, with its parameter names, a stem of stride 1, and no dropout, which perturbs features."""
    model = models.mobilenet_v2(num_classes=num_classes, dropout=0.0)
    model.features[0][0] = he_init(conv3x3(in_channels, 32))
    return out_of_place(model)
