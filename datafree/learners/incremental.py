"""How a network learns the classes of a task beside those that it knows, without the images of these."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree import criterions, relation
from datafree.augment import CropFlip
from datafree.datasets.splits import Split
from datafree.errors import InputError
from datafree.features import Features
from datafree.learners.base import Learner, cosine_to_zero, make_optimizer
from datafree.learners.transfer import TransferLearner
from datafree.network import Network
from datafree.pool import Batch
from datafree.terms import Term, weighted_sum

MAP_WIDTH = 2  # of R-DFCIL's learned maps, as a multiple of the embedding's dimension
HEAD_TERMS = ("hce", "hkd")  # those of the steps in which the head alone is trained


class Labels(NamedTuple):
    """Classes (N,) of a batch whose first ``real`` images are real ones of the new classes, the others synthetic.

    Those of synthetic images are the old network's predictions.
    """

    classes: Tensor
    real: int


class DistilledTask(TransferLearner):
    """LwF (Li and Hoiem 2016): L = lce * L_lce + kd * L_kd, on real images of the new classes alone.

    L_lce is the cross-entropy over the new classes, as if there were no others; L_kd the KL divergence of the old
    classes' logits from the old network's.

    network: its logits are those of all classes so far. teacher: the old network, whose classes are the first ones.
    config: its sections incremental, relation, optim and run are read. total_steps: of the task.
    """

    def __init__(self, network: Network, teacher: Network, augment: CropFlip, config: Any, total_steps: int):
        self.settings, self.old, self.seen = config.incremental, teacher.num_classes, network.num_classes
        super().__init__(network, teacher, augment, config, total_steps)
        if not self.terms:
            raise InputError("the loss of a task has no term; give a weight to one, such as --lce 1")

    def all_terms(self) -> list[Term]:
        s, logits = self.settings, ("logits",)
        return [Term("lce", s.lce, self._lce, (), logits), Term("kd", s.kd, self._kd, logits, logits)]

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.targets is not None
        views, teacher = self.views(batch)
        labels = Labels(batch.targets, len(batch.targets))
        return weighted_sum(self.terms, teacher, self.student_features(views, self.terms), labels)

    def _lce(self, teacher: Features, student: Features, labels: Labels) -> Tensor:
        logits, classes = student.logits[: labels.real, self.old :], labels.classes[: labels.real]
        return F.cross_entropy(logits.float(), classes - self.old)

    def _kd(self, teacher: Features, student: Features, labels: Labels) -> Tensor:
        return criterions.distillation(student.logits[:, : self.old], teacher.logits, self.settings.T)


class ReplayedTask(DistilledTask):
    """The hosts that replay, on real images of the new classes and synthetic ones of the old classes:

    L = lce * L_lce + hce * L_hce + fkd * L_fkd + hkd * L_hkd + rkd * L_rkd + kd * L_kd + striplet * L_tri

    ABD (Smith et al. 2021) has the first three. One cross-entropy for new real and old synthetic images would teach
    real from synthetic; so L_lce is over the new classes alone, and L_hce, over all and balanced, does not reach the
    trunk. L_fkd is the mean square of the difference of both embeddings' logits by the old head. R-DFCIL (Gao et
    al. 2022) has L_lce, L_hkd (L1 of the old logits of synthetic images) and L_rkd (angles among embeddings of real
    images, through learned maps), and at the end L_hce with a frozen trunk. L_tri is RGAL's.

    real: the images of the new classes, of which every step takes some.
    """

    def __init__(
        self, network: Network, teacher: Network, augment: CropFlip, config: Any, total_steps: int, real: Split
    ):
        super().__init__(network, teacher, augment, config, total_steps)
        s, new = self.settings, self.seen - self.old
        self.real, self.total_steps = real, total_steps
        self.head_steps = max(1, round(s.head_share * total_steps)) if s.hce and s.head_share else 0
        if self.head_steps >= total_steps:
            raise InputError(
                f"a task of {total_steps} student steps leaves none before those in which the head alone is trained; "
                "raise --epochs or --ep_steps, or give --head_share 0"
            )
        # As many real images as there are, for as many classes: so every class has the same weight in a batch.
        weights = [self.old / s.replay_batch_size] * self.old + [new / s.batch_size] * new
        self.class_weights = torch.tensor(weights, device=network.device)

    def trained_modules(self) -> dict[str, nn.Module]:
        """The maps of the two networks' embeddings, if that term has a weight."""
        if not self.settings.rkd:
            return {}
        sizes = (self.network.tap.embed_dim, self.teacher.tap.embed_dim)
        return {"maps": nn.ModuleList(nn.Linear(size, MAP_WIDTH * size) for size in sizes)}

    def all_terms(self) -> list[Term]:
        s, logits, embed = self.settings, ("logits",), ("embed",)
        local, kept = scale_factors(s.scale, self.old, self.seen - self.old)
        lce, kd = super().all_terms()
        return [
            lce._replace(weight=local * lce.weight),
            Term("hce", s.hce, self._hce, (), embed),
            Term("fkd", s.fkd, self._fkd, embed, embed),
            Term("hkd", kept * s.hkd, self._hkd, logits, logits),
            Term("rkd", kept * s.rkd, self._rkd, embed, embed),
            kd,
            self.separating_term(),
        ]

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        s, few = self.settings, self.settings.classes_per_batch
        real, classes = self.real.sample(candidates(s.batch_size, self.seen - self.old, few))
        synthetic = batch.images
        if few:
            chosen = of_few_classes(classes, self.seen, few, s.batch_size)
            real, classes = real[chosen], classes[chosen]
            with torch.no_grad():
                predicted = self.teacher(synthetic).argmax(1)
            synthetic = synthetic[of_few_classes(predicted, self.old, few, s.replay_batch_size)]
        views, teacher = self.views(Batch(torch.cat([real, synthetic])))
        labels = Labels(torch.cat([classes, teacher.logits[len(real) :].argmax(1)]), len(real))
        head_alone = self.schedule.last_epoch >= self.total_steps - self.head_steps
        student = self._features_for_head(views) if head_alone else self._features(views, len(real))
        return weighted_sum(self.active(head_alone), teacher, student, labels)

    def active(self, head_alone: bool) -> list[Term]:
        """The terms of a step, by whether it trains the head alone."""
        if not self.head_steps:
            return self.terms
        return [term for term in self.terms if (term.name in HEAD_TERMS if head_alone else term.name != "hce")]

    def _features(self, views: Tensor, real: int) -> Features:
        if self.settings.passes == "together":
            return self.student_features(views, self.terms)
        return Features.joined([self.student_features(part, self.terms) for part in (views[:real], views[real:])])

    @torch.no_grad()
    def _frozen_embed(self, views: Tensor) -> Tensor:
        self.network.eval()
        return self.network.features(views, with_maps=False).embed

    def _features_for_head(self, views: Tensor) -> Features:
        embed = self._frozen_embed(views)
        return Features(self.network.classify(embed), embed)

    def _hce(self, teacher: Features, student: Features, labels: Labels) -> Tensor:
        logits = self.network.classify(student.embed.detach())
        return F.cross_entropy(logits.float(), labels.classes, self.class_weights)

    def _fkd(self, teacher: Features, student: Features, labels: Labels) -> Tensor:
        return F.mse_loss(self.teacher.classify(student.embed).float(), self.teacher.classify(teacher.embed).float())

    def _hkd(self, teacher: Features, student: Features, labels: Labels) -> Tensor:
        synthetic = slice(labels.real, None)
        return criterions.l1_distance(student.logits[synthetic, : self.old], teacher.logits[synthetic]).mean()

    def _rkd(self, teacher: Features, student: Features, labels: Labels) -> Tensor:
        of_student, of_teacher = self.modules["maps"].children()
        real = slice(0, labels.real)
        return criterions.angle_distance(of_student(student.embed[real]), of_teacher(teacher.embed[real]))

    def _striplet(self, teacher: Features, student: Features, *more: Any) -> Tensor:
        """RGAL's triplets: the mean of those of real images and of synthetic ones, or those of all together."""
        labels: Labels = more[0]
        layers, space = self._triplet_layers(student), self._space(teacher, student)
        groups = (
            [slice(None)] if self.settings.separate == "together" else [slice(labels.real), slice(labels.real, None)]
        )
        losses = [self._separate([layer[g] for layer in layers], labels.classes[g], space[g]) for g in groups]
        return torch.stack(losses).mean()

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), "real": self.real}


