"""What ``--deterministic`` cannot do on a GPU: the operations whose backward pass has no deterministic kernel there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from datafree.errors import InputError
from datafree.outputs import graph_of, kind_of

# Node of the graph -> the operation, of those that torch.use_deterministic_algorithms lists as raising an exception
# in the backward pass; what raises one in the forward pass fails in the trial of a network. Bilinear interpolation and
# replication padding are not among them: torch then composes both of other operations. Adaptive average pooling to size
# 1 is a mean.
OPERATIONS = {
    "AdaptiveAvgPool2D": "adaptive average pooling to a size other than 1",
    "AdaptiveMaxPool2D": "adaptive max pooling",
    "FractionalMaxPool2D": "fractional max pooling",
    "ReflectionPad1D": "reflection padding",
    "ReflectionPad2D": "reflection padding",
    "UpsampleLinear1D": "linear interpolation",
    "UpsampleBicubic2D": "bicubic interpolation",
    "UpsampleBilinear2DAa": "antialiased interpolation",
    "UpsampleBicubic2DAa": "antialiased interpolation",
    "GridSampler2D": "grid_sample",
}


def nondeterministic_operations(output: Tensor) -> list[str]:
    """The OPERATIONS, in words, through which the gradient of ``output`` flows back; its graph may be used up."""
    names = {kind_of(node) for node in graph_of(output)}
    return sorted({OPERATIONS[name] for name in names & OPERATIONS.keys()})


def require_deterministic(operations: Sequence[str], user: str, device: torch.device) -> None:
    """Raise InputError if torch is to be deterministic and has no such kernel for ``operations`` on ``device``.

    user: what needs the gradient of these, for the message.
    """
    if operations and device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        raise InputError(
            f"--deterministic is not possible with {user}: the backward pass of {' and '.join(operations)} has no "
            "deterministic kernel on a GPU; drop one of the two"
        )
