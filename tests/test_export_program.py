"""python -m datafree.export: each format gives the logits of torch, states its card, and is compared on images."""

import json
import zipfile
from pathlib import Path

import nets
import pytest
import torch
from conftest import ROOT, call, command
from test_docs import commands, python_blocks, texts
from test_options_read import unread

import datafree
from datafree import cli, export, registry
from datafree.config import ExportConfig
from datafree.datasets.cards import DatasetCard
from datafree.errors import InputError
from datafree.exporting import files, packages
from datafree.exporting.files import export_network
from datafree.exporting.integers import quantize_onnx
from datafree.exporting.torch_files import ProgramNetwork, write_program
from datafree.models.factory import build_model
from datafree.network import Network
from datafree.registry import get_dataset

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
safetensors = pytest.importorskip("safetensors")

ALL = ("--format", "onnx", "pt2", "safetensors")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def comparison(folder):
    return json.loads((Path(folder) / "comparison.json").read_text())


def run_onnx(path, images):
    return torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0])


def stated_in(path):
    """What an ONNX file states, by onnxruntime."""
    return onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map


@pytest.fixture(scope="module")
def weights(teacher, tmp_path_factory):
    """The trained ``tiny`` network in a file that names it as a registered network, so that it is known by its file."""
    registry.MODELS["tiny_of_the_tests"] = nets.tiny
    path = tmp_path_factory.mktemp("weights") / "digits.pth"
    torch.save({**torch.load(teacher, weights_only=True), "model": "tiny_of_the_tests"}, path)
    yield path
    del registry.MODELS["tiny_of_the_tests"]


@pytest.fixture(scope="module")
def exported(weights):
    """All formats of it, in the folder that they have without --out."""
    call(export, weights, *ALL, "--repeats", 1, "--threads", 1)
    return weights.with_name("digits_export")


@pytest.fixture
def digits():
    """Test images (355, 1, 16, 16) in [0, 1] and their labels."""
    return next(get_dataset("digits")[2].batches(1000))


def test_each_format_gives_the_logits_of_torch_with_the_normalisation_inside(exported, weights, digits):
    images, labels = digits
    state = torch.load(weights, weights_only=True)
    plain = nets.tiny(10, 1).eval()
    plain.load_state_dict(state["state_dict"])
    with torch.no_grad():  # by the network alone, which takes normalised images
        expected = plain((images - state["mean"][0]) / state["std"][0])
    program = torch.export.load(exported / "model.pt2").module()
    for count in (1, 7, 355):
        for found in (
            run_onnx(exported / "model.onnx", images[:count]),
            program(images[:count]),
            datafree.load(exported / "model.safetensors")(images[:count]),
        ):
            torch.testing.assert_close(found, expected[:count], atol=1e-5, rtol=1e-4)
    accuracy = 100 * (expected.argmax(1) == labels).float().mean().item()
    rows = comparison(exported)
    assert rows["images"] == "the 355 test images of digits"
    for name in ("torch", "model.onnx", "model.pt2", "model.safetensors"):
        assert rows[name]["difference"] < 1e-5 and rows[name]["agreement"] == 100
        assert rows[name]["acc1"] == pytest.approx(accuracy) and rows[name]["latency_ms_64"] > 0
        assert name == "torch" or rows[name]["bytes"] == (exported / name).stat().st_size


