"""Small networks for the tests, named on command lines as path/to/tests/nets.py:FACTORY."""

from pathlib import Path

import torch
from torch import nn

from datafree.synthesis.base import BaseSynthesis


def name(factory):
    """What a command line calls the factory of this file."""
    return f"{Path(__file__).resolve()}:{factory}"


def block(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


def tiny(num_classes, in_channels=3, width=8):
    """Two stages with BatchNorm; 1,418 weights for grey digits."""
    return nn.Sequential(
        block(in_channels, width),
        block(width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def small(num_classes, in_channels=3):
    """As tiny, with other widths."""
    return tiny(num_classes, in_channels, width=6)


def plain(num_classes, in_channels=3):
    """No BatchNorm at all."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def stubborn(in_channels=3):
    """Seven classes, whatever is asked for."""
    return tiny(7, in_channels)


class Overflows(nn.Module):
    """Finite weights, logits that are not."""

    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.model = tiny(num_classes, in_channels)

    def forward(self, views):
        return self.model(views) * torch.inf


class Poisoned(nn.Module):
    """A good network whose logits are NaN from the 20th forward pass in training mode on."""

    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.model, self.passes = tiny(num_classes, in_channels), 0

    def forward(self, views):
        self.passes += self.training
        return self.model(views) * (torch.nan if self.passes >= 20 else 1)


class Stripes(BaseSynthesis):
    """A source of one's own: images of one grey level each, an option of the run's."""

    objective = "what one's own attributes are called is one's own affair"

    def sample(self, n):
        self.images_made += n
        return torch.full((n, *self.card.shape), self.config.synthesis.tv, device=self.device), None


class Bare(BaseSynthesis):
    """Images without their classes, and synthesis without terms."""

    def synthesize(self):
        pass

    def sample(self, n):
        return torch.rand(n, *self.card.shape)


class Mute(BaseSynthesis):
    """A source that hands nothing out."""


class Wordy(Stripes):
    """A source whose terms are no tensors."""

    def synthesize(self):
        return {"certainty": 3.0}


class Nothing:
    """No source at all."""

    def __init__(self, **given):
        pass
