"""Muon for convolutional networks: filters step along their orthogonalised momentum (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon)."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

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
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            filters = [parameter for parameter in given if parameter in self.filters]
            others = [parameter for parameter in given if parameter not in self.filters]
            for step, parameters in ((_step_filters, filters), (_step_others, others)):
                if parameters:
                    step(parameters, list(map(self._momentum, parameters)), group)
        return loss

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


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


def _step_others(parameters: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
    options = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
    sgd(parameters, _gradients(parameters), [*momenta], dampening=0, maximize=False, **options)


def _step_filters(filters: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
    gradients = _gradients(filters)
    torch._foreach_mul_(momenta, group["momentum"])
    torch._foreach_add_(momenta, gradients)
    alike = defaultdict(list)  # filters of the same shape are stepped in one go, which saves kernels on a GPU
    for weight, along in zip(filters, torch._foreach_add(gradients, momenta, alpha=group["momentum"])):
        alike[weight.shape].append((weight, along))
    for shape, pairs in alike.items():
        several = [weight for weight, _ in pairs]
        weights, steps = (torch.stack(each).flatten(2) for each in zip(*pairs))
        norms = _norms(weights)
        weights -= orthogonalised(steps) * (group["lr"] / min(weights.shape[1:]) ** 0.5 * norms)
        weights *= norms / _norms(weights)
        torch._foreach_copy_(several, list(weights.view(-1, *shape).unbind()))


def _norms(matrices: Tensor) -> Tensor:
    # One operation, as bmm below is; matrix_norm and @ take several, each of which a GPU's host would have to launch.
    return torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def orthogonalised(matrices: Tensor) -> Tensor:
    """The matrices (n, A, B) with singular values near 1 in place of their own, and 0 for 0."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / _norms(x).clamp_min(SMALLEST)
    for _ in range(ITERATIONS):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