def test_each_format_states_card_and_provenance_and_no_path_of_this_machine(exported, weights):
    extra = {"card.json": ""}
    torch.export.load(exported / "model.pt2", extra_files=extra)
    with safetensors.safe_open(exported / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["datafree"])
    in_onnx = {key: json.loads(value) for key, value in stated_in(exported / "model.onnx").items() if value[0] in "[{"}
    in_pt2 = json.loads(extra["card.json"])
    for stated in (in_onnx, in_pt2, facts):
        assert stated["mean"] == pytest.approx([0.3051]) and stated["shape"] == [1, 16, 16]
        assert stated["provenance"]["version"] == datafree.__version__
    for training in (in_onnx["training"], in_pt2["training"], facts):
        assert training["acc1"] > 80 and training["options"]["dataset"] == "digits"
        assert training["options"]["model"] == "nets.py:tiny"
    assert in_pt2["model"] == facts["model"] == "tiny_of_the_tests"
    with zipfile.ZipFile(exported / "model.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    for part in [*contents, *((exported / f"model.{kind}").read_bytes() for kind in ("onnx", "safetensors"))]:
        assert str(ROOT).encode() not in part and b"site-packages" not in part


@pytest.mark.slow
def test_bytes_are_taken_as_cameras_give_them(exported, weights, digits, tmp_path):
    call(export, weights, "--format", "onnx", "pt2", "--input", "bytes", "--out", tmp_path, "--repeats", 1)
    images = digits[0][:5]
    given = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    expected = run_onnx(exported / "model.onnx", images)
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", given), expected, atol=1e-5, rtol=1e-4)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(given), expected, atol=1e-5, rtol=1e-4)
    assert stated_in(tmp_path / "model.onnx")["input"] == "images: uint8 (N, H, W, C) from 0 to 255"
    assert comparison(tmp_path)["model.pt2"]["agreement"] == 100


@pytest.mark.parametrize(
    "words, kind",
    [(("--epochs", 2), "pool"), (("--method", "dfq", "--epochs", 1), "generator, made now")],
    ids=["pool", "generator"],
)
def test_a_run_is_compared_on_its_own_images(words, kind, distil, capsys, tmp_path):
    folder = distil(*words, "--eval", "none")
    given = ("--model", nets.name("small"), "--images", "pool", "--threads", 1)
    call(export, folder, "--format", "safetensors", *given, "--repeats", 1)
    printed, rows = capsys.readouterr().out, comparison(folder / "export")
    assert rows["images"].endswith(f"images of the run's {kind}") and f"Compared on {rows['images']}." in printed
    assert rows["model.safetensors"]["difference"] == 0 and "acc1" not in rows["torch"]
    if kind == "pool":
        pool = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)["source"]["pool"]["images"]
        assert rows["images"].startswith(f"{len(pool)} ")


def test_without_test_images_and_a_run_the_images_are_noise_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    DatasetCard("shapes", 3, 12, 12, 4, MEAN, STD, classes=("a", "b", "c", "ä")).to_yaml("card.yaml")
    torch.save(nets.tiny(4).state_dict(), "net.pth")
    call(export, "net.pth", "--model", nets.name("tiny"), "--card", "card.yaml", "--format", "pt2", "--repeats", 1)
    printed = capsys.readouterr().out
    assert "The test set is not used, because it cannot be read: no test images of shapes" in printed
    assert "Compared on 64 images of noise." in printed
    stated = ProgramNetwork("net_export/model.pt2").card
    assert stated["classes"] == ["a", "b", "c", "ä"] and stated["model"] == "nets.py:tiny"


@pytest.fixture
def incremental(weights, tmp_path):
    """A file of weights as class-incremental learning leaves it after six of ten classes, and the order of these."""
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    state = torch.load(weights, weights_only=True)
    for name in ("4.weight", "4.bias"):
        state["state_dict"][name] = state["state_dict"][name][order]
    names = [f"digit {k}" for k in range(10)]
    torch.save({**state, "class_order": order, "seen": 6, "classes": names}, tmp_path / "model_last.pth")
    return tmp_path / "model_last.pth", order[:6]


def test_of_a_network_that_has_seen_some_classes_these_are_exported(incremental, digits, tmp_path, capsys):
    path, order = incremental
    call(export, path, "--format", "pt2", "safetensors", "--out", tmp_path, "--repeats", 1)
    assert "It has learned 6 of 10 classes" in capsys.readouterr().out
    images, labels = digits
    chosen = [k in order for k in labels.tolist()]
    program = ProgramNetwork(tmp_path / "model.pt2")
    logits = program(images[chosen])
    found = torch.tensor(order)[logits.argmax(1)] == labels[chosen]
    rows = comparison(tmp_path)
    assert logits.shape == (sum(chosen), 6) and rows["images"] == f"the {sum(chosen)} test images of digits"
    assert rows["model.pt2"]["acc1"] == pytest.approx(100 * found.float().mean().item())
    assert rows["model.safetensors"]["acc1"] == pytest.approx(rows["torch"]["acc1"])
    assert program.card["classes"] == [f"digit {k}" for k in order]
    loaded = datafree.load(tmp_path / "model.safetensors")
    assert loaded.num_classes == 10 and loaded.metadata["seen"] == 6  # as a later task needs it


