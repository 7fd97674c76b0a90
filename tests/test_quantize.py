"""datafree_quantize.py, from options to files, on tiny networks."""

import json
from pathlib import Path

import nets
import pytest
import torch
from conftest import QUANTIZATION_BUDGETS, TINY_QUANTIZATION, call, mostly_slow, rows
from resuming import assert_same_run, at_call, kill, stopped, terminate
from test_data_free import files_opened

import datafree_quantize
import registry
from datafree.config import Quantizer
from datafree.errors import InputError
from datafree.exporting import integers
from datafree.learners.base import Learner
from datafree.learners.quantize import QuantizeLearner
from datafree.network import Network
from datafree.rounding import ActivationGrid
from datafree.session import Session
from datafree.synthesis.objective import SynthesisObjective

RGAL = ("--triplet", 0.1, "--striplet", 0.1)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_all_methods_are_tried():
    assert set(QUANTIZATION_BUDGETS) == set(registry.QUANTIZATION_METHODS)


@pytest.mark.parametrize("method", QUANTIZATION_BUDGETS)
def test_every_method_runs_and_says_its_protocol(method, quantised):
    folder = quantised(method=method)
    assert folder.parent.name == f"digits_{method}_nets-tiny_w3a3"
    written = summary(folder)
    assert written["protocol"].startswith("W3A3 simulated: weights 3 bits per channel asymmetric")
    assert "packed (computed)" in written["size"] and written["options"]["w_bits"] == 3
    assert 0 < written["last_acc1"] <= 100 and written["teacher_acc1"] > 80
    log = (folder / "log.txt").read_text()
    assert log.count(written["protocol"]) >= 2 and "is trained" not in log
    assert all("_w3a3]" in line for line in log.splitlines() if "[Eval]" in line)
    epochs = rows(folder)
    assert len(epochs) == 4 and "student/kd" not in epochs[1] and "student/kd" in epochs[2]


@pytest.mark.parametrize("method", ["gdfq", "pixels"])
def test_rgal_goes_into_every_method_that_synthesises(method, quantised):
    epoch = rows(quantised(*RGAL, method=method))[2]
    assert epoch["student/striplet"] > 0 and epoch["synthesis/triplet"] > 0


@pytest.mark.parametrize("method", QUANTIZATION_BUDGETS)
def test_no_epochs_observe_ranges_and_train_nothing(method, quantised, teacher, capsys):
    folder = quantised(method=method, length=("--epochs", 0, "--warmup", 2))
    assert "Nothing is trained." in (folder / "log.txt").read_text()
    state = torch.load(folder / "checkpoints" / "model_last.pth", weights_only=True)["state_dict"]
    original = torch.load(teacher, weights_only=True)["state_dict"]
    for name, tensor in original.items():
        assert torch.equal(state[f"model.{name}"], tensor)
    assert all(state[name][1] > 0 for name in state if name.endswith("range"))
    assert summary(folder)["student_s"] == 0


@pytest.mark.parametrize("ranges", ["ema", "mse", "learned"])
def test_what_must_move_moves_and_what_must_not_does_not(ranges, quantised, teacher, monkeypatch):
    steps = []

    def watched(self, batch, progress):
        before = {name: tensor.clone() for name, tensor in self.network.model.state_dict().items()}
        terms = original(self, batch, progress)
        after = self.network.model.state_dict()
        steps.append({name for name in before if not torch.equal(before[name], after[name])})
        return terms

    original = QuantizeLearner.step
    monkeypatch.setattr(QuantizeLearner, "step", watched)
    quantised("--ranges", ranges)
    moved = set().union(*steps)
    parameters = {f"model.{name}" for name, _ in nets.tiny(10, 1).named_parameters()}
    statistics = {name for name in moved if "running" in name or "tracked" in name}
    scales = {name for name in moved if name.startswith("grids.") and name.endswith("scale")}
    assert parameters <= moved and not statistics
    assert not any(name.endswith(("range", "fraction")) for name in moved)
    assert any("activations" in name for name in scales) == (ranges == "learned")
    assert any("weights" in name for name in scales)  # they follow the weights, or are learned


def test_ranges_are_observed_again_after_each_epoch_of_warmup(quantised, monkeypatch):
    counts, original = [], ActivationGrid.observe

    def counted(self, x):
        original(self, x)
        counts.append(self.batches)

    monkeypatch.setattr(ActivationGrid, "observe", counted)
    quantised(length=("--epochs", 1, "--warmup", 3))
    assert counts == [1, 1, 2, 2] * 3  # two activations, two batches


def test_the_weight_of_the_divergence_follows_the_number_of_classes(quantised):
    options = quantised("--print_config") or Path()
    assert options == Path()
    terms = {}
    for kd in (0.1, 1):
        terms[kd] = rows(quantised("--kd", kd, tag=f"kd{kd}", method="gdfq"))[-1]["student/kd"]
    default = rows(quantised(tag="default", method="gdfq"))[-1]["student/kd"]
    assert default == terms[0.1] != terms[1]


