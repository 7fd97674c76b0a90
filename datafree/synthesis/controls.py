"""Sources that synthesise nothing: the controls of every data-free claim, noise and the training images; a folder."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from datafree.datasets.cards import DatasetCard
from datafree.datasets.splits import Split
from datafree.pool import Batch, ImagePool
from datafree.synthesis import CONTROL, SOURCES, Traits
from datafree.synthesis.base import BaseSynthesis


class NoiseSource(BaseSynthesis):
    """Gaussian noise with the data card's mean and standard deviation, clipped to [0, 1]; new in every batch."""

    traits: ClassVar[Traits] = CONTROL

    def __init__(self, *, card: DatasetCard, device: torch.device | str = "cpu", **parts: Any):
        super().__init__(card=card, device=device, **parts)
        self.shape = card.shape
        self.mean = torch.tensor(card.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(card.std, device=device).view(-1, 1, 1)

    def sample(self, n: int) -> Batch:
        self.images_made += n
        noise = torch.randn(n, *self.shape, device=self.device)
        return Batch((noise * self.std + self.mean).clamp(0, 1))


class FolderSource(BaseSynthesis):
    """The images of ``pool_images``, which fill the pool before the run begins (datafree.synthesis.build)."""

    traits: ClassVar[Traits] = SOURCES["folder"].traits

    def __init__(self, *, card: DatasetCard, config: Any, device: torch.device | str = "cpu", **parts: Any):
        super().__init__(card=card, config=config, device=device, **parts)
        self.pool = ImagePool(0, card.shape, card.num_classes, self.device)

    def sample(self, n: int) -> Batch:
        settings = self.config.synthesis
        return self.pool.sample(n, settings.balanced_sampling, settings.pool_order == "passes")

    def latest(self) -> tuple[Tensor, Tensor | None]:
        return self.pool.spread(256)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "pool": self.pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.pool.load_state_dict(state["pool"])


class RealSource(BaseSynthesis):
    """Real training images with their labels: the upper bound, and how teachers are trained."""

    traits: ClassVar[Traits] = CONTROL

    def __init__(self, split: Split):
        super().__init__(device=split.device)
        self.split = split

    def sample(self, n: int) -> Batch:
        return Batch(*self.split.sample(n))

    def latest(self) -> tuple[Tensor, Tensor | None]:
        # Must not advance the stream, here either.
        state = self.split.state_dict()
        batch = self.split.sample(min(256, len(self.split)))
        self.split.load_state_dict(state)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.split.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.split.load_state_dict(state)
