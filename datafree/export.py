"""A network as ONNX files: in float32, and as an integer network for onnxruntime, compared on the same images.

Needs the packages in requirements-export.txt, which are imported when a function is called.
"""

import io
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datafree.datasets.splits import Split
from datafree.errors import InputError
from datafree.evaluators import evaluate
from datafree.files import replacing, write_text
from datafree.logger import RunFolder, table
from datafree.network import Network
from datafree.plugins import first_line
from datafree.quantizer import QuantizedModel
from datafree.runtime import environment
from datafree.trial import trial_images

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # the exporter's own; int8 per channel needs 13
ERRORS = 3  # onnxruntime's level of messages
LINEAR = ["Gemm", "MatMul"]
WEIGHTED = [*LINEAR, "Conv", "ConvTranspose"]
# Operators that copy values as they are, whatever their type, or change the type.
MOVING = {"QuantizeLinear", "DequantizeLinear", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice"}
MOVING |= {"Pad", "Concat", "Split", "Gather", "Identity", "MaxPool", "Shape", "Cast", "Expand"}
BATCH_SIZES = (1, 64)  # of which the latency is measured
TOLERANCE = 1e-3  # between torch and onnxruntime, relative to the largest logit


def require_packages() -> None:
    """Raise InputError if a package is missing that the functions here need."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise InputError(
            f"ONNX files need {', '.join(missing)}; run {sys.executable} -m pip install {' '.join(missing)}, or with "
            "-r requirements-export.txt"
        )


def export_onnx(network: Network, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write ``network`` to ``path`` as float32 ONNX: ``images`` (N, C, H, W) in [0, 1] -> ``logits`` (N, classes).

    The normalisation is inside, N is any number, and BatchNorm is folded into the convolution before it. Of a network
    whose quantization is simulated, the weights are exported as they are in float32. The file is run and compared with
    torch before it is put in its place.

    metadata: stored as strings beside the network's shape, mean, std, number of classes and provenance; what is no
    string becomes JSON. Raises InputError for a network that cannot be exported.
    """
    require_packages()
    plain, images = _plain_copy(network), trial_images(network.shape, 2)
    try:
        with _quiet():
            program = torch.onnx.export(
                plain,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # a user-defined network may do anything
        raise InputError(
            f"the {network.name} cannot be exported to ONNX ({_reason(error)}); write its forward with "
            "torch's operators alone and without branches on the values of tensors"
        ) from error
    assert program is not None
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise InputError(
            f"the {network.name} cannot be exported to ONNX: its forward fixes the batch size, as a loop over images "
            "does; write it with operators on the whole batch"
        )
    _strip(model)
    _state(model, _described(network) | dict(metadata or {}))
    _check_agreement(plain, model.SerializeToString())
    _write(model, path)


def quantize_onnx(fp32_path: str | Path, int8_path: str | Path, batches: Iterable[Tensor]) -> str:
    """Write the integer version of the file of :func:`export_onnx` to ``int8_path``, and return its protocol in words.

    Weights are stored as int8, symmetric, with a scale for each output channel; biases as int32; activations become
    uint8, with the least and the largest value that the calibration images gave as their range; the range of the
    normalised images is that of [0, 1], which calibration images need not fill. Of onnxruntime's
    methods min-max was as accurate as entropy and percentiles on CIFAR-10's ResNet-20, and three to five times faster;
    int8 activations were as accurate, and four times slower to run. The outputs of linear layers stay in float32, as
    logits on 256 levels often have two equal maxima, and so does what follows the last layer with weights, such as a
    softmax. In words are: bits, calibration, and which operators onnxruntime computes with integers.

    batches: calibration images (N, C, H, W) in [0, 1], as the file takes them. Raises InputError.
    """
    require_packages()
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = _read(fp32_path)
    reader = _Reader(batches, _shape(model), fp32_path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _quiet():
                quantize_static(
                    model,
                    f"{folder}/int8.onnx",
                    reader,
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    activation_type=QuantType.QUInt8,
                    calibrate_method=CalibrationMethod.MinMax,
                    nodes_to_exclude=_after_the_weights(model),
                    extra_options={
                        "WeightSymmetric": True,
                        "OpTypesToExcludeOutputQuantization": LINEAR,
                        "TensorQuantOverrides": _ranges_of_normalisation(model),
                    },
                )
        except InputError:
            raise
        except Exception as error:  # of whichever operator it does not know
            raise InputError(f"onnxruntime cannot quantise {fp32_path} ({_reason(error)})") from error
        model, operators = _read(f"{folder}/int8.onnx"), _operators(f"{folder}/int8.onnx")
    protocol = (
        "W8A8, int8 weights, symmetric, per channel, uint8 activations, per tensor, in the range of "
        f"{reader.count:,} images; {operators}"
    )
    _strip(model)
    _state(model, {"quantization": protocol})
    _write(model, int8_path)
    return protocol


class OnnxNetwork:
    """An ONNX file of :func:`export_onnx` or :func:`quantize_onnx`, run by onnxruntime on the CPU.

    Called with images (N, C, H, W) in [0, 1], on any device, it returns logits (N, classes) on that device. It uses
    as many threads as torch does. file: its path or its contents.
    """

    def __init__(self, file: str | Path | bytes):
        require_packages()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = ERRORS
        contents = file if isinstance(file, bytes) else str(file)
        self._name = "the exported network" if isinstance(file, bytes) else file
        with self._readable():
            self._session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Tensor:
        with self._readable():
            (logits,) = self._session.run(["logits"], {"images": images.float().cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Inside, an error of onnxruntime, which has a class for each kind, becomes one sentence."""
        try:
            yield
        except Exception as error:
            raise InputError(f"onnxruntime cannot run {self._name} ({_reason(error)})") from error


@torch.no_grad()
def compare(
    network: Network,
    fp32_path: str | Path,
    int8_path: str | Path,
    images: Tensor,
    split: Split | None = None,
    repeats: int = 20,
) -> dict[str, dict[str, float]]:
    """Compare ``network`` in torch with the two files in onnxruntime, as rows ``torch``, ``fp32`` and ``int8``.

    network: what the files are compared with, such as the network that they come from or its simulation. images: (N,
    C, H, W) in [0, 1], for agreement and latency. repeats: of each latency.

    Each row has ``agreement`` (% of ``images`` to which ``network`` gives the same class), ``acc1`` (% on ``split``, if
    there is one), ``bytes`` (of the file; not in ``torch``), ``latency_ms_1`` and ``latency_ms_64`` (median time of a
    batch on the CPU, with the threads that torch uses; the runs take turns) and ``latency_ms_1_iqr`` and so on (their
    interquartile range).
    """
    files = {"fp32": Path(fp32_path), "int8": Path(int8_path)}
    runners: dict[str, Callable[[Tensor], Tensor]] = {key: OnnxNetwork(path) for key, path in files.items()}
    with network.frozen():
        runners = {"torch": network, **runners}
        classes = {
            key: torch.cat([runner(part).argmax(1) for part in images.split(BATCH_SIZES[-1])])
            for key, runner in runners.items()
        }
        rows = {
            key: {"agreement": 100 * (found == classes["torch"]).float().mean().item()}
            for key, found in classes.items()
        }
        if split:
            for key, runner in runners.items():
                rows[key]["acc1"] = evaluate(runner, split, name=f"{key} network")["acc1"]
        runners["torch"] = network.copy().to("cpu")
    for key, path in files.items():
        rows[key]["bytes"] = path.stat().st_size
    for size in BATCH_SIZES:
        batch = images[torch.arange(size) % len(images)].cpu()
        for key, times in _alternating(runners, batch, repeats).items():
            low, median, high = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            rows[key] |= {f"latency_ms_{size}": median, f"latency_ms_{size}_iqr": high - low}
    return rows


def write_integer_network(
    folder: RunFolder, teacher: Network, student: Network, batches: Iterable[Tensor], split: Split | None
) -> None:
    """Write ``student`` as an integer network into ``folder``, beside ``teacher`` in float32, and log how they compare.

    batches: calibration images, of which the first ones are compared on, too.
    """
    images, place = list(batches), folder.root / "onnx"
    place.mkdir(exist_ok=True)
    fp32, int8 = place / "fp32.onnx", place / "int8.onnx"
    in_float = place / "student_fp32.onnx"
    export_onnx(student, in_float)
    protocol = quantize_onnx(in_float, int8, images)
    in_float.unlink()
    export_onnx(teacher, fp32)
    rows = compare(student, fp32, int8, torch.cat(images[:4]), split)
    names = {"torch": "simulated, torch", "fp32": "teacher, fp32.onnx", "int8": "student, int8.onnx"}
    shown = [{"network": names[key], **{k: v for k, v in row.items() if "iqr" not in k}} for key, row in rows.items()]
    write_text(place / "comparison.json", json.dumps({"protocol": protocol, **rows}, indent=2) + "\n")
    folder.log(f"Integer network: {protocol}.")
    folder.log(f"It is in {int8}\n" + table(shown))


def _alternating(
    runners: Mapping[str, Callable[[Tensor], Tensor]], batch: Tensor, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of ``repeats`` passes of each runner, which take turns, so that other load meets all alike."""
    times: dict[str, list[float]] = {key: [] for key in runners}
    for _ in range(repeats):
        for key, runner in runners.items():
            runner(batch)  # fills the caches, and the threads of the one before go to sleep
            start = time.perf_counter()
            runner(batch)
            times[key].append(1000 * (time.perf_counter() - start))
    return times


def _plain_copy(network: Network) -> Network:
    """A frozen copy on the CPU in float32, in the plain memory layout, which the exporter translates the best."""
    plain = network.copy()
    if isinstance(plain.model, QuantizedModel):
        plain.model = plain.model.model
    plain._compiled_call_impl = None  # the exporter compiles by itself
    plain.trial.channels_last, plain.trial.dtype = False, torch.float32
    plain.to("cpu", torch.float32)
    plain.model.to(memory_format=torch.contiguous_format)
    return plain.freeze()


class _Reader:
    """Calibration images as onnxruntime asks for them; count: how many it got."""

    def __init__(self, batches: Iterable[Tensor], shape: tuple[int, ...], path: str | Path):
        self.batches, self.shape, self.path, self.count = iter(batches), shape, path, 0

    def get_next(self) -> dict[str, Any] | None:
        images = next(self.batches, None)
        if images is None:
            if not self.count:
                raise InputError("there are no images to calibrate the ranges of the activations; give some")
            return None
        if images.shape[1:] != self.shape or not images.is_floating_point():
            raise InputError(
                f"{self.path} takes float images (N, {', '.join(map(str, self.shape))}), but the calibration images "
                f"are {tuple(images.shape)} of {images.dtype}"
            )
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise InputError("the calibration images have values outside [0, 1]; give them without normalisation")
        self.count += len(images)
        return {"images": images.detach().float().cpu().numpy()}


@contextmanager
def _quiet() -> Iterator[None]:
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


def _reason(error: Exception) -> str:
    """The first line of what an exporter's error was raised from."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


def _check_agreement(network: Network, contents: bytes) -> None:
    images = trial_images(network.shape, 3)  # another number than it was exported with
    with torch.no_grad():
        expected = network(images)
    if not expected.isfinite().all():
        raise InputError(f"the {network.name} gives non-finite logits; check its weights and its input mean and std")
    difference = (OnnxNetwork(contents)(images) - expected).abs().max() / expected.abs().max().clamp_min(1e-9)
    if not difference <= TOLERANCE:
        raise InputError(
            f"the {network.name} gives other logits in onnxruntime than in torch, by {difference:.1e} of the largest; "
            "does it draw random numbers in evaluation mode, or depend on the other images of a batch?"
        )


def _described(network: Network) -> dict[str, Any]:
    """What a user of the file must know of the network, and where the file comes from."""
    provenance = environment(torch.device("cpu"))
    return {
        "network": network.name,
        "shape": network.shape,
        "num_classes": network.num_classes,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "provenance": {key: provenance[key] for key in ("commit", "dirty", "torch", "time")},
    }


def _state(model: Any, metadata: Mapping[str, Any]) -> None:
    """Store ``metadata`` in an ONNX model beside what is there."""
    import onnx

    stated = {entry.key: entry.value for entry in model.metadata_props if not entry.key.startswith("onnx.")}
    for key, value in metadata.items():
        stated[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    onnx.helper.set_model_props(model, stated)


def _strip(model: Any) -> None:
    """Drop what does not affect the outputs: traces of the exporter, with paths of this machine, and inner shapes."""
    graph = model.graph
    for part in [graph, *graph.node, *graph.initializer, *graph.input, *graph.output]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")


def _after_the_weights(model: Any) -> list[str]:
    """Names of the nodes that no layer with weights depends on, without these layers."""
    needed, after = set[str](), list[str]()
    for node in reversed(model.graph.node):
        if node.op_type in WEIGHTED or needed.intersection(node.output):
            needed.update(node.input)
        else:
            after.append(node.name)
    return after


def _ranges_of_normalisation(model: Any) -> dict[str, list[dict[str, Any]]]:
    """The ranges of what an exported model computes of its images in [0, 1] by constants alone, by tensor."""
    import onnx

    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    operators = {"Sub": np.subtract, "Div": np.divide, "Add": np.add, "Mul": np.multiply}
    bounds, found = {"images": np.array([0.0, 1.0]).reshape(2, 1, 1, 1)}, {}
    for node in model.graph.node:
        if node.op_type in operators and node.input[0] in bounds and node.input[1] in constants:
            ends = operators[node.op_type](bounds[node.input[0]], constants[node.input[1]])
            bounds[node.output[0]] = ends
            found[node.output[0]] = [{"rmin": np.float32(ends.min()), "rmax": np.float32(ends.max())}]
    return found


def _operators(path: str | Path) -> str:
    """In words, which operators onnxruntime computes with integers in the file ``path``, and which in float32."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = _read(f"{folder}/optimised.onnx").graph.node
    kinds = Counter(node.op_type for node in nodes if node.op_type not in MOVING)
    words = {kind: f"{count} {kind}" for kind, count in kinds.items()}
    integer = [word for kind, word in words.items() if kind.startswith("Q")]
    floating = [word for kind, word in words.items() if not kind.startswith("Q")]
    return f"integer: {', '.join(integer) or 'none'}; float32: {', '.join(floating) or 'none'}"


def _shape(model: Any) -> tuple[int, ...]:
    """(C, H, W) of the images that an exported model takes."""
    return tuple(size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim[1:])


def _read(path: str | Path) -> Any:
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:  # a file of arbitrary bytes fails in arbitrary ways
        raise InputError(f"cannot read the ONNX file {path} ({_reason(error)})") from error


def _write(model: Any, path: str | Path) -> None:
    with replacing(path) as beside:
        beside.write_bytes(model.SerializeToString())
