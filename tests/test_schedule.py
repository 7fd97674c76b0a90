"""The schedule's counts are those of the loop that the engine runs."""

from itertools import product

import pytest

from datafree import config
from datafree.errors import InputError
from datafree.schedule import Schedule
from datafree.synthesis.base import BaseSynthesis

SCHEDULES = [
    Schedule(epochs, rounds, kd_steps, 8, g_steps, warmup, synthesis_rounds, *batches)
    for epochs, rounds, kd_steps, g_steps, warmup, synthesis_rounds, batches in product(
        (1, 2, 5), (1, 3), (1, 4), (0, 3), (0, 1, 3), (None, 1, 2, 4, 100), ((1, 1), (2, 3))
    )
    if warmup < epochs
]
SCHEDULES += [
    Schedule(5, rounds, 4, 8, 3, warmup, synthesis_rounds).lasting(length)
    for rounds, warmup, synthesis_rounds, length in product((1, 3), (0, 1), (None, 2), (13, 16, 24, 25))
]


def loop(schedule):
    """(kind, epoch, round, step) of every step of both phases, and of every round's synthesis, in a nested loop, which
    ends after ``length`` student steps, those of the warm-up included."""
    synthesised, left = 0, schedule.length or 10**9
    for epoch in range(schedule.epochs):
        for round_ in range(schedule.rounds):
            if left <= 0:
                return
            if schedule.synthesis_rounds is None or synthesised < schedule.synthesis_rounds:
                synthesised += 1
                yield "round", epoch, round_, 0
                for _ in range(schedule.warmup_batches if epoch < schedule.warmup else schedule.batches):
                    yield "batch", epoch, round_, 0
                    yield from (("synthesis", epoch, round_, step) for step in range(schedule.g_steps))
            if epoch >= schedule.warmup:
                yield from (("student", epoch, round_, step) for step in range(min(schedule.kd_steps, left)))
            left -= schedule.kd_steps


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_counts_are_those_of_a_nested_loop(schedule):
    steps = list(loop(schedule))
    kinds = [kind for kind, *_ in steps]
    assert schedule.total_student_steps == kinds.count("student") > 0
    assert schedule.total_synthesis_rounds == kinds.count("round") > 0
    assert schedule.total_batches == kinds.count("batch")
    for epoch in range(schedule.epochs + 1):
        before = [kind for kind, at, *_ in steps if at < epoch and kind != "round"]
        assert schedule.batches_until(epoch) == before.count("batch")
        assert schedule.steps_until(epoch) == len(before) - before.count("batch")
    assert schedule.rounds_of(schedule.epochs) == 0 < schedule.rounds_of(schedule.epochs - 1)
    synthesising = {(epoch, round_) for kind, epoch, round_, _ in steps if kind == "round"}
    for at in product(range(schedule.epochs), range(schedule.rounds)):
        if at[1] < schedule.rounds_of(at[0]):
            assert schedule.synthesises(*at) == (at in synthesising)
            taken = sum(kind == "student" and (epoch, round_) == at for kind, epoch, round_, _ in steps)
            assert schedule.steps_of(*at) == taken or at[0] < schedule.warmup


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_progress_grows_evenly_from_0_to_1_over_all_epochs(schedule):
    """Those of the warm-up count, too: terms that end at a fraction of the run end at the same epoch with one."""
    places = list(product(range(schedule.epochs), range(schedule.rounds), range(schedule.kd_steps)))[: schedule.length]
    for done, place in enumerate(places):
        assert schedule.student_steps_done(*place) == done
        assert schedule.progress(*place) == pytest.approx(done / len(places))
    assert schedule.progress(0, 0, 0) == 0 and schedule.progress(*places[-1]) < 1


def test_the_schedule_of_the_options():
    options = config.ScheduleOptions(epochs=7, ep_steps=12, kd_steps=3, g_steps=5, warmup=2, synthesis_rounds=9)
    expected = Schedule(7, 4, 3, batch_size=16, g_steps=5, warmup=2, synthesis_rounds=9)
    assert Schedule.of(options, 16) == expected
    assert Schedule.of(options, 16, BaseSynthesis()).g_steps == 0  # of a source that takes no steps
    assert Schedule.of(config.ScheduleOptions(ep_steps=4, kd_steps=4), 1).rounds == 1
    assert Schedule.of(config.ScheduleOptions(), 1).synthesis_rounds is None
    for given, warmup, expected in (
        ({}, 1, (1, 1)),
        ({"round_batches": 2}, 1, (2, 2)),
        ({"warmup_batches": 3}, 1, (1, 3)),
        ({"warmup_batches": 3}, 0, (1, 1)),
    ):
        schedule = Schedule.of(config.ScheduleOptions(warmup=warmup, **given), 16)
        assert (schedule.batches, schedule.warmup_batches) == expected


@pytest.mark.parametrize(
    "given, parts",
    [
        ({"ep_steps": 6, "kd_steps": 60}, ("kd_steps 60 is more than ep_steps 6", "lower --kd_steps", "--ep_steps")),
        ({"ep_steps": 6, "kd_steps": 4}, ("ep_steps 6", "kd_steps 4", "--ep_steps 4 or 8")),
        ({"ep_steps": 13, "kd_steps": 4}, ("give --ep_steps 12 or 16",)),
        ({"epochs": 4, "warmup": 4}, ("warmup 4 leaves none of 4 epochs", "lower --warmup or raise --epochs")),
        ({"epochs": 4, "warmup": 9}, ("warmup 9 leaves none of 4 epochs",)),
    ],
)
def test_options_that_make_no_schedule(given, parts):
    with pytest.raises(InputError) as caught:
        Schedule.of(config.ScheduleOptions(**given), 16)
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message
