"""One optimiser step, as both phases take it."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from datafree.errors import InputError
from datafree.network import Network
from datafree.runtime import autocast

Result = TypeVar("Result")


class Update:
    """Forward pass in the run's precision, backward pass, step; with gradient scaling in fp16.

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
        with autocast(self.network.device, self.precision):
            loss, result = compute()
        if not loss.requires_grad:
            raise InputError("the loss does not depend on anything that is trained; check for detach() and no_grad()")
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        if before_step:
            before_step()
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return loss.detach(), result


def load_part(part: Any, state: Any) -> None:
    """``part.load_state_dict(state)``; ValueError for the state of another optimiser or schedule, whose
    ``load_state_dict`` takes anything and fails in the step after it."""
    before = _form(part)
    part.load_state_dict(state)
    if _form(part) != before:
        raise ValueError(f"its state of {type(part).__name__} is damaged, or of another one")
    if isinstance(part, torch.optim.Optimizer):
        entries = list(part.state.items())
        if len({frozenset(entry) for _, entry in entries}) > 1:
            raise ValueError(f"its state of {type(part).__name__} lacks entries")
        for parameter, entry in entries:
            for name, value in entry.items():
                if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(f"{name} of {type(part).__name__} is of another shape")


def _form(part: Any) -> Any:
    """The names and types of what an optimiser or a schedule keeps, beside its tensors."""
    if isinstance(part, torch.optim.Optimizer):
        return [{name: _kind(value) for name, value in group.items()} for group in part.param_groups]
    if isinstance(part, torch.optim.lr_scheduler.LRScheduler):
        return {name: _kind(value) for name, value in part.state_dict().items()}
    return None


def _kind(value: Any) -> Any:
    """The type of a value; all numbers are of one."""
    return "number" if isinstance(value, (int, float)) else type(value)


def is_scalar(value: Any) -> bool:
    """Whether ``value`` is a tensor of one number."""
    return torch.is_tensor(value) and value.numel() == 1


def are_terms(value: Any) -> bool:
    """Whether ``value`` has the form of a loss's terms, name -> scalar tensor."""
    return isinstance(value, dict) and all(isinstance(name, str) and is_scalar(term) for name, term in value.items())


def detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of a loss for the log, without their graph."""
    return {name: term.detach() for name, term in terms.items()}
