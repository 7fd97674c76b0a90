"""ONNX files: the logits of torch in float32, integers in the quantised one, and a fair comparison of both."""

import json
import logging
import warnings
from types import SimpleNamespace

import nets
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.torch_version import TorchVersion

import registry
from datafree.config import Quantizer
from datafree.datasets.cards import DatasetCard
from datafree.datasets.splits import TensorSplit
from datafree.errors import InputError
from datafree.evaluators import evaluate
from datafree.exporting import comparison, packages
from datafree.exporting.comparison import compare
from datafree.exporting.integers import quantize_onnx, write_integers
from datafree.exporting.onnx_file import OnnxNetwork, write_onnx
from datafree.exporting.packages import PACKAGES, require_packages
from datafree.exporting.torch_files import ProgramNetwork, write_program, write_safetensors
from datafree.network import Network
from datafree.quantizer import quantise

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def settled(model, shape=(3, 16, 16)):
    """A network around ``model``, with statistics of BatchNorm that differ from their initial ones."""
    network = Network(model, shape, MEAN, STD, "student toy")
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.rand(32, *shape))
    return network.freeze()


def shaded(count, seed=0):
    """Smooth images (count, 3, 16, 16) that differ by much more than noise does."""
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=16, mode="bilinear")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A residual network with its two files, and the images that calibrated it."""
    folder = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    network, images = settled(nets.toy()), shaded(128)
    fp32, int8 = folder / "fp32.onnx", folder / "int8.onnx"
    write_onnx(network, fp32, metadata={"card": {"classes": ["a", "ä"]}, "options": "--method rgal"})
    protocol = quantize_onnx(fp32, int8, images.split(32))
    return SimpleNamespace(network=network, fp32=fp32, int8=int8, images=images, protocol=protocol)


def files_of(exported):
    return {"fp32": exported.fp32, "int8": exported.int8}


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def stored(path):
    """Name -> array of all that a file stores."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("count", [1, 7])
def test_a_file_gives_the_logits_of_torch_for_any_number_of_images(exported, count):
    images = shaded(count, seed=1)
    logits = exported.network(images)
    torch.testing.assert_close(OnnxNetwork(exported.fp32)(images), logits, atol=1e-5, rtol=1e-4)
    integer = OnnxNetwork(exported.int8)(images)
    assert integer.shape == logits.shape and (integer - logits).norm() < 0.05 * logits.norm()


def test_a_file_states_what_its_user_needs_and_no_path_of_this_machine(exported):
    stated = metadata(exported.fp32)
    assert json.loads(stated["card"])["classes"] == ["a", "ä"] and stated["options"] == "--method rgal"
    assert json.loads(stated["mean"]) == pytest.approx(MEAN) and json.loads(stated["shape"]) == [3, 16, 16]
    assert json.loads(stated["provenance"])["torch"] == torch.__version__
    assert metadata(exported.int8) == {**stated, "quantization": exported.protocol}
    for path in (exported.fp32, exported.int8):
        assert str(ROOT).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


def test_batch_norm_is_folded(exported):
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(exported.fp32).graph.node)


def test_weights_are_stored_once_as_symmetric_int8_with_a_scale_for_each_channel(exported):
    fp32, int8 = stored(exported.fp32), stored(exported.int8)
    weights = {name: array for name, array in fp32.items() if name.endswith("weight")}
    assert len(weights) == 6
    for name, weight in weights.items():
        quantised, scale = int8[f"{name}_quantized"], int8[f"{name}_scale"]
        assert quantised.dtype == "int8" and scale.shape == weight.shape[:1] and not int8[f"{name}_zero_point"].any()
        steps = weight / scale.reshape(-1, *[1] * (weight.ndim - 1))
        assert abs(quantised - steps).max() <= 0.501 and abs(quantised).max() == 127
    large = {name for name, array in int8.items() if array.dtype == "float32" and array.ndim > 1}
    assert large == {"mean", "std"}


def test_the_range_of_an_activation_is_that_of_the_calibration_images(exported):
    scales = [array for name, array in stored(exported.int8).items() if name.endswith("_scale") and not array.shape]
    network, seen = exported.network.copy(), []
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.max().item()))
    with torch.no_grad():
        network(exported.images)
    assert seen and all(any(255 * scale == pytest.approx(high, rel=1e-3) for scale in scales) for high in seen)


def test_the_range_of_the_normalised_images_is_that_of_all_images(exported):
    ends = exported.network.normalise(torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]))
    width = ends.max().clamp_min(0) - ends.min().clamp_max(0)
    assert stored(exported.int8)["div_scale"] == pytest.approx(width.item() / 255, rel=1e-5)


def test_the_protocol_states_what_onnxruntime_computes_with_integers(exported):
    assert exported.protocol.startswith("W8A8, int8 weights, symmetric, per channel, uint8 activations, per tensor")
    assert "of 128 images; integer: 5 QLinearConv, 2 QLinearAdd, 1 QGemm; float32: 1 Sub, 1 Div" in exported.protocol