def scale_factors(scale: str, old: int, new: int) -> tuple[float, float]:
    """Factors of the new classes' cross-entropy and of what keeps the old ones, from the numbers of classes."""
    if scale == "share":
        return new / (old + new), 1.0
    if scale == "adaptive":
        alpha, beta = math.log2(new / 2 + 1), math.sqrt(old / new)
        return (1 + 1 / alpha) / beta, alpha * beta
    return 1.0, 1.0


def candidates(count: int, classes: int, few: int) -> int:
    """How many images to draw so that about ``count`` of them are of ``few`` of the ``classes``; 0 few are all."""
    return count * math.ceil(classes / min(few, classes)) if few else count


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """How many of the labels (N,) each class has, int64 (num_classes,); unlike bincount, without a wait for the GPU."""
    return torch.zeros(num_classes, dtype=torch.long, device=labels.device).index_add_(
        0, labels, torch.ones_like(labels)
    )


def of_few_classes(labels: Tensor, num_classes: int, few: int, count: int) -> Tensor:
    """Indices (count,) into ``labels`` (N,): count // few of each of ``few`` random classes, as far as there are.

    What is missing is made up by others. Fixed shapes, so that nothing waits for the device.
    """
    n, device = len(labels), labels.device
    counts = class_counts(labels, num_classes)
    turn = (torch.rand(num_classes, device=device) + (counts == 0)).argsort().argsort()  # absent classes are last
    shuffled = torch.rand(n, device=device).argsort()
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(n, device=device) - (counts.cumsum(0) - counts)[labels[by_class]]
    wanted = (turn[labels] < few) & (rank < count // min(few, num_classes))
    return torch.where(wanted, 0.0, 1 + torch.rand(n, device=device)).argsort(stable=True)[:count]


class TranslatedTask(Learner):
    """FeTrIL (Petit et al. 2023): the trunk is frozen, and the head learns from features alone.

    Features of an old class are those of images of the new class whose mean is the most similar (cosine), moved by the
    difference of the means. The cross-entropy is over all classes, balanced.

    means: of the embeddings of all classes so far (seen, D), of which ``old`` ones come first.
    """

    def __init__(self, network: Network, means: Tensor, old: int, config: Any, total_steps: int):
        network.classify(means[:1])  # refuses a network without a linear head
        head = network.tap.head
        assert head is not None
        optimizer = make_optimizer([head], config.optim)
        super().__init__(network, optimizer, cosine_to_zero(optimizer, total_steps), config.run.precision)
        self.means, self.old, self.seen = means, old, network.num_classes

    def prepare(self) -> None:
        self.network.eval()

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.targets is not None
        with torch.no_grad():
            embed = self.network.features(batch.images, with_maps=False).embed.float()
            old, moved = self.translated(embed, batch.targets)
        logits = self.network.classify(torch.cat([embed, moved])).float()
        labels = torch.cat([batch.targets, old])
        loss = F.cross_entropy(logits, labels, 1 / class_counts(labels, self.seen).clamp_min(1))
        return loss, {"ce": loss}

    def translated(self, embed: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Old classes (N,), drawn evenly, and as many features (N, D) of theirs, from those of new classes."""
        old = torch.randint(self.old, (len(labels),), device=labels.device)
        directions = F.normalize(self.means, dim=1)
        nearest = self.old + (directions[: self.old] @ directions[self.old :].T).argmax(1)
        fits = (labels[None, :] == nearest[old][:, None]).float() + 1e-3  # another one where the batch has none
        chosen = relation.draw(fits / fits.sum(1, keepdim=True), 1)[:, 0]
        return old, embed[chosen] + self.means[old] - self.means[labels[chosen]]


@torch.no_grad()
def class_means(network: Network, split: Split, batch_size: int) -> Tensor:
    """Mean embeddings (classes, D), fp32, of the classes of ``split``, of images as they are; 0 for one without."""
    network.eval()
    sums = torch.zeros(split.num_classes, network.tap.embed_dim, device=network.device)
    counts = torch.zeros(split.num_classes, device=network.device)
    for images, labels in split.batches(batch_size):
        sums.index_add_(0, labels, network.features(images, with_maps=False).embed.float())
        counts.index_add_(0, labels, torch.ones(len(labels), device=network.device))
    return sums / counts.clamp_min(1)[:, None]
