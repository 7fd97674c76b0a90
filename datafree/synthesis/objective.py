"""The loss that images are synthesised under: a weighted sum of terms, each computed only if it is wanted."""
from contextlib import nullcontext

from datafree import criterions, relation
from datafree.errors import InputError
from datafree.hooks import BatchNormTap
from datafree.synthesis.contrast import InstanceContrast

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
        self._wanted()
        self.bn_tap = BatchNormTap(teacher)
        if self.weights["bn"] and not self.bn_tap.layers:
            raise InputError(f"the {teacher.name} has no BatchNorm statistics to match; set --bn 0 "
                             "(and lean on --oh, --adv, --tv, --l2 instead)")
        self.contrast = InstanceContrast(teacher, settings.cr_T) if self.weights["cr"] else None

    def to(self, device):
        """Move what the objective itself learns and remembers."""
        if self.contrast:
            self.contrast.to(device)
        return self

    def __call__(self, images, views, targets, with_student=True):
        """Loss and unweighted terms of a batch.

        images, views: (N, C, H, W) in [0, 1]; targets: (N,), the classes asked for.
        with_student: whether terms that look at the student take part.
        """
        wanted = self._wanted(with_student)
        with self.bn_tap if "bn" in wanted else nullcontext():
            teacher = self.teacher.features(views)
        looks_at_student = "adv" in wanted or ("triplet" in wanted and self.scored is self.student)
        student = self.student.features(views) if looks_at_student else None
        terms = {name: getattr(self, f"_{name}")(images, teacher, student, targets)
                 for name in self.weights if name in wanted}
        return sum(self.weights[name] * term for name, term in terms.items()), terms

    def _wanted(self, with_student=True):
        """Names of the terms to compute; InputError where there is none."""
        wanted = {name for name, weight in self.weights.items() if weight}
        if not with_student:
            wanted -= {"adv"} | ({"triplet"} if self.scored is self.student else set())
        if not wanted:
            raise InputError("no synthesis term has a weight" + ("" if with_student else " during --warmup")
                             + "; give one, such as --bn 1 and --oh 1")
        return wanted

    def _bn(self, images, teacher, student, targets):
        return criterions.bn_distance(self.bn_tap.statistics, self.settings.bn_reduction)

    def _oh(self, images, teacher, student, targets):
        return criterions.one_hot(teacher.logits, targets)

    def _adv(self, images, teacher, student, targets):
        return criterions.adversarial(student.logits, teacher.logits)

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
            relation.triplet_layers(scored, self.triplets), teacher.logits.argmax(1), space.detach(),
            self.triplets.margin, self.triplets.sampling, DIRECTIONS[self.triplets.relation])
