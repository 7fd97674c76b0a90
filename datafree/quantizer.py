"""Simulated quantization of any network: its weights and activations on an integer grid, with gradients.

The network's code is not changed. While it runs, a mode sees every call of a convolution or linear layer, and of an
activation function, wherever it is written, as a module or as a function: the weight is rounded before such a call and
the activation after it. The protocol is the section quantizer of the options (:class:`datafree.config.Quantizer`).
"""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from datafree.config import QuantizeConfig, Quantizer
from datafree.errors import InputError, OptionError
from datafree.options import list_options
from datafree.outputs import graph_of, raw_logits
from datafree.trial import trial_images, unchanged

if TYPE_CHECKING:
    from datafree.network import Network

FLOAT = 32  # bits of a number that is not quantised
# Layers with a weight, and the axis of its output channels.
LAYERS: dict[Any, int] = {
    **{layer: 0 for layer in (F.conv1d, F.conv2d, F.conv3d, F.linear)},
    **{layer: 1 for layer in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)},
}
# Activation functions -> the position of their argument ``inplace``, if they have one.
ACTIVATIONS: dict[Any, int | None] = {
    **dict.fromkeys((torch.relu, torch.Tensor.relu, torch.sigmoid, torch.Tensor.sigmoid, torch.tanh), None),
    **dict.fromkeys((torch.Tensor.tanh, torch.prelu, torch.selu, torch.celu, F.gelu, F.softplus, F.logsigmoid), None),
    **{
        function: list(inspect.signature(function).parameters).index("inplace")
        for function in (F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.rrelu, F.elu, F.selu, F.celu, F.silu, F.mish)
        + (F.hardswish, F.hardsigmoid, F.threshold)
    },
}
IN_PLACE: dict[Any, Any] = {  # functions that only work in place -> their twins that do not
    torch.relu_: torch.relu,
    torch.Tensor.relu_: torch.relu,
    torch.sigmoid_: torch.sigmoid,
    torch.Tensor.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
    torch.Tensor.tanh_: torch.tanh,
    torch.threshold_: F.threshold,
    F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.selu_: F.selu,
    F.celu_: F.celu,
}
# Lower bounds, which are a ReLU if the bound is 0.
CLAMPS = (torch.clamp, torch.Tensor.clamp, torch.clamp_min, torch.Tensor.clamp_min, torch.clip, torch.Tensor.clip)
CLAMPS_IN_PLACE = {
    torch.clamp_: torch.clamp,
    torch.Tensor.clamp_: torch.clamp,
    torch.clamp_min_: torch.clamp_min,
    torch.Tensor.clamp_min_: torch.clamp_min,
    torch.clip_: torch.clip,
    torch.Tensor.clip_: torch.clip,
}
# What multiplies by a weight without being a layer: the mode cannot see which argument is the weight.
PRODUCTS = {torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, F.bilinear} | {
    torch.tensordot,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.Tensor.addmm,
    F.multi_head_attention_forward,
}
GRIDS = "grids."  # prefix of the ranges among a quantised network's tensors
TINY = 1e-20  # smallest scale, of what is constantly 0
FRACTIONS = torch.linspace(0.2, 1, 17)  # of the range from minimum to maximum, tried for the least squared error
SAMPLE = 2**16  # values of an activation on which that is tried


# The grid: integers low to high, each times a scale, after a zero point is subtracted.


