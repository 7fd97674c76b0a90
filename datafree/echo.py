"""Data echoing: a view and the teacher's answer to it are used in several steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datafree.errors import out_of_memory_in
from datafree.features import FeatureRows, Features
from datafree.runtime import unfilled

KEPT = 1024  # views among which those of a step are drawn that are not new


class Echo:
    """Adds to the new views of a step some of earlier steps, so that each view is used ``times`` times on average.

    Choi et al. (2019) repeat what a slow input pipeline gives; here that is the teacher's pass, which for most pairs is
    the longest part of a student step. The views that are added are drawn among the last ``kept`` ones, so that a batch
    does not come back as it was. Their pixels are kept, too, and part of a checkpoint, because a blended view cannot be
    made again from a pool that has changed.

    rows: what of the teacher's Features is kept. shape: (C, H, W) of the views.
    """

    def __init__(self, rows: FeatureRows, times: int, shape: Sequence[int], device: torch.device, kept: int = KEPT):
        self.rows, self.times, self.kept, self.device, self.added = rows, times, kept, device, 0
        with out_of_memory_in("allocation of the views that are used again", "--echo"):
            self.views = unfilled(kept, *shape, device=device)
            self.answers = unfilled(kept, rows.width, device=device)

    @torch.no_grad()
    def __call__(self, views: Tensor, features: Features) -> tuple[Tensor, Features]:
        """New views (N, C, H, W) and the teacher's Features of them -> these and earlier ones, times * N in all."""
        answers = self.rows.pack(features)
        self._keep(views[-self.kept :], answers[-self.kept :])
        again = torch.randint(self._held(self.added), ((self.times - 1) * len(views),), device=self.device)
        return torch.cat([views, self.views[again]]), self.rows.unpack(torch.cat([answers, self.answers[again]]))

    def _keep(self, views: Tensor, answers: Tensor) -> None:
        """Write them over the oldest ones."""
        places = (torch.arange(len(views), device=self.device) + self.added) % self.kept
        self.views[places], self.answers[places] = views.to(self.views.dtype), answers
        self.added += len(views)

    def _held(self, added: int) -> int:
        """How many views are held when so many were added."""
        return min(added, self.kept)

    def state_dict(self) -> dict[str, Any]:
        held = self._held(self.added)
        return {"views": self.views[:held], "answers": self.answers[:held], "added": self.added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what is no such state."""
        views, answers, added = state["views"], state["answers"], state["added"]
        if not torch.is_tensor(views) or not torch.is_tensor(answers) or type(added) is not int or added < 0:
            raise ValueError("its views are damaged")
        held = self._held(added)
        for found, here in ((views, self.views[:held]), (answers, self.answers[:held])):
            if found.shape != here.shape or found.dtype != here.dtype:
                raise ValueError(f"it holds {found.dtype} of shape {tuple(found.shape)}, not {tuple(here.shape)}")
        self.views[:held], self.answers[:held], self.added = views.to(self.device), answers.to(self.device), added
