"""The time left: of the published schedules with phases of unequal cost, after a resume, and what is shown of it."""

import io
import re
import sys

import pytest
import torch
from test_engine import Pupil, Recorder

import registry
from datafree import cli, progress
from datafree.config import CONFIGS, DistillConfig, IncrementalConfig, QuantizeConfig, Run, ScratchConfig
from datafree.engine import Engine
from datafree.logger import RunFolder
from datafree.progress import Progress
from datafree.schedule import Schedule
from datafree.synthesis.base import BaseSynthesis

# Of a step; the end of an epoch, with its evaluation, takes as long as ten student steps.
SECONDS = {"warmup": 0.7, "synthesis": 1.0, "student": 0.3, "ranges": 1.0, "evaluation": 1.5, "closing": 0.5}
PUBLISHED = [
    *((DistillConfig, registry.METHODS, name) for name in registry.METHODS),
    *((QuantizeConfig, registry.QUANTIZATION_METHODS, name) for name in registry.QUANTIZATION_METHODS),
    *((IncrementalConfig, registry.INCREMENTAL_METHODS, name) for name in ("abd", "abd_inversion", "rdfcil", "rgal")),
    (ScratchConfig, None, None),
]


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests advance: a list of its one reading."""
    reading = [100.0]
    monkeypatch.setattr(progress, "now", lambda: reading[0])
    return reading


def published_schedule(config_class, files, name):
    words = ["--method", name] if name else []
    config, _ = cli.parse(config_class, words, description="", method_files=files, other_configs=CONFIGS, examples="")
    if not name:
        return Schedule(config.training.epochs, rounds=1, kd_steps=50_000 // config.training.batch_size, batch_size=1)
    takes_steps = config.synthesis.source not in ("noise", "real", "folder")
    return Schedule.of(config.schedule, 1, None if takes_steps else BaseSynthesis())


def positions(s, begin=(0, 0)):
    """The rounds from a position on, as (epoch, round)."""
    return [(e, r) for e in range(s.epochs) for r in range(s.rounds) if (e, r) >= begin]


def simulate(bar, s, clock, epoch, round):
    """A round, as the engine counts it; and the end of its epoch if it is the last one."""
    warm = epoch < s.warmup
    bar.epoch(epoch)
    if s.synthesises(epoch, round):
        kind = "warmup" if warm else "synthesis"
        with bar.phase(kind):
            clock[0] += SECONDS[kind] * s.round_steps(warm)
            bar.finish()
    if not warm:
        with bar.phase("student"):
            clock[0] += SECONDS["student"] * s.kd_steps
            bar.advance(s.kd_steps, s.kd_steps)
    if round == s.rounds - 1:
        with bar.phase("closing"):
            clock[0] += SECONDS["closing"] / 2
            for kind in ["ranges"] * warm + ["evaluation"] * s.evaluates(epoch):
                with bar.phase(kind):
                    clock[0] += SECONDS[kind]
                    bar.advance(1)
            clock[0] += SECONDS["closing"] / 2
            bar.advance(1)


@pytest.mark.parametrize("config_class, files, name", PUBLISHED)
def test_the_time_left_of_a_published_schedule_is_right_from_the_second_round_on(config_class, files, name, clock):
    s, seen = published_schedule(config_class, files, name), []
    bar = Progress(s, {"epoch": 0, "round": 0, "step": 0})
    for epoch, round in positions(s):
        simulate(bar, s, clock, epoch, round)
        seen.append((clock[0], bar.in_warmup, bar.seconds_left()))
    for warm in (True, False):
        phase = [(at, left) for at, in_warmup, left in seen if in_warmup == warm]
        end = seen[s.warmup * s.rounds - 1][0] if warm else seen[-1][0]
        # Without the first round of each; after the last round of the warm-up no student step is measured yet.
        for at, left in phase[1:] if warm or not s.warmup else phase[2:]:
            if left is None:
                assert warm and not s.g_steps and at == seen[0][0]  # nothing happens before the end of its first epoch
            else:
                assert left == pytest.approx(end - at, rel=0.1, abs=1e-6)


def test_the_time_left_is_right_at_once_after_a_resume_in_mid_epoch(clock):
    s = Schedule(epochs=10, rounds=5, kd_steps=20, batch_size=1, g_steps=30, warmup=1)
    whole = Progress(s, {"epoch": 0, "round": 0, "step": 0})
    for epoch, round in positions(s)[:18]:
        simulate(whole, s, clock, epoch, round)
    resumed = Progress(s, {"epoch": 3, "round": 3, "step": 0}, whole.state())
    assert resumed.seconds_left() == whole.seconds_left()
    begun = clock[0] + resumed.seconds_left()
    for epoch, round in positions(s, (3, 3)):
        simulate(resumed, s, clock, epoch, round)
    assert begun == pytest.approx(clock[0], rel=0.05)
    within = Progress(s, {"epoch": 3, "round": 3, "step": 7}, whole.state())
    assert within.seconds_left() == pytest.approx(whole.seconds_left() - 30 * 1.0 - 7 * 0.3, rel=1e-6)


class SlowRecorder(Recorder):
    clock: list

    def synthesize(self):
        for _ in range(3):
            self.clock[0] += SECONDS["synthesis" if self.with_student else "warmup"]
            self.tick()
        return super().synthesize()


def slow_engine(folder, clock, g_steps=3):
    learner, source = Pupil([]), SlowRecorder([]) if g_steps else Recorder([])
    source.clock = clock
    step = learner.step

    def slow_step(batch, at):
        clock[0] += SECONDS["student"]
        return step(batch, at)

    learner.step = slow_step
    return Engine(learner, source, Schedule(4, 3, 4, 4, g_steps=g_steps, warmup=1), folder, Run())


def test_the_engine_measures_each_kind_of_work(clock, tmp_path, monkeypatch):
    left = []
    advance = Progress.advance

    def watched(self, *given, **more):
        advance(self, *given, **more)
        left.append((clock[0], self.in_warmup, self.seconds_left()))

    monkeypatch.setattr(Progress, "advance", watched)
    with RunFolder(tmp_path / "run", "run") as folder:
        slow_engine(folder, clock).train()
    ends = {warm: max(at for at, in_warmup, _ in left if in_warmup == warm) for warm in (True, False)}
    known = [(at, value) for at, warm, value in left if not warm and value is not None]
    assert len(known) > 40 and all(value == pytest.approx(ends[False] - at, abs=0.8) for at, value in known)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_progress_is_plain_lines(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 5)
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with RunFolder(tmp_path / str(stream.isatty()), "run") as folder:
            slow_engine(folder, clock).train()
        text = stream.getvalue()
        assert ("\r" in text) == stream.isatty() and " left" in text
        if not stream.isatty():
            lines = text.splitlines()
            assert re.fullmatch(r"epoch 1/4: \d+ of 72 steps, 00:0\d left of the warm-up", lines[0])
            assert all(
                re.fullmatch(r"epoch \d/4: \d+ of 72 steps, (00:\d\d|\?) left( of the warm-up)?", x) for x in lines
            )
            assert 4 < len(lines) < 9


def test_a_source_that_counts_no_steps_is_measured_by_its_rounds(clock, tmp_path):
    with RunFolder(tmp_path / "run", "run") as folder:
        engine = slow_engine(folder, clock, g_steps=0)
        engine.train()
    assert engine.progress.seconds_left() == 0 and torch.isfinite(torch.tensor(engine.progress.seconds_left()))
