"""The loss under which images are synthesised: a weighted sum of terms, of which those of weight 0 are not computed."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from datafree import criterions, relation, shares
from datafree.batchnorm import BatchNormTap, LayerStatistics
from datafree.config import Relation, Synthesis
from datafree.errors import InputError
from datafree.features import Features
from datafree.micro_batch import in_parts
from datafree.runtime import autocast
from datafree.synthesis.contrast import InstanceContrast
from datafree.terms import Term, fields_read, weighted, weighted_sum
from datafree.trial import trial_images, unchanged
from datafree.update import load_part

if TYPE_CHECKING:
    from datafree.network import Network

ADAM_BETAS = (0.5, 0.999)
TRIPLET = "triplet"  # the name of RGAL's term
DIRECTIONS = {"paper": relation.CONFUSE, "release": relation.SEPARATE}


class Synthesised(NamedTuple):
    """A batch of synthesised images (N, C, H, W) in [0, 1] and their target classes (N,)."""

    images: Tensor
    targets: Tensor


class SynthesisObjective:
    """L_syn = sum of weight * term over the terms of nonzero weight (RGAL, phase 1).

    by_gradient: whether the weight of the triplets follows from gradients (``triplet_unit``).
    settings, triplets: the sections synthesis and relation of the configuration.
    A term of weight 0 is not computed, and the student is run only if a term reads its features.
    """

    def __init__(self, settings: Synthesis, triplets: Relation, teacher: "Network", student: "Network"):
        self.settings, self.triplets, self.teacher, self.student = settings, triplets, teacher, student
        self.bn_tap = BatchNormTap(teacher)
        self.statistics: list[LayerStatistics] = []  # of the latest batch
        self.bn_average: list[tuple[Tensor, Tensor]] = []  # (mean, variance) of each layer, over the rounds so far
        self.contrast: InstanceContrast | None = None
        self.optimizers: list[torch.optim.Optimizer] = []  # of what the objective itself learns
        self.terms = weighted(self.all_terms())
        self.by_gradient = triplets.triplet_unit == "gradient" and any(term.name == TRIPLET for term in self.terms)
        names = {term.name for term in self.active()}
        for network, reads in ((teacher, "teacher"), (student, "student")):
            if any(getattr(term, reads) for term in self.terms) and network.trial.gradient:
                raise InputError(
                    f"images cannot be synthesised with the {network.name}: {network.trial.gradient}; use a network "
                    "without torch.no_grad(), quantisation or argmax in its forward pass"
                )
        if "batch_norm" in fields_read(self.terms, "teacher"):
            self._require_statistics()
        if "cr" in names:
            self.contrast = InstanceContrast(teacher, settings.cr_T).to(teacher.device)
            self.optimizers = [torch.optim.Adam(self.contrast.head.parameters(), settings.lr_g)]

    def _require_statistics(self) -> None:
        """Try the tap on the teacher's BatchNorm statistics; InputError if there are none that have a gradient."""
        teacher = self.teacher
        if not self.bn_tap.layers:
            raise InputError(
                f"the {teacher.name} has no BatchNorm statistics to match; set --bn 0 "
                "(and rely on --oh, --adv, --tv, --l2 instead)"
            )
        images = teacher.normalise(trial_images(teacher.shape, 2, teacher.device))
        with unchanged(teacher), teacher.frozen():
            self.bn_tap.try_on(lambda images: teacher.tap(images).logits, images, teacher.name)

    def all_terms(self) -> list[Term]:
        """Every term: its weight, its function of (teacher, student, batch), and the fields that it reads of both."""
        s, logits = self.settings, ("logits",)
        return [
            Term("bn", s.bn, self._bn, teacher=("batch_norm",)),
            Term("oh", s.oh, self._oh, teacher=logits),
            Term("adv", s.adv, self._adv, teacher=logits, student=logits),
            Term("act", s.act, lambda teacher, *_: criterions.activation(teacher.embed), teacher=("embed",)),
            Term("balance", s.balance, lambda teacher, *_: criterions.balance(teacher.logits), teacher=logits),
            Term("cr", s.cr, self._cr, teacher=("embed", "pooled")),
            Term("tv", s.tv, lambda *given: criterions.total_variation(given[2].images)),
            Term("l2", s.l2, lambda *given: criterions.l2_norm(given[2].images)),
            self._triplet_term(),
        ]

    def __call__(
        self, images: Tensor, views: Tensor, targets: Tensor, with_student: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and unweighted terms of a batch.

        images, views: (N, C, H, W) in [0, 1]; targets: target classes (N,).
        with_student: whether terms that use the student take part.
        """
        terms = self.active(with_student)
        of_teacher, of_student = (fields_read(terms, network) for network in ("teacher", "student"))
        with_statistics = "batch_norm" in of_teacher
        teacher = in_parts(
            self._teacher_with_statistics if with_statistics else self.teacher.features,
            views,
            self.teacher.micro_batch,
            self.teacher,
            with_maps="stages" in of_teacher,
        )
        if with_statistics:
            self.statistics = teacher.batch_norm
        student = self.student.features(views, with_maps="stages" in of_student) if of_student else Features()
        batch = Synthesised(images, targets)
        if self.by_gradient and any(term.name == TRIPLET for term in terms):
            return self._in_units_of_gradient(terms, teacher, student, batch)
        return weighted_sum(terms, teacher, student, batch)

    def _in_units_of_gradient(
        self, terms: list[Term], teacher: Features, student: Features, batch: Synthesised
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the terms without the triplets, whose gradient has theirs in it, and the terms.

        With respect to the images it has ``triplet`` times the norm of all others' together. Both are computed here.
        So the triplets' weight changes with each step, and losses of several steps are comparable without them alone;
        what it is in units of the loss is returned beside the terms.
        """
        others, [triplet] = [term for term in terms if term.name != TRIPLET], [t for t in terms if t.name == TRIPLET]
        loss, values = weighted_sum(others, teacher, student, batch)
        spread = triplet.compute(teacher.only(triplet.teacher), student.only(triplet.student), batch)
        trained = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        with autocast(batch.images.device, "none"):  # as in any backward pass
            by_others, *by_trained = torch.autograd.grad(loss, [batch.images, *trained], retain_graph=True)
            [by_triplet] = torch.autograd.grad(spread, [batch.images])
            both = torch.stack([by_others, by_triplet]).float()
            norm, unit = shares.averaged(both).flatten(1).norm(dim=1)
            smallest = torch.finfo(unit.dtype).tiny
            weight = torch.where(unit > smallest, triplet.weight * norm / unit.clamp_min(smallest), 0)
            linear = (batch.images.float() * (both[0] + weight * both[1])).sum()
            linear = linear + sum((x * g).sum() for x, g in zip(trained, by_trained))
        values = {**values, TRIPLET: spread, f"{TRIPLET}_weight": weight}
        return loss.detach() + (linear - linear.detach()), values

    def _teacher_with_statistics(self, views: Tensor) -> Features:
        """The teacher's Features of views (N, C, H, W), which are computed at once, with its BatchNorm statistics."""
        with self.bn_tap:
            features = self.teacher.features(views)
        return features.with_batch_norm(shares.whole_statistics(self.bn_tap.statistics, len(views)))

    def active(self, with_student: bool = True) -> list[Term]:
        """The terms to compute; InputError if there is none."""
        terms = [term for term in self.terms if with_student or not term.student]
        if not terms:
            raise InputError(
                "no synthesis term has a weight"
                + ("" if with_student else " during --warmup")
                + "; give one, such as --bn 1 and --oh 1"
            )
        if self.by_gradient and [term.name for term in terms] == [TRIPLET]:
            raise InputError(
                "--triplet_unit gradient weighs the triplets by the other terms, of which none has a weight"
                + ("" if with_student else " during --warmup")
                + "; give one, such as --bn 1 and --oh 1, or --triplet_unit loss"
            )
        return terms

    @torch.no_grad()
    def end_round(self, images: Tensor) -> None:
        """Remember a round: its images (N, C, H, W) for the contrast, its last statistics for the moving average."""
        if self.contrast:
            self.contrast.remember(images)
        if self.settings.bn_momentum:
            averaged = self._averaged(self.statistics)
            self.bn_average = [(layer.mean.clone(), layer.variance.clone()) for layer in averaged]

    def _averaged(self, statistics: list[LayerStatistics]) -> list[LayerStatistics]:
        """The batch statistics of each layer, averaged with those of earlier rounds if ``bn_momentum`` is set."""
        if not self.bn_average:
            return statistics
        share = 1 - self.settings.bn_momentum
        return [
            layer._replace(mean=mean.lerp(layer.mean, share), variance=variance.lerp(layer.variance, share))
            for (mean, variance), layer in zip(self.bn_average, statistics)
        ]

    def _bn(self, teacher: Features, student: Features, batch: Synthesised) -> Tensor:
        return criterions.bn_distance(self._averaged(teacher.batch_norm), self.settings.bn_reduction)

    def _oh(self, teacher: Features, student: Features, batch: Synthesised) -> Tensor:
        s = self.settings
        targets = teacher.logits.argmax(1) if s.oh_target == "predicted" else batch.targets
        return criterions.one_hot(teacher.logits, targets, s.oh_T)

    def _adv(self, teacher: Features, student: Features, batch: Synthesised) -> Tensor:
        s = self.settings
        return criterions.adversarial(student.logits, teacher.logits, s.adv_distance, s.adv_T, s.adv_where)

    def _cr(self, teacher: Features, student: Features, batch: Synthesised) -> Tensor:
        assert self.contrast is not None  # made with the weight of this term
        return self.contrast(batch.images, teacher)

    def _triplet_term(self) -> Term:
        """RGAL's triplet loss on the features of teacher or student, with labels and distances of the teacher."""
        r = self.triplets
        of_teacher, space = r.triplet_target == "teacher", relation.SPACES[r.sampling_space]

        def triplet(teacher: Features, student: Features, batch: Synthesised) -> Tensor:
            layers = relation.triplet_layers(teacher if of_teacher else student, r)
            labels, negatives_from = teacher.logits.argmax(1), getattr(teacher, space).detach()
            return relation.relation_loss(
                layers,
                labels,
                negatives_from,
                r.margin,
                r.sampling,
                DIRECTIONS[r.relation],
                dim=r.sampling_dim,
                cap=r.sampling_cap,
            )

        scored = ("embed", "pooled")
        weight = 0.0 if r.relation == "off" else r.triplet
        if of_teacher:
            return Term(TRIPLET, weight, triplet, teacher=("logits", *scored))
        return Term(TRIPLET, weight, triplet, teacher=("logits", space), student=scored)

    def state_dict(self) -> dict[str, Any]:
        contrast = {"contrast": self.contrast.state_dict()} if self.contrast else {}
        return {
            **contrast,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "bn_average": list(self.bn_average),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.contrast:
            self.contrast.load_state_dict(state["contrast"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_part(optimizer, saved)
        device = self.teacher.device
        if not all(mean.dim() == 1 and mean.shape == variance.shape for mean, variance in state["bn_average"]):
            raise ValueError("its averaged statistics are damaged")
        self.bn_average = [(mean.to(device), variance.to(device)) for mean, variance in state["bn_average"]]
