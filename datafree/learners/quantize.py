"""Training of a quantised network: it matches the network that it is made of, on synthetic images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datafree import criterions
from datafree.augment import CropFlip
from datafree.errors import InputError
from datafree.features import Features
from datafree.learners.transfer import TransferLearner
from datafree.network import Network
from datafree.pool import Batch
from datafree.quantizer import QuantizedModel
from datafree.terms import Term, weighted_sum


class QuantizeLearner(TransferLearner):
    """L_Q = kd * KL_T T^2 + ce * CE(Q(x), y) + feature * mse(f_Q, f_P) + striplet * L_tri.

    The first two are GDFQ's (Xu et al., ECCV 2020), where the divergence is averaged over the classes, too, so that
    its weight is 1 / classes here; L_tri is RGAL's. The two embeddings have the same width and need no projection.
    Before, ranges are observed on batches of the source: see :meth:`end_warmup_epoch`.

    config: its sections finetune, quantizer, relation, optim and run are read.
    """

    def __init__(self, student: Network, teacher: Network, augment: CropFlip, config: Any, total_steps: int):
        self.settings, self.batches = config.finetune, config.quantizer.calibration
        super().__init__(student, teacher, augment, config, total_steps)
        if not self.terms and total_steps:
            raise InputError("the quantised network has no loss; give --kd, --ce, --feature or --striplet a weight")

    def all_terms(self) -> list[Term]:
        s, logits, embed = self.settings, ("logits",), ("embed",)
        kd = 1 / self.teacher.num_classes if s.kd is None else s.kd
        return [
            Term("kd", kd, self._kd, logits, logits),
            Term("ce", s.ce, lambda teacher, student, targets: F.cross_entropy(student.logits, targets), (), logits),
            Term("feature", s.feature, lambda p, q, targets: F.mse_loss(q.embed, p.embed), embed, embed),
            self.separating_term(),
        ]

    @torch.no_grad()
    def end_warmup_epoch(self, draw: Callable[[], Batch]) -> None:
        """Observe the ranges anew, on batches that ``draw`` returns; the last ones are kept.

        The extremes of a part are not those of its batch, so that each batch is computed at once.
        """
        assert isinstance(self.network.model, QuantizedModel)
        self.network.eval()
        with self.network.model.observing(), self.network.whole_batches():
            for _ in range(self.batches):
                self.network(self.augment(draw().images))

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        views, teacher = self.views(batch)
        targets = teacher.logits.argmax(1) if batch.targets is None else batch.targets
        return weighted_sum(self.terms, teacher, self.student_features(views, self.terms), targets)

    def _kd(self, teacher: Features, student: Features, targets: Tensor) -> Tensor:
        return criterions.distillation(student.logits, teacher.logits, self.settings.T)