def grid(bits: int, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest integer."""
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def step_and_zero(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32) of the grid on ranges ``low`` to ``high``, each () or (C,).

    Zero is always on the grid, for the sake of padding and of ReLU: a range without it is widened.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    first, last = grid(bits, symmetric)
    if symmetric:
        scale = torch.maximum(-low, high) / last
        return scale.clamp_min(TINY), torch.zeros_like(low, dtype=torch.int32)
    scale = ((high - low) / (last - first)).clamp_min(TINY)
    return scale, (first - low / scale).round().clamp(first, last).to(torch.int32)


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, bounds: tuple[int, int], axis: int | None) -> Tensor:
    """``x`` on the grid; inside it the gradient passes as if nothing was rounded, outside it stops.

    scale, zero: () if ``axis`` is None, or of one number for each index of that axis of x.
    """
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, *bounds)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, axis, *bounds)


class RoundActivation(torch.autograd.Function):
    """:func:`round_to_grid` for one range, given in numbers: several times as fast on a CPU as torch's kernel.

    scale: of the grid. low, high: its lowest and highest integer, minus the zero point.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.inside = ((low - 0.5) * scale, (high + 0.5) * scale)
        return (x * (1 / scale)).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.ops.aten.hardtanh_backward(grad, *ctx.saved_tensors, *ctx.inside), None, None, None


class LearnedStep(torch.autograd.Function):
    """:func:`round_by_learned_step` for scale and zero point that broadcast to x, without the factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        steps = x / scale
        rounded = steps.round().clamp(low - zero, high - zero)
        ctx.save_for_backward(steps, rounded, scale)
        return (rounded * scale).to(x.dtype)  # which may be half as long as the scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        steps, rounded, scale = ctx.saved_tensors
        inside = steps.round() == rounded
        slope = torch.where(inside, rounded - steps, rounded)
        return grad * inside, (grad * slope).sum_to_size(scale.shape), None, None, None


def round_by_learned_step(x: Tensor, scale: Tensor, zero: Tensor, bounds: tuple[int, int], axis: int | None) -> Tensor:
    """:func:`round_to_grid` with a gradient for the scale, too (LSQ; Esser et al., ICLR 2020).

    That gradient is divided by sqrt(values per scale * highest integer), as there.
    """
    share = (x.numel() / scale.numel() * bounds[1]) ** -0.5
    scale = scale * share + (scale * (1 - share)).detach()
    if axis is not None:
        shape = [-1 if i == axis else 1 for i in range(x.dim())]
        scale, zero = scale.view(shape), zero.view(shape)
    return LearnedStep.apply(x, scale, zero, *bounds)


class Grid(nn.Module):
    """The grid of one weight or activation.

    bits, symmetric: of the grid. axis: of a weight's output channels, each of which has its own range; None for one
    range. learned: whether the scale is a parameter.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, symmetric: bool, axis: int | None, count: int, learned: bool):
        super().__init__()
        self.bits, self.symmetric, self.axis, self.learned = bits, symmetric, axis, learned
        shape = () if axis is None else (count,)
        if learned:
            self.scale = nn.Parameter(torch.ones(shape))
        else:
            self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero", torch.zeros(shape, dtype=torch.int32))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        scale, zero = step_and_zero(low, high, self.bits, self.symmetric)
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero.copy_(zero)

    def is_sound(self) -> bool:
        """Whether its tensors have values that :meth:`set_range` or training gives them."""
        low, high = grid(self.bits, self.symmetric)
        are_finite = all(bool(tensor.isfinite().all()) for tensor in self.state_dict().values())
        is_inside = bool(((low <= self.zero) & (self.zero <= high)).all())
        return are_finite and is_inside and (self.learned or bool((self.scale > 0).all()))

    def rounded(self, x: Tensor) -> Tensor:
        if self.learned:
            scale = self.scale.abs().clamp_min(TINY)  # a step of training may take it below 0
            return round_by_learned_step(x, scale, self.zero, grid(self.bits, self.symmetric), self.axis)
        return round_to_grid(x, self.scale, self.zero, grid(self.bits, self.symmetric), self.axis)

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of each range of x."""
        if self.axis is None:
            return x.aminmax()
        rows = x.transpose(0, self.axis).flatten(1)
        return rows.amin(1), rows.amax(1)

    def best_fraction(self, x: Tensor) -> Tensor:
        """The one of FRACTIONS of the range of the extremes that has the least squared rounding error."""
        low, high = (bound.float() for bound in self.extremes(x))
        least, best = torch.full_like(low, float("inf")), torch.ones_like(low)
        for fraction in FRACTIONS.tolist():
            scale, zero = step_and_zero(fraction * low, fraction * high, self.bits, self.symmetric)
            error = (round_to_grid(x, scale, zero, grid(self.bits, self.symmetric), self.axis) - x).square()
            mean = error.mean() if self.axis is None else error.transpose(0, self.axis).flatten(1).mean(1)
            best = torch.where(mean < least, fraction, best)
            least = torch.minimum(mean, least)
        return best


class WeightGrid(Grid):
    """Rounds a weight. Its range follows the weight, unless the scale is learned.

    fraction: of the range from minimum to maximum, chosen by :meth:`fit`.
    """

    fraction: Tensor

    def __init__(self, bits: int, protocol: Quantizer, axis: int, count: int):
        per_channel = protocol.w_per == "channel"
        super().__init__(bits, protocol.w_symmetric, axis if per_channel else None, count, protocol.ranges == "learned")
        self.register_buffer("fraction", torch.ones_like(self.scale))
        self.fits = protocol.ranges != "ema"

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Choose the range for ``weight`` as it is now, if the protocol does not take minimum and maximum."""
        if self.fits:
            self.fraction.copy_(self.best_fraction(weight))
            self._follow(weight)

    def _follow(self, weight: Tensor) -> None:
        low, high = self.extremes(weight.detach())
        self.set_range(self.fraction * low, self.fraction * high)

    def forward(self, weight: Tensor) -> Tensor:
        if self.bits == FLOAT:
            return weight
        if not self.learned:
            self._follow(weight)
        return self.rounded(weight)


