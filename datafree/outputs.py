"""What a network returns, read as the logits that the losses assume."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datafree.errors import InputError


def raw_logits(output: Any, model: nn.Module) -> Tensor:
    """The one tensor (N, classes) in what ``model`` returned; one output per image, (N,), becomes (N, 1).

    That is the tensor itself, the field or entry ``logits``, or the only matrix of a container. Raises InputError if
    there is none or if there are several.
    """
    found = _logits_in(output)
    if found is None or found.dim() not in (1, 2):
        raise _no_logits(_described(output), model)
    return found if found.dim() == 2 else found.unsqueeze(1)


def check_rows(raw: Tensor, count: int, model: nn.Module) -> None:
    """Raise InputError unless ``raw``, which ``model`` returned for ``count`` images, has a row for each of them."""
    if len(raw) != count or not raw.is_floating_point():
        raise _no_logits(f"{tuple(raw.shape)} of {raw.dtype} for {count} images", model)


def _no_logits(returned: str, model: nn.Module) -> InputError:
    return InputError(
        f"the network {type(model).__name__} must return logits as one tensor (N, classes), not {returned}"
        + " in training mode" * model.training
        + "; give a network, or a module around it, that returns the logits alone"
    )


def where_logits_are(output: Any) -> str:
    """In words, for a network that does not return a tensor: the field or entry that :func:`raw_logits` takes."""
    what = "the tensor 'logits'" if _named(output) is not None else "the only matrix"
    return f"its logits are {what} of its {type(output).__name__}"


def _named(output: Any) -> Any:
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def _logits_in(output: Any) -> Tensor | None:
    if torch.is_tensor(output):
        return output
    if torch.is_tensor(named := _named(output)):
        return named
    matrices = [part for part in _parts(output) if torch.is_tensor(part) and part.dim() == 2]
    return matrices[0] if len(matrices) == 1 else None


def _parts(output: Any) -> Iterator[Any]:
    if isinstance(output, Mapping):
        yield from output.values()
    elif isinstance(output, (tuple, list)):
        yield from output


def _described(output: Any) -> str:
    if torch.is_tensor(output):
        return str(tuple(output.shape))
    shapes = [str(tuple(part.shape)) for part in _parts(output) if torch.is_tensor(part)]
    return type(output).__name__ + (f" of tensors {', '.join(shapes)}" if shapes else "")


class Output(NamedTuple):
    """How the tensor that a network returns becomes logits.

    kind: logits (unchanged), probabilities (their logarithm, which is the logits up to a constant), costs (negative
    logarithms of probabilities, which are negated), logit (one output z is the logits 0, z of two classes) or
    probability (one output p of the second of two classes).
    """

    kind: str = "logits"

    def logits(self, raw: Tensor) -> Tensor:
        """(N, classes) of the network -> logits (N, classes), of two classes if the network has one output."""
        if self.kind == "logits":
            return raw
        if self.kind == "costs":
            return -raw
        if self.kind == "logit":
            return torch.cat([torch.zeros_like(raw), raw], 1)
        p = raw if self.kind == "probabilities" else torch.cat([1 - raw, raw], 1)
        # Half precision and autocast would lose small probabilities, and a logarithm of 0 would have no gradient.
        return p.float().clamp_min(torch.finfo(torch.float32).tiny).log()

    def classes(self, columns: int) -> int:
        """How many classes a network with that many outputs has."""
        return 2 if self.kind in ("logit", "probability") else columns

    @property
    def sentence(self) -> str:
        """What is converted, in words; empty for logits."""
        return {
            "logits": "",
            "probabilities": "it returns probabilities, whose logarithm is used as logits",
            "costs": "it returns negative logarithms of probabilities, which are negated to logits",
            "logit": "its one output z is used as the logits 0 and z of two classes",
            "probability": "its one output is used as the probability of the second of two classes",
        }[self.kind]


@torch.no_grad()
def recognise(raw: Tensor, extremes: Tensor | None, model: nn.Module) -> Output:
    """What ``model`` returns.

    raw: its outputs (N, classes) with their graph. extremes: its outputs (M, classes) for images far out of range, if
    there are any; without them only a graph that ends in a sigmoid shows that outputs in [0, 1] are no logits.

    Probabilities are non-negative, and their sum is the same for all images. Of costs exp(-cost) adds up to 1. So it
    does for rectified logits of two classes, 0 and a large one, hence either the graph must end in the negation of a
    value, or an image must have no cost near 0. Raises InputError for values in [0, 1] that are neither these nor
    logits, as sigmoids of several classes are.
    """
    values = raw if extremes is None else torch.cat([raw, extremes])
    rows, origin = values.float()[values.isfinite().all(1)], _origin(raw)
    possible = len(rows) > 0 and bool((rows >= 0).all() and rows.any()) and origin not in LINEAR
    bounded = possible and bool((rows <= 1).all()) and (extremes is not None or origin == "Sigmoid")
    if raw.shape[1] == 1:
        return Output("probability" if bounded else "logit")
    told_apart = origin in NEGATED or bool((rows.amin(1) > 5e-2).any())
    if possible and told_apart and bool(((-rows).exp().sum(1) - 1).abs().max() <= 5e-3):
        return Output("costs")  # before probabilities, because costs that hardly differ have equal sums
    sums = rows.sum(1)
    if possible and bool((sums - sums[0]).abs().max() <= 5e-3 * sums[0]):
        return Output("probabilities")
    if bounded:
        raise InputError(
            f"the network {type(model).__name__} returns values in [0, 1] that do not add up to 1, as sigmoids of "
            "several classes do; the losses need logits of exclusive classes, so return the input of the sigmoid"
        )
    return Output()


# Nodes of the graph: of what is negated to costs, of layers whose outputs nothing bounds, and of what may follow them.
NEGATED = {"Neg", "LogSoftmax"}
LINEAR = {"Addmm", "Mm", "Convolution", "NativeBatchNorm", "CudnnBatchNorm", "MkldnnConvolution", "Linear"}
FOLLOWING = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "ToCopy", "Mean", "Alias", "Clone", "Relu"}
FOLLOWING |= {"AdaptiveAvgPool2D", "AvgPool2D", "Select", "Slice", "Transpose", "Permute", "Mul", "Div", "Add", "Sub"}


def graph_of(output: Tensor) -> set[Any]:
    """The nodes of the graph through which the gradient of ``output`` flows back."""
    seen, nodes = set[Any](), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    return seen


def kind_of(node: Any) -> str:
    """What a node of a graph computes, such as Convolution."""
    return node.name().partition("Backward")[0]


def _origin(raw: Tensor) -> str:
    """The node of the graph that made the outputs, before they were at most pooled, rectified, scaled or shifted."""
    node = raw.grad_fn
    while node is not None:
        name = kind_of(node)
        parents = [parent for parent, _ in node.next_functions if parent and "AccumulateGrad" not in parent.name()]
        if name not in FOLLOWING or len(parents) != 1:
            return name
        node = parents[0]
    return ""
