"""Phase 2 of RGAL: the student learns the teacher's answers, its stages, and to keep classes apart."""

import torch

from datafree import criterions, relation
from datafree.augment import mixup, shift_flip
from datafree.errors import InputError
from datafree.learners.base import Learner


class DistillLearner(Learner):
    """L_stu = kd * L_kd + cd_loss * L_cd + gram_loss * L_gram + at_loss * L_at + striplet * L_tri.

    RGAL's phase 2 has L_kd = KL_T T^2, L_cd and L_tri; L_at is ZSKT's, and the L1 distance as L_kd is DFAD's.

    settings, triplets: the Distill and Relation sections. augment: :class:`datafree.augment.CropFlip`. cache: a
    :class:`datafree.view_cache.ViewCache` of this teacher for images that have numbers, or None.
    """

    def __init__(self, student, teacher, augment, settings, triplets, total_steps, precision="none", cache=None):
        others = (settings.cd_loss, settings.gram_loss, settings.at_loss, triplets.striplet)
        if not settings.kd and (settings.custom_steps < 1 or not any(others)):
            raise InputError(
                "with --kd 0 the student has no loss"
                + (f" after custom_steps {settings.custom_steps:g} of the run" if any(others) else "")
                + "; give --kd a weight, or --cd_loss, --gram_loss, --at_loss or --striplet one and "
                "--custom_steps 1"
            )
        projects = settings.cd_loss or settings.gram_loss
        self.projection = None
        if projects:
            self.projection = criterions.StageProjection(student.tap, teacher.tap).to(student.mean.device)
        extra = self.projection.parameters() if projects else ()
        super().__init__(student, settings, total_steps, extra, precision)
        if cache is not None and not settings.views_recur:
            raise ValueError("a view cache knows neither blended views nor whole maps")
        if settings.at_loss:
            self.pairs = criterions.pair_stages(student.tap.stage_sizes, teacher.tap.stage_sizes)
        self.teacher, self.augment, self.settings, self.triplets = teacher, augment, settings, triplets
        self.cache = cache

    def loss(self, images, targets, numbers, progress):
        views, teacher = self._show(images, numbers)
        student = self.network.features(views)
        weights = {"kd": self.settings.kd, **self._feature_weights(progress)}
        terms = {name: getattr(self, f"_{name}")(student, teacher) for name, weight in weights.items() if weight}
        return sum(weights[name] * term for name, term in terms.items()), terms

    @torch.no_grad()
    def _show(self, images, numbers):
        """Views of the images, two of each if asked, and the teacher's Features of them."""
        times = 2 if self.settings.pair_sample else 1
        shift, flip = self.augment.draw(times * len(images), images.device)
        views = shift_flip(images, shift, flip)
        if self.settings.mixup:
            views = mixup(views, self.settings.mixup)
        if self.cache is None or numbers is None:
            return views, self.teacher.features(views)
        keys = numbers.repeat(times) * self.augment.count + self.augment.number(shift, flip)
        return views, self.cache.features(views, keys)

    def _feature_weights(self, progress):
        """The terms beside L_kd act in the first ``custom_steps`` of the run."""
        if progress >= self.settings.custom_steps:
            return {}
        return {
            **{name: getattr(self.settings, name) for name in ("cd_loss", "gram_loss", "at_loss")},
            "striplet": self.triplets.striplet,
        }

    def _kd(self, student, teacher):
        if self.settings.kd_distance == "l1":
            return criterions.l1_distance(student.logits, teacher.logits).mean()
        return criterions.distillation(student.logits, teacher.logits, self.settings.T)

    def _cd_loss(self, student, teacher):
        return self.projection.channel(student.stages, teacher.stages)

    def _gram_loss(self, student, teacher):
        return self.projection.gram(student.stages, teacher.stages)

    def _at_loss(self, student, teacher):
        return criterions.attention(student.stages, teacher.stages, self.pairs)

    def _striplet(self, student, teacher):
        layers = {
            "global": [student.embed],
            "logits": [student.logits],
            "features": relation.triplet_layers(student, self.triplets),
        }[self.triplets.striplet_feature]
        space = teacher.embed if self.triplets.sampling_space == "embedding" else student.logits
        return relation.relation_loss(
            layers,
            teacher.logits.argmax(1),
            space.detach(),
            self.triplets.margin,
            self.triplets.striplet_sampling,
            relation.SEPARATE,
        )

    def numbers(self):
        rate = self.cache.hit_rate() if self.cache else None
        return {} if rate is None else {"view_cache/hit_rate": rate}

    def parts(self):
        projection = {"projection": self.projection} if self.projection else {}
        return {**super().parts(), **projection}
