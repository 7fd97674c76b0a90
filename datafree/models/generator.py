"""The image generator: latents in, images in [0, 1] out, for any image size."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree import shares
from datafree.micro_batch import in_parts


class UpsampleConv(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution as one: (N, C, H, W) -> (N, out_channels, 2H, 2W).

    A pixel repeated 2x2 is multiplied only by sums of taps of the 3x3 kernel w, so both
    steps equal one transposed convolution of stride 2 with the 4x4 kernel w * ones(2, 2):
    the same function with 2.25 times fewer multiplications.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        kernel = F.pad(kernel, (1, 0)) + F.pad(kernel, (0, 1))
        kernel = F.pad(kernel, (0, 0, 1, 0)) + F.pad(kernel, (0, 0, 0, 1))
        return F.conv_transpose2d(x, kernel.to(x.dtype), stride=2, padding=1)


class Generator(nn.Module):
    """Latents z (N, nz) -> images (N, C, H, W) in [0, 1].

    At 32 px: linear to 2*ngf x 8 x 8, BN, two upsamplings by 2, each with a 3x3 convolution, BN
    and leaky ReLU, a last 3x3 convolution, sigmoid. Larger images need more upsamplings; the
    output is cropped to its centre if a size is not a multiple of the upsampling factor.

    ngf: channels of the last feature map. shape: (C, H, W). micro_batch: images at most that are computed at once
    (:mod:`datafree.micro_batch`), by whose statistics BatchNorm normalises them; 0 sets no limit.
    """

    def __init__(self, nz: int, ngf: int, shape: tuple[int, int, int], micro_batch: int = 0):
        super().__init__()
        self.micro_batch = micro_batch
        channels, self.height, self.width = shape
        doublings = max(2, math.ceil(math.log2(max(self.height, self.width) / 8)))
        scale = 2**doublings
        self.base = (2 * ngf, math.ceil(self.height / scale), math.ceil(self.width / scale))
        self.project = nn.Linear(nz, math.prod(self.base))
        layers: list[nn.Module] = [_batch_norm(2 * ngf)]
        for i in range(doublings):
            width = ngf if i == doublings - 1 else 2 * ngf
            layers += [UpsampleConv(2 * ngf, width), _batch_norm(width), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(ngf, channels, 3, padding=1))
        self.reset()

    @classmethod
    def from_state(cls, state: dict[str, Tensor], shape: tuple[int, int, int]) -> "Generator":
        """The generator of images of ``shape`` whose state_dict that is; nz and ngf follow from its tensors."""
        generator = cls(state["project.weight"].shape[1], state["layers.0.weight"].shape[0] // 2, shape)
        generator.load_state_dict(state)
        return generator

    def reset(self) -> None:
        """Re-initialise: N(0, 0.02) for convolutions and linear layers, N(1, 0.02) for BN scales, zero biases."""
        _initialise(self)

    def reset_first_layer(self) -> None:
        """Re-initialise the linear layer alone, which takes the latents."""
        _initialise(self.project)

    def forward(self, z: Tensor) -> Tensor:
        return in_parts(partial(shares.divided, self._render), z, self.micro_batch, self)

    def _render(self, z: Tensor) -> Tensor:
        x = self.project(z).view(-1, *self.base).contiguous(memory_format=torch.channels_last)
        images = torch.sigmoid(self.layers(x))
        top, left = (images.shape[2] - self.height) // 2, (images.shape[3] - self.width) // 2
        return images[:, :, top : top + self.height, left : left + self.width]


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    """Uses batch statistics only: running averages would lag behind a generator that is trained for so few steps."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.02)
