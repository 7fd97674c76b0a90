"""What learners share that compare a student with its teacher: views, terms, and RGAL's triplets between them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datafree import relation
from datafree.augment import CropFlip, shift_flip
from datafree.features import Features
from datafree.learners.base import Learner, cosine_to_zero, make_optimizer
from datafree.network import Network
from datafree.pool import Batch
from datafree.terms import Term, fields_read, weighted

CACHEABLE = ("logits", "embed", "pooled")  # fields of Features that a view cache can keep


class TransferLearner(Learner):
    """A student that is trained on a weighted sum of terms of its own Features and its teacher's.

    A subclass states the terms by :meth:`all_terms`, and by :meth:`trained_modules` what they train beside the student.

    config: its sections relation, optim and run are read here. total_steps: student steps of the whole run.
    """

    def __init__(self, student: Network, teacher: Network, augment: CropFlip, config: Any, total_steps: int):
        self.network, self.teacher, self.augment = student, teacher, augment
        self.config, self.triplets = config, config.relation
        self.modules = {name: module.to(student.device) for name, module in self.trained_modules().items()}
        self.terms = weighted(self.all_terms())
        optimizer = make_optimizer([student, *self.modules.values()], config.optim)
        super().__init__(student, optimizer, cosine_to_zero(optimizer, total_steps), config.run.precision)

    def trained_modules(self) -> dict[str, nn.Module]:
        """What is trained and saved beside the student, by name."""
        return {}

    def all_terms(self) -> list[Term]:
        """Every term: its weight, its function of (teacher, student), and the fields that it reads of both."""
        return [self.separating_term()]

    def separating_term(self, until: float = 1.0) -> Term:
        """RGAL's triplet loss of the student; until: see :class:`datafree.terms.Term`."""
        r = self.triplets
        space = ("embed",) if r.sampling_space == "embedding" else ()
        return Term("striplet", r.striplet, self._striplet, ("logits", *space), ("embed", "logits", "pooled"), until)

    @property
    def cached_fields(self) -> tuple[str, ...]:  # type: ignore[override]
        """None for terms that read whole maps."""
        fields = fields_read(self.terms, "teacher")
        return fields if set(fields) <= set(CACHEABLE) else ()

    @torch.no_grad()
    def views(self, batch: Batch, times: int = 1) -> tuple[Tensor, Features]:
        """``times`` augmented views of each image, and the teacher's Features of them."""
        images = batch.images
        shift, flip = self.augment.draw(times * len(images), images.device)
        views = shift_flip(images, shift, flip)
        if self.cache is None or batch.ids is None:
            return views, self.teacher_features(views)
        keys = batch.ids.repeat(times) * self.augment.count + self.augment.number(shift, flip)
        return views, self.cache.features(views, keys)

    def teacher_features(self, views: Tensor) -> Features:
        """The teacher's Features of views (N, C, H, W), with whole maps if a term reads them."""
        return self.teacher.features(views, with_maps="stages" in fields_read(self.terms, "teacher"))

    def student_features(self, views: Tensor, terms: Sequence[Term]) -> Features:
        """The student's Features of views (N, C, H, W), with whole maps if one of the ``terms`` reads them."""
        return self.network.features(views, with_maps="stages" in fields_read(terms, "student"))

    def _striplet(self, teacher: Features, student: Features, *more: Any) -> Tensor:
        return self._separate(self._triplet_layers(student), teacher.logits.argmax(1), self._space(teacher, student))

    def _space(self, teacher: Features, student: Features) -> Tensor:
        """(N, D), whose distances weight the sampling of negatives."""
        return (teacher.embed if self.triplets.sampling_space == "embedding" else student.logits).detach()

    def _separate(self, layers: Sequence[Tensor], labels: Tensor, space: Tensor) -> Tensor:
        """The triplet loss that pulls each class together. layers: [(N, ...)]; labels: (N,); space: (N, D)."""
        r = self.triplets
        return relation.relation_loss(
            layers,
            labels,
            space,
            r.margin,
            r.striplet_sampling,
            relation.SEPARATE,
            dim=r.sampling_dim,
            cap=r.sampling_cap,
        )

    def _triplet_layers(self, student: Features) -> Sequence[Tensor]:
        kind = self.triplets.striplet_feature
        if kind == "features":
            return relation.triplet_layers(student, self.triplets)
        return [student.embed if kind == "global" else student.logits]

    def remarks(self) -> list[str]:
        """How often the cache was of use. It is no metric, because the cache of a resumed run is empty at first."""
        rate = self.cache.hit_rate() if self.cache else None
        return [] if rate is None else [f"View cache: {100 * rate:.1f} % of the views were cached."]

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), **self.modules}