@pytest.mark.parametrize("act", mostly_slow([kill, terminate], [kill]))
@pytest.mark.parametrize(
    "method, words, owner, name, number",
    [
        ("rgal", (), SynthesisObjective, "__call__", 8),
        ("rgal", (), QuantizeLearner, "end_warmup_epoch", 1),
        ("rgal", (), ActivationGrid, "observe", 6),
        ("pixels", (), Session, "score", 2),  # after an epoch of warm-up, whose ranges are observed again
        ("rgal", (), Learner, "step", 2),
        ("rgal", ("--ranges", "learned"), Learner, "step", 8),
        ("pixels", ("--ranges", "mse"), Learner, "step", 8),
        ("noise", (), Learner, "step", 8),
    ],
)
def test_a_resumed_run_equals_the_straight_one(method, words, owner, name, number, act, quantised, monkeypatch):
    straight = quantised(*words, method=method)
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, number, act)
        with stopped(act):
            quantised(*words, method=method, tag="interrupted")
    assert_same_run(straight, quantised(*words, "--resume", "auto", method=method, tag="interrupted"))


def test_no_training_image_is_opened(quantised):
    with files_opened() as opened:
        quantised()
    assert {Path(path).name for path in opened if path.endswith(".npz")} == {"digits_test.npz"}


def test_the_file_is_a_network_for_whatever_comes_next(quantised, distil, teacher, capsys):
    folder = quantised("--first_last_bits", 8)
    file, accuracy = folder / "checkpoints" / "model_last.pth", summary(folder)["last_acc1"]
    network = Network.from_file(file, nets.name("tiny"))
    assert network.model.protocol == Quantizer(w_bits=3, a_bits=3, first_last_bits=8, calibration=2)
    capsys.readouterr()
    call(datafree_quantize, *TINY_QUANTIZATION[:6], "--evaluate_only", "--student_weights", folder)
    printed = capsys.readouterr().out
    assert f"Acc@1={accuracy:.4f}" in printed and "it is quantised, W3A3 simulated" in printed
    distil("--teacher_weights", folder, "--epochs", 1, tag="from quantised")


def test_an_integer_network_for_onnxruntime(quantised):
    pytest.importorskip("onnxruntime")
    words = ("--w_bits", 8, "--a_bits", 8, "--onnx")
    folder = quantised(*words, length=("--epochs", 0, "--warmup", 1))
    found = json.loads((folder / "onnx" / "comparison.json").read_text())
    assert found["int8"]["agreement"] > 80 and abs(found["int8"]["acc1"] - summary(folder)["last_acc1"]) < 5
    assert (folder / "onnx" / "int8.onnx").stat().st_size == found["int8"]["bytes"]
    assert "QLinearConv" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "words, parts",
    [
        (("--w_bits", 0), ("--w_bits cannot be 0", "2 to 16")),
        (("--a_bits", 33), ("--a_bits cannot be 33",)),
        (("--precision", "bf16"), ("--precision bf16", "fp32")),
        (("--compile", "default"), ("--compile default", "remove it")),
        (("--onnx",), ("--onnx needs --w_bits 8",)),
        (("--epochs", 0, "--kd", 2), ("--kd has no effect", "epochs is 0")),
        (("--epochs", 0, "--lr", 2), ("--lr has no effect",)),
        (("--epochs", 0, "--striplet", 2), ("--striplet has no effect",)),
        (("--epochs", 0, "--adv", 2), ("--adv has no effect",)),
        (("--w_bits", 32, "--w_symmetric"), ("--w_symmetric has no effect", "w_bits is 32")),
        (("--warmup", 0), ("--warmup cannot be '0'",)),
        (("--student_weights", "x.pth"), ("--student_weights has no effect",)),
        (("--kd", 0, "--ce", 0, "--striplet", 0), ("no loss", "--kd")),
        (("--evaluate_only",), ("--student_weights",)),
        (("--teacher", nets.name("halved"), "--teacher_weights", "own"), ("student nets-halved (w3a3)", ".float()")),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(words, parts, quantised, refused):
    code = 1 if {"no loss", ".float()"} & set(parts) else 2
    line = refused(lambda: quantised(*words), code=code)
    assert all(part in line for part in parts), line


def test_weights_in_float_are_not_evaluated_as_quantised_ones(quantised, teacher, refused):
    line = refused(lambda: quantised("--evaluate_only", "--student_weights", teacher))
    assert "the network is in float" in line and "train_scratch.py --evaluate_only" in line


def test_a_calibration_does_not_go_on_with_training(quantised, refused):
    quantised(length=("--epochs", 0, "--warmup", 2))
    line = refused(lambda: quantised("--resume", "auto"), before_run=False)
    assert "--epochs 0, not 2" in line


def test_no_file_is_left_of_an_integer_network_that_cannot_be_written(quantised, monkeypatch, refused):
    pytest.importorskip("onnxruntime")

    def fail(*parts):
        raise InputError("an operator is unknown")

    monkeypatch.setattr(integers, "quantize_onnx", fail)
    words = ("--w_bits", 8, "--a_bits", 8, "--onnx")
    refused(lambda: quantised(*words, length=("--epochs", 0, "--warmup", 1)), before_run=False)
    assert not list(Path("runs").glob("*/run/onnx/*.onnx"))


def test_another_protocol_does_not_go_on_with_a_run(quantised, refused):
    quantised()
    line = refused(lambda: quantised("--calibration", 3, "--resume", "auto"), before_run=False)
    assert "--calibration 2, not 3" in line


def test_terms_of_the_student_without_a_round_that_has_them_are_refused(quantised, refused):
    words = ("--triplet", 1, "--synthesis_rounds", 4)
    line = refused(lambda: quantised(*words, method="pixels"), code=2)
    assert "--triplet 1 would have no effect" in line and "above 4" in line
    quantised(*words, "--triplet_target", "teacher", method="pixels")
