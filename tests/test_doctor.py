"""The doctor: what it finds in healthy and in spoiled runs, its exit codes, and what it leaves alone."""

import re
import shlex
import sys
from dataclasses import replace

import nets
import pytest
import torch
from conftest import ROOT, command, scratch
from test_commands import SHAPES, write_images

from datafree import checks, cli, doctor
from datafree.checks import first_layer_distance, natural_images, teacher_findings
from datafree.config import CONFIGS, DistillConfig
from datafree.cost import Rate
from datafree.datasets.cards import CARDS
from datafree.datasets.loading import load_split
from datafree.errors import exit_on_input_error
from datafree.network import Network
from datafree.session import Session
from registry import METHODS

TINY = nets.name("tiny")
SHORT = tuple("--threads 1 --epochs 2 --ep_steps 4 --kd_steps 2 --batch_size 16 --crop_padding 1".split())
SYNTHESIS = tuple("--g_steps 2 --synthesis_batch_size 16 --nz 8 --ngf 4".split())
DIGITS = ("--dataset", "digits", *SHORT)
PAIR = ("--teacher", TINY, "--student", nets.name("small"), *SYNTHESIS)


@pytest.fixture
def examined(capsys, monkeypatch, tmp_path):
    """Call the doctor in an empty folder -> its exit code, and its findings as about -> (grade, text)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["datafree-doctor", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            exit_on_input_error(doctor.main)
        except SystemExit as stop:
            code = stop.code
        *lines, last = capsys.readouterr().out.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        found = [re.fullmatch(r"(ok|warning|fault) +([^:]+): (.+)", line).groups() for line in lines]
        grades = [grade for grade, *_ in found]
        assert last == f"{grades.count('ok')} ok, {grades.count('warning')} warning, {grades.count('fault')} fault."
        assert code == ("fault" in grades)
        return code, {about: (grade, text) for grade, about, text in found}

    return call


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """What is found about the teacher that a run with these options has, as about -> (grade, text)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        given = list(map(str, (*DIGITS, *PAIR, *words)))
        config, _ = cli.parse(DistillConfig, given, description="", method_files=METHODS, other_configs=CONFIGS)
        session = Session(config, write=False)
        rate = Rate(0.01, 0, None, session.evaluation_batch) if session.test else None
        return {f.about: (f.grade, f.text) for f in teacher_findings(session, session.load_teacher(), rate)}

    return call


def test_a_healthy_run_has_nothing_to_mend(examined, teacher):
    code, found = examined(*DIGITS, *PAIR, "--teacher_weights", teacher)
    assert code == 0 and {grade for grade, _ in found.values()} == {"ok"}
    assert re.fullmatch(r"\d\d\.\d\d % on 355 of 355 test images\.", found["teacher"][1])
    assert "2 layers" in found["BatchNorm"][1] and "(on 64 test images)" in found["normalisation"][1]
    assert "10 classes, an embedding of 16, stages 0.2 8x8x8, 1.2 16x4x4." == found["teacher nets-tiny"][1]
    assert "student nets-small" in found and {"time", "memory", "disk", "files"} <= found.keys()


@pytest.mark.parametrize(
    "program, words",
    [
        ("quantize", (*PAIR[:2], *SYNTHESIS, "--calibration", 1)),
        ("incremental", ("--model", TINY, *SYNTHESIS, "--init_cls", 5, "--increment", 5)),
        ("train", None),
    ],
)
def test_the_other_programs_are_checked_by_their_names(program, words, examined, teacher):
    weights = ("--teacher_weights", teacher) if program == "quantize" else ()
    training = ("--dataset", "digits", "--model", TINY, "--threads", 1)
    code, found = examined(program, *((*DIGITS, *words, *weights) if words else training))
    assert code == 0 and ("teacher" in found) == (program == "quantize") and "time" in found


@pytest.mark.parametrize("data, grade", [("test", "fault"), ("none", "warning")])
def test_a_wrong_normalisation_is_told_by_images_or_by_the_card(data, grade, judged, teacher):
    words = ("--teacher_weights", teacher, "--teacher_mean", 0, "--teacher_std", 1, "--eval", data)
    given, text = judged(*words)["normalisation"]
    assert given == grade and "give --teacher_mean 0.3051 --teacher_std 0.3188" in text
    assert ("64 test images" if data == "test" else "random images with the mean and std that the data card") in text


