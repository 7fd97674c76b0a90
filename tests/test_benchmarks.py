"""The benchmarks run, and their yardstick computes the same as what they measure, but for its random triplets."""

import json

import nets
import pytest
import torch
from PIL import Image

from benchmarks import budget, memory, plain, precision, step
from datafree.augment import CropFlip
from datafree.config import Distill, Relation, Synthesis
from datafree.errors import OptionError
from datafree.learners.distill import DistillLearner
from datafree.models.generator import Generator
from datafree.network import Network
from datafree.synthesis.objective import SynthesisObjective

SHAPE, CLASSES, CPU = (3, 16, 16), 4, torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("make", [nets.tiny, nets.small])
def test_the_savings_of_synthesis_leave_its_gradient_as_it_is(make, monkeypatch):
    """Frozen networks, fused statistics and channels_last against the plain form, all but the random triplets."""
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


def test_the_savings_of_the_student_leave_its_gradient_as_it_is(monkeypatch):
    monkeypatch.setattr(plain, "triplet_loss", lambda *given: 0.0)
    models, views = (nets.tiny(CLASSES, 3), nets.small(CLASSES, 3)), torch.rand(8, *SHAPE)
    theirs = plain.Plain(*models, SHAPE, 4, 8, CPU)
    teacher, student = (Network(model, SHAPE, (0.5,) * 3, (0.25,) * 3) for model in models)
    learner = DistillLearner(student, teacher.freeze(), CropFlip(0, False), Distill(cd_loss=0.1), Relation(), 10)
    for project in (*theirs.project, *learner.projection.project):
        torch.nn.init.ones_(project.weight)
        torch.nn.init.zeros_(project.bias)
    gradients = []
    for step_of in (
        lambda: theirs.student_step(theirs.normalise(views), torch.arange(8) % CLASSES),
        lambda: learner.step(views, None),
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


def test_the_known_share_is_that_of_a_cache_drawn_step_by_step():
    draws = dict(epochs=3, steps=5, images=4, views=2, n=2)
    everything = step.known_share(10**6, **draws)
    assert 0.3 < everything < 1 and step.known_share(1, **draws) < everything
    # All of the 24 views are drawn in a long run, and each is asked once, or twice where a pair is new and alike.
    asked = (1 - step.known_share(10**6, epochs=3, steps=500, images=4, views=2, n=2)) * 3 * 500 * 4
    assert 24 <= round(asked) <= 48


def test_a_benchmark_of_steps_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    words = "--pairs resnet20>resnet8 --batch 16 --turns 2 --pool 128 --data-steps 1 --cache 1 --json"
    monkeypatch.setattr(plain, "batches", lambda root, size, n, count: [None])  # its workers take seconds to start
    monkeypatch.setattr("sys.argv", ["step", *words.split(), str(tmp_path / "step.json")])
    step.main()
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


def test_memory_is_measured_in_a_process_of_its_own(capsys):
    row = memory.row("wrn16_1>wrn16_1,32,10,16,128")
    # The inputs of the teacher's widest layers alone, seven of 16 x 32 x 32 numbers an image.
    assert row["networks"] == "wrn16_1>wrn16_1" and row["synthesis MB"] > 7 * 128 * 16 * 32 * 32 * 4 / 1e6
    assert row["pool MB"] == 157 and row["view cache MB"] == 4 * (10 + 64 + 16 + 32 + 64) + 8
    memory.measure("resnet20>resnet8,16,10,4,8", "student")
    assert capsys.readouterr().out.strip().isdigit()
    with pytest.raises(memory.InputError, match="bad is not TEACHER>STUDENT"):
        memory.build("bad")


def test_half_precision_gradients_are_compared_on_a_teacher(teacher, monkeypatch, capsys):
    monkeypatch.setattr(precision, "LOOKS", (0, 2))
    monkeypatch.setattr("sys.argv", ["precision", "digits", nets.name("tiny"), nets.name("small"), str(teacher)])
    precision.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["synthesis", "0"], ["synthesis", "2"], ["student", "0"], ["student", "2"]]
    assert all(0.9 < float(row[2]) <= 1 for row in rows)


def test_a_budget_of_seconds_is_told_in_epochs(tmp_path, monkeypatch, capsys):
    for seed, seconds in ((0, 9.0), (1, 11.0)):
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}" / "summary.json").write_text(
            json.dumps(
                {
                    "run": "x",
                    "seed": seed,
                    "synthesis_s": seconds,
                    "student_s": 10.0,
                    "evaluation_s": 99.0,
                    "settings": {"epochs": 10},
                }
            )
        )
    for seconds, epochs in (("30", "15"), ("0.1", "1")):
        monkeypatch.setattr("sys.argv", ["budget", seconds, str(tmp_path)])
        budget.main()
        assert capsys.readouterr().out.strip() == epochs  # 2 s each
    monkeypatch.setattr("sys.argv", ["budget", "long", str(tmp_path)])
    with pytest.raises(OptionError, match="'long'"):
        budget.main()
