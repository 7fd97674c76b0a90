"""Residual networks (He et al., CVPR 2016): the blocks, and ResNet-18, 34 and 50 for 32-px images.

Unlike in the ImageNet networks, the stem is one 3x3 convolution of stride 1 without a max pool. Parameters are
named as in CMI (``shortcut``, ``linear``).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from .layers import GlobalAveragePool, conv3x3, he_init


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B of the paper: 1x1 convolution and BN where the shape changes, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions plus a shortcut; subclasses choose the shortcut and its name in the state dict."""

    expansion = 1
    make_shortcut: Callable[[int, int, int], nn.Module] = staticmethod(projection)
    shortcut_name = "shortcut"

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.add_module(self.shortcut_name, self.make_shortcut(in_channels, channels, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        shortcut = getattr(self, self.shortcut_name)
        return self.relu(self.bn2(self.conv2(out)) + shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions plus a shortcut; the output has four times ``channels``."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = projection(in_channels, 4 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def residual_network(
    num_classes: int,
    in_channels: int = 3,
    *,
    block: type[BasicBlock] | type[Bottleneck],
    depths: Sequence[int],
    widths: Sequence[int],
    stem: int,
    head: str = "linear",
) -> nn.Module:
    """A 3x3 stem, stages of residual blocks, and a linear classifier; each stage but the first halves the image.

    depths, widths: blocks and channels per stage. stem: channels after the first convolution. head: name of the
    classifier in the state dict.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=conv3x3(in_channels, stem), bn1=nn.BatchNorm2d(stem), relu=nn.ReLU()
    )
    channels = stem
    for index, (depth, width) in enumerate(zip(depths, widths), start=1):
        blocks = []
        for position in range(depth):
            stride = 2 if index > 1 and position == 0 else 1
            blocks.append(block(channels, width, stride))
            channels = width * block.expansion
        layers[f"layer{index}"] = nn.Sequential(*blocks)
    layers["pool"] = GlobalAveragePool()
    layers[head] = nn.Linear(channels, num_classes)
    return he_init(nn.Sequential(layers))


_resnet = partial(residual_network, widths=(64, 128, 256, 512), stem=64)
resnet18 = partial(_resnet, block=BasicBlock, depths=(2, 2, 2, 2))
resnet34 = partial(_resnet, block=BasicBlock, depths=(3, 4, 6, 3))
resnet50 = partial(_resnet, block=Bottleneck, depths=(3, 4, 6, 3))
