"""Batch statistics of the inputs of BatchNorm layers, for the distance to the running ones (L_bn)."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class LayerStatistics(NamedTuple):
    """Statistics of one BatchNorm layer, each (C,): of the batch (biased variance), and the running ones."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


class BatchNormTap:
    """Collects the batch statistics of the inputs of ``model``'s BatchNorm layers.

    Used as a context manager: its hooks exist only inside it, so that other forward passes cost nothing.
    ``statistics`` is then a list of :class:`LayerStatistics`, one for each call of a layer.
    """

    def __init__(self, model: nn.Module):
        self.layers = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]
        self.statistics: list[LayerStatistics] = []
        self._hooks: list[RemovableHandle] = []
        self._replaced: list[nn.Module] = []
        self._normalisers = {layer: partial(self._normalise, layer) for layer in self.layers}

    def __enter__(self) -> "BatchNormTap":
        self.statistics, self._hooks, self._replaced = [], [], []
        for layer in self.layers:
            if _is_plain_and_frozen(layer):
                # The same object each time, or a compiled network would be compiled again.
                layer.forward = self._normalisers[layer]  # type: ignore[method-assign]
                self._replaced.append(layer)
            else:
                self._hooks.append(layer.register_forward_pre_hook(self._observe))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer in self._replaced:
            del layer.forward

    def _normalise(self, layer: nn.Module, x: Tensor) -> Tensor:
        output, mean, variance = FrozenBatchNorm.apply(x, layer)
        self._keep(layer, mean, variance)
        return output

    def _observe(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._keep(layer, *ChannelStatistics.apply(args[0]))

    def _keep(self, layer: Any, mean: Tensor, variance: Tensor) -> None:
        self.statistics.append(LayerStatistics(mean, variance, layer.running_mean, layer.running_var))


def _is_plain_and_frozen(layer: nn.Module) -> bool:
    """Whether the layer is torch's own, only normalises by its running statistics, and has no trainable parameter."""
    plain = type(layer) in PLAIN and "forward" not in layer.__dict__
    return plain and not layer.training and not any(p.requires_grad for p in layer.parameters())


def is_batch_independent(model: nn.Module) -> bool:
    """Whether the output for an image does not depend on the rest of its batch, in evaluation mode."""
    return not any(isinstance(m, BATCH_NORMS) and m.running_mean is None for m in model.modules())


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, (N, C, ...) -> two vectors (C,) in at least fp32.

    One pass, by the kernel of BatchNorm itself; ``torch.var_mean`` takes twenty times as long on the CPU for
    channels_last tensors.
    """
    return torch.batch_norm_update_stats(x.to(torch.promote_types(x.dtype, torch.float32)), None, None, 0.0)


def statistics_gradient(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
    """Gradient of :func:`channel_statistics` by x, in one pass: d mean = 1 / n, d var = 2 (x - mean) / n."""
    count = x.numel() // x.shape[1]
    slope = 2 * grad_variance / count
    return torch.addcmul(_as_channels(grad_mean / count - slope * mean, x), x, _as_channels(slope, x))


def _as_channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.dim() - 2))


class ChannelStatistics(torch.autograd.Function):
    """:func:`channel_statistics` as one autograd node, so that no intermediate map is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = channel_statistics(x)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        return statistics_gradient(x, mean, grad_mean, grad_variance).to(x.dtype)


class FrozenBatchNorm(torch.autograd.Function):
    """The output of a BatchNorm ``layer`` in evaluation mode for x, and the :func:`channel_statistics` of x.

    Together they need two passes in backward and keep x once; apart they need four.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
        mean, variance = channel_statistics(x)
        scale = (layer.running_var + layer.eps).rsqrt()
        ctx.save_for_backward(x, mean, scale if layer.weight is None else scale * layer.weight)
        return output, mean, variance

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, None]:
        x, mean, scale = ctx.saved_tensors
        gradient = statistics_gradient(x, mean, grad_mean, grad_variance)
        return torch.addcmul(gradient, grad_output, _as_channels(scale, x)).to(x.dtype), None