class ActivationGrid(Grid):
    """Rounds an activation, to a range that is observed on batches and then kept.

    batches: how many were observed; before the first one nothing is rounded.
    """

    range: Tensor

    def __init__(self, bits: int, protocol: Quantizer):
        super().__init__(bits, protocol.a_symmetric, None, 1, protocol.ranges == "learned")
        self.register_buffer("range", torch.zeros(2))
        self.batches, self.momentum, self.fits = 0, protocol.range_momentum, protocol.ranges != "ema"
        self._numbers: tuple[float, int, int] | None = None

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range towards that of ``x``: the exponential moving average of the batches, without a bias.

        So an activation that is the same in each batch has its own range, from the first batch on.
        """
        values = x.detach().float().flatten()
        if self.fits:
            values = values[:: max(1, len(values) // SAMPLE)]
        observed = torch.stack(self.extremes(values))
        if self.fits:
            observed *= self.best_fraction(values)
        self.batches += 1
        rate = (1 - self.momentum) / (1 - self.momentum**self.batches)
        self.range += rate * (observed - self.range)
        self.set_range(*self.range)
        self._numbers = None

    def forget(self) -> None:
        """Observe anew."""
        self.batches = 0
        self.range.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == FLOAT or not self.batches:
            return x
        return self.rounded(x) if self.learned else RoundActivation.apply(x, *self.numbers)

    @property
    def numbers(self) -> tuple[float, int, int]:
        """What :class:`RoundActivation` is given; read from the device once."""
        if self._numbers is None:
            zero, bounds = int(self.zero), grid(self.bits, self.symmetric)
            self._numbers = float(self.scale), bounds[0] - zero, bounds[1] - zero
        return self._numbers

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.batches)

    def set_extra_state(self, state: Tensor) -> None:
        self.batches, self._numbers = int(state), None


# The calls of a network that are quantised.


@dataclass
class Layer:
    """A call of a convolution or linear layer.

    name: of its module. axis, channels: of the output channels in its weight. numbers: in its weight. is_again: whether
    an earlier call has the same weight. norm: module of the BatchNorm that follows it, and could be folded into it.
    """

    name: str
    axis: int
    channels: int
    numbers: int
    is_again: bool = False
    norm: str = ""


@dataclass
class Sites:
    """All such calls of one pass, and the names of the modules that call activation functions, in their order.

    read_again: activations in place whose argument the network reads afterwards, instead of the result.
    numbers, of: how many numbers of the network's parameters make weights that are rounded, out of how many. in_float:
    names of the matrices among the others.
    """

    layers: list[Layer] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    read_again: set[int] = field(default_factory=set)
    numbers: int = 0
    of: int = 0
    in_float: list[str] = field(default_factory=list)


class _Calls(TorchFunctionMode):
    """Hands the calls of layers and of activation functions to :meth:`layer` and :meth:`activation`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LAYERS:
            return self.layer(func, args, kwargs)
        if func is F.batch_norm:
            return self.norm(args, kwargs)
        out_of_place = _activation(func, args, kwargs)
        if out_of_place is None:
            return self.other(func, args, kwargs)
        function, in_place = out_of_place
        return self.activation(function, args[0] if args else kwargs["input"], in_place)

    def layer(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        raise NotImplementedError

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor, in_place: bool) -> Tensor:
        raise NotImplementedError

    def norm(self, args: Any, kwargs: Any) -> Tensor:
        return F.batch_norm(*args, **kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


def _activation(func: Any, args: Any, kwargs: Any) -> tuple[Callable[[Tensor], Tensor], bool] | None:
    """x -> the activation function that this call is, and whether it is to work in place; None if it is another."""
    if func in CLAMPS or func in CLAMPS_IN_PLACE:
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        if not isinstance(low, (int, float)) or low != 0:
            return None
        function = CLAMPS_IN_PLACE.get(func, func)
    elif func in IN_PLACE:
        function = IN_PLACE[func]
    elif func in ACTIVATIONS:
        function, place = func, ACTIVATIONS[func]
        in_place = kwargs.get("inplace", False)
        if place is not None and len(args) > place:
            in_place, args = args[place], args[:place]
        rest = {key: value for key, value in kwargs.items() if key not in ("inplace", "input")}
        return lambda x: function(x, *args[1:], **rest), in_place
    else:
        return None
    rest = {key: value for key, value in kwargs.items() if key != "input"}
    return lambda x: function(x, *args[1:], **rest), func is not function


class _Search(_Calls):
    """Finds the :class:`Sites` of a network in one pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.sites, self.stack = model, Sites(), [""]
        self.entered = 0  # number of calls of modules
        self.outputs: list[tuple[Layer, Tensor]] = []
        self.used: dict[int, int] = {}  # output of a layer -> number of calls that it is given to
        self.replaced: dict[int, list[tuple[int, Tensor]]] = {}  # memory -> activations that were to be written there
        self.weights = set[frozenset[int]]()  # the parameters of each weight
        self.parameters = {_memory(parameter) for parameter in model.parameters()}
        self.last_layer = 0  # number of activations before the last layer

    def __enter__(self) -> "_Search":
        self.hooks = []
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self.hooks.append(module.register_forward_hook(self._leave))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self.hooks:
            hook.remove()

    def _enter(self, name: str, *_: Any) -> None:
        self.stack.append(name)
        self.entered += 1

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def layer(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        weight, axis = args[1] if len(args) > 1 else kwargs["weight"], LAYERS[func]
        parameters = frozenset(map(_memory, _parameters_of(weight)))
        is_again = parameters in self.weights
        self.sites.layers.append(Layer(self.stack[-1], axis, weight.shape[axis], weight.numel(), is_again))
        self.weights.add(parameters)
        self.last_layer = len(self.sites.activations)
        output = self._counted(func(*args, **kwargs), args, kwargs)
        if func is not F.linear or output.dim() == 2:  # otherwise its channels are not those of a BatchNorm
            self.outputs.append((self.sites.layers[-1], output))
            self.used[id(output)] = 0
        return output

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor, in_place: bool) -> Tensor:
        self.sites.activations.append(self.stack[-1])
        result = self._counted(function(x), (x,), {})
        if in_place:
            self.replaced.setdefault(_memory(x), []).append((len(self.sites.activations) - 1, x))
        return result

    def norm(self, args: Any, kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        module = self.model.get_submodule(self.stack[-1])
        is_constant = isinstance(module, _BatchNorm) and module.running_mean is not None and not module.training
        for layer, output in self.outputs:
            if x is output and is_constant and layer.channels == x.shape[1]:  # a grouped transposed one has fewer
                layer.norm = self.stack[-1]
        return self._counted(super().norm(args, kwargs), args, kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in PRODUCTS and any(x.dim() > 1 and _memory(x) in self.parameters for x in _tensors(args, kwargs)):
            kind = type(self.model.get_submodule(self.stack[-1])).__name__
            part = f"layer '{self.stack[-1]}' ({kind})" if self.stack[-1] else f"network {kind}"
            raise InputError(
                f"the {part} multiplies by its weight in {func.__name__}, in which it "
                "cannot be quantised; use a network that calls nn.Linear, nn.Conv2d or their functions there"
            )
        return self._counted(func(*args, **kwargs), args, kwargs)

    def _counted(self, result: Any, args: Any, kwargs: Any) -> Any:
        """``result`` of a call, which uses its arguments if it is of tensors (and no question, such as for a shape)."""
        if torch.is_tensor(result) or isinstance(result, (list, tuple)) and any(map(torch.is_tensor, result)):
            for tensor in _tensors(args, kwargs):
                if id(tensor) in self.used:
                    self.used[id(tensor)] += 1
                self.sites.read_again.update(number for number, _ in self.replaced.get(_memory(tensor), ()))
        return result

    def finish(self) -> Sites:
        """The sites; of activations those that a layer follows."""
        sites = self.sites
        sites.activations = sites.activations[: self.last_layer]
        for layer, output in self.outputs:
            if self.used[id(output)] != 1:  # folded, it would change what else reads it
                layer.norm = ""
        rounded = frozenset[int]().union(*self.weights)
        for name, parameter in self.model.named_parameters():
            sites.of += parameter.numel()
            if _memory(parameter) in rounded:
                sites.numbers += parameter.numel()
            elif sum(size > 1 for size in parameter.shape) > 1:
                sites.in_float.append(name)
        return sites


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, and in lists of them."""
    for x in (*args, *kwargs.values()):
        yield from filter(torch.is_tensor, x if isinstance(x, (list, tuple)) else (x,))


def _memory(tensor: Tensor) -> int:
    """Where its numbers are, which views share."""
    return tensor.untyped_storage().data_ptr()


def _parameters_of(weight: Tensor) -> list[Tensor]:
    """What a weight is computed from; itself, if it is a parameter."""
    leaves = [node.variable for node in graph_of(weight) if hasattr(node, "variable")]
    return leaves or [weight]


def find_sites(model: nn.Module, images: Tensor, name: str) -> Sites:
    """What of ``model`` is quantised, by a pass of normalised ``images`` (N, C, H, W) in evaluation mode.

    name: of the network, for messages. Raises InputError if there is nothing, or something that cannot be.
    """
    for part, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"the {name} has a TorchScript module, '{part}', whose calls cannot be seen and rounded; give the "
                "Python class that it was made from"
            )
    search = _Search(model)
    with unchanged(model), torch.enable_grad(), search:
        model.eval()
        require_gradients(model)
        raw = raw_logits(model(images.clone().requires_grad_() * 1), model)
        entered = search.entered
        with suppress(Exception):  # it is asked only what it calls; training is tried elsewhere
            raw.sum().backward()
    if search.entered > entered:
        raise InputError(
            f"the {name} calls modules again in its backward pass, as torch.utils.checkpoint does, where they are not "
            "rounded; switch its gradient checkpointing off"
        )
    sites = search.finish()
    if not sites.layers:
        raise InputError(
            f"the {name} calls no convolution or linear layer that could be quantised; give the Python class of the "
            "network, with layers that call torch's functions"
        )
    return sites


