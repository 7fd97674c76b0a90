"""Where the stages and the head of a network are: what one traced forward pass shows.

A stage is the output of the last block of the trunk at one spatial size. Three kinds of output are read as maps:
(N, C, H, W), (N, H, W, C) as in Swin, and tokens (N, T, C) as in ViT, of which the first ones may belong to no place.
A network whose stem halves the image before its first block has no stage there, as in the released code.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datafree.errors import InputError, OptionError
from datafree.outputs import Output, check_rows, raw_logits
from datafree.trial import device_of, on_trial, run, trial_images

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
LARGE, LARGEST = 128, 512  # pixels at least, at which the last maps of the usual networks have several; and at most
MOST_PREFIX_TOKENS = 8
TOKEN_STAGES = 4


class Layout(NamedTuple):
    """How an output is read as maps (N, C, H, W). order: NCHW, NHWC or NTC. prefix: tokens that belong to no place."""

    order: str
    channels: int
    size: tuple[int, int]
    prefix: int = 0

    def read(self, x: Tensor) -> Tensor:
        """(N, C, H, W), without a copy."""
        if self.order == "NHWC":
            return x.permute(0, 3, 1, 2)
        if self.order == "NTC":
            return x[:, self.prefix :].transpose(1, 2).unflatten(2, self.size)
        return x


class Stage(NamedTuple):
    """name: of the module whose output it is. calls: (module, number) of the calls that give it, the last one that runs
    counts, because a network may skip blocks in training."""

    name: str
    layout: Layout
    calls: list[tuple[nn.Module, int]]


@dataclass(eq=False)
class Call:
    """One execution of a module: shapes, and how often it had run before. result: its output, of a layer with weights
    of its own. differentiable: whether the images' gradient passes through it."""

    module: nn.Module
    name: str
    number: int
    input: tuple[int, ...]
    output: tuple[int, ...]
    result: Tensor | None
    differentiable: bool


class Trace:
    """Every module call of ``model`` in evaluation mode on two images of ``shape`` (C, H, W), in order of completion.

    raw: what the network returned, (N, classes).
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], dtype: torch.dtype):
        self.model, self.shape, self.dtype = model, tuple(shape), dtype
        self.calls: list[Call] = []
        self._counts: dict[nn.Module, int] = {}
        self._names = {module: name for name, module in model.named_modules()}
        hooked = [module for module in self._names if not isinstance(module, torch.jit.ScriptModule)]
        images = trial_images(shape, 2, device_of(model)).to(dtype).requires_grad_()
        with on_trial(model):
            hooks = [module.register_forward_hook(self._record, with_kwargs=True) for module in hooked]
            try:
                self.raw = raw_logits(run(model, images * 1), model)
                check_rows(self.raw, len(images), model)
            finally:
                for hook in hooks:
                    hook.remove()

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        number = self._counts[module] = self._counts.get(module, -1) + 1
        given, output = first_tensor([*args, *kwargs.values()]), first_tensor(output)
        if given is not None and output is not None:
            own = has_weights(module, recurse=False) or output.dim() == 2
            self.calls.append(
                Call(
                    module,
                    self._names[module],
                    number,
                    tuple(given.shape),
                    tuple(output.shape),
                    output if own else None,
                    output.requires_grad,
                )
            )

    def larger(self) -> "Trace | None":
        """The same at a size at which maps of one pixel are those of pooled images; None if that is not possible."""
        channels, height, width = self.shape
        factor = -(-LARGE // min(height, width))
        if factor > 1 and factor * max(height, width) <= LARGEST:
            with suppress(InputError):
                return Trace(self.model, (channels, factor * height, factor * width), self.dtype)
        return None

    def forget(self) -> None:
        """Drop the tensors."""
        for call in self.calls:
            call.result = None


def first_tensor(output: Any) -> Tensor | None:
    """The output itself, or the first part of a tuple or list, as blocks return that pass something else along."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if torch.is_tensor(output) else None


def has_weights(module: nn.Module, recurse: bool = True) -> bool:
    """Whether the module has parameters, its children's included if ``recurse``."""
    return next(module.parameters(recurse), None) is not None


# ---------------------------------------------------------------- the head


def find_head(trace: Trace, output: Output) -> Call | None:
    """The call whose output is the logits, or becomes them class by class; its input is the embedding.

    So no other layer of that width misleads: of a hidden layer every output influences every class.
    """
    columns = trace.raw.shape[1]
    wide = [call for call in trace.calls if call.output[1:2] == (columns,) and call.result is not None]
    wide = [call for call in wide if any(p.dim() > 1 for p in call.module.parameters())]  # no normalisation
    for call in wide:  # of nested modules the innermost completes first
        if len(call.input) == 2 == len(call.output) and _equal(call.result, trace.raw):
            return call
    called = {call.module for call in trace.calls if has_weights(call.module)}
    layers = [call for call in wide if has_weights(call.module, recurse=False) and len(call.input) in (2, 4)]
    for call in reversed([call for call in layers if called.isdisjoint(list(call.module.modules())[1:])]):
        if _class_by_class(call, trace.raw, output):
            return call
    return None


