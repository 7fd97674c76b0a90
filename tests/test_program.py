"""The skeleton of a program: several trainings in turn, of which a later one may use what an earlier one left."""

import json
import sys
from dataclasses import dataclass, field

import nets
import pytest
import torch
from conftest import mostly_slow, rows
from resuming import Killed, assert_same_run, at_call, kill, stopped, terminate

from datafree import config, program
from datafree.config import option
from datafree.learners.base import Learner
from datafree.learners.distill import DistillLearner
from datafree.learners.supervised import SupervisedLearner
from datafree.network import Network
from datafree.schedule import Schedule
from datafree.synthesis.controls import RealSource
from datafree.training import Training

EPOCHS = 4


@dataclass
class Stages:
    """How the trainings follow each other."""

    stop_below: float = option(0.0, "Accuracy (%) of the first training below which the second is left out.", low=0)


@dataclass
class TwoConfig(config.DistillConfig):
    """Options of a program that trains a teacher, then a student from it."""

    stages: Stages = field(default_factory=Stages)


def two_trainings(session):
    """A teacher on the training images, then a student that learns from that teacher on them."""
    options, split, folders = session.config, session.split("train"), []
    schedule = Schedule(options.schedule.epochs, rounds=1, kd_steps=4, batch_size=128)
    teacher = session.network("teacher", options.teacher.teacher)
    learner = SupervisedLearner(teacher, session.augment, options.optim, schedule.total_student_steps)
    yield Training(
        learner,
        RealSource(split),
        schedule,
        model=options.teacher.teacher,
        name=("first", options.teacher.teacher),
        plan=["Plan: the first of two."],
        finish=folders.append,
    )
    if folders:
        summary = json.loads((folders[0].root / "summary.json").read_text())
        if summary["last_acc1"] < options.stages.stop_below:
            return
        teacher = session.network("teacher", options.teacher.teacher, folders[0].root)
    student = session.network("student", options.student.student)
    yield Training(
        DistillLearner(student, teacher.freeze(), session.augment, options, schedule.total_student_steps),
        RealSource(session.split("train")),
        schedule,
        model=options.student.student,
        name=("second", options.teacher.teacher, options.student.student),
        plan=["Plan: the second of two."],
        teacher=teacher,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the program with a tag -> the folders of its two trainings, as far as they are there."""
    monkeypatch.chdir(tmp_path)
    fixed = (
        *(
            "--threads",
            1,
            "--dataset",
            "digits",
            "--crop_padding",
            1,
            "--epochs",
            EPOCHS,
            "--lr",
            0.2,
            "--batch_size",
            128,
        ),
        *("--teacher", nets.name("tiny"), "--student", nets.name("small")),
    )

    def call(*words, tag="run"):
        monkeypatch.setattr(sys, "argv", ["two.py", *map(str, (*fixed, "--log_tag", tag, *words))])
        program.exit_on_input_error(lambda: program.run(program.Program(TwoConfig, two_trainings, "Two trainings.")))
        return [next((tmp_path / "runs").glob(f"digits_{name}_*/{tag}"), None) for name in ("first", "second")]

    return call


def test_both_trainings_run_in_turn_and_the_second_uses_the_first(run):
    first, second = run()
    assert first.parent.name == "digits_first_nets-tiny"
    assert second.parent.name == "digits_second_nets-tiny_nets-small"
    assert len(rows(first)) == len(rows(second)) == EPOCHS
    assert all("student/ce" in row for row in rows(first)) and all("student/kd" in row for row in rows(second))
    results = [json.loads((folder / "summary.json").read_text()) for folder in (first, second)]
    assert results[1]["teacher_acc1"] == results[0]["last_acc1"] and "teacher_acc1" not in results[0]
    assert "Plan: the first of two." in (first / "log.txt").read_text()
    network = Network.from_file(first, nets.name("tiny"))
    assert (network.name, network.metadata["epoch"], network.shape) == ("network nets-tiny", EPOCHS, (1, 16, 16))
    written = torch.load(second / "checkpoints" / "model_last.pth", weights_only=True)
    assert written["model"] == nets.name("small") and written["options"]["stop_below"] == 0


def test_the_second_training_may_be_left_out_because_of_the_first(run):
    first, second = run("--stop_below", 100)
    assert (first / "summary.json").exists() and second is None


def test_a_dry_run_prints_both_plans_and_writes_nothing(run, capsys, tmp_path):
    run("--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("Plan: ")] == [
        "Plan: the first of two.",
        "Plan: the second of two.",
    ]
    assert sum(line.startswith("Time: about ") for line in lines) == 1  # of both
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("act", mostly_slow([kill, terminate], [kill]))
@pytest.mark.parametrize("step", [7, 16 + 2, 16 + 7])  # in the first training; in epochs 0 and 1 of the second
def test_a_program_resumes_in_either_training_bit_for_bit(step, act, run, monkeypatch):
    straight = run(tag="straight")
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", step, act)
        with stopped(act):
            run(tag="stopped")
    resumed = run("--resume", "auto", tag="stopped")
    for one, other in zip(straight, resumed):
        assert_same_run(one, other)


def test_a_failure_of_the_second_training_leaves_the_first_whole(run, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, DistillLearner, "loss", 1, kill)
        with pytest.raises(Killed):
            run()
    with pytest.raises(SystemExit):
        run()  # the first one's folder holds a run
    first, second = run("--resume", "auto")
    assert len(rows(first)) == len(rows(second)) == EPOCHS


def test_print_config_of_a_program_with_a_section_of_its_own(run, capsys):
    run("--print_config", "--stages.stop_below", 5)
    assert "stages:\n  stop_below: 5.0\n" in capsys.readouterr().out
