"""ShuffleNetV2 of width 1.0 (Ma et al., ECCV 2018) for 32-px images, as CMI and RepDistiller have it.

The stem is a 1x1 convolution without a stride, and there is no max pool; names of parameters are those of their files.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from .layers import GlobalAveragePool, conv3x3, he_init, out_of_place

STAGES = ((116, 3), (232, 7), (464, 3))  # width, and blocks after the one that downsamples
HEAD = 1024


def _conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)


def shuffled(left: Tensor, right: Tensor) -> Tensor:
    """Channels of both (N, C, H, W) in turns -> (N, 2C, H, W)."""
    return torch.stack([left, right], dim=2).flatten(1, 2)


class Unit(nn.Module):
    """Half of the channels pass, the others go through three convolutions; then both are shuffled."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _conv1x1(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _depthwise(half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv1x1(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.bn1(self.conv1(right)))
        right = self.bn2(self.conv2(right))
        return shuffled(left, F.relu(self.bn3(self.conv3(right))))


class DownUnit(nn.Module):
    """Both halves are computed from all channels at half the resolution: the left by 1 and 2, the right by 3 to 5."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = out_channels // 2
        self.conv1, self.bn1 = _depthwise(in_channels, 2), nn.BatchNorm2d(in_channels)
        self.conv2, self.bn2 = _conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _depthwise(half, 2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv1x1(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        return shuffled(left, F.relu(self.bn5(self.conv5(right))))


class ShuffleNetV2(nn.Module):
    def __init__(self, num_classes: int, in_channels: int = 3):
        super().__init__()
        widths = [24, *(width for width, _ in STAGES)]
        self.conv1, self.bn1 = _conv1x1(in_channels, widths[0]), nn.BatchNorm2d(widths[0])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(DownUnit(before, width), *(Unit(width) for _ in range(count)))
            for before, (width, count) in zip(widths, STAGES)
        )
        self.conv2, self.bn2 = _conv1x1(widths[-1], HEAD), nn.BatchNorm2d(HEAD)
        self.pool = GlobalAveragePool()
        self.linear = nn.Linear(HEAD, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(F.relu(self.bn2(self.conv2(x)))))


shufflenetv2 = ShuffleNetV2


def shufflenetv2_torchvision(num_classes: int, in_channels: int = 3) -> nn.Module:
    """torchvision's network, with its parameter names, a stem of stride 1, and no max pool."""
    model = models.shufflenet_v2_x1_0(num_classes=num_classes)
    model.conv1[0] = conv3x3(in_channels, 24)
    model.maxpool = nn.Identity()
    return he_init(out_of_place(model))
