"""User-defined learners and sources with options, named on command lines as path/to/tests/custom.py:CLASS."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from datafree.config import option
from datafree.learners.base import Learner, cosine_to_zero, make_optimizer
from datafree.learners.distill import DistillLearner
from datafree.synthesis import Traits
from datafree.synthesis.base import BaseSynthesis


def name(cls):
    """What a command line calls the class of this file."""
    return f"{Path(__file__).resolve()}:{cls}"


class Grey(BaseSynthesis):
    """Images of one grey level, which is an option of this class."""

    traits = Traits(keeps_pool=False, has_generator=False, has_rounds=False)

    @dataclass
    class Options:
        """Plain images."""

        level: float = option(0.5, "Grey level.", low=0, high=1)
        polarity: Literal["positive", "negative"] = option("positive", "Whether the level is inverted.")
        dither: float | None = option(None, "Amplitude of uniform noise; none if empty.", low=0, high=1)

    def sample(self, n):
        given = self.config.grey
        level = given.level if given.polarity == "positive" else 1 - given.level
        self.images_made += n
        images = torch.full((n, *self.card.shape), level, device=self.device)
        return images if given.dither is None else (images + given.dither * torch.rand_like(images)).clamp(0, 1), None


class Scaled(DistillLearner):
    """DistillLearner whose loss has a factor."""

    @dataclass
    class Options:
        """Scale of the loss."""

        factor: float = option(1.0, "Factor of the loss.", low=0)

    def loss(self, batch, progress):
        loss, terms = super().loss(batch, progress)
        return self.config.scaled.factor * loss, {**terms, "scaled": loss}


class Averaged(Learner):
    """Cross-entropy with the teacher's predictions, smoothed by a moving average of its own logits."""

    def __init__(self, student, teacher, augment, config, total_steps):
        optimizer = make_optimizer([student], config.optim)
        super().__init__(student, optimizer, cosine_to_zero(optimizer, total_steps), config.run.precision)
        self.teacher, self.augment = teacher, augment
        self.average = torch.nn.BatchNorm1d(student.num_classes, affine=False)  # holds the moving average

    def loss(self, batch, progress):
        views = self.augment(batch.images)
        with torch.no_grad():
            labels = self.teacher(views).argmax(1)
        logits = self.network(views)
        self.average(logits.detach())
        term = F.cross_entropy(logits - 0.1 * self.average.running_mean, labels)
        return term, {"ce": term}

    def metrics(self):
        return {"average": self.average.running_mean.norm().item()}

    def parts(self):
        return {**super().parts(), "average": self.average}


class Failing(DistillLearner):
    """Cannot be constructed."""

    def __init__(self, **parts):
        raise ZeroDivisionError("no total\nof steps")


class Undecorated(Grey):
    """Its options are not a dataclass."""

    class Options:
        level = 0.5


class Unhelpful(Grey):
    """An option of it has no sentence."""

    @dataclass
    class Options:
        level: float = 0.5


class Greedy(Grey):
    """Its option has the name of another one."""

    @dataclass
    class Options:
        """Taken."""

        lr: float = option(0.5, "Another learning rate.")


class Distill(Grey):
    """Its section would have the name of another one."""

    @dataclass
    class Options:
        """Taken."""

        shade: float = option(0.5, "Grey level.")


class Darker(Grey):
    """Inherits its options, which stay in the section of the class that has them."""

    def sample(self, n):
        images, targets = super().sample(n)
        return images / 2, targets
