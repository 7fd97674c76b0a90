"""CMI's contrastive term: new images must differ from the earlier ones (Fang et al., IJCAI 2021)."""

import torch
from torch import nn

from datafree import criterions
from datafree.augment import random_resized_crop
from datafree.hooks import pooled

BANK_SIZE, NEGATIVES, HEAD_DIM = 40960, 4096, 256


class InstanceContrast(nn.Module):
    """InfoNCE between a local view and the global view of the same image, against other images of now and earlier.

    An instance is the concatenation of the teacher's pooled stages and embedding, mapped by a two-layer head that is
    trained along. Negatives are the global views of the rest of the batch and of a bank, which takes the kept batch of
    every round; as in the authors' code they and the positive gather no gradient. Unlike there, an instance has no
    mean of each BatchNorm layer's input, the bank is of images without augmentation, local views are not mirrored,
    and the bank's instances are not paired among themselves to train the head.
    """

    def __init__(self, teacher, T):
        super().__init__()
        self.T, self.added = T, 0
        self._teacher_features = teacher.features  # a method, so that the teacher is no submodule of this
        dim = sum(teacher.tap.stage_channels) + teacher.tap.embed_dim
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, HEAD_DIM))
        self.register_buffer("bank", torch.zeros(BANK_SIZE, dim))

    def forward(self, images, global_features):
        """images (N, C, H, W) in [0, 1]; global_features: the teacher's Features of their global views."""
        local = self.head(instance(self._teacher_features(random_resized_crop(images))))
        size = min(self.added, BANK_SIZE)
        drawn = torch.randint(max(size, 1), (min(NEGATIVES, size),), device=self.bank.device)
        with torch.no_grad():
            anchor, earlier = self.head(instance(global_features)), self.head(self.bank[drawn])
        return criterions.info_nce(local, anchor, earlier, self.T)

    @torch.no_grad()
    def remember(self, images):
        """Put a round's kept images (N, C, H, W) into the bank, over the oldest."""
        rows = instance(self._teacher_features(images)).float()
        place = (self.added + torch.arange(len(rows), device=rows.device)) % BANK_SIZE
        self.bank[place] = rows
        self.added += len(rows)

    def get_extra_state(self):
        return self.added

    def set_extra_state(self, state):
        self.added = state


def instance(features):
    """(N, D): pooled stages and embedding of a network, side by side."""
    return torch.cat([*(pooled(stage) for stage in features.stages), features.embed], dim=1)
