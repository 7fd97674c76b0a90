"""Checkpoints: whole or untouched, no code run, weights that fit or a sentence that states why not."""

import argparse
import builtins
import errno
import os
import resource
import sys

import numpy as np
import pytest
import torch
from torch import nn

from datafree import checkpoint
from datafree.errors import InputError
from datafree.files import remove_left_over


def net(classes=3, width=4):
    head = nn.Linear(width * 36, classes)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), head)


def load_weights(model, path):
    """Read the file and load what it holds into the model -> what the file states beside the weights."""
    weights, metadata = checkpoint.read_weights(path)
    checkpoint.load_weights(model, weights, path)
    return metadata


class Creates:
    """Its pickle makes a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


def test_round_trip_of_plain_state(tmp_path):
    path = tmp_path / "last.pth"
    state = {"w": torch.randn(3), "n": 2, "text": "a", "nested": {"t": (1, 2.5, None)}}
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.pop("w"), state.pop("w")) and loaded == state
    assert os.listdir(path.parent) == ["last.pth"]


def raise_no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    checkpoint.save(path, {"epoch": 1})
    monkeypatch.setattr(os, "replace", raise_no_space)
    with pytest.raises(InputError, match=r"could not write .*last.pth \(No space left.* is untouched"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pth"]


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, size):
    path = tmp_path / "last.pth"
    checkpoint.save(path, {"epoch": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(InputError, match="could not write .*File too large.*ulimit -f.*untouched"):
            checkpoint.save(path, {"epoch": 2, "w": torch.zeros(size)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(path) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pth"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError])
def test_other_failures_pass_through_and_leave_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pth"
    checkpoint.save(path, {"epoch": 1})

    def fail(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(error):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pth"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_writing(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(path, {"epoch": 1})
    child = os.fork()
    if child == 0:
        torch.save = lambda state, file: (file.write(b"half"), file.flush(), os.kill(os.getpid(), 9))
        checkpoint.save(path, {"epoch": 2})
    assert os.waitpid(child, 0)[1] == 9
    assert checkpoint.load(path) == {"epoch": 1}
    checkpoint.save(path, {"epoch": 3})
    remove_left_over(tmp_path)
    assert checkpoint.load(path) == {"epoch": 3} and os.listdir(tmp_path) == ["last.pth"]


def no_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_link_keeps_what_it_was_given(tmp_path, monkeypatch, links):
    last, best = tmp_path / "last.pth", tmp_path / "best.pth"
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for epoch in (1, 2):
        checkpoint.save(last, {"epoch": epoch})
        checkpoint.link(last, best)
        checkpoint.link(last, best)
    assert last.samefile(best) == links
    checkpoint.save(last, {"epoch": 3})
    assert checkpoint.load(best) == {"epoch": 2} and sorted(os.listdir(tmp_path)) == ["best.pth", "last.pth"]


def test_a_left_over_link_is_not_written_into(tmp_path):
    last, best = tmp_path / "last.pth", tmp_path / "best.pth"
    checkpoint.save(last, {"epoch": 1})
    os.link(last, tmp_path / "best.pth.tmp")  # as a run killed within link() leaves it
    checkpoint.save(best, {"epoch": 2})
    assert checkpoint.load(last) == {"epoch": 1} and checkpoint.load(best) == {"epoch": 2}


def test_missing_file_folder_and_unreadable_file(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path / "no.safetensors"):
        with pytest.raises(InputError, match="there is no file"):
            load_weights(net(), path)
    with pytest.raises(InputError, match="is a folder without checkpoints/model_last.pth; name a file"):
        load_weights(net(), tmp_path)
    with pytest.raises(InputError, match="there is no file"):
        checkpoint.load(tmp_path)
    if os.geteuid() != 0:
        (tmp_path / "secret.pth").touch(mode=0)
        with pytest.raises(InputError, match="may not be read"):
            checkpoint.load(tmp_path / "secret.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_file(tmp_path, zipped, share):
    path = tmp_path / "cut.pth"
    torch.save({"w": torch.zeros(5000)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cut.pth is truncated or no torch checkpoint \([\d,]+ bytes\); copy"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "content", [b"hello world\n", bytes(range(256)), b"PK\x03\x04" * 9, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_not_a_checkpoint(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match=rf"truncated or no torch checkpoint \({len(content)} bytes\); copy"):
        checkpoint.load(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, zipped):
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    contents = {"state_dict": net().state_dict(), "x": Creates(proof)}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"evil.pth contains a pickled \w+.open in its entry x; refused, nothing was"):
        load_weights(net(), path)
    assert not proof.exists()
    torch.load(path, weights_only=False)["x"].close()
    assert proof.exists()  # the trap works


def test_a_pickled_module_is_refused_by_name(tmp_path):
    torch.save(net(), tmp_path / "module.pth")
    with pytest.raises(InputError, match="contains a pickled torch.nn"):
        checkpoint.load(tmp_path / "module.pth")


def test_a_checkpoint_is_a_dict(tmp_path):
    torch.save(torch.zeros(2), tmp_path / "t.pth")
    with pytest.raises(InputError, match=r"holds a Tensor; save a dict .*state_dict\(\)"):
        checkpoint.load(tmp_path / "t.pth")


def test_require():
    checkpoint.require({"a": 1, "b": 2}, "a", "b", path="last.pth")
    with pytest.raises(InputError, match=r"last.pth has no 'rng' \(found: a, b\)"):
        checkpoint.require({"a": 1, "b": 2}, "a", "rng", path="last.pth")


def prefixed(prefix):
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


FORMS = {
    "bare": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "acc1": 91.5, "dataset": "digits", "model": "lenet"},
    "model": lambda w: {"model": w, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "acc1": 91.5},
    "model_state_dict": lambda w: {"epoch": 3, "model_state_dict": w},
    "net": lambda w: {"net": w, "acc": 91.5},
    "data parallel": lambda w: {"state_dict": prefixed("module.")(w)},
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "both, the other way": prefixed("_orig_mod.module."),
    "old": lambda w: {n: t for n, t in w.items() if not n.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights(tmp_path, form):
    source, model = net(), net()
    source[1].running_mean.normal_()
    torch.save(FORMS[form](source.state_dict()), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_what_the_file_states_beside_the_weights(tmp_path):
    stated = {"acc1": 91.5, "dataset": "digits", "model": "lenet", "num_classes": 3, "mean": [0.5]}
    contents = {"state_dict": net().state_dict(), **stated, "optimizer": {"lr": 1}, "none": None}
    torch.save(contents, tmp_path / "w.pth")
    assert load_weights(net(), tmp_path / "w.pth") == stated
    torch.save(net().state_dict(), tmp_path / "w.pth")
    assert load_weights(net(), tmp_path / "w.pth") == {}


def test_own_names_that_look_like_a_wrapper(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(model.state_dict(), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    torch.save(prefixed("module.")(model.state_dict()), tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")


def refused(tmp_path, contents, model, match):
    """load_weights refuses the contents with a message, and the model stays as it was."""
    torch.save(contents, tmp_path / "w.pth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=match):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_of_another_model(tmp_path):
    weights = net().state_dict()
    refused(
        tmp_path,
        nn.Linear(4, 3).state_dict(),
        net(),
        r"8 tensors missing \(0.weight, 0.bias, 1.weight, ...\), 2 unexpected \(weight, bias\)",
    )
    refused(tmp_path, {**weights, "4.bias": torch.zeros(1)}, net(), r"0 tensors missing \(none\), 1 unexp")
    del weights["3.bias"]
    refused(tmp_path, weights, net(), r"1 tensors missing \(3.bias\), 0 unexpected \(none\)")


def test_another_class_count(tmp_path):
    refused(tmp_path, net(classes=10).state_dict(), net(), r"has 10 classes \(3.weight\), the model 3")


def test_another_width_is_not_taken_for_a_class_count(tmp_path):
    refused(tmp_path, net(width=5).state_dict(), net(), r"0.weight is \(5, 1, 3, 3\), the model's is \(4, ")
    refused(tmp_path, nn.Linear(3, 2).state_dict(), nn.Linear(4, 2), r"is \(2, 3\), the model's is \(2, 4\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    weights = net().state_dict()
    weights["1.running_var"][2] = value
    refused(tmp_path, {"state_dict": weights}, net(), r"1.running_var is not finite")


@pytest.mark.parametrize("contents", [{}, {"learner": {"w": torch.zeros(1)}, "epoch": 3}, {"state_dict": {}}])
def test_no_weights_at_all(tmp_path, contents):
    refused(tmp_path, contents, net(), "holds no weights .*model_last.pth")


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, model = net(), net()
    safetensors.save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert load_weights(model, tmp_path / "w.safetensors") == {}
    assert torch.equal(model[3].weight, source[3].weight)
    (tmp_path / "w.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="truncated or no safetensors file"):
        load_weights(model, tmp_path / "w.safetensors")


def test_safetensors_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").touch()
    with pytest.raises(InputError, match="needs the package safetensors: pip install safetensors"):
        load_weights(net(), tmp_path / "w.safetensors")


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_numpy_and_parsed_options_beside_the_weights_are_no_code(tmp_path, module):
    written = np.float64(91.5).__reduce__()[0].__module__
    path = tmp_path / "net.pth"
    # The old format, for its names are plain text that can be turned into those of the other numpy.
    torch.save(
        {"state_dict": net().state_dict(), "acc": np.float64(91.5), "args": argparse.Namespace(lr=0.1)},
        path,
        _use_new_zipfile_serialization=False,
    )
    path.write_bytes(path.read_bytes().replace(f"c{written}\n".encode(), f"c{module}\n".encode()))
    assert load_weights(net(), path)["acc"] == 91.5


@pytest.mark.parametrize("name", ["model_last.pth", "student_last.pth"])
@pytest.mark.parametrize("given", ["", "checkpoints"])
def test_the_folder_of_a_run_stands_for_its_last_weights(tmp_path, name, given):
    """Runs of earlier versions call the file student_last.pth."""
    source, model = net(), net()
    path = tmp_path / "run" / "checkpoints" / name
    path.parent.parent.mkdir()
    checkpoint.save(path, {"state_dict": source.state_dict(), "acc1": 91.5})
    assert checkpoint.weights_file(tmp_path / "run" / given) == path
    assert load_weights(model, tmp_path / "run" / given) == {"acc1": 91.5}
    assert torch.equal(model[3].weight, source[3].weight)


def test_of_two_names_of_the_last_weights_the_present_one_counts(tmp_path):
    for name in ("student_last.pth", "model_last.pth"):
        checkpoint.save(tmp_path / "checkpoints" / name, {"state_dict": net().state_dict()})
    assert checkpoint.weights_file(tmp_path).name == "model_last.pth"
    assert checkpoint.weights_file(tmp_path / "x.pth") == tmp_path / "x.pth"  # a file need not exist to be named


def test_the_accuracy_that_a_file_states(tmp_path):
    path = tmp_path / "w.pth"
    for contents, accuracy in (
        ({"acc1": 91.5, "model": "lenet"}, 91.5),
        ({"acc1": 91.5, "model": "resnet8"}, None),
        ({"acc1": 91.5}, None),
        ({"model": "lenet"}, None),
        ({"acc1": "much", "model": "lenet"}, None),
        ({"acc1": None, "model": "lenet"}, None),
    ):
        checkpoint.save(path, {"state_dict": net().state_dict(), **contents})
        assert checkpoint.stored_accuracy(path, "lenet") == accuracy
    path.write_bytes(b"no checkpoint")
    assert checkpoint.stored_accuracy(path, "lenet") is None
