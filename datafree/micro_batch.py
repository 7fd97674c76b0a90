"""Batches that are computed in parts, so that a step takes the memory of ``--micro_batch`` images.

No more images than that go through a network at once, except within ``Network.whole_batches``. Of a pass with
gradients only the outputs are kept; the backward pass computes each part again when it comes to it, accumulates its
gradients and frees it (Chen et al. 2016). The loss is one function of the outputs of all parts, as in Gao et al. 2021,
and not a mean of losses of parts: so the gradients are those of the whole batch, whatever the loss makes of it and
however long the parts are. What is normalised by the batch within a pass, that is by BatchNorm in training mode, is
normalised by its part.

Rows are dealt out to the parts in turn, so that each has its share of what a batch has in order: sorted target classes,
real images before synthetic ones. Of several processes each has its share of each part (:mod:`datafree.shares`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from datafree.features import Features
from datafree.runtime import load_rng_state, rng_state, same_rng


def in_parts(
    compute: Callable[[Tensor], Any], batch: Tensor, most: int, module: nn.Module, with_maps: bool = True
) -> Any:
    """``compute(batch)`` for a batch (N, ...), of which at most ``most`` rows are computed at once; 0 sets no limit.

    compute: gives a tensor (N, ...) or :class:`Features` by ``module``, whose weights may have gradients. with_maps:
    whether Features of several parts have whole maps.
    """
    count = -(-len(batch) // most) if most else 1
    if count <= 1:
        return compute(batch)
    order = torch.cat([torch.arange(first, len(batch), count, device=batch.device) for first in range(count)])
    sizes = [len(range(first, len(batch), count)) for first in range(count)]
    parts = [_part(partial(_outputs, compute, with_maps), rows, module) for rows in batch[order].split(sizes)]
    places = order.argsort()
    return torch.cat(parts)[places] if torch.is_tensor(parts[0]) else Features.joined(parts, places)


def _outputs(compute: Callable[[Tensor], Any], with_maps: bool, rows: Tensor) -> Any:
    found = compute(rows)
    return found if torch.is_tensor(found) else found.computed(with_maps)


def _part(compute: Callable[[Tensor], Any], rows: Tensor, module: nn.Module) -> Any:
    if not torch.is_grad_enabled():
        return compute(rows)
    with set_checkpoint_early_stop(False):  # or an exception would end the second pass, through hooks and collectives
        return checkpoint(
            compute, rows, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, module)
        )


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Those of the first pass of a part and of later ones, as many as take a gradient of it."""
    buffers = [buffer for part in module.modules() if part.training for buffer in part.buffers(recurse=False)]
    return nullcontext(), _AsBefore(buffers)


class _AsBefore:
    """Inside, random states and buffers, such as running statistics, are as they were when this was made; then as they
    are now."""

    def __init__(self, buffers: list[Tensor]):
        self.buffers, self.before, self.rng = buffers, [buffer.clone() for buffer in buffers], rng_state()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.callback(_fill, self.buffers, [buffer.clone() for buffer in self.buffers])
            stack.enter_context(same_rng())
            _fill(self.buffers, self.before)
            load_rng_state(self.rng)
            self.stack = stack.pop_all()

    def __exit__(self, *exception: Any) -> None:
        self.stack.close()


def _fill(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values):
        buffer.data.copy_(value)  # by data, for another graph may keep the buffer, and would refuse its new version