@pytest.mark.slow
def test_a_quantised_student_becomes_an_integer_network_by_the_same_command(quantised, digits):
    folder = quantised("--w_bits", 8, "--a_bits", 8, length=("--epochs", 0, "--warmup", 1))
    words = ("--model", nets.name("tiny"), "--images", "test", "--repeats", 1)
    call(export, folder, "--format", "onnx", "safetensors", *words, "--tolerance", 0.5)
    rows, path = comparison(folder / "export"), folder / "export" / "model_int8.onnx"
    assert rows["model_int8.onnx"]["agreement"] > 80 and rows["model.safetensors"]["difference"] == 0
    assert "in the range of 2,048 images; integer: 2 QLinearConv" in stated_in(path)["quantization"]
    assert run_onnx(path, digits[0][:3]).shape == (3, 10) and not list(path.parent.glob("student*"))
    simulated = datafree.load(folder / "export" / "model.safetensors", nets.name("tiny"))
    assert torch.equal(simulated(digits[0]), datafree.load(folder, nets.name("tiny"))(digits[0]))


def test_a_quantised_student_has_no_other_files(quantised, refused):
    folder = quantised(length=("--epochs", 0, "--warmup", 1))
    for kind, reason in (
        ("pt2", "would have it in float"),
        ("onnx", "no integer kernel of onnxruntime has these bits"),
    ):
        line = refused(call, export, folder, "--model", nets.name("tiny"), "--format", kind)
        assert reason in line and "safetensors" in line
    assert not (folder / "export").exists()


def test_a_file_that_computes_something_else_is_found(weights, refused, tmp_path, monkeypatch):
    def spoiled(network, path, takes, program):
        other = network.copy()
        other.model[4].bias.data[0] += 1e-2
        write_program(other, path, takes)

    words = (weights, "--format", "pt2", "--out", tmp_path, "--repeats", 1)
    call(export, *words)
    good = (tmp_path / "model.pt2").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "model.pt2"]
    monkeypatch.setattr(files, "write_program", spoiled)
    line = refused(call, export, *words, code=1)
    assert "model.pt2 gives other logits than torch" in line and "above the tolerance of 0.0001" in line
    [left] = tmp_path.glob("unchecked-*")
    assert f"left in {left}:" in line and (left / "model.pt2").is_file()
    call(export, weights, "--format", "safetensors", *words[3:])
    assert (tmp_path / "model.pt2").read_bytes() == good and (left / "model.pt2").is_file()
    monkeypatch.setattr(files, "compare", lambda *_: 1 / 0)
    refused(call, export, *words, code=1)
    assert list(tmp_path.glob("unchecked-*")) == [left] and (tmp_path / "model.pt2").read_bytes() == good


def test_user_defined_weights_need_their_network(tmp_path, digits):
    network = Network(nets.tiny(10, 1), (1, 16, 16), (0.3,), (0.3,)).freeze()
    network.metadata = {"model": "/somewhere/net.py:tiny"}
    path = export_network(network, tmp_path, ["safetensors"])["model.safetensors"]
    with pytest.raises(InputError, match="states the model 'net.py:tiny', which is not a registered one; name the"):
        datafree.load(path)
    for model in (nets.name("tiny"), nets.tiny(10, 1)):
        assert torch.equal(datafree.load(path, model)(digits[0]), network(digits[0]))


def test_mistakes_are_one_sentence(weights, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "name the folder of a run" in refused(call, export, code=2)
    assert "one or more of onnx, pt2, safetensors" in refused(call, export, weights, "--format", "pt2", "onxx", code=2)
    line = refused(call, export, weights, "--format", "safetensors", "--input", "bytes", code=2)
    assert "--input has no effect because format is safetensors" in line
    assert "no file nowhere" in refused(call, export, "nowhere")
    assert "is in no run" in refused(call, export, weights, "--images", "pool")
    torch.save(nets.stubborn(1).state_dict(), tmp_path / "net.pth")
    line = refused(call, export, "net.pth", "--model", nets.name("stubborn"), "--dataset", "digits")
    assert "has 7 classes but digits has 10; name the right data set by --dataset" in line
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "safetensors" else name)
    line = refused(call, export, weights, *ALL)
    assert "safetensors files need safetensors; run " in line and " -m pip install safetensors" in line
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(weights, capsys, tmp_path):
    call(export, weights, "--out", tmp_path / "new", "--dry_run")
    assert capsys.readouterr().out.startswith("Plan: exporting the network tiny_of_the_tests in ")
    assert not (tmp_path / "new").exists()


def test_a_header_that_states_nonsense_is_one_sentence(tmp_path):
    from safetensors.torch import save_file

    save_file(nets.tiny(10, 1).state_dict(), tmp_path / "a.safetensors", {"datafree": "[1"})
    with pytest.raises(InputError, match="the header of .*a.safetensors states what this version does not know"):
        datafree.load(tmp_path / "a.safetensors", nets.name("tiny"))


