"""Phase 2 of RGAL: the student learns the teacher's answers, its stages, and to keep classes apart."""
import torch

from datafree import criterions, relation
from datafree.augment import mixup, shift_flip
from datafree.errors import InputError
from datafree.learners.base import Learner


class DistillLearner(Learner):
    """L_stu = kd * KL_T T^2 + cd_loss * L_cd + gram_loss * L_gram + striplet * L_tri (RGAL, phase 2).

    settings, triplets: the Distill and Relation sections. augment: :class:`datafree.augment.CropFlip`. cache: a
    :class:`datafree.view_cache.ViewCache` of this teacher for images that have numbers, or None.
    """

    def __init__(self, student, teacher, augment, settings, triplets, total_steps, precision="none", cache=None):
        if not settings.kd and (settings.custom_steps < 1 or not any(
                (settings.cd_loss, settings.gram_loss, triplets.striplet))):
            raise InputError("with --kd 0 no student term has a weight in all of the run; give --kd one")
        projects = settings.cd_loss or settings.gram_loss
        self.projection = None
        if projects:
            self.projection = criterions.StageProjection(student.tap, teacher.tap).to(student.mean.device)
        extra = self.projection.parameters() if projects else ()
        super().__init__(student, settings, total_steps, extra, precision)
        if cache is not None and (settings.mixup or settings.gram_loss):
            raise ValueError("a view cache knows neither blended views nor whole maps")
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
        """The terms beside KL act in the first ``custom_steps`` of the run."""
        if progress >= self.settings.custom_steps:
            return {}
        return {"cd_loss": self.settings.cd_loss, "gram_loss": self.settings.gram_loss,
                "striplet": self.triplets.striplet}

    def _kd(self, student, teacher):
        return criterions.distillation(student.logits, teacher.logits, self.settings.T)

    def _cd_loss(self, student, teacher):
        return self.projection.channel(student.stages, teacher.stages)

    def _gram_loss(self, student, teacher):
        return self.projection.gram(student.stages, teacher.stages)

    def _striplet(self, student, teacher):
        layers = {"global": [student.embed], "logits": [student.logits],
                  "features": relation.triplet_layers(student, self.triplets)}[self.triplets.striplet_feature]
        space = teacher.embed if self.triplets.sampling_space == "embedding" else student.logits
        return relation.relation_loss(layers, teacher.logits.argmax(1), space.detach(), self.triplets.margin,
                                      self.triplets.striplet_sampling, relation.SEPARATE)

    def numbers(self):
        rate = self.cache.hit_rate() if self.cache else None
        return {} if rate is None else {"view_cache/hit_rate": rate}

    def parts(self):
        projection = {"projection": self.projection} if self.projection else {}
        return {**super().parts(), **projection}
