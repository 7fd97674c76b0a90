"""What the processes of a run divide: in a pass of a network each computes its share of the batch.

The outputs are gathered, so that all that follows (losses, triplets, contrast, pool) sees the whole batch in each
process, as it does in one alone. Statistics that are computed within a pass are those of the whole batch, too: of
BatchNorm in training mode, and of the term L_bn.

Backward passes need no other rule. The collectives here have their exact adjoints, so that together the processes
differentiate the sum of their losses, which are equal; hence the mean over the processes of a parameter's gradients is
the gradient of the loss, wherever the parameter lies: in a network, behind what is gathered (a projection, the head of
the contrast), or before all (latents, pixels). :func:`average_gradients` takes it, in each update. A pass of which
nothing averages the gradients, as in a user-defined source with a backward pass of its own, is not divided.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from datafree import distributed
from datafree.batchnorm import LayerStatistics, channel_statistics, combined, fractions
from datafree.distributed import call

_averaged = False  # whether the gradients of what is computed now are averaged
_divided: int | None = None  # size of the batch that the current pass divides


def sizes(total: int) -> list[int]:
    """How many rows of a batch each process has: contiguous shares, the first ones longer by one if need be."""
    processes = distributed.count()
    return [total // processes + (number < total % processes) for number in range(processes)]


def has_shares(total: int) -> bool:
    """Whether a batch of so many rows is divided; each process has all of one that has fewer rows than there are
    processes."""
    return 1 < distributed.count() <= total


def own_rows(total: int) -> slice:
    """The rows of a batch that this process computes."""
    if not has_shares(total):
        return slice(0, total)
    before, size = sum(sizes(total)[: distributed.rank()]), sizes(total)[distributed.rank()]
    return slice(before, before + size)


def whole(part: Tensor, total: int) -> Tensor:
    """The rows (total, ...) of all processes, of which this one has its ``part``; differentiable."""
    return _Gather.apply(part, total) if has_shares(total) else part


class _Gather(torch.autograd.Function):
    """All rows in all processes; backward, the sum of all processes' gradients of one's own rows.

    (torch.distributed.nn.functional.all_gather is this for equal shares, and is deprecated; what is to replace it is
    not public.)
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, total: int) -> Tensor:
        ctx.total = total
        counts = sizes(total)
        missing = max(counts) - len(part)
        own = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part.contiguous()
        gathered = part.new_empty(max(counts) * len(counts), *part.shape[1:])
        rows = list(gathered.split(max(counts)))
        call(dist.all_gather, rows, own)
        return gathered if len(gathered) == total else torch.cat([r[:count] for r, count in zip(rows, counts)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        call(dist.all_reduce, gradient)
        return gradient[own_rows(ctx.total)], None


def _is_divided(total: int) -> bool:
    return has_shares(total) and (_averaged or not torch.is_grad_enabled())


def divided(compute: Callable[[Tensor], Any], batch: Tensor) -> Any:
    """``compute(batch)`` for a batch (N, ...), of which each process computes its share.

    It gives a tensor (N, ...), or an object whose method ``gathered`` takes a function that makes such tensors, of all
    rows, of those of one's own.
    """
    global _divided
    total = batch.shape[0]  # len() would fix it in a traced pass
    if not _is_divided(total) or _divided is not None:
        return compute(batch)
    _divided = total
    try:
        with distributed.own_random_numbers(), _WholeBatchNorm():
            found = compute(batch[own_rows(total)])
    finally:
        _divided = None
    return whole(found, total) if torch.is_tensor(found) else found.gathered(partial(whole, total=total))


def in_whole_batch(values: int) -> float:
    """How many values a whole batch has where the share of the current pass has so many."""
    return values if _divided is None else values * _divided / sizes(_divided)[distributed.rank()]


# Gradients.


@contextmanager
def averaged_gradients() -> Iterator[None]:
    """Inside, passes are divided that have gradients: :func:`average_gradients` is to follow their backward pass."""
    global _averaged
    before, _averaged = _averaged, True
    try:
        yield
    finally:
        _averaged = before


def average_gradients(optimizers: Iterable[torch.optim.Optimizer], loss: Tensor) -> Tensor:
    """Let the gradients of all parameters of the ``optimizers`` be their means over the processes -> the mean loss.

    That is the loss itself, to the last bit the same in all processes, so that decisions by it are, too. One reduction
    of all gradients; DistributedDataParallel does not fit (docs/scaling.md says why).
    """
    if distributed.count() == 1:
        return loss
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([part.reshape(-1).float() for part in (loss, *gradients)])
    call(dist.all_reduce, flat)
    flat /= distributed.count()
    mean, *parts = flat.split([1, *(gradient.numel() for gradient in gradients)])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view(gradient.shape))
    return mean.view(loss.shape).to(loss.dtype)


def averaged(gradient: Tensor) -> Tensor:
    """The mean over the processes of a gradient with respect to something that each of them has whole."""
    if distributed.count() > 1:
        gradient = (gradient / distributed.count()).contiguous()
        call(dist.all_reduce, gradient)
    return gradient


# Statistics of the whole batch.


def whole_statistics(statistics: Sequence[LayerStatistics], total: int) -> list[LayerStatistics]:
    """Of a pass on a batch of ``total`` images: the statistics of BatchNorm layers in all of it, from this process's.

    In one exchange for all layers; differentiable.
    """
    if not statistics or not _is_divided(total):
        return list(statistics)
    widths = [len(vector) for layer in statistics for vector in layer[:2]]
    own = torch.cat([vector for layer in statistics for vector in layer[:2]])
    parts = iter(whole(own[None], distributed.count()).split(widths, 1))
    weights = fractions(tuple(sizes(total)), own.device)
    return [
        LayerStatistics(*combined(mean, variance, weights), *layer[2:])
        for layer, mean, variance in zip(statistics, parts, parts)
    ]


class _WholeBatchNorm(TorchFunctionMode):
    """Inside, BatchNorm that normalises by its batch, wherever it is called, does so by the whole batch.

    (torch.nn.SyncBatchNorm is for GPUs alone, and takes the place of modules, whatever else these do.)
    """

    NAMES = tuple(inspect.signature(F.batch_norm).parameters)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            given = {**dict(zip(self.NAMES, args)), **kwargs}
            if given.pop("training", False):
                return _whole_batch_norm(**given)
        return func(*args, **kwargs)


def _whole_batch_norm(
    input: Tensor,  # noqa: A002  as torch calls it
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm`` in training mode, of a share (n, C, ...), by the statistics of the whole batch."""
    output, mean, variance = _NormaliseByWholeBatch.apply(input, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        values = in_whole_batch(input.numel() // input.shape[1])
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (values / (values - 1))).to(running_var.dtype), momentum)
    return output


class _NormaliseByWholeBatch(torch.autograd.Function):
    """The output of BatchNorm, and the mean and biased variance (C,) of the whole batch, without gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        assert _divided is not None
        own = torch.stack(channel_statistics(x))
        parts = [torch.empty_like(own) for _ in range(distributed.count())]
        call(dist.all_gather, parts, own)
        means, variances = torch.stack(parts, 1)
        mean, variance = combined(means, variances, fractions(tuple(sizes(_divided)), x.device))
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.values = eps, in_whole_batch(x.numel() // x.shape[1])
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, variance = ctx.saved_tensors
        # As if the statistics were constants; then what flows through them, for which the sums are of all processes.
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([by_bias, by_weight])
        call(dist.all_reduce, sums)
        mean_gradient, mean_product = sums / ctx.values
        inverse = (variance + ctx.eps).rsqrt()
        scale = inverse if weight is None else inverse * weight
        slope = scale * inverse * mean_product
        shape = (1, -1, *[1] * (x.dim() - 2))
        by_x = torch.addcmul(by_x - (scale * mean_gradient - slope * mean).view(shape), x, -slope.view(shape))
        return by_x.to(x.dtype), *((None, None) if weight is None else (by_weight, by_bias)), None
