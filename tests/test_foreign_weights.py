"""Files of other programs: names, kinds, averages, weights that a factory brings, and what is stated of them."""

import json
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import torchvision
from conftest import scratch
from parts import CLASSES, SHAPE, make_card
from torch import nn

from datafree import checkpoint, formats
from datafree.datasets.cards import DatasetCard
from datafree.errors import InputError
from datafree.models import MODELS
from datafree.models.factory import build_model
from datafree.network import Network

CARD = make_card()
TINY = nets.name("tiny")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def trained(factory=nets.tiny):
    """A network whose statistics are not those of its initialisation."""
    model = factory(CLASSES)
    model(torch.rand(8, *SHAPE))
    return model.eval()


def behind(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def loaded(tmp_path, contents, model=TINY, **more):
    """The network called ``model`` with the weights in a file of these contents."""
    torch.save(contents, tmp_path / "net.pth")
    return Network.from_file(tmp_path / "net.pth", model, CARD, **more).eval()


def assert_equal_logits(network, model):
    images = torch.rand(4, *network.shape)
    torch.testing.assert_close(network.model(images), model(images))  # in another memory format


class Wrapped(nn.Module):
    """Holds the network, as the wrappers of Hugging Face and Lightning do."""

    def __init__(self, num_classes):
        super().__init__()
        self.inner = nets.tiny(num_classes)

    def forward(self, x):
        return self.inner(x)


# ---------------------------------------------------------------- names


EXTRA = {"total_ops": torch.zeros(1), "0.0.total_ops": torch.zeros(1), "loss.weight": torch.ones(4)}
LAYOUTS = {
    "lightning": lambda w: {"state_dict": behind("model.", w), "epoch": 3},
    "any prefix": lambda w: behind("nets.backbone.", w),
    "prefix and others beside it": lambda w: {"state_dict": {**behind("model.", w), "criterion.weight": torch.ones(4)}},
    "counters and heads": lambda w: {**w, **EXTRA},
    "numbers among the tensors": lambda w: {**w, "epoch": 3, "lr": 0.1},
    "extra state": lambda w: {**w, "0.0._extra_state": {"version": 1}},
    "wrappers within": lambda w: {f"_orig_mod.{n.replace('.', '.module.', 1)}": t for n, t in w.items()},
    "a prefix on most names": lambda w: {n if n.startswith("4.") else f"backbone.{n}": t for n, t in w.items()},
    "pruned": lambda w: {
        **{n: t for n, t in w.items() if n != "4.weight"},
        "4.weight_orig": w["4.weight"],
        "4.weight_mask": torch.ones_like(w["4.weight"]),
    },
    "whole numbers as keys beside them": lambda w: {**w, 0: torch.ones(2)},
    "an average in the same dict": lambda w: {
        **behind("model.", w),
        **behind("ema.", {n: t + 1 for n, t in w.items()}),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_is_loaded_from_names_beside_its_own(layout, tmp_path):
    model = trained()
    network = loaded(tmp_path, LAYOUTS[layout](model.state_dict()))
    assert_equal_logits(network, model)
    assert network.notes  # what was done is stated


def test_notes_name_what_was_taken_off_and_left_out(tmp_path):
    weights = trained().state_dict()
    [note] = loaded(tmp_path, behind("model.", weights)).notes
    assert note == "the prefix model. was taken off the names of its weights"
    [note] = loaded(tmp_path, {**weights, "total_ops": torch.zeros(1)}).notes
    assert note == "1 of its file's tensors left out: total_ops"
    assert not loaded(tmp_path, weights).notes


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_prefix_may_be_on_the_side_of_the_network(prefix, tmp_path):
    model = trained()
    torch.save(behind(prefix, model.state_dict()), tmp_path / "net.pth")
    wrapped = Wrapped(CLASSES).eval()
    notes = checkpoint.load_weights(wrapped, *checkpoint.read_weights(tmp_path / "net.pth")[:1], "net.pth")
    images = torch.rand(4, *SHAPE)
    assert torch.equal(wrapped(images), model(images)) and "the prefix inner. was put before" in notes[-1]


@pytest.mark.parametrize("model", [TINY, nets.name("lazy")])
def test_what_is_wrong_in_a_file_is_called_by_the_names_of_the_file(model, tmp_path):
    module = build_model(model, CLASSES)
    module(torch.rand(2, *SHAPE))
    weights = module.state_dict()
    first, norm = [name for name, tensor in weights.items() if tensor.dim() == 4 or name.endswith("running_var")][:2]
    wrong = {
        rf"model\.{first} is \(5, 5, 3, 3\)": {first: torch.zeros(5, 5, 3, 3)},
        rf"model\.{norm} is not finite": {norm: weights[norm] * torch.nan},
        rf"1 unexpected \(model\.{first}_too\)": {f"{first}_too": torch.ones(8, 8)},
    }
    for sentence, changes in wrong.items():
        with pytest.raises(InputError, match=sentence):
            loaded(tmp_path, behind("model.", {**weights, **changes}), model)
    assert (
        "left out: model.total_ops, model.loss.weight"
        in loaded(tmp_path, behind("model.", {**weights, **EXTRA}), model).notes[-1]
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_without_their_scales_are_refused(dtype, tmp_path):
    weights = trained().state_dict()
    contents = {**weights, "4.weight": weights["4.weight"].to(dtype), "4.weight_scale": torch.ones(1)}
    with pytest.raises(InputError, match="holds 4.weight as .*8.*, as the weights of a quantised network"):
        loaded(tmp_path, contents)


def test_one_of_several_files_of_weights_is_named(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "model-00001-of-00003.pth")
    with pytest.raises(InputError, match="is one of 3 files that hold a set of weights; join them"):
        Network.from_file(tmp_path / "model-00001-of-00003.pth", TINY, CARD)


def test_averages_one_level_below_and_mmengines_are_told(tmp_path):
    weights = trained().state_dict()
    [note] = loaded(tmp_path, {"model": weights, "ema": {"module": weights, "updates": 100}}).notes
    assert "averages over the training are under ema.module, which" in note
    named = {"steps": torch.tensor(5), **behind("module.", weights)}
    [note] = loaded(tmp_path, {"state_dict": weights, "ema_state_dict": named}).notes
    assert "if mmengine wrote it, these are the averages" in note and "ema_state_dict" in note


@pytest.mark.parametrize(
    "contents, said",
    [
        (b"<!DOCTYPE html><html>quota exceeded</html>", "is a web page: download the file itself"),
        (b"\xfd7zXZ\x00" + bytes(64), "compressed by xz"),
        (b"MATLAB 5.0 MAT-file" + bytes(200), "a MATLAB file"),
    ],
)
def test_whole_files_of_other_kinds_are_named(contents, said, tmp_path):
    (tmp_path / "net.pth").write_bytes(contents)
    with pytest.raises(InputError, match=said):
        Network.from_file(tmp_path / "net.pth", TINY, CARD)


@pytest.mark.parametrize("missing", ["4.bias", "0.1.running_var", "1.0.weight"])
def test_a_missing_weight_stays_an_error(missing, tmp_path):
    weights = {name: tensor for name, tensor in trained().state_dict().items() if name != missing}
    for contents in (weights, behind("model.", weights), {**weights, **EXTRA}):
        with pytest.raises(InputError, match=rf"1 tensors missing \({missing}\)"):
            loaded(tmp_path, contents)


@pytest.mark.parametrize("smaller, larger", [("cifar_resnet20", "cifar_resnet32"), ("wrn16_2", "wrn40_2")])
def test_a_deeper_network_whose_names_include_these_is_not_taken_for_this_one(smaller, larger, tmp_path):
    with pytest.raises(InputError, match=r"0 tensors missing \(none\), \d+ unexpected \(\w+1"):
        loaded(tmp_path, MODELS[larger](CLASSES).state_dict(), smaller)


def test_a_part_within_a_module_tells_of_another_network(tmp_path):
    weights = {**trained().state_dict(), "1.attention.weight": torch.ones(8, 8)}
    with pytest.raises(InputError, match=r"1 unexpected \(1.attention.weight\)"):
        loaded(tmp_path, weights)


def test_two_networks_in_one_file_are_not_guessed(tmp_path):
    teacher, student = trained(), trained()
    contents = {"state_dict": {**behind("teacher.", teacher.state_dict()), **behind("student.", student.state_dict())}}
    with pytest.raises(InputError, match="under teacher., student.; name one of them by --teacher_weights_key"):
        loaded(tmp_path, contents, role="teacher")
    assert_equal_logits(loaded(tmp_path, contents, key="student"), student)


# ---------------------------------------------------------------- averages


AVERAGES = {
    "timm": lambda raw, mean: {"state_dict": raw, "state_dict_ema": mean, "metric": 77.1},
    "torchvision": lambda raw, mean: {
        "model": raw,
        "model_ema": {"n_averaged": torch.tensor(3), **behind("module.", mean)},
    },
}


@pytest.mark.parametrize("program, key", [("timm", "state_dict_ema"), ("torchvision", "model_ema")])
def test_of_raw_and_averaged_weights_it_is_stated_which_were_taken(program, key, tmp_path):
    raw, mean = trained(), trained()
    contents = AVERAGES[program](raw.state_dict(), mean.state_dict())
    network = loaded(tmp_path, contents, role="student")
    assert_equal_logits(network, raw)
    assert f"averages over the training are under {key}, which --student_weights_key can name" in network.notes[0]
    assert_equal_logits(loaded(tmp_path, contents, key=key), mean)


def test_averaged_weights_alone_are_taken_and_stated(tmp_path):
    model = trained()
    network = loaded(tmp_path, {"model_ema": model.state_dict(), "epoch": 3})
    assert_equal_logits(network, model)
    assert "under model_ema, an average over the training" in network.notes[0]


def test_weights_under_an_unusual_key_are_named_by_it(tmp_path):
    model = trained()
    contents = {"best": {"weights": model.state_dict()}, "epoch": 3}
    with pytest.raises(InputError, match="holds no weights .* name their key by --weights_key"):
        loaded(tmp_path, contents)
    assert_equal_logits(loaded(tmp_path, contents, key="best.weights"), model)
    with pytest.raises(InputError, match="holds no weights under best.bias"):
        loaded(tmp_path, contents, key="best.bias")


# ---------------------------------------------------------------- names that their owner translates


def plain(weights):
    """Without the record of versions, as some programs write it."""
    return dict(weights)


def former_densenet(weights):
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", n): t for n, t in weights.items()}


def translated(model, contents, tmp_path):
    """Load the contents into ``model`` -> the notes."""
    torch.save(contents, tmp_path / "net.pth")
    weights, _ = checkpoint.read_weights(tmp_path / "net.pth")
    return checkpoint.load_weights(model, weights, "net.pth")


def assert_equal_states(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_the_former_names_of_densenet(tmp_path):
    def densenet():
        return torchvision.models.DenseNet(8, (2, 2), 8, num_classes=CLASSES)

    source, model = densenet(), densenet()
    assert translated(model, former_densenet(source.state_dict()), tmp_path) == [
        "DenseNet's former names were translated"
    ]
    assert_equal_states(model, source)


@pytest.mark.parametrize("record", [lambda w: w, plain, lambda w: behind("module.", w)], ids=["kept", "lost", "moved"])
def test_a_module_that_asks_for_the_version_of_its_file(record, tmp_path):
    """MNASNet raises an exception where there is none."""
    source, model = (build_model("mnasnet0_5", CLASSES) for _ in range(2))
    translated(model, record(source.state_dict()), tmp_path)
    assert_equal_states(model, source)


@pytest.mark.filterwarnings("ignore:A new version of MNASNet")
def test_a_module_that_replaces_its_parts_by_those_of_an_older_file(tmp_path):
    """The first version of MNASNet had a wider stem; the features are those of the parts that run."""
    source = torchvision.models.mnasnet0_5(num_classes=CLASSES)
    weights = source.state_dict()
    weights._metadata[""]["version"] = 1
    with pytest.raises(RuntimeError):
        source.load_state_dict(weights)  # it becomes one of the first version, which these weights do not fit
    assert source.layers[0].weight.shape[0] == 32
    torch.save(source.state_dict(), tmp_path / "net.pth")
    network = Network.from_file(tmp_path / "net.pth", "mnasnet0_5", make_card((3, 32, 32))).eval()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network.model(images), source.eval()(images))
    assert network.features(images).stages[0].shape[1] == network.tap.stage_channels[0]


def test_the_former_names_of_a_vision_transformer(tmp_path):
    """torchvision's MLPBlock translates them, if the record says that the file is older, or says nothing."""

    def vit():
        return torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=CLASSES)

    source, model = vit(), vit()
    former = {
        n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t
        for n, t in source.state_dict().items()
    }
    assert any("linear_2" in name for name in former)
    translated(model, behind("module.", former), tmp_path)
    assert_equal_states(model, source)


def test_a_former_name_of_a_weight_that_is_not_finite(tmp_path):
    source, model = (nn.Sequential(torchvision.models.vision_transformer.MLPBlock(4, 4, 0.0)) for _ in range(2))
    former = {
        name.replace("0.0.", "0.linear_1.").replace("0.3.", "0.linear_2."): t for name, t in source.state_dict().items()
    }
    former["0.linear_2.bias"][0] = torch.nan
    before = model[0][0].weight.clone()
    with pytest.raises(InputError, match="0.3.bias is not finite"):
        translated(model, former, tmp_path)
    assert torch.equal(model[0][0].weight, before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("forms", ["old to new", "new to old"])
def test_both_forms_of_weight_norm(forms, tmp_path):
    old, new = torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm
    first, second = (old, new) if forms == "old to new" else (new, old)
    source, model = (nn.Sequential(wrap(nn.Linear(3, 4)), nn.Linear(4, 2)) for wrap in (first, second))
    translated(model, source.state_dict(), tmp_path)
    assert torch.equal(model(torch.ones(1, 3)), source(torch.ones(1, 3)))


def test_a_module_whose_translation_fails_changes_nothing(tmp_path):
    class Strict(nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            raise ValueError("no such version")

    model, source = Strict(3, 2), nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(InputError, match="cannot be loaded into the model: no such version"):
        translated(model, source.state_dict(), tmp_path)
    assert torch.equal(model.weight, before)


def test_auxiliary_heads_in_a_file_are_left_out(tmp_path):
    source = torchvision.models.googlenet(num_classes=CLASSES, init_weights=False)
    model = build_model("googlenet", CLASSES)
    [note] = translated(model, source.state_dict(), tmp_path)
    assert re.match(r"20 of its file's tensors left out: aux1\.", note)
    assert torch.equal(model.fc.weight, source.fc.weight)


def test_weights_of_torchvisions_network_of_a_registered_name(tmp_path):
    weights = torchvision.models.resnet18(num_classes=CLASSES).state_dict()
    with pytest.raises(
        InputError, match="They are those of torchvision:resnet18, which is another network than resnet18"
    ):
        loaded(tmp_path, weights, "resnet18")
    assert not loaded(tmp_path, weights, "torchvision:resnet18").notes


def test_shufflenetv2_of_earlier_versions_is_named(tmp_path):
    weights = MODELS["shufflenetv2_torchvision"](CLASSES).state_dict()
    with pytest.raises(InputError, match="They are those of shufflenetv2_torchvision"):
        loaded(tmp_path, weights, "shufflenetv2")


# ---------------------------------------------------------------- files of another kind


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x)


def scripted(path):
    torch.jit.script(Plain()).save(path)


def exported(path):
    torch.export.save(torch.export.export(Plain(), (torch.zeros(2, 4),)), path)


def onnx(path):
    """The first fields of a ModelProto: ir_version 8, producer_name."""
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(50))


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/net.pth", b"weights")


def keras(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"")


def quantised(path):
    torch.save(torch.ao.quantization.quantize_dynamic(Plain(), {nn.Linear}).state_dict(), path)


KINDS = [
    (scripted, r"is a TorchScript archive.*torch.jit.load\(FILE\).state_dict\(\)"),
    (exported, r"is a program of torch.export.*torch.export.load\(FILE\).state_dict"),
    (onnx, r"is an ONNX model.*torch.save\(network.state_dict\(\), FILE\)"),
    (zipped, "is a zip archive of other files: unpack it"),
    (keras, "is a Keras model"),
    (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "is an HDF5 file"),
    (lambda path: path.write_text('{"weight_map": {}}'), "is a JSON text"),
    (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(99)), "is compressed by gzip: unpack it"),
    (lambda path: path.write_bytes(pickle.dumps({"w": 1})), "is a pickle that torch.save did not write"),
    (lambda path: np.savez(path.open("wb"), w=np.zeros(3)), "is an archive of NumPy arrays"),
    (quantised, "holds the weights of a quantised network .*before its quantisation"),
    (
        lambda path: torch.save(Plain(), path),
        r"contains a pickled .*Plain; refused.*the weights alone are .*network.state_dict\(\)",
    ),
]


class Conf:
    """Options of another program, in a class of its own."""

    def __init__(self):
        self.out = Path("runs")


REFUSED = {
    "hyper_parameters.out": lambda w: {"state_dict": w, "hyper_parameters": {"lr": 0.1, "out": Path("runs")}},
    "callbacks": lambda w: {"callbacks": [1, ({2}, Path("runs"))], "state_dict": w},
    "args": lambda w: {"state_dict": w, "args": Conf()},
    "history": lambda w: {"history": defaultdict(list, {"a": [1]}), "state_dict": w},
    "optimizer.decay": lambda w: {"state_dict": w, "optimizer": OrderedDict(decay=partial(max, 1))},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("entry", REFUSED)
def test_the_entry_of_a_checkpoint_that_is_refused_is_named(entry, zipped, tmp_path):
    contents = REFUSED[entry](trained().state_dict())
    torch.save(contents, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"contains a pickled [\w.]+ in its entry {entry}; refused, nothing was exec"):
        checkpoint.load(tmp_path / "net.pth")


def test_a_pickle_is_looked_through_without_its_classes(tmp_path):
    """Only names are read: no module is imported, and what calls itself a class of the file is none."""
    for name in ("nowhere.Thing", "os.system"):
        module, _, attribute = name.rpartition(".")
        pickled = b"\x80\x02}X\x01\x00\x00\x00ac" + f"{module}\n{attribute}\n".encode() + b"X\x01\x00\x00\x001\x85Rs."
        with zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
            archive.writestr("net/data.pkl", pickled)
            archive.writestr("net/version", "3")
        assert formats.entry_with(tmp_path / "net.pth", name) == "a"
        assert formats.entry_with(tmp_path / "net.pth", "another.Thing") == ""
    (tmp_path / "net.pth").write_bytes(b"no pickle")
    assert formats.entry_with(tmp_path / "net.pth", "os.system") == ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write, sentence", KINDS)
def test_a_whole_file_of_another_kind_is_not_called_broken(write, sentence, tmp_path):
    path = tmp_path / "net.pt"
    write(path)
    with pytest.raises(InputError, match=sentence) as refusal:
        checkpoint.read_weights(path)
    assert "truncated" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "net.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match="no torch checkpoint .*git lfs pull"):
        checkpoint.read_weights(tmp_path / "net.pth")


def test_safetensors_by_any_name(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    content = len(header).to_bytes(8, "little") + header + np.array([1, 2], np.float32).tobytes()
    (tmp_path / "net.bin").write_bytes(content)
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="needs the package safetensors"):
            checkpoint.read_weights(tmp_path / "net.bin")
    else:
        assert checkpoint.read_weights(tmp_path / "net.bin")[0]["w"].tolist() == [1, 2]


# ---------------------------------------------------------------- weights that a factory brings


BRINGS = """
from pathlib import Path

import nets
import torch

FILE = Path(__file__).with_name("net.pth")


def loaded(num_classes):
    model = nets.tiny(num_classes)
    model.load_state_dict(torch.load(FILE))
    return model


def hub(pretrained=False, num_classes=4):
    return loaded(num_classes) if pretrained else nets.tiny(num_classes)


def weights(*, weights=None, **kwargs):
    return hub(weights == "DEFAULT", **{"num_classes": 4, **kwargs})


def states(num_classes):
    model = loaded(num_classes)
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": [0.3, 0.3, 0.3], "input_size": (3, 224, 224)}
    return model


def random(num_classes):
    return nets.tiny(num_classes)


def half(num_classes):
    model = loaded(num_classes)
    model[-1] = torch.nn.Linear(16, num_classes)
    return model
"""


@pytest.fixture
def brings(tmp_path):
    """The path of a file of factories, and the network whose weights they bring."""
    model = trained()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    (tmp_path / "brings.py").write_text(BRINGS)
    return f"{tmp_path}/brings.py", model


@pytest.mark.parametrize("factory", ["loaded", "hub", "weights"])
def test_a_factory_may_bring_its_weights(factory, brings):
    path, model = brings
    network = Network.build(f"{path}:{factory}", CARD, pretrained=True).eval()
    assert_equal_logits(network, model)
    assert network.notes == ["its weights are those that the model brings"]


@pytest.mark.parametrize("factory, tensors", [("random", "0.0.weight"), ("half", "2 of 16 tensors .*4.weight, 4.bias")])
def test_random_weights_are_not_taken_for_those_of_a_factory(factory, tensors, brings):
    with pytest.raises(InputError, match=f"does not bring all its weights.*{tensors}.*name a file"):
        Network.build(f"{brings[0]}:{factory}", CARD, pretrained=True)


def test_torchvisions_weights_bring_their_normalisation_and_their_classes(monkeypatch):
    """Without a download: the weights of its address are random here."""
    weights = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(weights))
    for name in ("torchvision:squeezenet1_1", "squeezenet1_1"):
        network = Network.build(name, make_card((3, 32, 32)), pretrained=True)
        assert network.num_classes == 1000 and torch.equal(
            network.model.classifier[1].bias, weights["classifier.1.bias"]
        )
        assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_a_registered_model_brings_no_weights():
    with pytest.raises(InputError, match="resnet8 has no weights of its own; name a file"):
        Network.build("resnet8", CARD, pretrained=True)


def test_a_teacher_with_its_own_weights_is_distilled(distil, teacher, tmp_path):
    """As with its file, to the last digit."""
    text = BRINGS.replace('Path(__file__).with_name("net.pth")', repr(str(teacher)))
    text = text.replace(
        "model.load_state_dict(torch.load(FILE))", 'model.load_state_dict(torch.load(FILE)["state_dict"])'
    )
    (tmp_path / "brings.py").write_text(text.replace("nets.tiny(num_classes)", "nets.tiny(num_classes, 1)"))
    own = ("--teacher", f"{tmp_path}/brings.py:loaded", "--teacher_weights", "own")
    folder = distil("--epochs", 1, *own)
    assert "The teacher brings-loaded: its weights are those that the model brings." in (folder / "log.txt").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    by_file = json.loads((distil("--epochs", 1, tag="file") / "summary.json").read_text())
    assert summary["last_acc1"] == by_file["last_acc1"] and summary["teacher_acc1"] == by_file["teacher_acc1"] > 80
    assert summary["options"]["teacher_weights"] == by_file["options"]["teacher_weights"]


def test_a_missing_file_of_the_teacher_says_how_to_come_by_it(distil, refused):
    message = refused(distil, "--teacher_weights", "")
    assert "train it by: python train_scratch.py" in message and "own if the model brings its weights" in message
    assert "train it by" not in refused(distil, "--teacher_weights", "", "--teacher", "nowhere", code=2)


# ---------------------------------------------------------------- mean and std


def test_the_mean_and_std_that_a_model_states_are_used_for_its_weights(brings):
    path, _ = brings
    network = Network.build(f"{path}:states", CARD, pretrained=True)
    assert network.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert "its own mean, 0.1,0.2,0.3, differs from that of the data card, 0.5,0.5,0.5, is used" in network.notes[0]
    network = Network.from_file(
        path.replace("brings.py", "net.pth"), f"{path}:states", CARD, mean=(0.4,) * 3, role="teacher"
    )
    assert network.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    assert network.std.flatten().tolist() == pytest.approx([0.3] * 3)
    assert network.notes == [
        "its own mean, 0.1,0.2,0.3, differs from that used here, 0.4,0.4,0.4",
        "its own std, 0.3,0.3,0.3, differs from that of the data card, 0.25,0.25,0.25, is used; --teacher_std gives "
        "another",
    ]


def test_a_random_network_is_normalised_by_the_card(brings):
    network = Network.build(f"{brings[0]}:states", CARD)
    assert network.mean.flatten().tolist() == [0.5] * 3 and not network.notes


def test_timms_weights_and_normalisation(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet10t", num_classes=CLASSES).state_dict(), tmp_path / "net.pth")
    network = Network.from_file(tmp_path / "net.pth", "timm:resnet10t", make_card((3, 32, 32)))
    assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert any(note.startswith("its own mean, 0.485,0.456,0.406, differs") for note in network.notes)


def test_what_timm_does_to_weights_is_stated(tmp_path):
    """A position embedding of another image size is resized; masks, which are computed, are dropped."""
    pytest.importorskip("timm")
    vit = build_model("timm:test_vit", CLASSES)
    positions = vit.pos_embed.shape
    weights = {**vit.state_dict(), "pos_embed": torch.randn(1, 17, positions[2])}
    [note] = translated(vit, weights, tmp_path)
    assert note.endswith("vision_transformer translated its weights, and resized pos_embed")
    assert vit.pos_embed.shape == positions


def test_a_registered_network_on_large_images_is_called_out():
    card = DatasetCard("large", 3, 224, 224, 3, (0.5,) * 3, (0.5,) * 3)
    [note] = Network.build("resnet8", card).notes
    assert note == "it is made for images of about 32 pixels and does 49 times that work at 224x224"
    assert not Network.build("resnet8", make_card((3, 64, 64))).notes


def test_a_file_may_state_a_library_model(tmp_path):
    weights = torchvision.models.squeezenet1_1(num_classes=CLASSES).state_dict()
    stated = {"num_classes": CLASSES, "shape": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save({"state_dict": weights, "model": "torchvision:squeezenet1_1", **stated}, tmp_path / "net.pth")
    assert type(Network.from_file(tmp_path / "net.pth").model).__name__ == "SqueezeNet"


def test_a_foreign_teacher_is_evaluated_with_its_own_normalisation(teacher, tmp_path, monkeypatch, capsys):
    """A bare state_dict of a network that was trained on other units than the data card's."""
    monkeypatch.chdir(tmp_path)
    stated = torch.load(teacher)
    torch.save(stated["state_dict"], "bare.pth")
    words = ("--model", nets.name("tiny"), "--evaluate_only", "--weights")
    scratch(*words, teacher)
    expected = capsys.readouterr().out.splitlines()[-1]
    mean, std = (",".join(map(str, stated[key])) for key in ("mean", "std"))
    scratch(*words, "bare.pth", "--mean", mean, "--std", std)
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == expected and f"normalises images by mean {float(mean):.4g}" in out[-2]
    scratch(*words, "bare.pth", "--mean", 0.9, "--std", 0.02)
    assert capsys.readouterr().out.splitlines()[-1] != expected
