"""The calls of a network that are quantised, found in one pass of it: of layers and of activation functions."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from datafree.errors import InputError
from datafree.outputs import graph_of, raw_logits
from datafree.trial import unchanged

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


# Functions whose results have no values but those of their arguments, or means of them, as far as rounding goes.
PASSING = set(
    "flatten view reshape permute transpose squeeze unsqueeze contiguous __getitem__ chunk split cat pad dropout "
    "identity expand repeat clone interpolate mean pixel_shuffle max_pool1d max_pool2d max_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d".split()
)


@dataclass
class Layer:
    """A call of a convolution or linear layer.

    name: of its module. axis, channels: of the output channels in its weight. numbers: in its weight. is_again: whether
    an earlier call has the same weight. in_float: whether its input is no rounded activation. norm: module of the
    BatchNorm that follows it, and could be folded into it.
    """

    name: str
    axis: int
    channels: int
    numbers: int
    is_again: bool = False
    in_float: bool = False
    norm: str = ""


@dataclass
class Sites:
    """All such calls of one pass, and the names of the modules that call activation functions, in their order.

    read_again: activations in place whose argument the network reads afterwards, instead of the result.
    last, last_activation: the layer that gives the logits, and the activation before it; others may be called later.
    numbers, of: how many numbers of the network's parameters make weights that are rounded, out of how many. in_float:
    names of the matrices among the others.
    """

    layers: list[Layer] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    read_again: set[int] = field(default_factory=set)
    last: int = 0
    last_activation: int = -1
    numbers: int = 0
    of: int = 0
    in_float: list[str] = field(default_factory=list)


class Calls(TorchFunctionMode):
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


class _Search(Calls):
    """Finds the :class:`Sites` of a network in one pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.sites, self.stack = model, Sites(), [""]
        self.entered = 0  # number of calls of modules
        self.outputs: list[tuple[Layer, Tensor]] = []
        self.made: list[tuple[Any, int]] = []  # of each layer, the node of its output and the activations before it
        self.used: dict[int, int] = {}  # output of a layer -> number of calls that it is given to
        self.replaced: dict[int, list[tuple[int, Tensor]]] = {}  # memory -> activations that were to be written there
        self.weights = set[frozenset[int]]()  # the parameters of each weight
        self.rounded: dict[int, Any] = {}  # activations, and what was made of them without leaving their grid, by id
        self.parameters = {_memory(parameter) for parameter in model.parameters()}

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
        in_float = id(args[0] if args else kwargs["input"]) not in self.rounded
        self.sites.layers.append(Layer(self.stack[-1], axis, weight.shape[axis], weight.numel(), is_again, in_float))
        self.weights.add(parameters)
        output = self._counted(func(*args, **kwargs), args, kwargs)
        self.made.append((output.grad_fn, len(self.sites.activations)))
        if func is not F.linear or output.dim() == 2:  # otherwise its channels are not those of a BatchNorm
            self.outputs.append((self.sites.layers[-1], output))
            self.used[id(output)] = 0
        return output

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor, in_place: bool) -> Tensor:
        self.sites.activations.append(self.stack[-1])
        result = self._counted(function(x), (x,), {})
        self.rounded.update({id(y): y for y in ((result, x) if in_place else (result,))})
        if in_place:
            self.replaced.setdefault(_memory(x), []).append((len(self.sites.activations) - 1, x))
        return result

    def norm(self, args: Any, kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        module = self.model.get_submodule(self.stack[-1])
        is_constant = isinstance(module, _BatchNorm) and _is_its_own(module, *args, **kwargs)
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
        result = self._counted(func(*args, **kwargs), args, kwargs, func)
        given = {id(tensor) for tensor in _tensors(args, kwargs)}
        if func.__name__ in PASSING and given and given <= self.rounded.keys():
            self.rounded.update({id(part): part for part in _tensors((result,), {})})
        return result

    def _counted(self, result: Any, args: Any, kwargs: Any, func: Any = None) -> Any:
        """``result`` of a call, which uses its arguments if it is of tensors (and no question, such as for a shape), or
        writes to them."""
        parts = result if isinstance(result, (list, tuple)) else (result,)
        if any(map(torch.is_tensor, parts)) or func is torch.Tensor.__setitem__:
            for tensor in _tensors(args, kwargs):
                if id(tensor) in self.used:
                    self.used[id(tensor)] += 1
                self.sites.read_again.update(number for number, _ in self.replaced.get(_memory(tensor), ()))
        return result

    def finish(self, raw: Tensor) -> Sites:
        """The sites; of activations those that a layer follows. raw: the network's output."""
        sites, graph = self.sites, graph_of(raw)
        if self.made:
            sites.activations = sites.activations[: self.made[-1][1]]
            of_logits = [number for number, (node, _) in enumerate(self.made) if node in graph]
            sites.last = max(of_logits, default=len(self.made) - 1)
            sites.last_activation = self.made[sites.last][1] - 1
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


def _is_its_own(
    module: _BatchNorm,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> bool:
    """Whether the arguments of a call of F.batch_norm are those that ``module`` has, and not computed from them."""
    own = (module.running_mean, module.running_var, module.weight, module.bias)
    given = (running_mean, running_var, weight, bias)
    is_constant = running_mean is not None and not training
    return is_constant and eps == module.eps and all(a is b for a, b in zip(own, given))


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
    sites = search.finish(raw)
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