def test_the_integer_file_means_what_the_standard_says(exported):
    images, model = shaded(8, seed=2), onnx.load(exported.int8)
    model.opset_import[0].version = 19  # the reference has these operators from then on
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, {"images": images.numpy()})
    found = OnnxNetwork(exported.int8)(images)
    assert (found - torch.from_numpy(expected)).norm() < 0.02 * found.norm()  # values between two levels


def test_what_follows_the_last_weights_stays_in_float32(tmp_path):
    network = settled(nets.Ends(lambda x: x.softmax(1)))
    write_onnx(network, tmp_path / "a.onnx")
    protocol = quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", [shaded(32)])
    integer, floating = protocol.partition("; float32: ")[::2]
    assert "Softmax" in floating and "Softmax" not in integer and "QGemm" in integer
    images = shaded(200, seed=1)
    logits = OnnxNetwork(tmp_path / "b.onnx")(images)
    assert (logits == logits.max(1, keepdim=True).values).sum() == len(images)  # no ties


def test_compare_measures_all_three_on_the_same_images(exported):
    labels = exported.network(exported.images).argmax(1)
    labels[:32] = (labels[:32] + 1) % 5
    split = TensorSplit((exported.images * 255).round().byte(), labels, 5)
    rows = compare(exported.network, files_of(exported), exported.images, split, repeats=2)
    assert list(rows) == ["torch", "fp32", "int8"]
    accuracy = evaluate(exported.network, split)["acc1"]
    assert rows["torch"]["acc1"] == rows["fp32"]["acc1"] == accuracy and 70 <= accuracy <= 80
    assert rows["torch"]["agreement"] == rows["fp32"]["agreement"] == 100 and rows["int8"]["agreement"] > 90
    assert rows["int8"]["bytes"] == exported.int8.stat().st_size and "bytes" not in rows["torch"]
    for row in rows.values():
        assert all(isinstance(value, (int, float)) for value in row.values())
        assert 0 < row["latency_ms_1"] and 0 < row["latency_ms_64"] and 0 <= row["latency_ms_1_iqr"]


def test_compare_without_a_test_set_leaves_the_network_as_it_was(exported):
    network = exported.network.copy().train()
    rows = compare(network, files_of(exported), exported.images[:3], repeats=1)
    assert network.training and "acc1" not in rows["torch"] and rows["torch"]["agreement"] == 100
    assert network.mean.grad_fn is None


def test_of_a_simulated_quantization_the_float_weights_are_exported(exported, tmp_path):
    student = quantise(exported.network, Quantizer(w_bits=3, a_bits=3))
    with student.model.observing():
        student(exported.images)
    write_onnx(student, tmp_path / "a.onnx")
    images = shaded(8, seed=1)
    torch.testing.assert_close(OnnxNetwork(tmp_path / "a.onnx")(images), OnnxNetwork(exported.fp32)(images))
    rows = compare(student, {"fp32": tmp_path / "a.onnx"}, exported.images, repeats=1)
    assert rows["torch"]["agreement"] == 100 > rows["fp32"]["agreement"]  # with the simulation, which 3 bits change


def test_the_runs_that_are_timed_take_turns(exported):
    calls = []
    runners = {"a": lambda x: calls.append("a"), "b": lambda x: calls.append("b")}
    times = comparison._alternating(runners, exported.images, repeats=3)
    assert calls == [*"aabb"] * 3 and [len(values) for values in times.values()] == [3, 3]


