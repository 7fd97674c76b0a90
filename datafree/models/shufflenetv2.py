"""ShuffleNetV2 of width 1.0 (Ma et al., ECCV 2018) for 32-px images."""

from torch import nn
from torchvision import models

from .layers import conv3x3, he_init, out_of_place


def shufflenetv2(num_classes: int, in_channels: int = 3) -> nn.Module:
    """torchvision's network, with its parameter names, a stem of stride 1, and no max pool."""
    model = models.shufflenet_v2_x1_0(num_classes=num_classes)
    model.conv1[0] = conv3x3(in_channels, 24)
    model.maxpool = nn.Identity()
    return he_init(out_of_place(model))
