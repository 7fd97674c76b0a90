"""The generator of images: noise in, images in [0, 1] out, for any image size."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class UpsampleConv(nn.Module):
    """Nearest-neighbour doubling followed by a 3x3 convolution, computed as one.

    A pixel doubled to 2x2 meets the 3x3 kernel w only through sums of its taps, so both
    steps equal one transposed convolution of stride 2 with the 4x4 kernel w * ones(2, 2):
    the same function for 2.25 times fewer multiplications.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))

    def forward(self, x):
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        kernel = F.pad(kernel, (1, 0)) + F.pad(kernel, (0, 1))
        kernel = F.pad(kernel, (0, 0, 1, 0)) + F.pad(kernel, (0, 0, 0, 1))
        return F.conv_transpose2d(x, kernel.to(x.dtype), stride=2, padding=1)


class Generator(nn.Module):
    """Noise (N, nz) -> images (N, C, H, W) in [0, 1].

    At 32 px: linear to 2*ngf x 8 x 8, BN, two doublings with 3x3 convolutions, BN and leaky
    ReLU, a last 3x3 convolution, sigmoid. Larger images get more doublings; sizes that are
    no multiple of the doublings are cut out of the middle.
    """

    def __init__(self, nz, ngf, shape):
        super().__init__()
        channels, self.height, self.width = shape
        doublings = max(2, math.ceil(math.log2(max(self.height, self.width) / 8)))
        scale = 2**doublings
        self.base = (2 * ngf, math.ceil(self.height / scale), math.ceil(self.width / scale))
        self.project = nn.Linear(nz, math.prod(self.base))
        layers = [_batch_norm(2 * ngf)]
        for i in range(doublings):
            width = ngf if i == doublings - 1 else 2 * ngf
            layers += [UpsampleConv(2 * ngf, width), _batch_norm(width), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(ngf, channels, 3, padding=1))
        self.reset()

    def reset(self):
        """New random weights: N(0, 0.02) for convolutions and linear layers, N(1, 0.02) for BN."""
        _draw(self)

    def reset_first_layer(self):
        """New random weights of the layer that takes the noise."""
        _draw(self.project)

    def forward(self, z):
        x = self.project(z).view(-1, *self.base).contiguous(memory_format=torch.channels_last)
        images = torch.sigmoid(self.layers(x))
        top, left = (images.shape[2] - self.height) // 2, (images.shape[3] - self.width) // 2
        return images[:, :, top : top + self.height, left : left + self.width]


def _batch_norm(channels):
    """By the batch alone: averages over steps would lag behind a generator of so few."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


@torch.no_grad()
def _draw(module):
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.02)