def _equal(result: Tensor | None, raw: Tensor) -> bool:
    return result is not None and result.shape == raw.shape and bool(torch.equal(result, raw))


def _class_by_class(call: Call, raw: Tensor, output: Output) -> bool:
    """Whether the logits of two classes depend on these two channels of the call's output alone."""
    if call.result is None or not call.result.requires_grad or not raw.requires_grad or call.input == call.output:
        return False
    logits = output.logits(raw).float()
    if raw.shape[1] == 1:
        return bool(_influence(logits[:, 1], call.result).any())
    # Of all classes the highest, which a ReLU does not hide. A softmax adds the same to all, and so to no difference.
    first, second = logits.sum(0).topk(2).indices.tolist()
    if raw.shape[1] > 2:
        reached = _influence(logits[:, first] - logits[:, second], call.result).any(1).nonzero().flatten().tolist()
        return bool(reached) and set(reached) <= {first, second}
    influences = {k: _influence(logits[:, k], call.result) for k in (first, second)}
    alone = all(influence[k].any() and not influence[1 - k].any() for k, influence in influences.items())
    softmax = all(influence.any() and torch.allclose(influence[0], -influence[1]) for influence in influences.values())
    return alone or softmax


def _influence(logits: Tensor, result: Tensor) -> Tensor:
    """Gradient of a class's ``logits`` (N,) by the channels of ``result``, (channels, rest), without rounding."""
    gradient = None
    with suppress(RuntimeError):  # of reentrant checkpointing
        (gradient,) = torch.autograd.grad(logits.sum(), result, retain_graph=True, allow_unused=True)
    gradient = torch.zeros_like(result) if gradient is None else gradient
    channels = gradient.float().transpose(0, 1).flatten(1)
    return channels.where(channels.abs() > 1e-5 * channels.abs().max(), torch.zeros(()).to(channels))


# ---------------------------------------------------------------- layouts


def layout_of(call: Call, calls: Sequence[Call], shape: Sequence[int]) -> Layout | None:
    """How the output of a call is read as maps; None if it is none. shape: (C, H, W) of the images."""
    if len(call.output) == 4:
        _, a, b, c = call.output
        last = _fits((a, b), shape) and (not _fits((b, c), shape) or _channels_last(call, calls))
        return Layout("NHWC", c, (a, b)) if last else Layout("NCHW", a, (b, c))
    if len(call.output) == 3 and call.output[0] == 2 and (grid := _grid(call.output[1], shape)):
        prefix, size = grid
        return Layout("NTC", call.output[2], size, prefix)
    return None


def _fits(size: tuple[int, int], shape: Sequence[int]) -> bool:
    """Whether maps of this size have the proportions of the images, up to a pixel."""
    return abs(size[0] * shape[2] - size[1] * shape[1]) <= max(shape[1:])


def _grid(tokens: int, shape: Sequence[int]) -> tuple[int, tuple[int, int]] | None:
    """Number of tokens before those of a map, and its size, which has the images' proportions; None if none has."""
    found = []
    for prefix in range(min(MOST_PREFIX_TOKENS, tokens - 1) + 1):
        height = max(1, round(math.sqrt((tokens - prefix) * shape[1] / shape[2])))
        width, rest = divmod(tokens - prefix, height)
        if not rest and abs(height * shape[2] - width * shape[1]) < min(shape[1:]):
            found.append((abs(height * shape[2] - width * shape[1]), prefix, (height, width)))
    return min(found)[1:] if found else None


def _channels_last(call: Call, calls: Sequence[Call]) -> bool:
    """Whether a map whose shape does not tell has its channels last: by the layers that wrote it."""
    inside = set(call.module.modules())
    votes = [vote for c in calls if c.module in inside and (vote := _vote(c))]
    if not votes:  # such as an activation
        votes = [vote for c in reversed(calls[: calls.index(call)]) if (vote := _vote(c))][:1]
    return votes == ["NHWC"] * len(votes) and bool(votes)


