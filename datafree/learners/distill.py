"""Phase 2 of RGAL: the student matches the teacher's outputs and stages, and keeps classes apart."""

from typing import Any

import torch
from torch import Tensor, nn

from datafree import criterions
from datafree.augment import CropFlip, mixup, shift_flip
from datafree.errors import InputError
from datafree.features import Features
from datafree.learners.transfer import TransferLearner
from datafree.network import Network
from datafree.pool import Batch
from datafree.terms import Term, weighted_sum


class DistillLearner(TransferLearner):
    """L_stu = kd * L_kd + cd_loss * L_cd + gram_loss * L_gram + at_loss * L_at + striplet * L_tri.

    RGAL's phase 2 has L_kd = KL_T T^2, L_cd and L_tri; L_at is ZSKT's, and the L1 distance as L_kd is DFAD's.

    config: its sections distill, relation, optim and run are read. total_steps: student steps of the whole run.
    """

    reads_distill_options = True

    def __init__(self, student: Network, teacher: Network, augment: CropFlip, config: Any, total_steps: int):
        self.settings = config.distill
        if self.settings.at_loss:
            self.pairs = criterions.pair_stages(student.tap.stage_sizes, teacher.tap.stage_sizes, ["at_loss"])
        super().__init__(student, teacher, augment, config, total_steps)
        self._require_loss()

    def trained_modules(self) -> dict[str, nn.Module]:
        """The projections, if a term uses them."""
        terms = [name for name in ("cd_loss", "gram_loss") if getattr(self.settings, name)]
        return {"projection": criterions.StageProjection(self.network.tap, self.teacher.tap, terms)} if terms else {}

    @property
    def projection(self) -> Any:
        return self.modules.get("projection")

    def all_terms(self) -> list[Term]:
        s, logits, maps, early = self.settings, ("logits",), ("stages",), self.settings.custom_steps
        return [
            Term("kd", s.kd, self._kd, logits, logits),
            Term("cd_loss", s.cd_loss, self._channel, ("pooled",), ("pooled",), early),
            Term("gram_loss", s.gram_loss, self._gram, maps, maps, early),
            Term("at_loss", s.at_loss, self._attention, maps, maps, early),
            self.separating_term(early),
        ]

    def _require_loss(self) -> None:
        if not any(term.until >= 1 for term in self.terms):
            after = f" after custom_steps {self.settings.custom_steps:g} of the run" if self.terms else ""
            raise InputError(
                f"with --kd 0 the student has no loss{after}; give --kd a weight, or --cd_loss, --gram_loss, --at_loss "
                "or --striplet one and --custom_steps 1"
            )

    @property
    def cached_fields(self) -> tuple[str, ...]:  # type: ignore[override]
        """None for blended views, which do not recur, nor for terms that read whole maps."""
        return () if self.settings.mixup else super().cached_fields

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        views, teacher = self._views(batch)
        terms = [term for term in self.terms if progress < term.until]
        return weighted_sum(terms, teacher, self.student_features(views, terms))

    @torch.no_grad()
    def _views(self, batch: Batch) -> tuple[Tensor, Features]:
        """Views of the images, two of each with pair_sample, and the teacher's Features of them."""
        times = 2 if self.settings.pair_sample else 1
        if not self.settings.mixup:
            return self.views(batch, times)
        draw = self.augment.draw(times * len(batch.images), batch.images.device)
        views = mixup(shift_flip(batch.images, *draw), self.settings.mixup)
        return views, self.teacher_features(views)

    def _kd(self, teacher: Features, student: Features) -> Tensor:
        if self.settings.kd_distance == "l1":
            return criterions.l1_distance(student.logits, teacher.logits).mean()
        return criterions.distillation(student.logits, teacher.logits, self.settings.T)

    def _channel(self, teacher: Features, student: Features) -> Tensor:
        return self.projection.channel(student.pooled, teacher.pooled)

    def _gram(self, teacher: Features, student: Features) -> Tensor:
        return self.projection.gram(student.stages, teacher.stages)

    def _attention(self, teacher: Features, student: Features) -> Tensor:
        return criterions.attention(student.stages, teacher.stages, self.pairs)
