"""Muon for convolutional networks: filters step along their orthogonalised momentum (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: brings singular values near 1 in five iterations
ITERATIONS = 5
SMALLEST = 1e-7  # norm of a momentum that is normalised: below it, steps fade as the momentum does


class Muon(torch.optim.Optimizer):
    """Muon for the filters of convolutions (see :func:`filters_of`), and SGD for all other parameters of ``module``.

    The filters of a layer, (out, in / groups, *kernel), are a matrix of ``out`` rows. A step changes it by about
    ``filter_lr`` times its norm, less where the momentum has a low rank, and the norm stays: behind a normalisation
    nothing depends on it, and steps would lose their effect as it grows. So no weight decay acts on filters.
    torch.optim.Muon takes matrices alone, and leaves their norm free.

    lr, weight_decay, nesterov: of the other parameters. The filters' momentum is always Nesterov's.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        filter_lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        self.filters = filters_of(module)
        others = [parameter for parameter in module.parameters() if parameter not in self.filters]
        groups = [{"params": others, "lr": lr}, {"params": list(self.filters), "lr": filter_lr}]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step along the gradients -> what ``closure`` returns, which computes them if it is given."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step = _step_filters if parameter in self.filters else _step_others
                    step(parameter, parameter.grad, self.state[parameter], group)
        return loss


def filters_of(module: nn.Module) -> dict[Tensor, None]:
    """The weights of its convolutions in their order, as the keys of a dict.

    Without those of one value per filter, those that are all 0, whose norm may not stay, and those that are computed
    of other parameters, as by weight_norm.
    """
    found: dict[Tensor, None] = {}
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            weight = layer.weight
            if isinstance(weight, nn.Parameter) and weight[0].numel() > 1 and weight.detach().any():
                found[weight] = None
    return found


def _step_others(p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    gradient = gradient.add(p, alpha=group["weight_decay"])
    buffer = _momentum(p, gradient, state, group["momentum"])
    p.add_(gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer, alpha=-group["lr"])


def _step_filters(p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    norm = p.norm()
    along = gradient.add(_momentum(p, gradient, state, group["momentum"]), alpha=group["momentum"]).flatten(1)
    along = orthogonalised(along) * (group["lr"] * norm / min(along.shape) ** 0.5)
    p.sub_(along.view(p.shape))
    p.mul_(norm / p.norm())


def _momentum(p: Tensor, gradient: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(p)
    return state["momentum_buffer"].mul_(momentum).add_(gradient)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix (A, B) with singular values near 1 in place of its own, and 0 for 0."""
    a, b, c = QUINTIC
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(SMALLEST)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x