def _vote(call: Call) -> str:
    if len(call.input) != 4:
        return ""
    if isinstance(call.module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
        return "NCHW"
    return "NHWC" if isinstance(call.module, (nn.LayerNorm, nn.Linear)) and len(call.output) == 4 else ""


# ---------------------------------------------------------------- the stages


class Candidate(NamedTuple):
    """A call of the trunk and how it is read. block: whether it has several layers with weights, or is part of such."""

    call: Call
    layout: Layout
    block: bool


def find_stages(trace: Trace, head: Call | None, names: Sequence[str], notes: list[str]) -> list[Stage]:
    """The stages of the traced network, those of the modules called ``names`` if there are any.

    notes: gets a sentence for what is left out.
    """
    if names:
        return [_named_stage(trace, name) for name in names]
    calls = _before(head, trace.calls)
    groups = _groups(trace, calls)
    if groups and any(_pixels(group[-1]) == 1 for group in groups):
        groups = _groups_of_larger(trace, head, groups)
    stages = [stage for group in groups for stage in _stages_of(group, len(groups) == 1)]
    if not stages and any(len(call.output) in (3, 4) and has_weights(call.module) for call in calls):
        notes.append("it has no stages: its maps or tokens cannot be told from its other tensors")
    return stages


def _named_stage(trace: Trace, name: str) -> Stage:
    """The stage that is the output of the module called ``name`` in its last call."""
    kind = type(trace.model).__name__
    modules = dict(trace.model.named_modules())
    if name not in modules:
        near = ", ".join(child for child in modules if child and child.count(".") <= name.count("."))
        raise OptionError(f"--teacher_stages: {kind} has no module '{name}'; it has {near[:300] or 'none'}")
    calls = [call for call in trace.calls if call.module is modules[name]]
    layout = layout_of(calls[-1], trace.calls, trace.shape) if calls else None
    if layout is None:
        shape = f"outputs {calls[-1].output}" if calls else "is not run, or not with tensors"
        raise OptionError(
            f"--teacher_stages: the module '{name}' of {kind} {shape}; name one that outputs feature maps"
        )
    return Stage(name, layout, [(calls[-1].module, calls[-1].number)])


def _groups(trace: Trace, calls: Sequence[Call]) -> list[list[Candidate]]:
    """The trunk's calls, and those that ``feature_info`` names instead in networks of timm, by spatial size."""
    if any(call.differentiable for call in calls):  # else nothing is, as in a quantised network
        calls = [call for call in calls if call.differentiable]
    listed = _listed_by_timm(trace, calls)
    groups: dict[tuple[int, int], list[Candidate]] = {}
    for candidate in listed or _trunk_calls(trace, calls):
        groups.setdefault(candidate.layout.size, []).append(candidate)
    learned = [group for group in groups.values() if listed or any(has_weights(c.call.module) for c in group)]
    return _without_stem(learned, trace.shape)


def _listed_by_timm(trace: Trace, calls: Sequence[Call]) -> list[Candidate]:
    """The calls that the network's own list of features names, if all of them are found."""
    for prefix, module in trace.model.named_modules():
        info = getattr(module, "feature_info", None)
        entries = getattr(info, "info", info)
        if isinstance(entries, list) and entries and all(isinstance(e, dict) and "module" in e for e in entries):
            found = [_call_named(f"{prefix}.{e['module']}" if prefix else e["module"], calls) for e in entries]
            read = [
                Candidate(c, layout, _is_block(c.module) or _is_in_block(trace.model, prefix, c.name))
                for c in found
                if c and (layout := layout_of(c, trace.calls, trace.shape))
            ]
            widths = [entry.get("num_chs") for entry in entries]
            return read if [c.layout.channels for c in read] == widths else []
    return []


def _call_named(name: str, calls: Sequence[Call]) -> Call | None:
    """The last call of the module called ``name``, or of its children, if it is a list of them."""
    of = {call.name: call for call in calls}
    children = [call for call in calls if call.name.rpartition(".")[0] == name]
    return of.get(name) or next(reversed(children), None)


def _is_in_block(model: nn.Module, root: str, name: str) -> bool:
    """Whether the module called ``name`` is part of a block of the network called ``root``."""
    above = name.split(".")[:-1]
    names = [".".join(above[:depth]) for depth in range(root.count(".") + 1 + bool(root), len(above) + 1)]
    return any(_is_block(part) and not _is_container(part) for part in map(model.get_submodule, filter(None, names)))


def _trunk_calls(trace: Trace, calls: Sequence[Call]) -> list[Candidate]:
    layouts = {call: layout_of(call, trace.calls, trace.shape) for call in calls}
    members = set(_trunk(trace.model, calls, layouts, trace))
    found = [
        Candidate(call, layout, _is_block(call.module))
        for call in calls
        if call.module in members and (layout := layouts[call])
    ]
    # Single layers that output tokens may be anything: of a side branch, or of the attention.
    return [c for c in found if c.layout.order != "NTC" or c.block]


def _trunk(
    module: nn.Module, calls: Sequence[Call], layouts: dict[Call, Layout | None], trace: Trace
) -> Iterator[nn.Module]:
    """Modules applied to the image one after the other: containers are opened, blocks are not.

    A module is opened if it is a plain container, if it does not map images to images, or if it
    downsamples by more than a factor of two, because then it holds several stages.
    """
    for child in module.children():
        own = [call for call in calls if call.module is child]
        if (
            own
            and not _is_container(child)
            and not _is_encoder(child, calls)
            and all(_within_one_scale(call, layouts[call], trace) for call in own)
        ):
            yield child
        else:
            yield from _trunk(child, calls, layouts, trace)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_encoder(module: nn.Module, calls: Sequence[Call]) -> bool:
    """Whether the module holds several blocks of one class that output tokens, as the encoder of a ViT does."""
    inside = list(module.modules())[1:]
    blocks = [
        call.module for call in calls if len(call.output) == 3 and call.module in inside and _is_block(call.module)
    ]
    return any(a is not b and type(a) is type(b) and not _is_container(a) for a in blocks for b in blocks)


def _within_one_scale(call: Call, output: Layout | None, trace: Trace) -> bool:
    if output is None or len(call.input) not in (3, 4):
        return False
    if len(call.input) == 3:
        grid = _grid(call.input[1], trace.shape)
        return grid is not None and grid[1][0] <= 2 * output.size[0] + 1
    last = output.order == "NHWC" and call.input[1:] != trace.shape
    return call.input[1 if last else 2] <= 2 * output.size[0] + 1


def _groups_of_larger(trace: Trace, head: Call | None, groups: list[list[Candidate]]) -> list[list[Candidate]]:
    """The groups that the network has for larger images, read at this size, of which several have maps of one pixel.

    There a map of one pixel is one behind the pooling, and no stage.
    """
    large = trace.larger()
    if large is None:
        return [group for group in groups if _pixels(group[-1]) > 1 or any(map(_shrinks, group))]
    here = {(call.module, call.number): call for call in _before(head, trace.calls)}
    found = []
    for group in _groups(large, _before(head, large.calls)):
        same = [c for c in group if (c.call.module, c.call.number) in here]
        if same and _pixels(same[-1]) > 1:
            found.append([_read_at(here[c.call.module, c.call.number], c, trace) for c in same])
    return found


def _before(head: Call | None, calls: Sequence[Call]) -> Sequence[Call]:
    """The calls that complete before the head's, in this trace or in one of another size."""
    if head is None:
        return calls
    return calls[: next((i for i, c in enumerate(calls) if (c.module, c.number) == (head.module, head.number)), None)]


def _read_at(call: Call, found: Candidate, trace: Trace) -> Candidate:
    """The call read in the order that was found at another size."""
    if found.layout.order == "NTC":
        layout = layout_of(call, trace.calls, trace.shape) or found.layout
    else:
        _, a, b, c = call.output
        layout = Layout("NHWC", c, (a, b)) if found.layout.order == "NHWC" else Layout("NCHW", a, (b, c))
    return Candidate(call, layout, found.block)


def _pixels(candidate: Candidate) -> int:
    return math.prod(candidate.layout.size)


def _shrinks(candidate: Candidate) -> bool:
    """Whether a layer with weights made one pixel of several."""
    given = candidate.call.input
    return has_weights(candidate.call.module) and len(given) == 4 and math.prod(given[2:]) > 1


def _without_stem(groups: list[list[Candidate]], shape: Sequence[int]) -> list[list[Candidate]]:
    """The groups without those of a stem that halves the images: before the first block, and before a quarter."""
    first = next((i for i, group in enumerate(groups) if any(c.block for c in group)), 0)
    large = [group for group in groups[:first] if group[0].layout.size[0] > shape[1] / 4 + 1]
    halved = any(group[0].layout.size[0] < shape[1] for group in large)
    return [group for group in groups if group not in large] if halved else groups


def _is_block(module: nn.Module) -> bool:
    """Whether the module has several layers with weights, unlike a convolution with its normalisation."""
    return not isinstance(module, nn.MultiheadAttention) and sum(isinstance(m, WEIGHTED) for m in module.modules()) > 1


def _stages_of(group: list[Candidate], alone: bool) -> Iterable[Stage]:
    """The last block of a group is its stage; of tokens of one size there are as many as other networks have."""
    nested = [c for c in group if next(c.call.module.children(), None) is not None]
    blocks = [c for c in group if c.block] or nested
    members = blocks or group
    ends = [len(members) - 1]
    if alone and members[-1].layout.order == "NTC":
        count = min(TOKEN_STAGES, len(members))
        ends = [math.ceil(len(members) * (k + 1) / count) - 1 for k in range(count)]
    start = 0
    for end in ends:
        last = members[end]
        alike = [c for c in members[start : end + 1] if c.layout == last.layout] if blocks else [last]
        yield Stage(last.call.name, last.layout, [(c.call.module, c.call.number) for c in alike])
        start = end + 1
