"""A network as a graph of torch.export, for any number of images, and what the formats made of it share."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import Tensor, nn

from datafree.errors import InputError
from datafree.network import Network
from datafree.plugins import first_line
from datafree.quantizer import QuantizedModel
from datafree.trial import is_close, tensors_of, trial_images

TOLERANCE = 1e-3  # between torch and a file, relative to the largest logit: beyond it a file is not written
# What an exported network takes, by the value of --input.
INPUTS = {"floats": "images: float32 (N, C, H, W) in [0, 1]", "bytes": "images: uint8 (N, H, W, C) from 0 to 255"}
# Where the exporter found a node in the source, with paths of this machine.
ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")
Program = torch.export.ExportedProgram


class FromBytes(nn.Module):
    """``network`` for images as decoders and cameras give them: uint8 (N, H, W, C) -> logits (N, classes)."""

    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.permute(0, 3, 1, 2).float() / 255)


def to_bytes(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as uint8 (N, H, W, C)."""
    return (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def exact(images: Tensor) -> Tensor:
    """Images (N, C, H, W) in [0, 1], rounded to what bytes can hold, so that both inputs get the same ones."""
    return (images.float() * 255).round() / 255


def traced(network: Network, takes: str = "floats") -> Program:
    """The graph of ``network``, normalisation inside: what ``takes`` names in INPUTS -> logits (N, classes).

    It is traced as a frozen copy on the CPU in float32, for any N. Of a network whose quantization is simulated, the
    weights are those in float32. Raises InputError for a network that cannot be traced.
    """
    plain, images = plain_copy(network), trial_images(network.shape, 2)
    module, images = (plain, images) if takes == "floats" else (FromBytes(plain).eval(), to_bytes(images))
    try:
        program = _export(module, images, any_batch=True)
    except Exception as error:  # a user-defined network may do anything
        raise InputError(f"the {network.name} cannot be exported{_why(error, module, images)}") from error
    for node in program.graph.nodes:
        for key in ORIGINS:
            node.meta.pop(key, None)
    return program


def _export(module: nn.Module, images: Tensor, any_batch: bool) -> Program:
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    with quiet():
        try:
            return torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)
        except Exception:  # the analysis of the bytecode understands some networks that running them does not
            return torch.export.export(module, (images,), dynamic_shapes=shapes, strict=True)


def _why(error: Exception, module: nn.Module, images: Tensor) -> str:
    """The reason for a failure, and the way: what works for one number of images fails by that number alone."""
    try:
        _export(module, images, any_batch=False)
    except Exception:
        return (
            f" ({reason(error)}); write its forward with torch's operators alone and without branches on the values "
            "of tensors"
        )
    return ": its forward fixes the batch size, as a loop over images does; write it with operators on the whole batch"


def plain_copy(network: Network) -> Network:
    """A frozen copy on the CPU in float32, in the plain memory layout, which exporters translate the best."""
    plain = network.copy()
    if isinstance(plain.model, QuantizedModel):
        plain.model = plain.model.model
    plain._compiled_call_impl = None  # the exporter compiles by itself
    plain.trial.channels_last, plain.trial.dtype = False, torch.float32
    plain.to("cpu").float()
    plain._apply(lambda tensor: tensor.to(torch.complex64) if tensor.is_complex() else tensor)
    plain.model.to(memory_format=torch.contiguous_format)
    return plain.freeze()


def require_agreement(network: Network, run: Callable[[Tensor], Tensor], where: str) -> None:
    """Raise InputError unless ``run``, a file that ``where`` runs, gives the logits of ``network`` in float32.

    It is asked for another number of images than the network was traced with.
    """
    images = exact(trial_images(network.shape, 3))
    with torch.no_grad():
        expected = plain_copy(network)(images)
    if not expected.isfinite().all():
        raise InputError(f"the {network.name} gives non-finite logits; check its weights and its input mean and std")
    _require_same_in_float32(network, images, expected)
    difference = largest_difference(run(images), expected)
    if not difference <= TOLERANCE:
        raise InputError(
            f"the {network.name} gives other logits in {where} than in torch, by {difference:.1e} of the largest; "
            "does it draw random numbers in evaluation mode, or depend on the other images of a batch?"
        )


def _require_same_in_float32(network: Network, images: Tensor, expected: Tensor) -> None:
    """Raise InputError if a network of another type gives other logits than ``expected``, those of its copy."""
    numbers = [t for t in tensors_of(network.model) if t.is_floating_point() or t.is_complex()]
    if isinstance(network.model, QuantizedModel) or all(t.dtype == torch.float32 for t in numbers):
        return
    with torch.no_grad(), network.frozen():
        own = network(images.to(network.device)).cpu()
    if not is_close(own.to(network.trial.dtype), expected):
        raise InputError(
            f"the {network.name} gives other logits in float32, in which it would be exported, than as it is, by "
            f"{largest_difference(own, expected):.1e} of the largest; does its code depend on the type of its numbers?"
        )


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Of logits (N, classes), over the largest expected one."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing that exporter and quantiser print, log or warn of reaches the terminal."""
    handlers, disabled = logging.root.handlers[:], logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers  # logging.warning() adds one


def reason(error: Exception) -> str:
    """The first line of what an exporter's error was raised from."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)