def test_export_is_quiet_and_changes_nothing(tmp_path, capfd):
    network = Network(nets.tiny(4), (3, 16, 16), MEAN, STD).train()
    before, state, handlers = network.state_dict(), torch.get_rng_state(), logging.root.handlers[:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_onnx(network, tmp_path / "a.onnx")
        quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", [shaded(8)])
    assert capfd.readouterr() == ("", "") and logging.root.handlers == handlers
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


class Sharing(nn.Module):
    """Nodes that share constants: a convolution called twice, and normalisations with equal parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, 5),
        )
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for norm in self.norms:
            x = self.again(norm(x).relu())
        return self.head(x.mean((2, 3)))


def test_an_integer_network_whose_nodes_share_constants_is_loaded(tmp_path):
    network, images = settled(Sharing()), shaded(64)
    (tmp_path / "student_fp32.onnx").write_text("of the user")
    student = quantise(network, Quantizer(w_bits=8, a_bits=8))
    protocol = write_integers(student, tmp_path / "int8.onnx", images.split(32))
    found, expected = OnnxNetwork(tmp_path / "int8.onnx")(images), network(images).detach()
    assert (found - expected).abs().max() < 0.1 * expected.abs().max() and "QLinearConv" in protocol
    assert (tmp_path / "student_fp32.onnx").read_text() == "of the user" and len(list(tmp_path.iterdir())) == 2


def test_a_grouped_transposed_convolution_stays_in_float(tmp_path):
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, groups=2), nn.ReLU())
    network, images = (
        settled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))),
        shaded(64),
    )
    write_onnx(network, tmp_path / "fp32.onnx")
    protocol = quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [images])
    found, expected = OnnxNetwork(tmp_path / "int8.onnx")(images), network(images).detach()
    assert (found - expected).abs().max() < 0.1 * expected.abs().max() and "1 ConvTranspose" in protocol


class Fourier(nets.Trunk):
    """Filters in the frequency domain, by complex numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filter", torch.randn(16, 16, dtype=torch.complex64))

    def forward(self, x):
        return super().forward(torch.fft.ifft2(torch.fft.fft2(x) * self.filter).real)


def test_complex_numbers_are_kept_or_refused(tmp_path):
    network, images = settled(Fourier()), shaded(4)
    write_program(network, tmp_path / "a.pt2")
    torch.testing.assert_close(
        ProgramNetwork(tmp_path / "a.pt2")(images), network(images).detach(), atol=1e-4, rtol=1e-3
    )
    with pytest.raises(InputError, match="because filter is of torch.complex64.*export it as onnx or pt2"):
        write_safetensors(network, tmp_path / "a.safetensors")


class Branching(nets.Trunk):
    def forward(self, x):
        return super().forward(x) if x.mean() > -5 else super().forward(-x)


class Looping(nets.Trunk):
    def forward(self, x):
        return torch.stack([self.fc(maps.mean((1, 2))) for maps in self.maps(x)])


class Random(nets.Trunk):
    def forward(self, x):
        return self.fc(nn.functional.dropout(self.maps(x).mean((2, 3)), 0.5, training=True))


@pytest.mark.parametrize(
    "model, message",
    [
        (Branching(), "cannot be exported .* without branches"),
        (Looping(), "its forward fixes the batch size"),
        (Random(), "other logits in onnxruntime .* random numbers"),
        (nets.Overflows(4), "non-finite logits; check its weights"),
    ],
    ids=["branch", "loop", "random", "overflow"],
)
def test_a_network_that_cannot_be_exported_is_one_sentence_and_writes_no_file(model, message, tmp_path):
    network = Network(model, (3, 16, 16), MEAN, STD, "student x")
    with pytest.raises(InputError, match=f"^the student x .*{message}.*$") as error:
        write_onnx(network, tmp_path / "a.onnx")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "no images to calibrate"),
        ([torch.rand(4, 3, 16, 16), torch.rand(4, 1, 16, 16)], r"images \(N, 3, 16, 16\), but .* \(4, 1, 16, 16\)"),
        ([torch.randint(255, (4, 3, 16, 16), dtype=torch.uint8)], "takes float images .* torch.uint8"),
        ([torch.randn(4, 3, 16, 16)], r"outside \[0, 1\]; give them without normalisation"),
        ([torch.full((4, 3, 16, 16), torch.nan)], r"outside \[0, 1\]"),
    ],
    ids=["none", "shape", "bytes", "normalised", "nan"],
)
def test_images_that_cannot_calibrate_are_one_sentence(batches, message, exported, tmp_path):
    with pytest.raises(InputError, match=message):
        quantize_onnx(exported.fp32, tmp_path / "int8.onnx", batches)
    assert not list(tmp_path.iterdir())


def test_other_files_and_images_are_one_sentence(exported, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"cannot read the ONNX file .*x.onnx"):
        quantize_onnx(tmp_path / "x.onnx", tmp_path / "y.onnx", [shaded(1)])
    with pytest.raises(InputError, match=r"cannot run .*x.onnx"):
        OnnxNetwork(tmp_path / "x.onnx")
    with pytest.raises(InputError, match=r"cannot run .*fp32.onnx .*dimensions"):
        OnnxNetwork(exported.fp32)(torch.rand(1, 3, 8, 8))


def test_a_missing_package_is_named_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "onnxruntime" else name)
    calls = (
        lambda: require_packages(),
        lambda: write_onnx(None, "a.onnx"),
        lambda: quantize_onnx("a.onnx", "b.onnx", []),
        lambda: OnnxNetwork("a.onnx"),
    )
    for call in calls:
        with pytest.raises(InputError, match="need onnxruntime; run .* -m pip install onnxruntime$"):
            call()


def test_too_old_a_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))
    require_packages(["pt2"])
    with pytest.raises(InputError, match=r"^onnx files need torch 2\.7 or newer, and this is 2\.6\.0\+cu124; upgrade"):
        require_packages()


def test_the_packages_are_those_of_the_requirements():
    lines = (ROOT / "requirements-export.txt").read_text().splitlines()
    assert {line.split()[0] for line in lines if not line.startswith("-r")} == set().union(*PACKAGES.values())


TORCHVISIONS = "resnet18 mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_x_400mf densenet121 vgg11_bn".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*registry.MODELS, *(f"torchvision:{name}" for name in TORCHVISIONS)])
def test_every_network_becomes_integers(name, tmp_path):
    side = 64 if ":" in name else 32
    network = Network.build(name, DatasetCard("x", 3, side, side, 10, MEAN, STD))
    write_onnx(network, tmp_path / "fp32.onnx")
    images = torch.rand(8, 3, side, side)
    protocol = quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", [images])
    floating = protocol.partition("; float32: ")[2]
    assert "Conv" not in floating and "Gemm" not in floating and "MatMul" not in floating
    assert OnnxNetwork(tmp_path / "int8.onnx")(images[:3]).shape == (3, 10)