def require_gradients(model: nn.Module) -> None:
    """Train all parameters, except those that are integers."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


class QuantizedModel(nn.Module):
    """``model`` with its weights and activations on the grid of ``protocol``: same inputs, same outputs.

    It is run in evaluation mode, also while it is trained, so that its BatchNorm statistics stay as they are. Ranges of
    activations are observed inside :meth:`observing`; until then activations are not rounded.

    images: normalised, (N, C, H, W), for the pass that finds what is quantised. name: for messages.
    """

    def __init__(self, model: nn.Module, protocol: Quantizer, images: Tensor, name: str = "network"):
        super().__init__()
        protocol.validate()
        self.protocol, self.sites = protocol, find_sites(model, images, name)
        if protocol.a_bits != FLOAT and not self.sites.activations:
            raise InputError(
                f"the {name} calls no activation function before its last layer, so --a_bits {protocol.a_bits} has "
                "nothing to quantise; give --a_bits 32"
            )
        self.model = model
        layers, count = self.sites.layers, len(self.sites.activations)
        self.weights = [
            WeightGrid(self._bits("w_bits", i in (0, len(layers) - 1)), protocol, layer.axis, layer.channels)
            for i, layer in enumerate(layers)
        ]
        self.activations = [ActivationGrid(self._bits("a_bits", i == count - 1), protocol) for i in range(count)]
        self.grids = nn.ModuleDict(
            {"weights": nn.ModuleList(self.weights), "activations": nn.ModuleList(self.activations)}
        ).to(images.device)
        self._observing, self._to_fit = False, set[int]()

    def _bits(self, option: str, is_outer: bool) -> int:
        bits = getattr(self.protocol, option)
        outer = self.protocol.first_last_bits
        return bits if outer is None or bits == FLOAT or not is_outer else outer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls = _Quantized(self)
        with calls:
            output = self.model(*args, **kwargs)
        calls.require_all()
        return output

    def train(self, mode: bool = True) -> "QuantizedModel":
        """Evaluation mode, whatever is asked for."""
        super().train(False)
        return self

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Inside, passes observe the ranges anew: of weights in the first one, of activations in all."""
        for grid in self.activations:
            grid.forget()
        self._observing, self._to_fit = True, set(range(len(self.sites.layers)))
        try:
            yield
        finally:
            self._observing, self._to_fit = False, set()

    def round_weight(self, number: int, weight: Tensor) -> Tensor:
        """The weight of the ``number``-th layer on its grid."""
        if number in self._to_fit:
            self._to_fit.remove(number)
            self.weights[number].fit(weight)
        return self.weights[number](weight)

    def round_activation(self, number: int, x: Tensor) -> Tensor:
        """The ``number``-th activation on its grid."""
        if self._observing:
            self.activations[number].observe(x)
        return self.activations[number](x)

    @property
    def packed_bytes(self) -> int:
        """Size of its weights if each took its bits, with scale and zero point of each range, the others in float32."""
        bits = 0
        for layer, grid in zip(self.sites.layers, self.weights):
            is_other = grid.learned or (layer.norm and self.protocol.fold_bn)  # than in an earlier call
            if is_other or not layer.is_again:
                bits += layer.numbers * grid.bits + grid.scale.numel() * (32 + grid.bits) * (grid.bits < FLOAT)
        return bits // 8 + 4 * (self.sites.of - self.sites.numbers)

    def load_grids(self, state: dict[str, Tensor]) -> None:
        """Load the ranges of another such model, ``grids.…`` -> tensor. Raises InputError if they do not fit."""
        try:
            self.grids.load_state_dict({key.removeprefix(GRIDS): value for key, value in state.items()})
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"its ranges are those of another network or protocol ({reason})") from error
        if not all(grid.is_sound() for grid in (*self.weights, *self.activations)):
            raise InputError("its ranges have values that no grid has: the file is spoiled; write or copy it again")


