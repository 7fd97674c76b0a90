"""The interface between engine and learner: steps, and a state to resume from."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from datafree.config import Optim, Sgd
from datafree.errors import InputError
from datafree.muon import Muon
from datafree.network import Network
from datafree.pool import Batch
from datafree.update import Update, are_terms, detached, is_scalar, load_part

if TYPE_CHECKING:
    from datafree.view_cache import ViewCache


class Learner:
    """A network with its optimiser and learning rate schedule, and anything else that its loss trains.

    A user-defined learner overrides :meth:`loss`, and :meth:`prepare` if it does not train in training mode.

    network: what is trained. schedule: steps once after each update.
    cached_fields: the fields of the teacher's Features that a :class:`datafree.view_cache.ViewCache` would have to keep
    for the loss; none if it has no use for one. cache: that cache, if there is one.
    reads_distill_options: whether it reads the options of distillation, such as --T and --striplet, which are refused
    as unused otherwise; a subclass of DistillLearner does.
    """

    reads_distill_options: ClassVar[bool] = False

    cached_fields: tuple[str, ...] = ()
    cache: "ViewCache | None" = None

    def __init__(
        self, network: Network, optimizer: torch.optim.Optimizer, schedule: LRScheduler, precision: str = "none"
    ):
        self.network, self.optimizer, self.schedule = network, optimizer, schedule
        self.update = Update(network, precision)

    def prepare(self) -> None:
        """Put the network into the mode in which it is trained; called before each step."""
        self.network.train()

    def end_warmup_epoch(self, draw: Callable[[], Batch]) -> None:
        """Called after each epoch of the warm-up, in which nothing was trained; draw: () -> a batch of images."""

    @property
    def acts_in_warmup(self) -> bool:
        """Whether :meth:`end_warmup_epoch` does anything."""
        return type(self).end_warmup_epoch is not Learner.end_warmup_epoch

    def loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss of a batch, and its unweighted terms, name -> scalar tensor.

        progress: position in the run, in [0, 1).
        """
        raise InputError(f"{type(self).__name__} has no method loss(batch, progress), which returns loss and terms")

    def step(self, batch: Batch, progress: float = 0.0) -> dict[str, Tensor]:
        """One update of the network -> detached terms, name -> scalar tensor."""
        self.prepare()
        _, terms = self.update(lambda: self._checked_loss(batch, progress), [self.optimizer])
        self.schedule.step()
        return detached(terms)

    def _checked_loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.loss(batch, progress)
        if not isinstance(found, tuple) or len(found) != 2 or not is_scalar(found[0]) or not are_terms(found[1]):
            raise InputError(
                f"{type(self).__name__}.loss returned {type(found).__name__}; it must return (loss, terms): a scalar "
                "tensor, and a dict of name -> scalar tensor"
            )
        return found

    def metrics(self) -> dict[str, float]:
        """Further numbers to log about the steps since the last call, by name."""
        return {}

    def remarks(self) -> list[str]:
        """Sentences for the log about the steps since the last call, on what a resumed run need not repeat."""
        return []

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def follow(self, total_steps: int) -> None:
        """Take over that the run has ``total_steps`` student steps now, over which the learning rate falls to 0.

        A learner with another schedule than a :func:`cosine_to_zero` overrides this. Raises InputError if it does not.
        """
        if not isinstance(self.schedule, LambdaLR) or not all(map(_is_cosine, self.schedule.lr_lambdas)):
            raise InputError(
                f"the learning rate of {type(self).__name__} does not follow cosine_to_zero, so that --budget cannot "
                "give it another length; use that, define follow(total_steps), or give --epochs in place of --budget"
            )
        self.schedule.lr_lambdas = [partial(half_cosine, total_steps)] * len(self.schedule.lr_lambdas)
        self._set_rates()

    def _set_rates(self) -> None:
        """Give the optimiser the learning rates of its schedule as that is now."""
        assert isinstance(self.schedule, LambdaLR)
        for group, rate, factor in zip(self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas):
            group["lr"] = rate * factor(self.schedule.last_epoch)

    def parts(self) -> dict[str, Any]:
        """Everything with a state, name -> object with state_dict and load_state_dict."""
        return {
            "student": self.network.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.update.scaler,
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            load_part(part, state[name])
        if isinstance(self.schedule, LambdaLR):  # a resumed run may be longer than it was, and its cosine with it
            self._set_rates()


def make_optimizer(modules: Iterable[nn.Module], optim: Sgd) -> torch.optim.Optimizer:
    """The optimiser of the section optim for all parameters of ``modules``; it clips the gradient, if it is to, just
    before a step."""
    every = nn.ModuleList(modules)
    trained = list(every.parameters())
    nesterov = optim.nesterov and optim.momentum > 0  # without momentum there is nothing to look ahead along
    common: dict[str, Any] = {"momentum": optim.momentum, "weight_decay": optim.weight_decay, "nesterov": nesterov}
    optimizer: torch.optim.Optimizer
    if isinstance(optim, Optim) and optim.optimizer == "muon":
        optimizer = Muon(every, optim.lr, optim.filter_lr, **common)
    else:
        optimizer = torch.optim.SGD(trained, optim.lr, **common)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(trained, optim.clip_grad)

    if optim.clip_grad:
        optimizer.register_step_pre_hook(clip)
    return optimizer


def cosine_to_zero(optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """A learning rate that falls along half a cosine to 0 over the steps of the whole run; in closed form."""
    return LambdaLR(optimizer, partial(half_cosine, total_steps))


def half_cosine(total_steps: int, step: int) -> float:
    """The factor of the learning rate at a step: from 1 to 0, and 0 after ``total_steps``."""
    return (1 + math.cos(math.pi * min(step / max(total_steps, 1), 1))) / 2


def _is_cosine(factor: Any) -> bool:
    return isinstance(factor, partial) and factor.func is half_cosine
