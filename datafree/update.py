"""One optimiser step, as both phases take it."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from datafree import shares
from datafree.errors import InputError
from datafree.muon import Muon
from datafree.network import Network
from datafree.results import is_number
from datafree.runtime import autocast

Result = TypeVar("Result")
OURS = (torch.optim.SGD, torch.optim.Adam, Muon)  # optimisers whose state is tensors alone


class Update:
    """Forward pass in the run's precision, backward pass, step; with gradient scaling in fp16.

    Of several processes each computes its share; the gradients are those of the whole batch.

    network: its device is used, and whether it is compiled.
    """

    def __init__(self, network: Network, precision: str = "none"):
        self.network, self.precision = network, precision
        self.scaler = torch.amp.GradScaler(network.device.type, enabled=precision == "fp16")

    def __call__(
        self,
        compute: Callable[[], tuple[Tensor, Result]],
        optimizers: Sequence[torch.optim.Optimizer],
        before_step: Callable[[], Any] | None = None,
    ) -> tuple[Tensor, Result]:
        """Take one step of ``optimizers`` on the loss of ``compute`` -> its detached loss, and its second result.

        compute: () -> scalar loss and anything else. before_step: called after the backward pass, when gradients are
        unscaled, before the optimisers step.
        """
        if self.network.compile_mode is not None:
            torch.compiler.cudagraph_mark_step_begin()  # outputs of the previous step may be overwritten
        with shares.averaged_gradients():
            with autocast(self.network.device, self.precision):
                loss, result = compute()
            if not loss.requires_grad:
                raise InputError(
                    "the loss does not depend on anything that is trained; check for detach() and no_grad()"
                )
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.scaler.scale(loss).backward()  # which computes the parts of a batch again
        loss = shares.average_gradients(optimizers, loss.detach())
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        if before_step:
            before_step()
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return loss, result


def load_part(part: Any, state: Any) -> None:
    """``part.load_state_dict(state)``; ValueError for a state that an optimiser or a schedule of torch would take and
    then fail in its next step."""
    defaults = dict(getattr(part, "defaults", {}))  # to which an optimiser adds some as it takes a state
    part.load_state_dict(state)
    if isinstance(part, torch.optim.Optimizer):
        _check_optimizer(part, defaults)
    if isinstance(part, torch.optim.lr_scheduler.LRScheduler):
        for name in ("last_epoch", "_step_count"):
            if type(value := getattr(part, name, 0)) is not int or not is_number(value):
                raise ValueError(f"{name} of {type(part).__name__} is {value!r:.40}")


def _check_optimizer(optimizer: torch.optim.Optimizer, defaults: dict[str, Any]) -> None:
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        for name, default in defaults.items():
            if name not in group or not _is_like(group[name], default):
                raise ValueError(f"{name} of {kind} is missing, or of another type")
    entries = list(optimizer.state.items())
    if len({frozenset(entry) for _, entry in entries}) > 1:
        raise ValueError(f"the state of {kind} lacks entries")
    for parameter, entry in entries:
        for name, value in entry.items():
            whole = torch.is_tensor(value) and (value.dim() or name == "momentum_buffer")
            if whole and value.shape != parameter.shape:
                raise ValueError(f"{name} of {kind} is of another shape")
            may_lack = value is None and type(optimizer) is torch.optim.SGD  # its momentum, if that is 0
            if type(optimizer) in OURS and not (may_lack or torch.is_tensor(value)):
                raise ValueError(f"{name} of {kind} is of another type")


def _is_like(value: Any, default: Any) -> bool:
    """Whether an entry of an optimiser's group may stand where ``default`` does."""
    if default is None:
        return value is None or isinstance(value, bool)
    if isinstance(default, (int, float)):
        return isinstance(value, bool) or is_number(value)
    return isinstance(value, type(default))


def is_scalar(value: Any) -> bool:
    """Whether ``value`` is a tensor of one number."""
    return torch.is_tensor(value) and value.numel() == 1


def are_terms(value: Any) -> bool:
    """Whether ``value`` has the form of a loss's terms, name -> scalar tensor."""
    return isinstance(value, dict) and all(isinstance(name, str) and is_scalar(term) for name, term in value.items())


def detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of a loss for the log, without their graph."""
    return {name: term.detach() for name, term in terms.items()}
