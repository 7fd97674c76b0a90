"""The loss that images are synthesised under: a weighted sum of terms, each computed only if it is wanted."""

from contextlib import nullcontext

import torch

from datafree import criterions, relation
from datafree.errors import InputError
from datafree.hooks import BatchNormTap
from datafree.synthesis.contrast import InstanceContrast

ADAM_BETAS = (0.5, 0.999)
TERMS = ("bn", "oh", "adv", "act", "balance", "cr", "tv", "l2")
DIRECTIONS = {"paper": relation.CONFUSE, "release": relation.SEPARATE}


class SynthesisObjective:
    """L_syn = sum of weight * term over the terms of nonzero weight (RGAL, phase 1).

    ``settings`` and ``triplets`` are the Synthesis and Relation sections of the configuration.
    A weight of 0 costs neither the term nor the forward pass that it alone would need.
    """

    def __init__(self, settings, triplets, teacher, student):
        self.settings, self.triplets, self.teacher, self.student = settings, triplets, teacher, student
        self.weights = {name: getattr(settings, name) for name in TERMS}
        self.weights["triplet"] = 0.0 if triplets.relation == "off" else triplets.triplet
        self.scored = teacher if triplets.triplet_target == "teacher" else student  # by the triplets
        self.wanted()
        self.bn_tap = BatchNormTap(teacher)
        if self.weights["bn"] and not self.bn_tap.layers:
            raise InputError(
                f"the {teacher.name} has no BatchNorm statistics to match; set --bn 0 "
                "(and lean on --oh, --adv, --tv, --l2 instead)"
            )
        self.bn_average = []  # (mean, variance) of each layer, over the rounds so far
        self.contrast, self.optimizers = None, []  # what the objective itself learns, and how
        if self.weights["cr"]:
            self.contrast = InstanceContrast(teacher, settings.cr_T).to(teacher.mean.device)
            self.optimizers = [torch.optim.Adam(self.contrast.head.parameters(), settings.lr_g)]

    def __call__(self, images, views, targets, with_student=True):
        """Loss and unweighted terms of a batch.

        images, views: (N, C, H, W) in [0, 1]; targets: (N,), the classes asked for.
        with_student: whether terms that look at the student take part.
        """
        wanted = self.wanted(with_student)
        with self.bn_tap if "bn" in wanted else nullcontext():
            teacher = self.teacher.features(views)
        looks_at_student = "adv" in wanted or ("triplet" in wanted and self.scored is self.student)
        student = self.student.features(views) if looks_at_student else None
        terms = {
            name: getattr(self, f"_{name}")(images, teacher, student, targets)
            for name in self.weights
            if name in wanted
        }
        return sum(self.weights[name] * term for name, term in terms.items()), terms

    def wanted(self, with_student=True):
        """Names of the terms to compute; InputError where there is none."""
        wanted = {name for name, weight in self.weights.items() if weight}
        if not with_student:
            wanted -= {"adv"} | ({"triplet"} if self.scored is self.student else set())
        if not wanted:
            raise InputError(
                "no synthesis term has a weight"
                + ("" if with_student else " during --warmup")
                + "; give one, such as --bn 1 and --oh 1"
            )
        return wanted

    @torch.no_grad()
    def end_round(self, images):
        """Remember a round: its images (N, C, H, W) for the contrast, its last statistics for the running average."""
        if self.contrast:
            self.contrast.remember(images)
        if self.settings.bn_momentum:
            self.bn_average = [(mean.clone(), var.clone()) for mean, var, *_ in self._bn_statistics()]

    def _bn_statistics(self):
        """The batch's statistics per layer, as moved by ``bn_momentum`` from those of the rounds before."""
        if not self.bn_average:
            return self.bn_tap.statistics
        share = 1 - self.settings.bn_momentum
        return [
            (old_mean.lerp(mean, share), old_var.lerp(var, share), *running)
            for (old_mean, old_var), (mean, var, *running) in zip(self.bn_average, self.bn_tap.statistics)
        ]

    def _bn(self, images, teacher, student, targets):
        return criterions.bn_distance(self._bn_statistics(), self.settings.bn_reduction)

    def _oh(self, images, teacher, student, targets):
        asked = self.settings.oh_target == "asked"
        return criterions.one_hot(teacher.logits, targets if asked else teacher.logits.argmax(1))

    def _adv(self, images, teacher, student, targets):
        settings = self.settings
        return criterions.adversarial(
            student.logits, teacher.logits, settings.adv_distance, settings.adv_T, settings.adv_where
        )

    def _act(self, images, teacher, student, targets):
        return criterions.activation(teacher.embed)

    def _balance(self, images, teacher, student, targets):
        return criterions.balance(teacher.logits)

    def _tv(self, images, teacher, student, targets):
        return criterions.total_variation(images)

    def _l2(self, images, teacher, student, targets):
        return criterions.l2_norm(images)

    def _cr(self, images, teacher, student, targets):
        return self.contrast(images, teacher)

    def _triplet(self, images, teacher, student, targets):
        scored = student if self.scored is self.student else teacher
        space = teacher.embed if self.triplets.sampling_space == "embedding" else teacher.logits
        return relation.relation_loss(
            relation.triplet_layers(scored, self.triplets),
            teacher.logits.argmax(1),
            space.detach(),
            self.triplets.margin,
            self.triplets.sampling,
            DIRECTIONS[self.triplets.relation],
        )

    def state_dict(self):
        contrast = {"contrast": self.contrast.state_dict()} if self.contrast else {}
        return {
            **contrast,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "bn_average": list(self.bn_average),
        }

    def load_state_dict(self, state):
        if self.contrast:
            self.contrast.load_state_dict(state["contrast"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        device = self.teacher.mean.device
        self.bn_average = [tuple(part.to(device) for part in layer) for layer in state["bn_average"]]