class _Quantized(_Calls):
    """Rounds the weight before, and the activation after, each call of one pass of ``model``."""

    def __init__(self, model: QuantizedModel):
        super().__init__()
        self.model, self.layers, self.activations = model, 0, 0
        self.folded: list[Tensor] = []  # outputs of layers that have their BatchNorm in them

    def layer(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        number, self.layers = self.layers, self.layers + 1
        given, axis = {**dict(zip(("input", "weight", "bias"), args)), **kwargs}, LAYERS[func]
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        sites = self.model.sites.layers
        if number >= len(sites):
            raise self._changed(f"more than {len(sites)} layers")
        if (axis, weight.shape[axis]) != (sites[number].axis, sites[number].channels):
            raise self._changed(
                f"as layer {self.layers} one of {weight.shape[axis]} channels, where '{sites[number].name}' had "
                f"{sites[number].channels}"
            )
        norm = self._norm(number)
        if norm:
            weight, bias = _folded(weight, bias, norm, axis)
        output = func(x, self.model.round_weight(number, weight), bias, *args[3:], **given)
        if norm:
            self.folded.append(output)
        return output

    def _norm(self, number: int) -> Any:
        """The BatchNorm to fold into a layer, or None."""
        name = self.model.sites.layers[number].norm
        return self.model.model.get_submodule(name) if name and self.model.protocol.fold_bn else None

    def norm(self, args: Any, kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        return x if any(x is output for output in self.folded) else super().norm(args, kwargs)

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor, in_place: bool) -> Tensor:
        number, self.activations = self.activations, self.activations + 1
        if number not in self.model.sites.read_again:
            return self._rounded(number, function(x))
        # Of a copy, because functions save what they are given for their gradient.
        return x.copy_(self._rounded(number, function(x.clone())))

    def _rounded(self, number: int, x: Tensor) -> Tensor:
        return self.model.round_activation(number, x) if number < len(self.model.sites.activations) else x

    def require_all(self) -> None:
        """Raise InputError if the pass made other calls than the one that found them."""
        layers, activations = len(self.model.sites.layers), len(self.model.sites.activations)
        if self.layers < layers or self.activations < activations:
            raise self._changed(
                f"{self.layers} layers and {self.activations} activation functions, instead of {layers} and "
                f"{activations}"
            )

    def _changed(self, called: str) -> InputError:
        return InputError(
            f"the network {type(self.model.model).__name__} called {called}, unlike in its trial; make it call the "
            "same ones in each pass, whatever the number and the values of the images"
        )


def _folded(weight: Tensor, bias: Tensor | None, norm: Any, axis: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the BatchNorm that follows it in them."""
    slope = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        slope = slope * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    bias = shift * slope if norm.bias is None else shift * slope + norm.bias
    return weight * slope.view([-1 if i == axis else 1 for i in range(weight.dim())]), bias


def quantise(network: "Network", protocol: Quantizer, name: str = "student") -> "Network":
    """An independent copy of ``network`` on the grid of ``protocol``, to be trained; ``name`` is its role."""
    if isinstance(network.model, QuantizedModel):
        raise InputError(f"the {network.name} is quantised already; give its weights in float")
    other = network.copy()
    other.name = f"{name} {network.name.partition(' ')[2]} ({protocol.short})"
    require_gradients(other)
    images = network.normalise(trial_images(network.shape, 2, network.device))
    other.model = other.tap.model = QuantizedModel(other.model, protocol, images, network.name)
    return other


# Files: the weights as they are in float, the ranges, and the protocol.


def stated(model: nn.Module) -> dict[str, Any]:
    """What a file of the weights of ``model`` has to state beside them: the protocol, if it is quantised."""
    return {"quantization": json.dumps(asdict(model.protocol))} if isinstance(model, QuantizedModel) else {}


def of_file(metadata: dict[str, Any], path: Any) -> Quantizer | None:
    """The protocol that the file ``path`` states; None if its network is in float. Raises InputError."""
    if "quantization" not in metadata:
        return None
    try:
        protocol = Quantizer(**json.loads(metadata["quantization"]))
        for opt in list_options(QuantizeConfig):
            if opt.section == "quantizer" and not opt.accepts(value := getattr(protocol, opt.name)):
                raise OptionError(f"{opt.name} cannot be {value!r}; it takes {opt.allowed}")
        protocol.validate()
    except Exception as error:  # of whatever stands there
        raise InputError(f"{path} states a quantization that this version does not know ({error})") from error
    return protocol


def split(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a :class:`QuantizedModel` as those of the model in it, by its own names, and its ranges."""
    ranges = {name: tensor for name, tensor in weights.items() if name.startswith(GRIDS)}
    return {name.removeprefix("model."): weights[name] for name in weights if name not in ranges}, ranges


def restored(network: "Network", protocol: Quantizer, grids: dict[str, Tensor], name: str) -> "Network":
    """``network``, with its weights, as it was quantised: on the grids of a file."""
    quantised = quantise(network, protocol, name)
    assert isinstance(quantised.model, QuantizedModel)
    quantised.model.load_grids(grids)
    quantised.notes.append(f"it is quantised, {protocol.sentence}")
    return quantised
