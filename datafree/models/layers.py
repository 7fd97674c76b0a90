"""Parts shared by several networks: convolution, pooling, initialisation."""

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

M = TypeVar("M", bound=nn.Module)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A padded 3x3 convolution without bias, to be followed by a BatchNorm."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class GlobalAveragePool(nn.Module):
    """(N, C, H, W) -> (N, C): the mean of each channel, so that images may have any size."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def he_init(model: M) -> M:
    """Initialise convolutions as in He et al. (2015), by fan-out, zero all biases, and return ``model``."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def out_of_place(model: M) -> M:
    """Make activations return new tensors, so that hooked outputs stay unmodified; return ``model``."""
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.inplace = False
    return model
