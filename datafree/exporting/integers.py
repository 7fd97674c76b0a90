"""A network as an integer network for onnxruntime: int8 weights, uint8 activations, by onnxruntime's own quantizer."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datafree.datasets.splits import Split
from datafree.errors import InputError
from datafree.exporting.comparison import compare, shown_rows
from datafree.exporting.onnx_file import ERRORS, PRECISE, OnnxNetwork, read_model, state, strip, write_model, write_onnx
from datafree.exporting.packages import require_packages
from datafree.exporting.tracing import quiet, reason, to_bytes
from datafree.files import write_text
from datafree.logger import RunFolder, table
from datafree.network import Network
from datafree.trial import trial_images

LINEAR = ["Gemm", "MatMul"]
WEIGHTED = [*LINEAR, "Conv", "ConvTranspose"]
# Operators that copy values as they are, whatever their type, or change the type.
MOVING = {"QuantizeLinear", "DequantizeLinear", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice"}
MOVING |= {"Pad", "Concat", "Split", "Gather", "Identity", "MaxPool", "Shape", "Cast", "Expand"}


def quantize_onnx(fp32_path: str | Path, int8_path: str | Path, batches: Iterable[Tensor]) -> str:
    """Write the integer version of a file of :func:`datafree.exporting.onnx_file.write_onnx` -> its protocol in words.

    Weights are stored as int8, symmetric, with a scale for each output channel; biases as int32; activations become
    uint8, with the least and the largest value that the calibration images gave as their range; the range of the
    normalised images is that of [0, 1], which calibration images need not fill. Of onnxruntime's
    methods min-max was as accurate as entropy and percentiles on CIFAR-10's ResNet-20, and three to five times faster;
    int8 activations were as accurate, and four times slower to run. The outputs of linear layers stay in float32, as
    logits on 256 levels often have two equal maxima, and so does what follows the last layer with weights, such as a
    softmax. In words are: bits, calibration, and which operators onnxruntime computes with integers.

    batches: calibration images (N, C, H, W) in [0, 1], whichever input the file takes. Raises InputError.
    """
    require_packages()
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = read_model(fp32_path)
    _unshare_constants(model)
    reader = _Reader(batches, model, fp32_path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with quiet():
                quantize_static(
                    model,
                    f"{folder}/int8.onnx",
                    reader,
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    activation_type=QuantType.QUInt8,
                    calibrate_method=CalibrationMethod.MinMax,
                    nodes_to_exclude=_in_float(model),
                    extra_options={
                        "WeightSymmetric": True,
                        "OpTypesToExcludeOutputQuantization": LINEAR,
                        "TensorQuantOverrides": _ranges_of_normalisation(model),
                    },
                )
        except InputError:
            raise
        except Exception as error:  # of whichever operator it does not know
            raise InputError(
                f"onnxruntime cannot quantise {fp32_path} ({reason(error)}); export the network as safetensors"
            ) from error
        model, operators = read_model(f"{folder}/int8.onnx"), _operators(f"{folder}/int8.onnx")
    protocol = (
        "W8A8, int8 weights, symmetric, per channel, uint8 activations, per tensor, in the range of "
        f"{reader.count:,} images; {operators}; for x64 CPUs without VNNI set {'='.join(PRECISE)} in the session's "
        "configuration, as their sums overflow without"
    )
    strip(model)
    state(model, {"quantization": protocol})
    if not OnnxNetwork(model.SerializeToString())(trial_images(reader.shape, 2)).isfinite().all():
        raise InputError(f"the integer network of {fp32_path} gives logits that are not finite; check its weights")
    write_model(model, int8_path)
    return protocol


def write_integers(student: Network, path: str | Path, batches: Iterable[Tensor], takes: str = "floats") -> str:
    """Write the quantised ``student`` as an integer network to ``path`` -> its protocol in words.

    batches: calibration images (N, C, H, W) in [0, 1]. takes: as of :func:`datafree.exporting.onnx_file.write_onnx`.
    """
    with tempfile.TemporaryDirectory() as folder:
        in_float = Path(folder) / "student_fp32.onnx"
        write_onnx(student, in_float, takes)
        return quantize_onnx(in_float, path, batches)


def write_integer_network(
    folder: RunFolder, teacher: Network, student: Network, batches: Iterable[Tensor], split: Split | None
) -> None:
    """Write ``student`` as an integer network into ``folder``, beside ``teacher`` in float32, and log how they compare.

    batches: calibration images, of which the first ones are compared on, too.
    """
    images, place = list(batches), folder.root / "onnx"
    place.mkdir(exist_ok=True)
    fp32, int8 = place / "fp32.onnx", place / "int8.onnx"
    protocol = write_integers(student, int8, images)
    write_onnx(teacher, fp32)
    rows = compare(student, {"fp32": fp32, "int8": int8}, torch.cat(images[:4]), split)
    names = {"torch": "simulated, torch", "fp32": "teacher, fp32.onnx", "int8": "student, int8.onnx"}
    write_text(place / "comparison.json", json.dumps({"protocol": protocol, **rows}, indent=2) + "\n")
    folder.log(f"Integer network: {protocol}.")
    folder.log(f"It is in {int8}\n" + table(shown_rows(rows, names)))


class _Reader:
    """Calibration images as onnxruntime asks for them; count: how many it got."""

    def __init__(self, batches: Iterable[Tensor], model: Any, path: str | Path):
        self.batches, self.path, self.count = iter(batches), path, 0
        self.shape, self.takes_bytes = _input(model)

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
        given = to_bytes(images) if self.takes_bytes else images.detach().float()
        return {"images": given.cpu().numpy()}


def _in_float(model: Any) -> list[str]:
    """Names of the nodes that stay in float: those that no layer with weights depends on, and those that onnxruntime
    computes in float all the same: BatchNorm on its own, and grouped transposed convolutions, on which it fails.
    """
    needed, names = set[str](), list[str]()
    for node in reversed(model.graph.node):
        is_needed = node.op_type in WEIGHTED or needed.intersection(node.output)
        if is_needed:
            needed.update(node.input)
        groups = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
        stays = node.op_type == "BatchNormalization" or node.op_type == "ConvTranspose" and groups > 1
        if not is_needed or stays:
            names.append(node.name)
    return names


def _unshare_constants(model: Any) -> None:
    """Give each node constants of its own: a session with PRECISE does not load integers that two nodes share."""
    constants, used = {tensor.name: tensor for tensor in model.graph.initializer}, set[str]()
    for number, node in enumerate(model.graph.node):
        for place, name in enumerate(node.input):
            if name in used:
                again = model.graph.initializer.add()
                again.CopyFrom(constants[name])
                again.name = node.input[place] = f"{name}.{number}.{place}"
            elif name in constants:
                used.add(name)


def _ranges_of_normalisation(model: Any) -> dict[str, list[dict[str, Any]]]:
    """The ranges of what an exported model computes of any images by constants alone, by tensor."""
    import onnx

    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    operators = {"Sub": np.subtract, "Div": np.divide, "Add": np.add, "Mul": np.multiply}
    brightest = 255.0 if _input(model)[1] else 1.0
    bounds, found = {"images": np.array([0.0, brightest]).reshape(2, 1, 1, 1)}, {}
    for node in model.graph.node:
        if node.input and node.input[0] in bounds and node.op_type in ("Cast", "Transpose"):
            bounds[node.output[0]] = bounds[node.input[0]]
        elif node.op_type in operators and node.input[0] in bounds and node.input[1] in constants:
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
        nodes = read_model(f"{folder}/optimised.onnx").graph.node
    kinds = Counter(node.op_type for node in nodes if node.op_type not in MOVING)
    words = {kind: f"{count} {kind}" for kind, count in kinds.items()}
    in_integers = [kind for kind in kinds if kind.startswith("Q") or "Integer" in kind]
    integer = [words[kind] for kind in in_integers]
    floating = [word for kind, word in words.items() if kind not in in_integers]
    return f"integer: {', '.join(integer) or 'none'}; float32: {', '.join(floating) or 'none'}"


def _input(model: Any) -> tuple[tuple[int, ...], bool]:
    """(C, H, W) of the images that an exported model takes, and whether it takes them as bytes, channels last."""
    import onnx

    kind = model.graph.input[0].type.tensor_type
    shape = tuple(size.dim_value for size in kind.shape.dim[1:])
    takes_bytes = kind.elem_type == onnx.TensorProto.UINT8
    return (shape[-1], *shape[:-1]) if takes_bytes else shape, takes_bytes
