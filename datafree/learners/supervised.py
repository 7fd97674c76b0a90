"""Plain training on labelled images: how teachers are trained."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from datafree.config import Optim
from datafree.learners.base import Learner, cosine_to_zero, make_optimizer
from datafree.network import Network
from datafree.pool import Batch


class SupervisedLearner(Learner):
    """Cross-entropy with the true labels on augmented images."""

    def __init__(
        self,
        network: Network,
        augment: Callable[[Tensor], Tensor],
        optim: Optim,
        total_steps: int,
        precision: str = "none",
    ):
        optimizer = make_optimizer([network], optim)
        super().__init__(network, optimizer, cosine_to_zero(optimizer, total_steps), precision)
        self.augment = augment

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.targets is not None
        loss = F.cross_entropy(self.network(self.augment(batch.images)).float(), batch.targets)
        return loss, {"ce": loss}
