"""Batch statistics of the inputs of BatchNorm layers, for the distance to the running ones (L_bn)."""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from datafree.errors import InputError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BATCH_NORMS = (*PLAIN, nn.SyncBatchNorm)
OF_SINGLE_IMAGES = (
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)  # variances within images are another thing
NAMES = (("running_mean", "running_var"), ("moving_mean", "moving_var"))


class LayerStatistics(NamedTuple):
    """Statistics of one BatchNorm layer, each (C,): of the batch (biased variance), and the running ones."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


@lru_cache(maxsize=64)
def fractions(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The fraction (parts, 1) of a batch that each of its parts is; made once, for a GPU is waited for."""
    return (torch.tensor(sizes, dtype=torch.float64) / sum(sizes)).float()[:, None].to(device)


def combined(means: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of a batch from those of its parts (parts, C) and their :func:`fractions`."""
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean) ** 2)).sum(0)


def combined_statistics(parts: Sequence[list[LayerStatistics]], sizes: Sequence[int]) -> list[LayerStatistics]:
    """The statistics of each layer in a batch, from those in its parts of these sizes."""
    return [
        LayerStatistics(
            *combined(
                torch.stack([layer.mean for layer in layers]),
                torch.stack([layer.variance for layer in layers]),
                fractions(tuple(sizes), layers[0].mean.device),
            ),
            *layers[0][2:],
        )
        for layers in zip(*parts)
    ]


def running_statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Running mean and variance of any module that has them, whatever its class, each (C,)."""
    for names in NAMES:
        mean, variance = (getattr(module, name, None) for name in names)
        if torch.is_tensor(mean) and torch.is_tensor(variance) and mean.numel() == variance.numel():
            flat = (mean, variance) if mean.dim() == 1 else (mean.flatten(), variance.flatten())
            return None if isinstance(module, OF_SINGLE_IMAGES) else flat
    return None


class BatchNormTap:
    """Collects the batch statistics of the inputs of ``model``'s BatchNorm layers.

    A layer is what has running statistics: a module that is called, or ``F.batch_norm`` called with those of a module
    that is not. Used as a context manager: its hooks exist only inside it, so that other forward passes cost nothing.
    ``statistics`` is then a list of :class:`LayerStatistics`, one for each call of a layer. :meth:`try_on` finds out
    which layers run.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = [module for module in model.modules() if running_statistics(module) is not None]
        self.matched = self.total = len(self.layers)
        self.statistics: list[LayerStatistics] = []
        self._hooks: list[RemovableHandle] = []
        self._replaced: list[nn.Module] = []
        self._functional: _FunctionalCalls | None = None
        self._normalisers = {layer: partial(self._normalise, layer) for layer in self.layers}

    def __enter__(self) -> "BatchNormTap":
        self.statistics, self._hooks, self._replaced = [], [], []
        for layer in self.layers:
            if _is_plain_and_frozen(layer):
                # The same object each time, or a compiled network would be compiled again.
                layer.forward = self._normalisers[layer]  # type: ignore[method-assign]
                self._replaced.append(layer)
            else:
                self._hooks.append(layer.register_forward_pre_hook(self._observe, with_kwargs=True))
        if self._functional:
            self._functional.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._functional:
            self._functional.__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        for layer in self._replaced:
            del layer.forward

    def try_on(self, forward: Callable[[Tensor], Tensor], images: Tensor, name: str) -> None:
        """Find out which layers normalise by their running statistics, and whether gradients pass through all.

        forward: normalised images (N, C, H, W) -> logits, by a frozen model. name: of the network, for messages. Raises
        InputError if no layer is reached, or if the statistics have no gradient or are computed again in the backward
        pass.
        """
        found = _Reached(self.layers)
        with torch.no_grad(), found:
            forward(images)
        self.total = len(self.layers) + len(found.foreign)
        self.layers = [
            layer for layer in self.layers if layer in found.inputs and _normalises(layer, found.inputs[layer])
        ]
        self.matched = len(self.layers) + len(found.functional - set(map(_place, self.layers)))
        if self.total and not self.matched:
            raise InputError(
                f"the {name} holds BatchNorm statistics in {self.total} layers, but none of them normalises by them in "
                "evaluation mode; set --bn 0 (and rely on --oh, --adv, --tv, --l2 instead)"
            )
        self._functional = _FunctionalCalls(self._keep_functional) if self.matched > len(self.layers) else None
        self._try_gradient(forward, images, name)

    def _try_gradient(self, forward: Callable[[Tensor], Tensor], images: Tensor, name: str) -> None:
        recomputed, switch = "which activation checkpointing computes", "switch checkpointing off in it, or set --bn 0"
        again: list[nn.Module] = []
        with torch.enable_grad():
            with self:
                logits = forward(images.detach().requires_grad_())
            parts = [part for layer in self.statistics for part in layer[:2]]
            if not all(part.requires_grad for part in parts):
                raise InputError(
                    f"the {name} has BatchNorm statistics without a gradient: a part of it runs under torch.no_grad(), "
                    f"as by reentrant activation checkpointing; {switch}"
                )
            modules = (m for m in self.model.modules() if not isinstance(m, torch.jit.ScriptModule))
            hooks = [m.register_forward_pre_hook(lambda module, _: again.append(module)) for m in modules]
            try:
                (sum(part.sum() for part in parts) + logits.sum()).backward()
                failure = None
            except Exception as error:
                failure = error
            finally:
                for hook in hooks:
                    hook.remove()
        if any(module in self._normalisers or self._functional for module in again):
            raise InputError(f"the {name} has BatchNorm statistics {recomputed} again in the backward pass; {switch}")
        if failure:
            raise failure

    def _normalise(self, layer: Any, input: Tensor) -> Tensor:  # noqa: A002  as torch calls it
        output, mean, variance = FrozenBatchNorm.apply(input, layer)
        self._keep(layer, mean, variance)
        return output

    def _observe(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(layer, *ChannelStatistics.apply(_given(args, kwargs)))

    def _keep(self, layer: nn.Module, mean: Tensor, variance: Tensor) -> None:
        running = running_statistics(layer)
        assert running is not None  # a layer is what has them (torch.compile cannot take the truth of two tensors)
        self.statistics.append(LayerStatistics(mean, variance, *running))

    def _keep_functional(self, x: Tensor, running_mean: Tensor, running_variance: Tensor) -> None:
        if running_mean.data_ptr() not in set(map(_place, self.layers)):  # of the others a hook has taken them
            self.statistics.append(LayerStatistics(*ChannelStatistics.apply(x), running_mean, running_variance))  # type: ignore[call-arg]


class _FunctionalCalls(TorchFunctionMode):
    """Inside, ``keep`` is called with input, running mean and variance of each normalisation by ``F.batch_norm``."""

    SIGNATURES = {
        F.batch_norm: tuple(inspect.signature(F.batch_norm).parameters),
        torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
    }

    def __init__(self, keep: Callable[[Tensor, Tensor, Tensor], None]):
        super().__init__()
        self.keep = keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if names := self.SIGNATURES.get(func):
            given = {**dict(zip(names, args)), **(kwargs or {})}
            if torch.is_tensor(given.get("running_mean")) and not given.get("training", False):
                self.keep(given["input"], given["running_mean"], given["running_var"])
        return func(*args, **(kwargs or {}))


class _Reached:
    """What runs in one pass. inputs: layer -> its input. functional, foreign: where ``F.batch_norm`` found running
    means, and those of them that belong to no layer."""

    def __init__(self, layers: list[nn.Module]):
        self.layers, self.inputs = layers, dict[nn.Module, Tensor]()
        self.functional, self.foreign = set[int](), set[int]()
        self.mode = _FunctionalCalls(self._called)

    def __enter__(self) -> None:
        self.hooks = [layer.register_forward_pre_hook(self._observe, with_kwargs=True) for layer in self.layers]
        self.mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.mode.__exit__(*exception)
        for hook in self.hooks:
            hook.remove()

    def _observe(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, (mean, _) = _given(args, kwargs), running_statistics(layer) or (None, None)
        if torch.is_tensor(x) and mean is not None and x.dim() > 1 and x.shape[1] == len(mean):
            self.inputs[layer] = x

    def _called(self, x: Tensor, mean: Tensor, variance: Tensor) -> None:
        self.functional.add(mean.data_ptr())
        if mean.data_ptr() not in set(map(_place, self.layers)):
            self.foreign.add(mean.data_ptr())


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a module that is called by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _place(layer: nn.Module) -> int:
    running = running_statistics(layer)
    return running[0].data_ptr() if running else 0


@torch.no_grad()
def _normalises(layer: nn.Module, x: Tensor) -> bool:
    """Whether the output of ``layer`` for x follows its running mean."""
    if type(layer) in PLAIN and not layer.training:
        return True
    mean, _ = running_statistics(layer) or (None, None)
    assert mean is not None
    before, kept = layer.forward(x.clone()), mean.clone()
    mean += 1
    after = layer.forward(x.clone())
    mean.copy_(kept)
    return torch.is_tensor(before) and not torch.equal(before, after)


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
    channels_last tensors. Compiled code fuses that into one pass, whereas BatchNorm's kernel would break its graph.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.compiler.is_compiling():
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        return mean, variance
    return torch.batch_norm_update_stats(x, None, None, 0.0)


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
