"""What a dry run says of cost, by real runs, hand counts and simulations; and what it does where files are missing."""

import os
import re
import signal
import tempfile
from types import SimpleNamespace

import nets
import numpy as np
import parts
import pytest
import torch
from conftest import call, forked
from parts import count_calls
from torch import nn

import datafree_incremental
import datafree_kd
import datafree_quantize
import train_scratch
from benchmarks import step
from datafree import cost, engine, plan
from datafree.config import Run
from datafree.cost import Rate, amounts_of, measure, measure_training
from datafree.datasets.cards import CARDS
from datafree.datasets.loading import stand_in
from datafree.grids import Gallery
from datafree.learners.base import Learner
from datafree.network import Network
from datafree.runtime import peak_memory, reset_peak
from datafree.schedule import Schedule
from datafree.session import Session
from datafree.synthesis.objective import SynthesisObjective
from datafree.view_cache import expected_new_views

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests advance: a list of its one reading."""
    reading = [0.0]
    monkeypatch.setattr(cost, "now", lambda device: reading[0])
    monkeypatch.setattr(cost, "SECONDS", 4.0)
    return reading


@pytest.mark.parametrize(
    "of_an_image, micro_batch, sizes, times",
    [
        (0.001, 0, [32, 64, 128, 256], 13),
        (0.1, 0, [32, 64], 4),
        (9.0, 0, [32, 64], 3),
        (9.0, 16, [32, 64], 3),
        (0.1, 50, [100, 128], 3),
        (0.1, 200, [256], 2),
    ],
)
def test_a_step_is_measured_on_ever_more_images_while_that_is_quick(of_an_image, micro_batch, sizes, times, clock):
    """A slow one once for each size, beside that in which FLOP are counted; of a batch in parts two parts at least."""
    tried = []

    def take(images, progress):
        tried.append(images)
        clock[0] += of_an_image * images

    rate = measure(take, 256, CPU, cost.SECONDS, micro_batch=micro_batch)
    assert sorted(set(tried)) == sizes and (rate.images, rate.measured) == (256, sizes[-1])
    assert len(tried) == times
    assert rate.seconds == pytest.approx(256 * of_an_image)


def test_on_a_gpu_the_steps_in_which_kernels_are_chosen_are_not_measured(clock, monkeypatch):
    chosen, taken = set(), []
    monkeypatch.setattr(cost, "reset_peak", lambda device: None)
    monkeypatch.setattr(cost, "peak_memory", lambda device: 100)

    def take(images, progress):
        taken.append(images)
        clock[0] += 0.01 if images in chosen else 5.0
        chosen.add(images)
        torch.ones(images, 3) @ torch.ones(3, 2)

    rate = measure(take, 64, torch.device("cuda"), limit=1.0)
    assert rate.seconds == pytest.approx(0.01) and rate.measured == 64 and set(taken) == {32, 64}
    assert rate.flop == 2 * 64 * 3 * 2


def test_terms_that_come_and_go_are_weighed_by_their_share_of_the_run(clock):
    def take(images, progress):
        clock[0] += 0.01 if progress < 0.8 else 0.06

    assert measure(take, 4, CPU, cost.SECONDS).seconds == pytest.approx(0.8 * 0.01 + 0.2 * 0.06)


@pytest.mark.skipif(reset_peak(CPU) is None, reason="the peak of memory can be reset on Linux alone")
def test_memory_of_a_few_images_is_scaled_to_that_of_all():
    def take(images, progress):
        torch.ones(images, 10**6).sum()  # 4 MB an image

    before = reset_peak(CPU)
    rate = measure(take, 64, CPU, cost.SECONDS)
    take(64, 0)
    assert rate.measured == 16 and rate.peak - before == pytest.approx(peak_memory(CPU) - before, rel=0.25)
    assert peak_memory(CPU) - before > 240


def test_flop_are_those_of_all_images():
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5))
    network = Network(model, (1, 8, 8), (0.0,), (1.0,))
    images, labels = torch.zeros(100, 1, 8, 8), torch.zeros(100)
    test = SimpleNamespace(batches=lambda size: zip(images.split(size), labels.split(size)))
    rate = measure(cost._evaluation(network, test), 100, CPU, cost.SECONDS)
    assert rate.flop == 2 * 100 * (64 * 3 * 9 + 192 * 5)


@pytest.mark.parametrize(
    "places, size",
    [
        (10**9, dict(epochs=20, steps=40, images=16, views=25, n=16)),
        (2000, dict(epochs=20, steps=40, images=16, views=25, n=16)),
        (1000, dict(epochs=50, steps=50, images=16, views=25, n=16)),
    ],
)
def test_the_share_of_known_views_is_that_of_a_simulated_cache(places, size):
    schedule = Schedule(size["epochs"], 1, size["steps"], size["n"], g_steps=1)
    capacity = size["epochs"] * size["images"]
    places = min(places, capacity * size["views"])
    new = expected_new_views(schedule, 2 * size["n"], size["images"], capacity, size["views"], places)
    simulated = 1 - step.expected_hit_rate(places, **size)
    assert new / (schedule.total_student_steps * 2 * size["n"]) == pytest.approx(simulated, abs=0.03)


def test_views_of_images_that_leave_the_pool_are_new_ones_again():
    schedule = Schedule(epochs=30, rounds=2, kd_steps=20, batch_size=8, g_steps=1, warmup=5, synthesis_rounds=50)
    images, capacity, count = 8, 24, 9
    random, seen, new, made = np.random.default_rng(0), set(), 0, 0
    for round in range(60):
        made += images * (round < 50)
        for _ in range(20 if round >= 10 else 0):
            drawn = random.integers(max(0, made - capacity), made, 8) * count + random.integers(count, size=8)
            new += len(set(drawn.tolist()) - seen)
            seen.update(drawn.tolist())
    assert expected_new_views(schedule, 8, images, capacity, count, 10**9) == pytest.approx(new, rel=0.03)


def test_views_of_images_that_the_pool_begins_with_are_new_once():
    schedule = Schedule(20, 2, 20, 8, 1, 2, None, 2, 3)
    images, start, count = 4, 50, 9
    random, seen, new, made = np.random.default_rng(0), set(), 0, start
    for round in range(40):
        made += images * (3 if round < 4 else 2)
        for _ in range(20 if round >= 4 else 0):
            drawn = random.integers(made, size=8) * count + random.integers(count, size=8)
            new += len(set(drawn.tolist()) - seen)
            seen.update(drawn.tolist())
    assert expected_new_views(schedule, 8, images, 10**6, count, 10**9, start) == pytest.approx(new, rel=0.03)


def test_a_schedule_of_any_length_is_reckoned_at_once():
    schedule = Schedule(10**9, 10**9, 10**9, 8, g_steps=1)
    assert expected_new_views(schedule, 8, 8, 10**6, 9, 10**9) > 0


def test_the_steps_of_a_run_are_counted_as_it_takes_them(distil, monkeypatch):
    words = ("--epochs", 5, "--warmup", 2, "--g_steps", 2, "--eval_every", 2, "--grid_every", 3, "--ep_steps", 8)
    words += ("--kd_steps", 4, "--synthesis_rounds", 7, "--batch_size", 16, "--round_batches", 2)
    words += ("--warmup_batches", 3)
    calls = {
        "synthesis": count_calls(monkeypatch, SynthesisObjective, "__call__"),
        "student": count_calls(monkeypatch, Learner, "step"),
        "evaluation": count_calls(monkeypatch, Session, "score"),
        "closing": count_calls(monkeypatch, engine.Engine, "close_epoch"),
        "grid": count_calls(monkeypatch, Gallery, "draw"),
    }
    distil(*words)
    counts = {"synthesis_rounds": 7, "batches": 2, "warmup_batches": 3, "eval_every": 2}
    schedule = Schedule(5, 2, 4, 16, g_steps=2, warmup=2, **counts)
    phases = {name: Rate(1, 1, None, images=355) for name in ("evaluation", "teacher")}
    counted = amounts_of(schedule, Run(grid_every=3), 355, 0.0, phases)
    counted["synthesis"] += counted.pop("warmup")
    counted["evaluation"] += counted.pop("teacher")
    assert {name: counted[name] for name in calls} == {name: len(found) for name, found in calls.items()}
    assert calls["grid"] and len(calls["synthesis"]) == 2 * (4 * 3 + 3 * 2)


@pytest.mark.parametrize(
    "epochs, every, grids", [(1, 1, 1), (1, 10, 1), (10, 10, 2), (11, 10, 2), (12, 10, 3), (3, 1, 3)]
)
def test_image_grids_are_counted(epochs, every, grids):
    schedule = Schedule(epochs, 1, 1, 1)
    assert amounts_of(schedule, Run(grid_every=every), 0, 0.0, {})["grid"] == grids
    assert sum(epoch % every == 0 or epoch == epochs - 1 for epoch in range(epochs)) == grids


def test_a_signal_while_an_epoch_is_tried_leaves_no_folder(distil, monkeypatch, tmp_path):
    places = tmp_path / "places"
    places.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(places))

    def interrupted(engine):
        assert list(places.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(engine.Engine, "close_epoch", interrupted)
    assert forked(distil, "--dry_run") == 128 + signal.SIGTERM and not list(places.iterdir())


def test_measuring_leaves_the_network_and_the_random_states_as_they_were():
    given = parts.options(synthesis_batch_size=16, g_steps=3, bn=1.0, kd_steps=2, ep_steps=2, epochs=2, nz=8, ngf=4)
    source = parts.make_source(given)
    learner = parts.make_learner(given, source.teacher, source.student)
    before, batches = parts.snapshot(learner.network, source.teacher), []
    state = torch.get_rng_state()
    session = SimpleNamespace(
        config=given, run=given.run, device=CPU, test=None, evaluation_batch=500, card=parts.make_card(), digests={}
    )
    schedule = Schedule(2, 1, 2, 32, g_steps=3)
    training = SimpleNamespace(
        learner=learner,
        source=source,
        schedule=schedule,
        test=None,
        teacher=None,
        model="x",
        monitor=None,
        stored={},
        classes="ab",
        judge=None,
        budget=None,
        held_out_count=0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            learner, "step", lambda batch, progress: batches.append(len(batch.images)) or Learner.step(learner, batch)
        )
        rates = measure_training(session, training)
    assert not parts.changed(before, learner.network, source.teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert given.synthesis.synthesis_batch_size == 16 and max(batches) == 16 and min(batches) == 8
    assert {"synthesis", "student", "closing", "grid"} == rates.phases.keys()
    assert all(rates.phases[name].seconds > 0 for name in ("synthesis", "student", "closing"))
    assert rates.phases["student"].flop > 0


# The plan.


def told(text):
    """The numbers of the lines on cost."""
    time = re.search(r"^Time: about (.*) at this rate", text, re.MULTILINE)[1]
    disk = re.search(r"^Disk: up to ([\d.]+) (.)B in", text, re.MULTILINE)
    return time, float(disk[1]) * {"k": 1e3, "M": 1e6}[disk[2]]


def test_a_dry_run_of_distillation_tells_time_memory_and_disk(distil, capsys):
    distil("--dry_run")
    printed = capsys.readouterr().out
    _, disk = told(printed)
    folder = distil()
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    size = sum({file.st_ino: file.st_size for file in files}.values())
    assert 1 < disk / size < 3
    assert "a step of " in printed and re.search(r"^student +[\d.]+ ms +[\d.]+ [MG]B +[\d.]+ M +16 +16$", printed, re.M)
    assert re.search(r"Memory: about [\d.,]+ [MG]B at most, of which .* are in use now; .* are free\.", printed)


QUANTISED = ("--method", "rgal", *"--g_steps 2 --synthesis_batch_size 16 --nz 8 --ngf 4 --calibration 2".split())
INCREMENTAL = (
    "--method",
    "abd",
    *"--g_steps 2 --synthesis_batch_size 16 --nz 8 --ngf 4 --init_cls 4 --increment 3".split(),
)
SHORT = ("--threads", 1, "--epochs", 2, "--ep_steps", 4, "--kd_steps", 2, "--batch_size", 16)
TINY = nets.name("tiny")


def test_a_dry_run_of_quantization_and_of_incremental_learning(teacher, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = ("--teacher", TINY, "--teacher_weights", teacher)
    call(datafree_quantize, "--dataset", "digits", *weights, *QUANTISED, *SHORT, "--dry_run")
    printed = capsys.readouterr().out
    assert told(printed) and re.search(r"^observing ranges +", printed, re.MULTILINE)
    call(datafree_incremental, "--dataset", "digits", "--model", TINY, *INCREMENTAL, *SHORT, "--dry_run")
    printed = capsys.readouterr().out
    assert printed.count("Measured here") == 2 and printed.count("Time: about") == 1  # two kinds of tasks, three tasks
    assert not list(tmp_path.iterdir())


def test_units_are_those_that_a_reader_expects():
    assert [plan.duration(s) for s in (0.0123, 1.5, 119, 600, 7200, 172_800)] == [
        "12.3 ms",
        "1.5 s",
        "119.0 s",
        "10.0 minutes",
        "2.0 hours",
        "2.0 days",
    ]
    assert [plan.magnitude(n, "B") for n in (0, 999, 1234, 5.6e9, 1e21)] == [
        "0 B",
        "999 B",
        "1.23 kB",
        "5.6 GB",
        "1e+03 EB",
    ]


SIZES = {"synthesis_batch_size", "batch_size", "lr"}


def test_what_does_not_fit_is_an_alarm():
    one = cost.Cost({"student": 60.0}, 1e12, 9e9, 1e9, 5e9, 0.0)
    fits = plan.describe_costs([one], 1e10, "runs", 1e10, SIZES)
    assert not any("[Alarm]" in line for line in fits)
    alarms = [line for line in plan.describe_costs([one, one], 7e9, "runs", 8e9, SIZES) if line.startswith("[Alarm]")]
    assert len(alarms) == 2 and "--save_dir" in alarms[1]
    assert alarms[0].endswith("or lower --synthesis_batch_size or --batch_size.")  # a pool is not among the options
    unknown = plan.describe_costs([cost.Cost({"student": 60.0}, 1e12, None, 0, 5e9, 0.0)], 7e9, "runs", 8e9, SIZES)
    assert any("Memory: not known" in line for line in unknown)


# What is missing.


def test_without_its_teacher_a_dry_run_tells_the_plan_and_how_to_get_it(refused, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ("--dataset", "digits", "--teacher", TINY, "--dry_run")
    for program, more in ((datafree_kd, ("--student", TINY, *SYNTHESIS)), (datafree_quantize, QUANTISED)):
        with pytest.raises(SystemExit) as stop:
            call(program, *small, *SHORT, *more)
        printed = capsys.readouterr()
        [line] = printed.err.strip().splitlines()
        assert stop.value.code == 1 and line.startswith(
            "error: there is no file checkpoints/pretrained/digits_nets-tiny.pth"
        )
        assert f"train it by: python train_scratch.py --dataset digits --model {TINY}" in line
        assert (
            "Plan: " in printed.out and told(printed.out) and f"Missing: {line.removeprefix('error: ')}." in printed.out
        )
        assert "random weights and noise in place of what is not there" in printed.out
    named = refused(call, datafree_kd, *small, "--teacher_weights", "none.pth", "--student", TINY, *SHORT, *SYNTHESIS)
    assert "there is no file none.pth" in named
    assert not list(tmp_path.iterdir())


SYNTHESIS = tuple("--g_steps 2 --synthesis_batch_size 16 --nz 8 --ngf 4".split())


def test_weights_that_a_model_would_download_are_missing_as_a_file_is(refused, tmp_path, monkeypatch, capsys):
    def offline(name):
        raise OSError("no route to the host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.models.get_model_weights", offline)
    small = ("--dataset", "cifar10", "--teacher", "torchvision:shufflenet_v2_x0_5", "--teacher_weights", "own")
    words = (*small, "--student", TINY, "--eval", "none", *SHORT, *SYNTHESIS)
    with pytest.raises(SystemExit):
        call(datafree_kd, *words, "--dry_run")
    printed = capsys.readouterr()
    assert "Plan: " in printed.out and told(printed.out) and "Missing: torchvision's weights of" in printed.out
    assert "cannot be had: OSError: no route to the host; download them on a machine" in printed.err
    assert "cannot be had" in refused(call, datafree_kd, *words)


def test_without_images_a_dry_run_plans_with_as_many_as_are_published(refused, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("--dataset", "cifar10", "--model", TINY, "--threads", 1, "--dry_run")
    call(train_scratch, *words)
    printed = capsys.readouterr().out
    assert "training nets.py:tiny on 50,000 images" in printed.replace(TINY, "nets.py:tiny") and told(printed)
    assert "The test images of cifar10 are not here; the run downloads them." in printed and "Missing" not in printed
    line = refused(call, train_scratch, *words, "--download", "false")
    assert "no test images of cifar10" in line
    call(datafree_incremental, *words, *INCREMENTAL, *SHORT)
    assert "task 1 of 3" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_run_itself_still_ends_with_what_is_missing(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8", "--threads", 1)
    assert "there is no file" in refused(call, datafree_kd, *words)
    evaluated = ("--dataset", "digits", "--model", "resnet8", "--weights", "none.pth", "--evaluate_only", "--dry_run")
    assert "there is no file none.pth" in refused(call, train_scratch, *evaluated)


def test_a_stand_in_takes_the_memory_of_one_image():
    split = stand_in(CARDS["imagenet"], "train")
    assert len(split) == 1_281_167 and split.images.untyped_storage().nbytes() == 3 * 224 * 224
    part = split.of_classes([5, 7], [0, 1], 2)
    assert len(part) in (2562, 2563, 2564) and part.images.untyped_storage().nbytes() == 3 * 224 * 224
    images, labels = part.sample(4)
    assert images.shape == (4, 3, 224, 224) and set(labels.tolist()) <= {0, 1}
    some = stand_in(parts.make_card(), "test", classes=[1, 3])
    assert len(some) == 500 and sorted(set(some.labels.tolist())) == [0, 1]
