"""A run within a time budget: what it accepts, how its length is found, when it ends, and that it resumes exactly."""

import json
import os
import re
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import nets
import pytest
import torch
from conftest import call, mostly_slow, rows, scratch, tiny_run
from resuming import at_call, checkpoint_of, kill, same, stopped, terminate
from test_engine import Pupil, Recorder
from together import together

import datafree_incremental
import datafree_kd
import datafree_quantize
from datafree import budget, cost, progress
from datafree.budget import Budget, fitted, seconds_of
from datafree.config import Run
from datafree.cost import Rate, Rates
from datafree.engine import Engine
from datafree.errors import InputError, OptionError
from datafree.learners.base import Learner
from datafree.logger import RunFolder
from datafree.pool import ImagePool
from datafree.report import group, read_summaries, report
from datafree.schedule import Schedule
from datafree.session import Session
from datafree.synthesis.objective import SynthesisObjective

MEASURE_TRAINING = cost.measure_training


@pytest.mark.parametrize("text, seconds", [("900s", 900), ("30m", 1800), ("1.5h", 5400), ("0.5s", 0.5), (None, 0)])
def test_a_time_is_a_number_with_its_unit(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["0s", "-3m", "nan", "nans", "10x", "10", "m", "1e9h", "999999999h", "1 h", "30m ", "1h30m", "٣s", ""]
)
def test_what_is_no_time_is_one_sentence(text):
    with pytest.raises(OptionError, match=r"--budget cannot be .*; it takes a time such as 900s, 30m or 1.5h"):
        seconds_of(text)


# The length of a run, by hand-made costs.

COSTS = {"warmup": 3.0, "synthesis": 5.0, "student": 0.25, "ranges": 1.0, "evaluation": 1.5, "closing": 0.5}
RECIPES = {
    "without synthesis": Schedule(10, 1, 40, 8),
    "many rounds": Schedule(20, 10, 5, 8, 3),
    "long rounds": Schedule(200, 1, 8, 8, 400),
    "warm-up": Schedule(20, 2, 10, 8, 5, warmup=2),
    "a pool of the first rounds": Schedule(20, 3, 10, 8, 5, warmup=1, synthesis_rounds=10),
}


def seconds(schedule, costs=COSTS):
    work = schedule.work_until(schedule.epochs)
    return sum(costs[kind] * amount for kind, amount in work.items())


def seconds_after(taken, schedule):
    return seconds(schedule) - taken


@pytest.mark.parametrize("available", (40.0, 130.0, 1000.0, 7777.0))
@pytest.mark.parametrize("name", RECIPES)
def test_a_length_is_the_longest_that_fits(name, available):
    recipe = RECIPES[name]
    found = fitted(recipe, seconds, available)
    assert seconds(found) <= available < seconds(found.lasting(found.length + 1))
    if recipe.g_steps and not recipe.synthesis_rounds:  # another whole round does not fit either
        whole = found.synthesis_rounds * recipe.kd_steps
        assert whole <= found.length
        more = Schedule(1, recipe.rounds, recipe.kd_steps, 8, 5, found.warmup).lasting(whole + recipe.kd_steps)
        assert available < seconds(more)


@pytest.mark.parametrize("available", (300.0, 1000.0, 7777.0))
def test_warm_up_and_rounds_of_synthesis_keep_their_shares(available):
    found = fitted(RECIPES["warm-up"], seconds, available)
    assert abs(found.warmup - found.epochs / 10) <= 1 and found.warmup > 0
    found = fitted(RECIPES["a pool of the first rounds"], seconds, available)
    assert found.synthesis_rounds == pytest.approx(found.total_rounds / 6, abs=3)
    assert found.synthesis_rounds > 3 * found.warmup  # some of them with terms that use the student


