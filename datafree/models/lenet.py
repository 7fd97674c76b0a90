"""LeNet-5 (LeCun et al., 1998) for images of any size."""

from torch import Tensor, nn
from torch.nn import functional as F

from .layers import GlobalAveragePool


class LeNet5(nn.Module):
    """The layers C1 to F6 of the paper, with BatchNorm, ReLU and max pools: (N, C, H, W) -> logits (N, num_classes).

    Images below 32 px are zero-padded to 32 px, as the 28-px digits are in the paper; for larger images the
    outputs of C5 at all positions are averaged.
    """

    def __init__(self, num_classes: int, in_channels: int = 3):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 120, 5),
            nn.ReLU(),
        )
        self.pool = GlobalAveragePool()
        self.head = nn.Sequential(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes))

    def forward(self, views: Tensor) -> Tensor:
        height, width = (max(0, 32 - size) for size in views.shape[-2:])
        views = F.pad(views, (width // 2, width - width // 2, height // 2, height - height // 2))
        return self.head(self.pool(self.trunk(views)))


def lenet5(num_classes: int, in_channels: int = 3) -> nn.Module:
    """LeNet-5 with 120 and 84 features before its classifier."""
    return LeNet5(num_classes, in_channels)
