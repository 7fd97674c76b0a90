"""A network is tried once, before anything is computed, with the inputs and modes of the run.

It is taken as it is: the trial finds out which inputs it takes and what it returns, changes nothing that it did not
find to work, and leaves weights, buffers, modes and random states as they were. What fails is one sentence with its
cause.
"""

import copy
import inspect
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from datafree import distributed
from datafree.determinism import nondeterministic_operations
from datafree.errors import InputError
from datafree.outputs import Output, check_rows, graph_of, kind_of, raw_logits, recognise, where_logits_are
from datafree.plugins import first_line
from datafree.runtime import load_rng_state, rng_state

HALF = (torch.float16, torch.bfloat16)
AVX2_FLOATS = 8  # in a register
TRIED_SEED = 7_654_321  # which nobody's network sets
COPYING = {"Clone", "Alias", "ToCopy"}  # nodes of the graph that give what they are given
OTHER_SIZES = (32, 28, 64, 96, 128, 224, 256, 299, 384)  # that a network may have been made for


@dataclass
class Trial:
    """What the trial in evaluation mode found out.

    dtype, channels_last: of the inputs. output: how the returned tensor is read. gradient: why no gradient reaches the
    images; empty if it does. nondeterministic: operations on its way that no GPU repeats exactly. repeatable: whether
    the output for an image is always the same, whatever else is in its batch. normalises: whether it shifts or scales
    the images by constants before anything else. notes: sentences for the plan.
    """

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    output: Output = Output()
    gradient: str = ""
    nondeterministic: list[str] = field(default_factory=list)
    repeatable: bool = True
    normalises: bool = False
    notes: list[str] = field(default_factory=list)