def test_a_run_that_has_begun_keeps_its_warm_up_and_its_steps():
    recipe = RECIPES["warm-up"]
    current = fitted(recipe, seconds, 1000.0)
    for done, available in product((121, 130, 135), (0.0, 50.0, 500.0)):
        work = current.work_until(0, done // 10, done % 10)
        taken = sum(COSTS[kind] * amount for kind, amount in work.items())
        left = partial(seconds_after, taken)
        found = fitted(recipe, left, available, current, done)
        assert found.warmup == current.warmup and found.length >= done
        assert left(found) <= available or found.length == done


def test_a_round_without_synthesis_is_not_made_up_for():
    recipe = RECIPES["many rounds"]
    current = Schedule(3, 10, 5, 8, 3, synthesis_rounds=20).lasting(115)  # 23 rounds
    assert fitted(recipe, seconds, 1000.0, current, 108).synthesis_rounds == 20
    assert fitted(recipe, seconds, 1000.0, current, 98).synthesis_rounds > 100


# Runs with a clock that stands still but for the work.


@pytest.fixture
def clock(monkeypatch):
    """A list of its one reading."""
    reading = [100.0]
    for module in (budget, progress):
        monkeypatch.setattr(module, "now", lambda: reading[0])
    return reading


class Timed(Engine):
    """An engine that saves nothing; its work takes ``costs`` times ``pace`` of the share of the budget spent so far."""

    def __init__(self, folder, clock, recipe, text, pace, costs=COSTS):
        learner, source = Pupil([]), Recorder([])
        super().__init__(learner, source, recipe, folder, Run(), budget=Budget(text, recipe))
        self.save = self._save_what_follows = lambda: None
        self._draw = lambda epoch: None
        self.lines = []
        folder.log = lambda line: line.startswith("[Eval]") or self.lines.append(line)
        self.budget.costs = dict(costs)
        self.follow(fitted(recipe, partial(seconds, costs=costs), self.budget.seconds))

        def take(kind):
            clock[0] += costs[kind] * pace(self.budget.spent / self.budget.seconds)

        make, step, close = source.synthesize, learner.step, self.close_epoch
        source.synthesize = lambda: take("synthesis" if source.with_student else "warmup") or make()
        learner.step = lambda *given: take("student") or step(*given)
        learner.end_warmup_epoch = lambda batch: take("ranges")
        self.evaluate = lambda tick: take("evaluation") or {"acc1": 50.0, "loss": 1.0}
        self.close_epoch = lambda: take("closing") or close()


PACES = {
    "as measured": lambda share: 1.0,
    "twice as slow": lambda share: 2.0,
    "three times as fast": lambda share: 1 / 3,
    "ever slower": lambda share: 1 + share,
    "ever faster": lambda share: 2 - share,
    "slow from the middle on": lambda share: 1.0 if share < 0.5 else 2.0,
    "slow in the last tenth": lambda share: 1.0 if share < 0.9 else 2.0,
    "at times": lambda share: 1.5 if int(10 * share) % 2 else 1.0,
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("pace", PACES)
def test_a_run_ends_in_time_whatever_the_pace(name, pace, clock, tmp_path):
    with RunFolder(tmp_path / "run", "run") as folder:
        engine = Timed(folder, clock, RECIPES[name], "400s", PACES[pace])
        engine.train()
    plan = engine.schedule
    assert engine.budget.spent == pytest.approx(400, rel=0.05)
    assert engine.position["epoch"] == plan.epochs == len(rows(folder.root))
    steps = [event for event in engine.learner.events if isinstance(event, float)]
    assert len(steps) == plan.total_student_steps and max(steps) > 0.9
    assert (pace != "as measured") == bool(engine.lines) and len(engine.lines) < 15


@pytest.mark.parametrize("recipe", [Schedule(20, 10, 5, 8, 3), Schedule(200, 1, 20, 8)])
@pytest.mark.parametrize("every", [1, 5, 10, 1000])
def test_a_run_ends_in_time_with_its_last_evaluation(every, recipe, clock, tmp_path):
    with RunFolder(tmp_path / "run", "run") as folder:
        dear = COSTS | {"evaluation": 4.0 if every == 1 else 40.0}
        engine = Timed(folder, clock, replace(recipe, eval_every=every), "400s", lambda share: 1.0, dear)
        engine.train()
    assert 400 - 1.05 * dear["evaluation"] < engine.budget.spent <= 400  # one more epoch has another evaluation
    assert not engine.lines  # all is as it was measured, so the first plan stays


def test_ends_of_the_warm_up_that_take_long_do_not_count_for_later_ones(clock, tmp_path):
    with RunFolder(tmp_path / "run", "run") as folder:
        engine = Timed(folder, clock, RECIPES["warm-up"], "1000s", lambda share: 1.0, COSTS | {"ranges": 30.0})
        engine.train()
    assert engine.budget.spent == pytest.approx(1000, rel=0.05) and not engine.lines


def test_a_first_step_that_is_slow_does_not_end_the_run(clock, tmp_path):
    """As where code is compiled in it: the plan becomes a few steps, after which the run and its synthesis go on."""
    with RunFolder(tmp_path / "run", "run") as folder:
        engine = Timed(folder, clock, RECIPES["many rounds"], "400s", lambda share: 1.0)
        step = engine.learner.step

        def slow(*given):
            clock[0] += 0 if engine.learner.events.count(0.0) else 60
            return step(*given)

        engine.learner.step = slow
        engine.train()
    assert engine.budget.spent == pytest.approx(400, rel=0.05)
    assert engine.source.events.count("synthesis") > 35


def test_a_budget_that_the_warm_up_has_used_up_ends_with_the_first_step(clock, tmp_path):
    with RunFolder(tmp_path / "run", "run") as folder:
        engine = Timed(folder, clock, RECIPES["warm-up"], "60s", lambda share: 20.0)
        engine.train()
    assert engine.schedule.total_student_steps == 1 and engine.position["epoch"] == engine.schedule.epochs == 2


class Plain(Pupil):
    """With a learning rate of its own."""

    def __init__(self, events):
        super().__init__(events)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)


def test_a_learner_with_another_schedule_is_refused_unless_it_follows(tmp_path):
    with pytest.raises(InputError, match="learning rate of Plain does not follow cosine_to_zero, so that --budget"):
        Plain([]).follow(100)
    pupil = Pupil([])
    for _ in range(5):
        pupil.optimizer.step(), pupil.schedule.step()
    pupil.follow(10)
    assert pupil.lr == pytest.approx(0.05)  # the middle of the cosine


# Whole programs. Their steps take a clock's time, and the steps before the run are hand-made.


def within(*words, epochs=4, program=datafree_kd):
    """Words of a tiny run whose epochs stand in a file, as those of a recipe do."""
    given = list(tiny_run(*words))
    at = given.index("--epochs")
    del given[at : at + 2]
    with open("recipe.yaml", "w") as file:
        file.write(f"schedule: {{epochs: {epochs}}}\n")
    return ("--config", "recipe.yaml", *given, *words)


@pytest.fixture
def distil_within(teacher, tmp_path, monkeypatch):
    """Call datafree_kd.py with --budget -> its folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words, tag="run"):
        given = ("--method", "rgal", "--teacher", nets.name("tiny"), "--teacher_weights", teacher, "--log_tag", tag)
        call(datafree_kd, *given, *within(*words))
        return next((tmp_path / "runs").glob(f"*/{tag}"), None)

    return run


@pytest.fixture
def timed(clock, monkeypatch):
    """A step of synthesis takes 0.5 s and one of the student 0.25 s; measured before the run: a factor of that."""

    def advance(owner, method, amount):
        original = getattr(owner, method)

        def wrapped(*given, **more):
            clock[0] += amount
            return original(*given, **more)

        monkeypatch.setattr(owner, method, wrapped)

    def measure(factor):
        one = {"warmup": 0.5, "synthesis": 0.5, "student": 0.25, "closing": 0.0}
        phases = {kind: Rate(factor * value, 0, None) for kind, value in one.items()}
        monkeypatch.setattr(cost, "measure_training", lambda *given, **more: Rates(dict(phases), None, 0, 0, 0))

    advance(SynthesisObjective, "__call__", 0.5)
    advance(Learner, "step", 0.25)
    measure(1)
    return measure


def student(folder):
    return torch.load(folder / "checkpoints" / "model_last.pth", weights_only=True)["state_dict"]


@pytest.mark.parametrize("text, epochs", [("13.5s", 3), ("27s", 6)])
def test_a_plan_of_whole_epochs_trains_what_as_many_epochs_do(text, epochs, distil_within, distil, timed):
    """A round takes 3 x 0.5 + 3 x 0.25 s, an epoch 4.5 s. The recipe has four epochs, and a pool for as many."""
    folder = distil_within("--budget", text, tag="budget")
    plain = distil("--epochs", epochs, tag="epochs")
    assert same(student(folder), student(plain))
    states = [checkpoint_of(run) for run in (folder, plain)]
    assert [state.pop("plan").get("length") for state in states] == [6 * epochs, None]
    states[0]["learner"]["schedule"].pop("lr_lambdas"), states[1]["learner"]["schedule"].pop("lr_lambdas")
    assert all(same(states[0][part], states[1][part]) for part in states[0])


def test_measuring_before_the_run_leaves_no_trace(distil_within, timed, monkeypatch):
    """The same plan, with real steps before it and without."""
    without = distil_within("--budget", "13.5s", "--method", "rgal_fast", "--grid_every", 1, tag="without")
    rates = cost.measure_training(None, None)
    monkeypatch.undo()
    monkeypatch.chdir(without.parent.parent.parent)
    monkeypatch.setattr(cost, "SECONDS", 0)
    monkeypatch.setattr(cost, "measure_training", lambda *given, **more: MEASURE_TRAINING(*given, **more) and rates)
    monkeypatch.setattr(budget.Budget, "is_due", lambda *given: False)
    monkeypatch.setattr(budget.Budget, "spent", 0.0)
    folder = distil_within("--budget", "13.5s", "--method", "rgal_fast", "--grid_every", 1, tag="with")
    assert same(student(without), student(folder))


VARIANTS = {"rgal": (), "warm-up": ("--method", "rgal_fast", "--warmup", 1), "stream": ("--method", "dfq")}
MOMENTS = [(name, number, act) for name in VARIANTS for number in (2, 8, 23, 31) for act in (kill, terminate)]


@pytest.mark.parametrize("name, number, act", mostly_slow(MOMENTS, [("rgal", 23, terminate), ("warm-up", 8, kill)]))
def test_a_killed_run_keeps_its_plan_to_the_bit(name, number, act, distil_within, timed, monkeypatch):
    """In the measuring rounds, in which a plan that was half as long is replaced, and after them."""
    timed(2)
    words = (*VARIANTS[name], "--budget", "25s")
    straight = distil_within(*words, tag="straight")
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", number, act)
        with stopped(act):
            distil_within(*words, tag="stopped")
    resumed = distil_within(*words, "--resume", "auto", tag="stopped")
    assert "by steps tried before the run" in (resumed / "log.txt").read_text()
    first, second = checkpoint_of(straight), checkpoint_of(resumed)
    assert all(same(first[part], second[part]) for part in first), [p for p in first if not same(first[p], second[p])]
    assert rows(straight) == rows(resumed) and first["plan"]["spent"] == pytest.approx(25, rel=0.05)


def test_a_resumed_run_counts_the_time_before(distil_within, timed, clock, monkeypatch, refused):
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", 14, terminate)
        with stopped(terminate):
            distil_within("--budget", "20s")
    [folder] = Path("runs").glob("*/run")
    spent = checkpoint_of(folder)["plan"]["spent"]
    assert 8 < spent < 14
    line = refused(distil_within, "--budget", "40s", "--resume", "auto")
    assert "last.pth was written with --budget 20s, not 40s" in line
    folder = distil_within("--budget", "20s", "--resume", "auto")
    told = json.loads((folder / "summary.json").read_text())["budget"]
    assert re.fullmatch(r"20s, of which (19|20)\.\d s \([+-]\d\.\d %\) were taken", told)
    at_call(monkeypatch, Session, "score", 1, lambda: clock.append(clock.pop() + 50))  # of the teacher
    distil_within("--budget", "20s", "--resume", "auto")  # the run is finished
    assert json.loads((folder / "summary.json").read_text())["budget"] == told


def test_a_run_of_epochs_is_not_continued_within_a_budget_nor_the_other_way(distil, distil_within, timed, refused):
    distil(tag="epochs"), distil_within("--budget", "9s", tag="budget")
    line = refused(partial(distil_within, tag="epochs"), "--budget", "9s", "--resume", "auto")
    assert "last.pth was written with --budget None, not 9s; resume with the same options" in line
    line = refused(partial(distil, tag="budget"), "--resume", "auto")
    assert "last.pth was written with --budget 9s, not None" in line


def test_a_damaged_plan_is_one_sentence(distil_within, timed, refused):
    last = distil_within("--budget", "9s") / "checkpoints" / "last.pth"
    state = torch.load(last, weights_only=True)
    for damage in ({"length": 0}, {"warmup": "1"}, {"spent": 10**400}, {"costs": [1]}, {"more": 1}):
        last.unlink()
        torch.save({**state, "plan": {**state["plan"], **damage}}, last)
        assert "last.pth is damaged: its part 'plan'" in refused(distil_within, "--budget", "9s", "--resume", "auto")


def test_what_was_planned_is_told(distil_within, timed, capsys):
    folder = distil_within("--budget", "14s")
    log, summary = (folder / "log.txt").read_text(), json.loads((folder / "summary.json").read_text())
    assert "Cost: 14s, in rounds of 3 synthesis steps of 16 images and 3 student steps of 32 views." in log
    assert "Budget 14s, by steps tried before the run: 3.33 epochs, with 6 rounds of 3 synthesis steps" in log
    assert (summary["student_steps"], summary["epochs"], summary["options"]["budget"]) == (20, 3.33, "14s")
    weights = torch.load(folder / "checkpoints" / "model_last.pth", weights_only=True)
    assert weights["student_steps"] == 20 and weights["options"]["budget"] == "14s"
    assert rows(folder)[-1]["lr"] == pytest.approx(0)
    capsys.readouterr()
    distil_within("--budget", "14s", "--dry_run", tag="other")
    printed = capsys.readouterr().out
    assert "Budget 14s, by steps tried here: 3.33 epochs" in printed and "Time: about 14.0 s" in printed


def test_a_dry_run_measures_what_it_plans_for(distil_within, capsys):
    """A recipe of few rounds, whose pool is small, and a budget of many; several batches a round."""
    words = ("--budget", "2m", "--round_batches", 2, "--view_cache", 1, "--dry_run")
    distil_within(*words)
    printed = capsys.readouterr().out
    assert "in rounds of 2 batches of 3 synthesis steps of 16 images and 3 student steps" in printed
    planned = float(re.search(r"by steps tried here: ([0-9.]+) epochs, with .* of 2 batches of 3", printed)[1])
    assert planned > 12 and re.search(r"Time: about (1\.\d|2\.0) minutes|Time: about 1\d\d\.\d s", printed), printed


def test_a_longer_plan_without_room_for_its_images_is_not_taken(distil_within, clock, timed, monkeypatch):
    resize = ImagePool.resize

    def without_room(pool, capacity):
        if capacity > pool.capacity and clock[0] > 101:
            raise InputError("a pool of that size takes more than is free")
        resize(pool, capacity)

    monkeypatch.setattr(ImagePool, "resize", without_room)
    timed(3)
    log = (distil_within("--budget", "20s") / "log.txt").read_text()
    assert "the plan stays, because of a longer one a pool of that size takes more than is free" in log


def test_runs_of_one_budget_share_a_row_whatever_their_plans(distil_within, timed):
    distil_within("--budget", "9s", tag="one")
    timed(3)
    distil_within("--budget", "9s", "--seed", 1, tag="two")
    [line] = report(group(read_summaries(["runs"])))
    assert line["n"] == 2 and 9 < line["steps"] < 15


def test_an_alarm_tells_of_a_run_that_missed_its_budget(distil_within, timed, monkeypatch):
    timed(0.1)
    monkeypatch.setattr(budget.Budget, "is_due", lambda *given: False)
    log = (distil_within("--budget", "2s") / "log.txt").read_text()
    assert "[Alarm] the run took" in log and "of its budget of 2 s" in log


def test_a_budget_that_is_too_short_is_one_sentence(distil_within, timed, refused, tmp_path):
    line = refused(distil_within, "--budget", "1s", before_run=False)
    assert "--budget 1s is too short" in line and "would take about 1.8 s here" in line


@pytest.mark.parametrize("words", [("--epochs", 3), ("--epoch=3",), ("--schedule.epochs", 3)])
def test_epochs_beside_a_budget_are_refused_as_a_flag(words, distil_within, refused):
    line = refused(distil_within, "--budget", "9s", *words, code=2)
    assert line.startswith(f"error: {str(words[0]).partition('=')[0]} 3 does not go with --budget 9s")


def test_a_wrong_budget_is_refused_before_anything_is_done(distil_within, refused, tmp_path):
    assert "--budget cannot be '10x'" in refused(distil_within, "--budget", "10x", code=2)
    assert "unknown option --budget" in refused(call, datafree_incremental, "--budget", "9s", code=2)
    words = ("--budget", "9s", "--epochs", 0)
    assert "--budget has no effect because epochs is 0" in refused(call, datafree_quantize, *words, code=2)
    assert not (tmp_path / "runs").exists()


def test_quantization_within_a_budget(quantised, timed):
    """Its warm-up is extra, and observes ranges."""
    with open("recipe.yaml", "w") as file:
        file.write("schedule: {epochs: 3, warmup: 1}\n")
    folder = quantised("--budget", "30s", length=("--config", "recipe.yaml"))
    plan = checkpoint_of(folder)["plan"]
    assert plan["warmup"] == 2 and plan["spent"] == pytest.approx(30, rel=0.05)


@pytest.mark.slow
def test_several_processes_follow_the_plan_of_the_first_one(distil_within, timed, clock, monkeypatch):
    """Their clocks differ, and the first one measures the steps before the run by itself."""
    monkeypatch.setattr(cost, "measure_training", MEASURE_TRAINING)

    def work():
        faster = 1 + 0.5 * int(os.environ["RANK"])
        for module in (budget, progress):
            monkeypatch.setattr(module, "now", lambda: faster * clock[0])
        distil_within("--budget", "20s")

    assert together(work) == [0, 0]
    [folder] = Path("runs").glob("*/run")
    assert checkpoint_of(folder)["plan"]["spent"] == pytest.approx(20, rel=0.05)
    assert "Budget 20s, after" in (folder / "log.txt").read_text()


@pytest.mark.slow
def test_training_on_real_images_ends_in_time(tmp_path, monkeypatch):
    """With the real clock, and a tolerance that a busy machine keeps."""
    monkeypatch.chdir(tmp_path)
    scratch("--model", nets.name("tiny"), "--batch_size", 64, "--budget", "3s", "--log_tag", "run")
    [folder] = (tmp_path / "runs").glob("*/run")
    assert checkpoint_of(folder)["plan"]["spent"] == pytest.approx(3, rel=0.3)


@pytest.mark.slow
def test_distillation_on_the_digits_ends_in_time(distil_within):
    folder = distil_within("--budget", "10s")
    assert checkpoint_of(folder)["plan"]["spent"] == pytest.approx(10, rel=0.2)
