"""Phase 2 of RGAL: the student matches the teacher's outputs and stages, and keeps classes apart."""

from typing import Any

import torch
from torch import Tensor, nn

from datafree import criterions, relation
from datafree.augment import CropFlip, mixup, shift_flip
from datafree.errors import InputError
from datafree.features import Features
from datafree.learners.base import Learner, cosine_to_zero, sgd
from datafree.network import Network
from datafree.pool import Batch
from datafree.terms import Term, fields_read, weighted, weighted_sum

CACHEABLE = ("logits", "embed", "pooled")  # fields of Features that a view cache can keep


class DistillLearner(Learner):
    """L_stu = kd * L_kd + cd_loss * L_cd + gram_loss * L_gram + at_loss * L_at + striplet * L_tri.

    RGAL's phase 2 has L_kd = KL_T T^2, L_cd and L_tri; L_at is ZSKT's, and the L1 distance as L_kd is DFAD's.

    config: its sections distill, relation, optim and run are read. total_steps: student steps of the whole run.
    """

    reads_distill_options = True

    def __init__(self, student: Network, teacher: Network, augment: CropFlip, config: Any, total_steps: int):
        self.network, self.teacher, self.augment = student, teacher, augment
        self.config, self.settings, self.triplets = config, config.distill, config.relation
        self.modules = {name: module.to(student.device) for name, module in self.trained_modules().items()}
        if self.settings.at_loss:
            self.pairs = criterions.pair_stages(student.tap.stage_sizes, teacher.tap.stage_sizes)
        self.terms = weighted(self.all_terms())
        self._require_loss()
        trained = [student, *self.modules.values()]
        optimizer = sgd([parameter for module in trained for parameter in module.parameters()], config.optim)
        super().__init__(student, optimizer, cosine_to_zero(optimizer, total_steps), config.run.precision)

    def trained_modules(self) -> dict[str, nn.Module]:
        """What is trained and saved beside the student, by name: the projections, if a term uses them."""
        if not (self.settings.cd_loss or self.settings.gram_loss):
            return {}
        return {"projection": criterions.StageProjection(self.network.tap, self.teacher.tap)}

    @property
    def projection(self) -> Any:
        return self.modules.get("projection")

    def all_terms(self) -> list[Term]:
        """Every term: its weight, its function of (teacher, student), and the fields that it reads of both."""
        s, r, logits, maps, early = self.settings, self.triplets, ("logits",), ("stages",), self.settings.custom_steps
        space = ("embed",) if r.sampling_space == "embedding" else ()
        return [
            Term("kd", s.kd, self._kd, logits, logits),
            Term("cd_loss", s.cd_loss, self._channel, ("pooled",), maps, early),
            Term("gram_loss", s.gram_loss, self._gram, maps, maps, early),
            Term("at_loss", s.at_loss, self._attention, maps, maps, early),
            Term("striplet", r.striplet, self._striplet, (*logits, *space), ("embed", "logits", "stages"), early),
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
        fields = fields_read(self.terms, "teacher")
        return fields if not self.settings.mixup and set(fields) <= set(CACHEABLE) else ()

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        views, teacher = self._views(batch)
        return weighted_sum([t for t in self.terms if progress < t.until], teacher, self.network.features(views))

    @torch.no_grad()
    def _views(self, batch: Batch) -> tuple[Tensor, Features]:
        """Augmented views of the images, two of each with pair_sample, and the teacher's Features of them."""
        images, times = batch.images, 2 if self.settings.pair_sample else 1
        shift, flip = self.augment.draw(times * len(images), images.device)
        views = shift_flip(images, shift, flip)
        if self.settings.mixup:
            views = mixup(views, self.settings.mixup)
        if self.settings.mixup or self.cache is None or batch.ids is None:
            return views, self.teacher.features(views)
        keys = batch.ids.repeat(times) * self.augment.count + self.augment.number(shift, flip)
        return views, self.cache.features(views, keys)

    def _kd(self, teacher: Features, student: Features) -> Tensor:
        if self.settings.kd_distance == "l1":
            return criterions.l1_distance(student.logits, teacher.logits).mean()
        return criterions.distillation(student.logits, teacher.logits, self.settings.T)

    def _channel(self, teacher: Features, student: Features) -> Tensor:
        return self.projection.channel(student.stages, teacher.pooled)

    def _gram(self, teacher: Features, student: Features) -> Tensor:
        return self.projection.gram(student.stages, teacher.stages)

    def _attention(self, teacher: Features, student: Features) -> Tensor:
        return criterions.attention(student.stages, teacher.stages, self.pairs)

    def _striplet(self, teacher: Features, student: Features) -> Tensor:
        r = self.triplets
        layers = {
            "global": [student.embed],
            "logits": [student.logits],
            "features": relation.triplet_layers(student, r),
        }[r.striplet_feature]
        space = teacher.embed if r.sampling_space == "embedding" else student.logits
        labels = teacher.logits.argmax(1)
        return relation.relation_loss(
            layers,
            labels,
            space.detach(),
            r.margin,
            r.striplet_sampling,
            relation.SEPARATE,
            dim=r.sampling_dim,
            cap=r.sampling_cap,
        )

    def metrics(self) -> dict[str, float]:
        rate = self.cache.hit_rate() if self.cache else None
        return {} if rate is None else {"view_cache/hit_rate": rate}

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), **self.modules}
