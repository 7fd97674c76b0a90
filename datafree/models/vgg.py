"""VGG with BatchNorm for small images (Simonyan & Zisserman, ICLR 2015; as in RepDistiller).

One linear layer follows a global average pool. Parameters are named as in RepDistiller.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from .layers import GlobalAveragePool, he_init


class LargeMapPool(nn.MaxPool2d):
    """A max pool that is skipped for maps of 4 px or less, so that 32-px and 64-px images both end at 4 px."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if min(x.shape[-2:]) > 4 else x


def block(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    """``depth`` times 3x3 convolution, BN and ReLU."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        layers.append(nn.BatchNorm2d(out_channels))
        layers.append(nn.ReLU())
        in_channels = out_channels
    return nn.Sequential(*layers)


def vgg(num_classes: int, in_channels: int = 3, *, depths: Sequence[int]) -> nn.Module:
    """A VGG network of five blocks with ``depths`` convolutions each, of 64 to 512 channels."""
    return he_init(
        nn.Sequential(
            OrderedDict(
                block0=block(in_channels, 64, depths[0]),
                pool0=nn.MaxPool2d(2),
                block1=block(64, 128, depths[1]),
                pool1=nn.MaxPool2d(2),
                block2=block(128, 256, depths[2]),
                pool2=nn.MaxPool2d(2),
                block3=block(256, 512, depths[3]),
                pool3=LargeMapPool(2),
                block4=block(512, 512, depths[4]),
                pool4=GlobalAveragePool(),
                classifier=nn.Linear(512, num_classes),
            )
        )
    )


vgg8 = partial(vgg, depths=(1, 1, 1, 1, 1))
vgg11 = partial(vgg, depths=(1, 1, 2, 2, 2))
vgg13 = partial(vgg, depths=(2, 2, 2, 2, 2))
