"""What several networks share: their last pooling and their first weights."""

from torch import nn
from torch.nn import functional as F


def conv3x3(in_channels, out_channels, stride=1):
    """A padded 3x3 convolution without bias, for a BatchNorm follows."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class GlobalAveragePool(nn.Module):
    """(N, C, H, W) -> (N, C): the mean of every channel, so that images may have any size."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def he_init(model):
    """Draw the convolutions as He et al. (2015) do, by fan-out, zero all biases, and return ``model``."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


def out_of_place(model):
    """Let activations make new tensors, so that no hooked output changes afterwards; return ``model``."""
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.inplace = False
    return model