@pytest.mark.parametrize("mean, std", [(0.5, 0.5), (0.0, 1.0)])
def test_the_normalisation_of_training_is_the_nearest_on_random_images_too(mean, std, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scratch("--model", TINY, "--epochs", 3, "--batch_size", 64, "--mean", mean, "--std", std)
    teacher = Network.from_file("checkpoints/pretrained/digits_nets-tiny.pth", TINY).freeze()
    before = teacher.mean.clone()
    images = natural_images(CARDS["digits"], 64)
    candidates = [((0.5,), (0.5,)), ((0.0,), (1.0,)), ((0.3051,), (0.3188,))]
    distances = {c: first_layer_distance(teacher, images, *c) for c in candidates}
    nearest = min(distances, key=distances.get)
    assert nearest == ((mean,), (std,)) and 2 * distances[nearest] < sorted(distances.values())[1]
    assert torch.equal(teacher.mean, before)


def test_random_images_have_the_mean_and_std_of_the_card():
    for card in (CARDS["digits"], CARDS["cifar10"]):
        images = natural_images(card, 200)
        assert images.shape == (200, *card.shape) and images.min() >= 0 and images.max() <= 1
        assert images.mean((0, 2, 3)).tolist() == pytest.approx(card.mean, abs=0.05)
        assert images.std((0, 2, 3)).tolist() == pytest.approx(card.std, rel=0.2)


def test_a_teacher_without_a_test_set_is_asked_on_images_that_are_made_for_it(judged, teacher):
    grade, text = judged("--teacher_weights", teacher, "--eval", "none")["teacher"]
    assert grade == "ok" and "its accuracy is not known" in text and re.search(r"target class for \d+%", text)


def test_a_network_that_was_never_trained_is_a_fault(judged, tmp_path):
    torch.save(nets.tiny(10, 1).state_dict(), tmp_path / "w.pth")
    found = judged("--teacher_weights", "w.pth")
    assert found["BatchNorm"][0] == "fault" and "as before any training" in found["BatchNorm"][1]
    assert found["teacher"][0] == "fault" and "chance is 10.00 %" in found["teacher"][1]


def test_a_teacher_that_is_weaker_than_its_file_states_is_a_warning(judged, teacher, tmp_path):
    state = torch.load(teacher, weights_only=True)
    torch.save({**state, "acc1": state["acc1"] + 5}, tmp_path / "w.pth")
    grade, text = judged("--teacher_weights", "w.pth")["teacher"]
    assert grade == "warning" and "was expected" in text and "on 355 of 355 test images" in text


def test_a_teacher_without_batchnorm(judged, tmp_path):
    torch.save(nets.plain(10, 1).state_dict(), tmp_path / "w.pth")
    found = judged("--teacher", nets.name("plain"), "--teacher_weights", "w.pth", "--bn", 0, "--eval", "none")
    assert found["BatchNorm"] == ("ok", "there is none, so that --bn has to be 0.")
    assert "not checked" in found["normalisation"][1]


def test_what_is_missing_is_a_fault_with_its_remedy(examined):
    _, found = examined(*DIGITS, *PAIR)
    assert found["files"][0] == "fault" and "train it by: python train_scratch.py" in found["files"][1]
    assert "teacher" not in found and "time" in found
    _, found = examined("train", "--dataset", "cifar10", "--model", TINY, "--threads", 1)
    assert found["files"][0] == "warning" and "needs a network" in found["files"][1]


def test_another_number_of_classes_is_a_fault_that_ends_the_examination(examined, tmp_path):
    torch.save(nets.tiny(7, 1).state_dict(), tmp_path / "w.pth")
    code, found = examined(*DIGITS, *PAIR, "--teacher_weights", "w.pth")
    assert code == 1 and list(found) == ["run"] and "7 classes" in found["run"][1]


def test_alarms_of_the_plan_are_warnings(examined, tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / "data" / "shapes" / split, count=12)
    replace(SHAPES, classes=("circle", "square", "cross")).to_yaml(tmp_path / "card.yaml")
    state = nets.tiny(3, 3).state_dict()
    torch.save({"state_dict": state, "classes": ["circle", "cross", "square"]}, tmp_path / "w.pth")
    words = ("--dataset", "shapes", "--card", "card.yaml", *SHORT, *PAIR, "--teacher_weights", "w.pth")
    _, found = examined(*words)
    assert found["plan"][0] == "warning" and "Class 1 is cross in the file of the teacher" in found["plan"][1]


def test_what_does_not_fit_is_a_fault(examined, teacher, monkeypatch):
    monkeypatch.setattr("datafree.cost.free_memory", lambda device: 1000)
    monkeypatch.setattr("datafree.cost.free_disk", lambda folder: 10)
    code, found = examined(*DIGITS, *PAIR, "--teacher_weights", teacher)
    assert code == 1 and found["cost"][0] == "fault" and "does not suffice" in found["cost"][1]


def test_part_of_a_large_test_set_is_enough(judged, teacher, monkeypatch):
    monkeypatch.setattr(checks, "SECONDS", 0)
    monkeypatch.setattr("datafree.session.PIXELS_AT_ONCE", 50 * 16 * 16)
    found = judged("--teacher_weights", teacher)
    assert found["teacher"][0] == "ok" and "on 50 of 355 test images" in found["teacher"][1]


def test_help_and_mistakes_in_options(refused, capsys, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["datafree-doctor", *words])
        exit_on_input_error(doctor.main)

    run("--help")
    assert capsys.readouterr().out.strip() == doctor.__doc__.strip()
    assert "unknown option --epcohs" in refused(run, "quantize", "--epcohs", "3", code=2)
    assert "unexpected argument 'distil'" in refused(run, "distil", code=2)
    evaluated = ("train", "--evaluate_only", "--weights", "w.pth")
    assert "--evaluate_only: the doctor checks" in refused(run, *evaluated, code=2)


def test_the_doctor_is_a_module_and_reads_mistakes_without_torch(tmp_path):
    done = command("-m", "datafree.doctor", "--bn", "much", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --bn cannot be 'much'")


def test_some_images_are_the_same_ones_each_time_and_of_all_classes():
    split = load_split(CARDS["digits"], "data", "test")
    part, again = split.some(100), split.some(100)
    assert torch.equal(part.images, again.images) and len(set(part.labels.tolist())) == 10
    assert len(split.some(10**6)) == 355


DOCS = (ROOT / "docs" / "doctor.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", re.findall(r"^python -m datafree.doctor (.*digits.*)$", DOCS, re.MULTILINE))
def test_a_shown_command_of_the_doctor_runs(command, examined):
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(command, comments=True)]
    _, found = examined(*words)
    grade, told = found["files"]
    assert "time" in found and (grade == "ok" or "train it by" in told)
