"""Small networks for the tests, named on command lines as path/to/tests/nets.py:FACTORY."""

import os
import signal
from pathlib import Path

import torch
from torch import nn

from datafree.synthesis.base import BaseSynthesis


def name(factory):
    """The name of a factory in this file, as it is given on a command line."""
    return f"{Path(__file__).resolve()}:{factory}"


def block(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


def conv(in_channels, out_channels, stride=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
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


def halved(num_classes, in_channels=3, pretrained=True):
    """Weights of half the length."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny(num_classes, in_channels).bfloat16()


def small(num_classes, in_channels=3):
    """Like tiny, with other widths."""
    return tiny(num_classes, in_channels, width=6)


def dropping(num_classes, in_channels=3):
    """Like small, with dropout, so that a pass of training draws random numbers."""
    layers = list(small(num_classes, in_channels))
    return nn.Sequential(*layers[:-1], nn.Dropout(0.3), layers[-1])


class Deadly(nn.Module):
    """Like small; the second of two processes is killed in its 20th pass of training, unless that has happened."""

    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.model, self.passes = small(num_classes, in_channels), 0

    def forward(self, views):
        self.passes += self.training
        if self.passes == 20 and os.environ.get("RANK") == "1" and not os.path.exists("killed"):
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.model(views)


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
    """Seven classes, whatever num_classes is."""
    return tiny(7, in_channels)


class Overflows(nn.Module):
    """Finite weights, infinite logits."""

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


class Residual(nn.Module):
    """A residual block that halves the image."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.body, self.skip = conv(in_channels, out_channels, 2), nn.Conv2d(in_channels, out_channels, 1, 2)

    def forward(self, x):
        return self.body(x) + self.skip(x)


def toy(num_classes=5, in_channels=3):
    """Three stages: a convolution and two residual blocks; 4, 6 and 8 channels."""
    return nn.Sequential(
        conv(in_channels, 4),
        Residual(4, 6),
        Residual(6, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


class Trunk(nn.Module):
    """Two convolutions with normalisation, of 8 and 16 channels, and a linear head; to be changed by subclasses."""

    def __init__(self, num_classes=10, norm=nn.BatchNorm2d):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), norm(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), norm(16), nn.ReLU())
        self.fc = nn.Linear(16, num_classes)

    def maps(self, x):
        return self.b(self.a(x))

    def forward(self, x):
        return self.fc(self.maps(x).mean((2, 3)))


class Ends(Trunk):
    """Returns a function of its logits, which are large."""

    def __init__(self, last, num_classes=10):
        super().__init__(num_classes)
        self.last = last

    def forward(self, x):
        return self.last(4 * super().forward(x))


class Same(nn.Module):
    """A residual block of unchanged shape."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(conv(channels, channels), nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        return x + self.body(x)


def lazy(num_classes, in_channels=3):
    """Layers that take their shapes from their first input."""
    return nn.Sequential(
        nn.LazyConv2d(8, 3, 2, 1),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LazyLinear(num_classes),
    )


class SharedReLU(nn.Module):
    """One ReLU module after each of four convolutions, of which two have the same size."""

    def __init__(self, num_classes=3, in_channels=1):
        super().__init__()
        self.first, self.a = nn.Conv2d(in_channels, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b, self.c = nn.Conv2d(4, 5, 3, 2, 1), nn.Conv2d(5, 6, 3, 2, 1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(6, num_classes)

    def forward(self, x):
        for layer in (self.first, self.a, self.b, self.c):
            x = self.relu(layer(x))
        return self.fc(x.mean((2, 3)))


class Stripes(BaseSynthesis):
    """A user-defined source: images of one grey level, which is the value of an option."""

    objective = "a user-defined source may call its attributes as it likes"

    def sample(self, n):
        self.images_made += n
        return torch.full((n, *self.card.shape), self.config.synthesis.tv, device=self.device), None


class Bare(BaseSynthesis):
    """Images without target classes, and synthesis without terms."""

    def synthesize(self):
        pass

    def sample(self, n):
        return torch.rand(n, *self.card.shape)


class Mute(BaseSynthesis):
    """A source without a method sample."""


class Wordy(Stripes):
    """A source whose terms are not tensors."""

    def synthesize(self):
        return {"certainty": 3.0}


class Nothing:
    """Not a source at all."""

    def __init__(self, **given):
        pass
