"""The benchmarks run, and the plain pipeline computes the same as what they measure, except for its random triplets."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import nets
import parts
import pytest
import torch
from conftest import ROOT, command
from parts import CLASSES, SHAPE
from PIL import Image

import registry
from benchmarks import budget, forecast, kill_storm, memory, plain, precision, same_bits, step
from datafree import checkpoint
from datafree.config import Distill, Relation, Synthesis
from datafree.errors import OptionError
from datafree.models.generator import Generator
from datafree.network import Network
from datafree.pool import Batch
from datafree.signals import StopSignal
from datafree.synthesis.objective import SynthesisObjective

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("make", [nets.tiny, nets.small])
def test_the_optimisations_of_synthesis_leave_its_gradient_unchanged(make, monkeypatch):
    """Frozen networks, fused statistics and channels_last against the plain form, without the random triplets."""
    monkeypatch.setattr(plain, "triplet_loss", lambda *given: 0.0)
    models = make(CLASSES, 3), nets.small(CLASSES, 3)
    theirs = plain.Plain(*models, SHAPE, 4, 8, CPU)
    theirs.model.eval()
    teacher, student = (Network(model, SHAPE, (0.5,) * 3, (0.25,) * 3) for model in models)
    objective = SynthesisObjective(Synthesis(bn=1, oh=1, adv=1), Relation(), teacher.freeze(), student)
    views, targets, gradients, losses = torch.rand(8, *SHAPE), torch.arange(8) % CLASSES, [], []
    for loss_of in (
        lambda x: theirs.synthesis_loss(theirs.normalise(x), targets),
        lambda x: objective(x, x, targets)[0],
    ):
        x = views.clone().requires_grad_()
        with student.frozen():
            loss = loss_of(x)
            loss.backward()
        gradients.append(x.grad)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_the_optimisations_of_the_student_step_leave_its_gradient_unchanged(monkeypatch):
    monkeypatch.setattr(plain, "triplet_loss", lambda *given: 0.0)
    models, views = (nets.tiny(CLASSES, 3), nets.small(CLASSES, 3)), torch.rand(8, *SHAPE)
    theirs = plain.Plain(*models, SHAPE, 4, 8, CPU)
    teacher, student = (Network(model, SHAPE, (0.5,) * 3, (0.25,) * 3) for model in models)
    learner = parts.make_learner(parts.options(distill=Distill(cd_loss=0.1)), teacher.freeze(), student)
    for project in (*theirs.project, *learner.projection.project):
        torch.nn.init.ones_(project.weight)
        torch.nn.init.zeros_(project.bias)
    gradients = []
    for step_of in (
        lambda: theirs.student_step(theirs.normalise(views), torch.arange(8) % CLASSES),
        lambda: learner.step(Batch(views)),
    ):
        for parameter in student.parameters():
            parameter.grad = None
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", lambda self: None)
            patch.setattr(theirs.sgd, "zero_grad", lambda: None)
            patch.setattr(learner.optimizer, "zero_grad", lambda: None)
            step_of()
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_the_folded_generator_is_the_plain_one():
    theirs, ours = plain.generator(8, 4, SHAPE), Generator(8, 4, SHAPE)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            assert mine.shape == other.shape
            mine.copy_(other)
    z = torch.randn(6, 8)
    torch.testing.assert_close(ours(z), theirs(z))


def test_a_clock_takes_inner_parts_off_the_outer_one(monkeypatch):
    ticks = iter([0.0, 1.0, 4.0, 10.0])
    clock = step.Clock(CPU)
    monkeypatch.setattr(clock, "now", lambda: next(ticks))
    clock.run("rest", clock.run, "teacher", lambda: None)
    assert clock.take() == {"teacher": 3.0, "rest": 7.0} and not clock.take()


def test_the_expected_hit_rate_is_that_of_a_simulated_cache():
    sizes = dict(epochs=3, steps=5, images=4, views=2, n=2)
    everything = step.expected_hit_rate(10**6, **sizes)
    assert 0.3 < everything < 1 and step.expected_hit_rate(1, **sizes) < everything
    # In a long run all of the 24 views occur. Each misses once, or twice if it comes first as both views of a pair.
    misses = (1 - step.expected_hit_rate(10**6, epochs=3, steps=500, images=4, views=2, n=2)) * 3 * 500 * 4
    assert 24 <= round(misses) <= 48


def test_a_benchmark_of_steps_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    words = "--pairs resnet20>resnet8 --batch 16 --turns 2 --pool 128 --data-steps 1 --cache 1 --json"
    monkeypatch.setattr(plain, "batches", lambda root, size, n, count: [None])  # whose workers take seconds to start
    monkeypatch.setattr("sys.argv", ["step", *words.split(), str(tmp_path / "step.json")])
    torch.backends.cudnn.benchmark = False
    step.main()
    assert torch.backends.cudnn.benchmark  # as in a run
    found = json.loads((tmp_path / "step.json").read_text())
    rows = {row["step"]: row for row in found["steps"]}
    assert list(rows) == list(step.CASES) and found["environment"]["torch"] == torch.__version__
    assert rows["plain student"]["faster"] == 1
    for row in rows.values():
        assert row["ms"] == pytest.approx(sum(row[f"{part} ms"] for part in step.PARTS), rel=0.5)
        assert row["teacher ms"] > 0 or row["step"].endswith("known")
    assert rows["student, all views known"]["teacher ms"] == 0
    assert found["view cache"][0]["cache MB"] == 1 and 0 < found["view cache"][0]["known %"] < 100
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("plain synthesis", "known %", "than plain", "pool"))
    monkeypatch.setattr("sys.argv", ["step", "--pool", "127"])
    with pytest.raises(SystemExit):
        step.main()
    assert "--pool" in capsys.readouterr().err


def test_the_plain_pool_is_read_from_files(tmp_path):
    for number in range(5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    shown = list(plain.batches(tmp_path, 8, 2, 3, workers=0))
    assert [tuple(views.shape) for views in shown] == [(4, 3, 8, 8)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["real", "quantize", "incremental"])
def test_a_forecast_is_within_30_per_cent_of_the_run(name):
    (row,) = forecast.rows([name], "--epochs", 2)
    # Operations stand for the seconds, which other programs on the machine make longer in one of the two measurements.
    assert abs(row["GFLOP off %"]) < 30 and abs(row["MB off %"]) < 30
    assert row["seconds forecast"] > 0 < row["seconds"] and row["disk MB forecast"] >= row["disk MB"] > 0


@pytest.mark.slow
def test_memory_is_measured_in_a_separate_process(capsys):
    row = memory.row("wrn16_1>wrn16_1,32,10,16,128")
    # The inputs of the teacher's widest layers alone: seven, of 16 x 32 x 32 numbers per image.
    assert row["networks"] == "wrn16_1>wrn16_1" and row["synthesis MB"] > 7 * 128 * 16 * 32 * 32 * 4 / 1e6
    assert row["pool MB"] == 157 and row["view cache MB"] == 4 * (10 + 64 + 16 + 32 + 64) + 8
    memory.measure("resnet20>resnet8,16,10,4,8", "student")
    assert capsys.readouterr().out.strip().isdigit()
    with pytest.raises(memory.InputError, match="bad is not TEACHER>STUDENT"):
        memory.build("bad")


def test_half_precision_gradients_are_compared_on_a_teacher(teacher, monkeypatch, capsys):
    monkeypatch.setattr(precision, "STEPS", (0, 2))
    monkeypatch.setattr("sys.argv", ["precision", "digits", nets.name("tiny"), nets.name("small"), str(teacher)])
    precision.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["synthesis", "0"], ["synthesis", "2"], ["student", "0"], ["student", "2"]]
    assert all(0.9 < float(row[2]) <= 1 for row in rows)


@pytest.mark.parametrize("lengths", [{"options": {"epochs": 10}}, {"options": {"epochs": 200}, "epochs": 10}])
def test_a_budget_of_seconds_is_converted_to_epochs(lengths, tmp_path, monkeypatch, capsys):
    for seed, seconds in ((0, 9.0), (1, 11.0)):
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}" / "summary.json").write_text(
            json.dumps(
                {"run": "x", "seed": seed, "synthesis_s": seconds, "student_s": 10.0, "evaluation_s": 99.0, **lengths}
            )
        )
    for seconds, epochs in (("30", "15"), ("0.1", "1")):
        monkeypatch.setattr("sys.argv", ["budget", seconds, str(tmp_path)])
        budget.main()
        assert capsys.readouterr().out.strip() == epochs  # 2 s each
    monkeypatch.setattr("sys.argv", ["budget", "long", str(tmp_path)])
    with pytest.raises(OptionError, match="'long'"):
        budget.main()


def test_the_comparison_of_revisions_runs_every_method_file():
    methods = [path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")]
    found = same_bits.runs()
    assert found.keys() == {*methods, *same_bits.MORE}
    for method in methods:
        assert found[method][:2] == ["--method", method]
    assert same_bits.SYNTHESIS.keys() <= set(methods)


def test_state_dicts_are_equal_only_to_the_last_bit():
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    assert same_bits.equal(weights, copies)
    copies["a"] = torch.nextafter(copies["a"], torch.tensor(9.0))
    assert not same_bits.equal(weights, copies)
    assert not same_bits.equal(weights, {"a": weights["a"]}) and not same_bits.equal({}, weights)


@pytest.mark.parametrize("file", ["model_last.pth", "student_last.pth"])  # the latter in earlier revisions
def test_the_compared_weights_are_the_last_ones_of_every_run(file, tmp_path):
    for number, run in enumerate(("a/straight", "a/resumed")):
        folder = tmp_path / "runs" / run / "checkpoints"
        folder.mkdir(parents=True)
        checkpoint.save(folder / file, {"state_dict": {"weight": torch.tensor(number)}})
        for other in ("last.pth", "best.pth", file.replace("last", "best")):
            checkpoint.save(folder / other, {"learner": {}})
    found = same_bits.weights_of(tmp_path)
    assert {run: weights["weight"].item() for run, weights in found.items()} == {
        "runs/a/straight": 0,
        "runs/a/resumed": 1,
    }


def test_a_compared_run_is_stopped_by_a_signal_at_one_of_its_steps(monkeypatch):
    steps = []

    def main():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        with StopSignal() as stop:
            while len(steps) < 5 and not stop.received:
                optimizer.step()
                steps.append(sys.argv)
        if stop.received:
            raise SystemExit(128 + signal.SIGTERM)

    program = SimpleNamespace(__name__="program", main=main)
    monkeypatch.setattr(same_bits, "STOP_AT", 3)
    same_bits.call_and_stop(program, "--epochs", 2)
    assert steps == 3 * [["program.py", "--epochs", "2"]]
    with pytest.raises(RuntimeError, match="not stopped"):
        same_bits.call_and_stop(program)


@pytest.mark.slow
def test_the_fuzz_finds_no_fault_in_a_few_cases():
    pytest.importorskip("hypothesis")
    done = command("-m", "benchmarks.fuzz", "--configs", 30, "--runs", 3, "--files", 30)
    assert done.returncode == 0 and done.stdout.count("seed 0:") == 3, done.stdout + done.stderr


def test_a_storm_kills_at_its_moment_and_notices_what_differs(tmp_path):
    """The tests of the test: the moment is counted, what a clock measured is left out, and nothing else is."""

    def main():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        for number in range(4):
            optimizer.step()
            checkpoint.save(f"{number}.pth", {"n": number, "seconds": number, "metadata": {}})

    program = SimpleNamespace(__name__="program", main=main)
    code, moments = kill_storm.in_fork(program, [], tmp_path)
    assert code == 0 and moments["step"] == 4 and moments["file"] >= 4 * 4  # opened, to the disk twice, renamed
    whole = kill_storm.outcome(tmp_path)
    assert whole[Path("3.pth")] == {"n": 3} and kill_storm.differences(whole, dict(whole)) == []
    for kind, number, left in (("step", 3, 2), ("file", moments["file"], 4)):
        folder = tmp_path / kind
        folder.mkdir()
        assert kill_storm.in_fork(program, [], folder, (kind, number, signal.SIGKILL))[0] == -signal.SIGKILL
        assert len(list(folder.glob("?.pth"))) == left
    assert kill_storm.differences(whole, kill_storm.outcome(tmp_path / "step")) == ["2.pth", "3.pth"]
    for one, other in (([1], [1.5]), ([1], [1, 1]), ({"a": 1}, {}), (torch.ones(2), torch.ones(2) + 1e-7)):
        assert not kill_storm.same(one, other) and kill_storm.same(one, one)


def test_a_storm_has_every_method():
    names = set(kill_storm.all_runs("teacher.pth"))
    assert {"scratch", *registry.METHODS} <= names
    assert {f"quantize {name}" for name in registry.QUANTIZATION_METHODS} <= names
    assert {f"incremental {name}" for name in registry.INCREMENTAL_METHODS} <= names
