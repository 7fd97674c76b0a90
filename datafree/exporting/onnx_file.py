"""A network as an ONNX file in float32, and any ONNX file of this package run by onnxruntime."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datafree.errors import InputError
from datafree.exporting.metadata import as_texts, described
from datafree.exporting.packages import require_packages
from datafree.exporting.tracing import Program, quiet, reason, require_agreement, to_bytes, traced
from datafree.files import replacing
from datafree.network import Network
from datafree.quantizer import QuantizedModel

OPSET = 18  # the exporter's own; int8 per channel needs 13
ERRORS = 3  # onnxruntime's level of messages
# Of a session of onnxruntime: no sum of two products of 8 bits exceeds the 16 bits in which x64 CPUs without VNNI add
# them. Other CPUs have no such sums, and ignore it.
PRECISE = ("session.x64quantprecision", "1")


def write_onnx(
    network: Network,
    path: str | Path,
    takes: str = "floats",
    metadata: Mapping[str, Any] | None = None,
    program: Program | None = None,
) -> None:
    """Write ``network`` to ``path`` as float32 ONNX: ``images``, as ``takes`` names them -> ``logits`` (N, classes).

    The normalisation is inside, N is any number, and BatchNorm is folded into the convolution before it. Of a network
    whose quantization is simulated, the weights are exported as they are in float32. The file is run and compared with
    torch before it is put in its place.

    takes: a key of :data:`datafree.exporting.tracing.INPUTS`. metadata: stored as strings beside the network's card
    and provenance; what is no string becomes JSON. program: the network traced, if it is already. Raises InputError for
    a network that cannot be exported.
    """
    require_packages()
    program = program or traced(network, takes)
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # of whichever operator it does not know
        other = "safetensors" if isinstance(network.model, QuantizedModel) else "pt2"
        raise InputError(
            f"the {network.name} cannot be written as ONNX ({reason(error)}); export it as {other}"
        ) from error
    assert exported is not None
    model = exported.model_proto
    strip(model)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    state(model, described(network, takes) | dict(metadata or {}))
    require_agreement(network, OnnxNetwork(model.SerializeToString()), "onnxruntime")
    write_model(model, path)


class OnnxNetwork:
    """An ONNX file of :func:`write_onnx` or :func:`datafree.exporting.integers.quantize_onnx`, run by onnxruntime.

    Called with images (N, C, H, W) in [0, 1], on any device, it returns logits (N, classes) on that device, whichever
    input the file takes. It runs on the CPU, with as many threads as torch. file: its path or its contents.
    """

    def __init__(self, file: str | Path | bytes):
        require_packages()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = ERRORS
        options.add_session_config_entry(*PRECISE)
        contents = file if isinstance(file, bytes) else str(file)
        self._name = "the exported network" if isinstance(file, bytes) else file
        with self._readable():
            self._session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
            self._takes_bytes = self._session.get_inputs()[0].type == "tensor(uint8)"

    def __call__(self, images: Tensor) -> Tensor:
        given = to_bytes(images) if self._takes_bytes else images.float()
        with self._readable():
            (logits,) = self._session.run(["logits"], {"images": given.cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Inside, an error of onnxruntime, which has a class for each kind, becomes one sentence."""
        try:
            yield
        except Exception as error:
            raise InputError(f"onnxruntime cannot run {self._name} ({reason(error)})") from error


def state(model: Any, metadata: Mapping[str, Any]) -> None:
    """Store ``metadata`` in an ONNX model beside what is there."""
    import onnx

    stated = {entry.key: entry.value for entry in model.metadata_props if not entry.key.startswith("onnx.")}
    onnx.helper.set_model_props(model, stated | as_texts(metadata))


def strip(model: Any) -> None:
    """Drop what does not affect the outputs: traces of the exporter, with paths of this machine, and inner shapes."""
    graph = model.graph
    for part in [graph, *graph.node, *graph.initializer, *graph.input, *graph.output]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")


def read_model(path: str | Path) -> Any:
    """The ONNX model in the file ``path``; raises InputError if it holds none."""
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:  # a file of arbitrary bytes fails in arbitrary ways
        raise InputError(f"cannot read the ONNX file {path} ({reason(error)})") from error


def write_model(model: Any, path: str | Path) -> None:
    """Write an ONNX model to the file ``path``."""
    with replacing(path, after="") as beside:
        beside.write_bytes(model.SerializeToString())
