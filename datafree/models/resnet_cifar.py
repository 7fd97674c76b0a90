"""Thin residual networks of depth 6n + 2 for 32-px images (He et al., CVPR 2016, section 4.2).

``resnet8 ... resnet110, resnet8x4, resnet32x4``: as in RepDistiller (Tian et al., ICLR 2020), with projection
shortcuts. ``cifar_resnet20 ... cifar_resnet110``: as in the paper, with parameter-free shortcuts.
Parameters are named as in the published checkpoints of each family.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from .resnet import BasicBlock, residual_network


class Subsample(nn.Module):
    """Option A of the paper: strided subsampling, with zero channels added, half of them before and half after."""

    def __init__(self, extra_channels: int, stride: int):
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra_channels // 2
        pixels = x[:, :, :: self.stride, :: self.stride]
        return F.pad(pixels, (0, 0, 0, 0, before, self.extra_channels - before))


def subsample(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option A where the shape changes, else the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return Subsample(out_channels - in_channels, stride)


class OptionABlock(BasicBlock):
    """A basic block with a parameter-free shortcut."""

    make_shortcut = staticmethod(subsample)


class DownsampleBlock(BasicBlock):
    """A basic block whose projection is called ``downsample``."""

    shortcut_name = "downsample"


def rep_resnet(num_classes: int, in_channels: int = 3, *, depth: int, widths: Sequence[int]) -> nn.Module:
    """RepDistiller's network of ``depth`` layers; widths: channels of the stem and of the three stages."""
    stem, *stages = widths
    return residual_network(
        num_classes,
        in_channels,
        block=DownsampleBlock,
        depths=[(depth - 2) // 6] * 3,
        widths=stages,
        stem=stem,
        head="fc",
    )


def cifar_resnet(num_classes: int, in_channels: int = 3, *, depth: int) -> nn.Module:
    """The paper's network of ``depth`` layers for CIFAR-10."""
    return residual_network(
        num_classes, in_channels, block=OptionABlock, depths=[(depth - 2) // 6] * 3, widths=(16, 32, 64), stem=16
    )


_thin = partial(rep_resnet, widths=(16, 16, 32, 64))
_wide = partial(rep_resnet, widths=(32, 64, 128, 256))
resnet8 = partial(_thin, depth=8)
resnet20 = partial(_thin, depth=20)
resnet32 = partial(_thin, depth=32)
resnet56 = partial(_thin, depth=56)
resnet110 = partial(_thin, depth=110)
resnet8x4 = partial(_wide, depth=8)
resnet32x4 = partial(_wide, depth=32)

cifar_resnet20 = partial(cifar_resnet, depth=20)
cifar_resnet32 = partial(cifar_resnet, depth=32)
cifar_resnet44 = partial(cifar_resnet, depth=44)
cifar_resnet56 = partial(cifar_resnet, depth=56)
cifar_resnet110 = partial(cifar_resnet, depth=110)
