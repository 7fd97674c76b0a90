"""A network as a program of torch.export (pt2), which needs none of this package, and as safetensors, its weights."""

import io
import json
from pathlib import Path

import torch
from torch import Tensor

from datafree.checkpoint import FACTS, is_odd
from datafree.errors import InputError
from datafree.exporting.metadata import as_json, described, facts
from datafree.exporting.packages import require_packages
from datafree.exporting.tracing import Program, reason, require_agreement, to_bytes, traced
from datafree.files import replacing
from datafree.network import Network

CARD = "card.json"  # in a pt2 file: what it states of its network


def write_program(network: Network, path: str | Path, takes: str = "floats", program: Program | None = None) -> None:
    """Write ``network`` to ``path`` as a pt2 file: images, as ``takes`` names them -> logits (N, classes).

    Whoever has torch alone runs it by ``torch.export.load(path).module()``. takes, program: as of
    :func:`datafree.exporting.onnx_file.write_onnx`. Raises InputError for a network that cannot be exported.
    """
    program = program or traced(network, takes)
    contents = io.BytesIO()
    try:
        torch.export.save(program, contents, extra_files={CARD: as_json(described(network, takes))})
    except Exception as error:
        raise InputError(f"the {network.name} cannot be written as pt2 ({reason(error)}); export it as onnx") from error
    contents.seek(0)
    require_agreement(network, ProgramNetwork(contents), "torch.export")
    with replacing(path, after="") as beside:
        beside.write_bytes(contents.getvalue())


class ProgramNetwork:
    """A file of :func:`write_program`, run by torch on the CPU.

    Called with images (N, C, H, W) in [0, 1], on any device, it returns logits (N, classes) on that device, whichever
    input the file takes. card: what the file states.
    """

    def __init__(self, file: str | Path | io.BytesIO):
        found = {CARD: ""}
        try:
            self._module = torch.export.load(file, extra_files=found).module()
            self.card = json.loads(found[CARD])
        except Exception as error:  # a file of arbitrary bytes fails in arbitrary ways
            raise InputError(f"torch.export cannot read {file} ({reason(error)})") from error

    def __call__(self, images: Tensor) -> Tensor:
        given = images.float() if "float32" in self.card["input"] else to_bytes(images)
        with torch.no_grad():
            return self._module(given.cpu()).to(images.device)


def write_safetensors(network: Network, path: str | Path) -> None:
    """Write the weights of ``network`` to ``path`` as safetensors, with what :func:`datafree.load` needs beside them.

    The ranges of a quantised network are among the weights. Raises InputError for a network whose state is not of
    tensors alone.
    """
    require_packages(["safetensors"])
    from safetensors.torch import save

    tensors = network.model.state_dict()
    if others := [name for name, value in tensors.items() if not torch.is_tensor(value)]:
        raise InputError(
            f"the {network.name} cannot be written as safetensors, which hold tensors alone, and {others[0]} of its "
            "state is none; export it as onnx or pt2"
        )
    if odd := [name for name, tensor in tensors.items() if is_odd(tensor)]:
        raise InputError(
            f"the {network.name} cannot be written as safetensors that this package reads, because {odd[0]} is of "
            f"{tensors[odd[0]].dtype}, sparse or not there; export it as onnx or pt2"
        )
    # Copies, because safetensors take no two tensors that share their memory, nor any other layout.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path, after="") as beside:
        beside.write_bytes(save(own, {"format": "pt", FACTS: as_json(facts(network))}))