def test_every_option_is_read(weights, teacher, tmp_path):
    words = ("--images", "noise", "--format", "pt2", "--repeats", 1, "--out", tmp_path)

    def run():
        call(export, weights, *words)
        call(export, teacher, *words, "--dataset", "digits", "--model", nets.name("tiny"))

    assert unread(ExportConfig, run) == set()


# What the pages show.

TEXTS = [export.EXAMPLES, *(text for _, text in texts())]
SHOWN = {words[3:] for text in TEXTS for words in commands(text) if words[1:3] == ("-m", "datafree.export")}


@pytest.mark.parametrize("words", sorted(SHOWN), ids=" ".join)
def test_a_shown_command_parses(words):
    cli.parse(ExportConfig, words, description="", first="weights")


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """A folder with the files that the pages name, of random weights."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "digits_rgal_resnet20_resnet8" / "seed0"
    (run / "checkpoints").mkdir(parents=True)
    facts = {"model": "resnet8", "dataset": "digits", "num_classes": 10, "shape": [1, 16, 16]}
    weights = {"state_dict": build_model("resnet8", 10, 1).state_dict(), "mean": [0.3], "std": [0.3]}
    torch.save(facts | weights, run / "checkpoints" / "model_last.pth")
    torch.save(build_model("cifar_resnet20", 10).state_dict(), tmp_path / "resnet20.th")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("words", sorted(SHOWN), ids=" ".join)
def test_a_shown_command_runs(words, shown):
    call(export, *words, "--repeats", 1, "--threads", 1)


@pytest.mark.slow
def test_the_blocks_of_the_page_run(shown, tmp_path):
    call(export, shown, *ALL, "--repeats", 1, "--threads", 1)
    quantised = tmp_path / "runs" / "digits_rgal_resnet8_w8a8" / "seed0" / "export"
    quantised.mkdir(parents=True)
    quantize_onnx(shown / "export" / "model.onnx", quantised / "model_int8.onnx", [torch.rand(8, 1, 16, 16)])
    for block in python_blocks("export.md"):
        found = {}
        exec(compile(block, "docs/export.md", "exec"), found)
        assert found["logits"].shape == (5, 10) if "logits" in found else found["rows"]["model.pt2"]["agreement"] == 100


# Networks of all kinds.


def exports(name, tmp_path, side=32):
    """Export a network called ``name`` with random weights by the command -> the rows of its comparison."""
    torch.manual_seed(0)
    DatasetCard("shapes", 3, side, side, 10, MEAN, STD).to_yaml(tmp_path / "card.yaml")
    torch.save(build_model(name, 10).state_dict(), tmp_path / "net.pth")
    given = ("--model", name, "--card", tmp_path / "card.yaml", "--images", "noise")
    call(export, tmp_path / "net.pth", *ALL, *given, "--repeats", 1, "--threads", 1)
    loaded = datafree.load(tmp_path / "net_export" / "model.safetensors")
    assert loaded(torch.rand(1, 3, side, side)).shape == (1, 10)
    return comparison(tmp_path / "net_export")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(registry.MODELS))
def test_every_registered_network_is_exported(name, tmp_path):
    rows = exports(name, tmp_path, side=16)
    assert rows["model.safetensors"]["difference"] == 0 and rows["model.onnx"]["agreement"] == 100


TORCHVISIONS = (
    "resnet18 mobilenet_v2 mobilenet_v3_small efficientnet_b0 regnet_x_400mf densenet121 mnasnet0_5 shufflenet_v2_x0_5 "
    "convnext_tiny squeezenet1_1 swin_t"
).split()
TIMMS = "resnet18d regnetx_002 mobilenetv3_small_100 convnext_atto test_vit".split()


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISIONS)
def test_torchvisions_networks_are_exported(name, tmp_path):
    exports(f"torchvision:{name}", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMMS)
def test_timms_networks_are_exported(name, tmp_path):
    pytest.importorskip("timm")
    exports(f"timm:{name}", tmp_path, side=160 if name == "test_vit" else 32)


@pytest.mark.slow
def test_a_pt2_file_needs_torch_alone(exported, tmp_path):
    code = f"""
import sys, torch
logits = torch.export.load({str(exported / "model.pt2")!r}).module()(torch.rand(3, 1, 16, 16))
print(tuple(logits.shape), any(name.startswith("datafree") for name in sys.modules))
"""
    done = command("-c", code, cwd=tmp_path)
    assert done.stdout == "(3, 10) False\n", done.stderr
