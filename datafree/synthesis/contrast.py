"""CMI's contrastive term: new images must differ from earlier ones (Fang et al., IJCAI 2021)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from datafree import criterions
from datafree.augment import random_resized_crop
from datafree.features import Features

if TYPE_CHECKING:
    from datafree.network import Network

BANK_SIZE, NEGATIVES, HEAD_DIM = 40960, 4096, 256


class InstanceContrast(nn.Module):
    """InfoNCE between a local view and the global view of the same image, against other and earlier images.

    An instance is the concatenation of the teacher's pooled stages and embedding, mapped by a two-layer head that is
    trained jointly. Negatives are the global views of the rest of the batch and of a memory bank, to which the kept
    batch of every round is added; as in the authors' code they and the positive are detached. Unlike there, an instance
    has no mean of each BatchNorm layer's input, the bank has images without augmentation, local views are not flipped,
    and the bank's instances are not paired among themselves to train the head.
    """

    bank: Tensor

    def __init__(self, teacher: "Network", T: float):
        super().__init__()
        self.T, self.added = T, 0
        self._teacher_features = teacher.features  # a method, so that the teacher is no submodule of this
        dim = sum(teacher.tap.stage_channels) + teacher.tap.embed_dim
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, HEAD_DIM))
        self.register_buffer("bank", torch.zeros(BANK_SIZE, dim))

    def forward(self, images: Tensor, global_features: Features) -> Tensor:
        """images (N, C, H, W) in [0, 1]; global_features: the teacher's Features of their global views."""
        local = self.head(instance(self._teacher_features(random_resized_crop(images), with_maps=False)))
        size = min(self.added, BANK_SIZE)
        drawn = torch.randint(max(size, 1), (min(NEGATIVES, size),), device=self.bank.device)
        with torch.no_grad():
            anchor, earlier = self.head(instance(global_features)), self.head(self.bank[drawn])
        return criterions.info_nce(local, anchor, earlier, self.T)

    @torch.no_grad()
    def remember(self, images: Tensor) -> None:
        """Add a round's kept images (N, C, H, W) to the bank, in place of the oldest."""
        rows = instance(self._teacher_features(images, with_maps=False)).float()
        place = (self.added + torch.arange(len(rows), device=rows.device)) % BANK_SIZE
        self.bank[place] = rows
        self.added += len(rows)

    def get_extra_state(self) -> int:
        return self.added

    def set_extra_state(self, state: int) -> None:
        if type(state) is not int or state < 0:
            raise ValueError("its bank is damaged")
        self.added = state


def instance(features: Features) -> Tensor:
    """(N, D): pooled stages and embedding of a network, concatenated."""
    return torch.cat([*features.pooled, features.embed], dim=1)