@contextmanager
def unchanged(model: nn.Module, eager: bool = True) -> Iterator[None]:
    """Inside, ``model`` may be run in any mode; afterwards it and the random states are as they were.

    Weights, buffers, gradients, modes and plain attributes of all modules are restored. eager: whether networks that
    are compiled run as they are written inside, so that hooks see their parts.
    """
    state = rng_state()
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]
    tensors = [(t, t.detach().clone(), t.requires_grad) for t in tensors_of(model)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    try:
        with torch.compiler.set_stance("force_eager") if eager and "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        for module, values, buffers in attributes:
            vars(module).clear()
            vars(module).update(values)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value, wants_gradient in tensors:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                if tensor.is_leaf:
                    tensor.requires_grad_(wants_gradient)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        load_rng_state(state)


@contextmanager
def on_trial(model: nn.Module) -> Iterator[None]:
    """:func:`unchanged`, in evaluation mode, with gradients by the images alone. Raises InputError for TorchScript."""
    refuse_script(model)
    with unchanged(model), torch.enable_grad():
        evaluation_mode(model)
        model.requires_grad_(False)
        yield


def trial_images(shape: Sequence[int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """``count`` images (count, C, H, W) of noise in [0, 1], the same each time, whatever the random state."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, *shape, generator=generator).to(device)


def layout(channels_last: bool) -> torch.memory_format:
    """The memory format of images: views have one of their own, which is not the network's."""
    return torch.channels_last if channels_last else torch.contiguous_format


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def device_of(model: nn.Module) -> torch.device:
    """Where its tensors are; the CPU if it has none."""
    return next((tensor.device for tensor in tensors_of(model)), torch.device("cpu"))


def input_dtype(model: nn.Module) -> torch.dtype:
    """The type of the images that ``model`` is given: that of its first weight."""
    return next((tensor.dtype for tensor in tensors_of(model) if tensor.is_floating_point()), torch.float32)


def refuse_script(model: nn.Module) -> None:
    """Raise InputError for TorchScript, which cannot be hooked."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            what = f"its part '{name}' is" if name else "it is"
            raise InputError(
                f"the network {type(model).__name__} cannot be used: {what} a TorchScript module, whose features and "
                "BatchNorm statistics cannot be read; give the Python class that it was made from"
            )


def independent_copy(model: nn.Module, role: str) -> nn.Module:
    """A copy of ``model`` with memory of its own; raises InputError if there can be none. role: for messages."""
    memo: dict[int, Any] = {}
    detach_results(model, memo)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # an attribute of a user's class may be anything
        raise InputError(
            f"the {role} {type(model).__name__} cannot be copied ({first_line(error)}); give a network without "
            "open files, locks and generators in its attributes"
        ) from error


def detach_results(model: nn.Module, memo: dict[int, Any]) -> None:
    """Let ``memo`` of a deepcopy have the results of operations that modules keep, which torch does not copy."""
    for module in model.modules():
        for kept in vars(module).values():
            for value in kept if isinstance(kept, (list, tuple)) else (kept,):
                if torch.is_tensor(value) and not value.is_leaf:  # such as weight_norm's weight
                    memo[id(value)] = value.detach()


def materialise(model: nn.Module, shape: Sequence[int]) -> None:
    """Give lazy layers their shapes, by one pass on images of ``shape`` (C, H, W), before weights are loaded."""
    if any(map(nn.parameter.is_lazy, tensors_of(model))):
        evaluation_mode(model)
        with torch.no_grad():
            run(model, torch.zeros(2, *shape))


def evaluation_mode(model: nn.Module) -> None:
    """``model.eval()``, of which nothing is expected to return."""
    try:
        model.eval()
    except Exception as error:  # as of exported programs
        raise InputError(
            f"the network {type(model).__name__} has no evaluation mode ({first_line(error)}); give the Python class "
            "that it was made from"
        ) from error


def run(model: nn.Module, images: Tensor, forward: Callable[[Tensor], Any] | None = None) -> Any:
    """What ``model``, or ``forward`` that calls it, returns for ``images`` (N, C, H, W).

    Raises InputError if it fails, with the likeliest cause.
    """
    try:
        return (forward or model)(images)
    except InputError:
        raise
    except Exception as error:  # a user-defined network may raise anything
        mode = "training" if model.training else "evaluation"
        raise InputError(
            f"the network {type(model).__name__} fails on images of {images.shape[1]} channels and "
            f"{images.shape[2]}x{images.shape[3]} pixels in {mode} mode ({first_line(error)}){_remedy(model, images)}"
        ) from error


def _remedy(model: nn.Module, images: Tensor) -> str:
    """What to change, if the network takes other images than these."""
    count, channels, height, width = images.shape
    if _required(model.forward) > 1:
        return "; give a network, or a module around it, whose forward takes the images alone"
    if _takes(model, images.detach()):  # without a gradient, so that it is not the images
        return ""
    if _takes(model, torch.rand_like(images)):
        return (
            "; it takes values from 0 to 1 alone: if it normalises the images itself, state that by --teacher_mean 0 "
            "--teacher_std 1"
        )
    for other in (c for c in (1, 2, 3, 4) if c != channels):
        if _takes(model, images.new_zeros(count, other, height, width)):
            return f"; it takes images of {other} channels: correct the data card, or build it with in_channels"
    for side in (side for side in OTHER_SIZES if (side, side) != (height, width)):
        if _takes(model, images.new_zeros(count, channels, side, side)):
            return f"; it takes images of {side}x{side} pixels: build it for this size, or choose another network"
    return ""


def _required(forward: Callable[..., Any]) -> int:
    """The number of arguments that ``forward`` cannot do without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # of built-in code
        return 0
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


@torch.no_grad()
def _takes(model: nn.Module, images: Tensor) -> bool:
    try:
        model(images)
    except Exception:
        return False
    return True


@dataclass
class _Pass:
    """Outcome of one pass: the tensor (N, classes), and the gradient by the images or why there is none.

    overruns: whether training would overrun memory in channels_last, see :func:`_overruns`.
    """

    raw: Tensor
    returned: Any
    gradient: Tensor | None = None
    reason: str = ""
    overruns: bool = False
    normalises: bool = False


def _pass(model: nn.Module, images: Tensor, seed: int = 0) -> _Pass:
    """One forward and backward pass, in the type and layout of ``images``."""
    random.seed(seed)
    torch.manual_seed(seed)
    # Not a leaf, as views are not: the normalisation came before.
    images = images.detach().requires_grad_()
    given = images * 1
    returned = run(model, given)
    raw = raw_logits(returned, model)
    graph = graph_of(raw)
    found: dict[str, Any] = {"overruns": any(map(_overruns, graph)), "normalises": _normalises(graph, given.grad_fn)}
    if raw.requires_grad:
        try:
            _weighted_sum(raw).backward()
        except Exception as error:
            return _Pass(raw, returned, None, f"its backward pass fails ({first_line(error)})", **found)
    if images.grad is None:
        return _Pass(raw, returned, None, "its output is computed without a gradient", **found)
    return _Pass(raw, returned, images.grad, "", **found)


def _normalises(graph: Collection[Any], start: Any) -> bool:
    """Whether what reads the images, which the node ``start`` of a graph gives, shifts or scales them by constants."""
    readers = [node for node in graph if any(parent is start for parent, _ in node.next_functions)]
    if any(kind_of(node) in COPYING and _normalises(graph, node) for node in readers):
        return True
    alone = [node for node in readers if sum(parent is not None for parent, _ in node.next_functions) == 1]
    return any(kind_of(node) in ("Sub", "Rsub", "Add", "Div", "Mul") for node in alone)


def _overruns(node: Any) -> bool:
    """Whether this node of a graph is a convolution whose gradient by its weights overruns memory in channels_last.

    On a CPU with AVX2 and no AVX-512 that is so for strides over a 1x1 kernel with fewer channels of input than a
    register holds (https://github.com/uxlfoundation/oneDNN/issues/6035): processes crash, or weights go wrong.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX2" or node.name() != "ConvolutionBackward0":
        return False
    _, channels, *kernel = node._saved_weight.shape
    return channels < AVX2_FLOATS and node._saved_groups == max(kernel) == 1 and max(node._saved_stride) > 1


def try_backward(model: nn.Module, raw: Tensor) -> None:
    """A backward pass from the outputs ``raw`` of ``model``.

    Raises InputError if it fails, and in several processes if it computes BatchNorm again: what these exchange in a
    pass, they do not exchange then.
    """
    again: list[nn.Module] = []
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(lambda module, _: again.append(module)) for norm in norms]
    try:
        _weighted_sum(raw).backward()
    except Exception as error:
        raise InputError(
            f"the network {type(model).__name__} fails in the backward pass of its training ({first_line(error)})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if again and distributed.count() > 1:
        raise InputError(
            f"the network {type(model).__name__} computes BatchNorm again in the backward pass, as activation "
            "checkpointing does, which several processes cannot; switch that off in it, or start one process"
        )


def _weighted_sum(raw: Tensor) -> Tensor:
    """A scalar that depends on all outputs, also if they add up to 1."""
    return (raw.float() * (torch.linspace(-1, 1, raw.shape[1], device=raw.device) + 0.1)).sum()


def try_evaluation(model: nn.Module, images: Tensor) -> Trial:
    """Try ``model`` in evaluation mode on normalised fp32 ``images`` (3, C, H, W); its weights stay as they are.

    Afterwards the weights are in channels_last if that is what the network works with, as it does in its own layout.
    Raises InputError for what cannot be used.
    """
    trial, named = Trial(), {name for name, _ in model.named_parameters()}
    with on_trial(model):
        pair = images[:2]
        trial.dtype, first = _first_pass(model, pair)
        if made := [name for name, _ in model.named_parameters() if name not in named]:
            raise InputError(
                f"the network {type(model).__name__} makes {made[0]} in its forward pass, which neither files nor "
                "optimisers know; make it in __init__, or as a lazy layer such as nn.LazyLinear"
            )
        if trial.dtype != torch.float32:
            trial.notes.append(f"it is given images in {str(trial.dtype)[6:]}, the type of its weights")
        if not torch.is_tensor(first.returned):
            trial.notes.append(where_logits_are(first.returned))
        trial.normalises = first.normalises
        trial.gradient, trial.nondeterministic = first.reason, nondeterministic_operations(first.raw)
        check_rows(first.raw, len(pair), model)
        _try_layout(model, pair.to(trial.dtype), first, trial)
        _try_again(model, images.to(trial.dtype).contiguous(memory_format=layout(trial.channels_last)), first, trial)
        if torch.initial_seed() != TRIED_SEED:
            trial.notes.append(
                "[Alarm] its forward pass sets torch's seed, so that all that the run draws is the same each time; "
                "remove torch.manual_seed from it"
            )
        trial.output = _recognised(model, images.to(trial.dtype), first.raw)
        if trial.output.sentence:
            trial.notes.append(trial.output.sentence)
    return trial


def _first_pass(model: nn.Module, images: Tensor) -> tuple[torch.dtype, _Pass]:
    """The type of images that the network takes, its own first, and the pass with it."""
    own = input_dtype(model)
    try:
        return own, _pass(model, images.to(own))
    except InputError:
        if own != torch.float32:
            with suppress(InputError):
                return torch.float32, _pass(model, images)
        raise


def _try_layout(model: nn.Module, images: Tensor, first: _Pass, trial: Trial) -> None:
    """Turn weights and images to channels_last, which is faster, where that works and agrees with the plain layout."""
    if first.overruns:
        model.to(memory_format=torch.contiguous_format)  # whoever made it may have turned it
        trial.notes.append(
            "it runs in the plain memory layout, because on this CPU its strided 1x1 convolutions of fewer than "
            f"{AVX2_FLOATS} channels corrupt memory in channels_last (issue 6035 of oneDNN)"
        )
        return
    originals = [(tensor, tensor.data) for tensor in tensors_of(model)]
    try:
        model.to(memory_format=torch.channels_last)
        second = _pass(model, images.contiguous(memory_format=torch.channels_last))
        why = "" if _agree(first, second) else "it gives other outputs"
    except Exception as error:  # InputError of the pass, or of the conversion
        why = f"it fails ({first_line(error.__cause__ or error)})"
    if not why:
        trial.channels_last = True
        return
    for tensor, data in originals:
        tensor.data = data
    trial.notes.append(f"it runs in the plain memory layout, because in channels_last {why}")


def _agree(first: _Pass, second: _Pass) -> bool:
    if first.reason != second.reason or not is_close(first.raw, second.raw):
        return False
    if first.gradient is None or second.gradient is None:
        return True
    # As a whole: rounding decides which way gradients go at a ReLU's zero and at equal maxima.
    difference = (first.gradient - second.gradient).float().norm()
    return bool(difference <= 0.1 * first.gradient.float().norm()) or not first.gradient.isfinite().all()


def is_close(expected: Tensor, found: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of their type."""
    tolerance = 3e-2 if expected.dtype in HALF else 1e-3
    expected, found = expected.detach().float(), found.detach().float()
    scale = expected.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(found, expected, tolerance, tolerance * scale + 1e-9, equal_nan=True)


def _try_again(model: nn.Module, images: Tensor, first: _Pass, trial: Trial) -> None:
    """Ask twice: the output for an image must not change, nor depend on the rest of its batch."""
    pair = first.raw.detach()
    with torch.no_grad():
        torch.manual_seed(TRIED_SEED)
        random.seed(1)
        with suppress(Exception):  # of a network that takes no three images
            if is_close(pair, raw_logits(model(images), model)[: len(pair)]):
                return
        again = raw_logits(model(images[: len(pair)]), model)
    trial.repeatable = False
    if is_close(pair, again):
        trial.notes.append("its output for an image depends on the other images of the batch")
    else:
        trial.notes.append(
            "[Alarm] it gives different outputs for the same images in evaluation mode, which adds noise to what is "
            "learned from them; make its forward pass repeatable, such as by F.dropout(x, training=self.training)"
        )


def _recognised(model: nn.Module, images: Tensor, raw: Tensor) -> Output:
    """What the outputs are, by those for ordinary images and for extreme ones, which no bounded output follows."""
    rows = [raw[:0]]
    for scale in (-30.0, 1000.0):
        with torch.no_grad(), suppress(Exception):  # of a network that refuses them
            rows.append(raw_logits(model(scale * images[:2]), model))
    return recognise(raw, torch.cat(rows), model)
