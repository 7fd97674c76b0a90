"""Muon for convolutional networks: filters move along their orthogonalised momentum (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: brings singular values near 1 in five iterations
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon for the filters of convolutions, and SGD for all other parameters.

    The filters of a layer, (out, in / groups, *kernel), are a matrix of ``out`` rows. A step moves it by ``filter_lr``
    times its norm, and leaves it the norm that it had at first: behind a BatchNorm nothing depends on that, and steps
    would lose their effect as it grows. So no weight decay acts on filters; all zeros get the norm sqrt(out).
    torch.optim.Muon takes matrices alone, and leaves their norm free.

    lr, weight_decay, nesterov: of the other parameters. The filters' momentum is always Nesterov's.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        filter_lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        every = list(parameters)
        of_kind = {kind: [p for p in every if (p.ndim > 2) == kind] for kind in (False, True)}
        rates = {False: lr, True: filter_lr}
        groups = [{"params": found, "lr": rates[kind], "filters": kind} for kind, found in of_kind.items() if found]
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(groups, {"lr": lr, "filters": False, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients; closure: not supported."""
        for group in self.param_groups:
            step = _step_filters if group["filters"] else _step_others
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step(parameter, parameter.grad, self.state[parameter], **group)


def _step_others(p: Tensor, gradient: Tensor, state: dict[str, Tensor], **group: Any) -> None:
    gradient = gradient.add(p, alpha=group["weight_decay"])
    buffer = _momentum(p, gradient, state, group["momentum"])
    p.add_(gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer, alpha=-group["lr"])


def _step_filters(p: Tensor, gradient: Tensor, state: dict[str, Tensor], **group: Any) -> None:
    if "norm" not in state:
        norm = p.norm()
        state["norm"] = norm.where(norm > 0, torch.full_like(norm, len(p)).sqrt())
    along = gradient.add(_momentum(p, gradient, state, group["momentum"]), alpha=group["momentum"]).flatten(1)
    along = orthogonalised(along) * (group["lr"] * state["norm"] / min(along.shape) ** 0.5)
    p.sub_(along.view(p.shape))
    now = p.norm()
    p.mul_(torch.where(now > 0, state["norm"] / now, now))


def _momentum(p: Tensor, gradient: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(p)
    return state["momentum_buffer"].mul_(momentum).add_(gradient)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix (A, B) with singular values near 1 in place of its own, and 0 for 0."""
    a, b, c = QUINTIC
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x
