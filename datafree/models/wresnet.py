"""Wide residual networks (Zagoruyko & Komodakis, 2016) for 32-px images.

wrn<depth>_<k>: depth 6n + 4, three groups of n pre-activation blocks, widths 16k, 32k, 64k. Parameters are
named as in published checkpoints.
"""

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from .layers import GlobalAveragePool, conv3x3, he_init


class PreActBlock(nn.Module):
    """BN, ReLU and convolution twice, plus a shortcut (He et al., 2016, "Identity Mappings")."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.convShortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(activated))))
        # Where the width changes, the shortcut convolution is applied to the activated input, too.
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class Group(nn.Module):
    """``depth`` blocks of one width, the first with ``stride``; checkpoints call them ``layer``."""

    def __init__(self, depth: int, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        first = PreActBlock(in_channels, out_channels, stride)
        rest = [PreActBlock(out_channels, out_channels, 1) for _ in range(depth - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def wide_resnet(num_classes: int, in_channels: int = 3, *, depth: int, k: int) -> nn.Module:
    """A wide residual network of ``depth`` layers with widening factor ``k``."""
    n = (depth - 4) // 6
    return he_init(
        nn.Sequential(
            OrderedDict(
                conv1=conv3x3(in_channels, 16),
                block1=Group(n, 16, 16 * k, stride=1),
                block2=Group(n, 16 * k, 32 * k, stride=2),
                block3=Group(n, 32 * k, 64 * k, stride=2),
                bn1=nn.BatchNorm2d(64 * k),
                relu=nn.ReLU(),
                pool=GlobalAveragePool(),
                fc=nn.Linear(64 * k, num_classes),
            )
        )
    )


wrn16_1 = partial(wide_resnet, depth=16, k=1)
wrn16_2 = partial(wide_resnet, depth=16, k=2)
wrn40_1 = partial(wide_resnet, depth=40, k=1)
wrn40_2 = partial(wide_resnet, depth=40, k=2)
