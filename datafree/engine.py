"""The loop: epochs of rounds, each some synthesis steps and some student steps.

    for every epoch:
        for every round:
            source.synthesize()                      phase 1: images from the teacher
            for every student step:
                learner.step(*source.sample(n))      phase 2: the student learns from images
        evaluate, log, draw, save

The engine knows two things only: a source that makes images (``synthesis/``) and a learner that
takes them (``learners/``). Distillation, its controls and teacher training are choices of the two.
"""

import math
import re
import signal
import sys
import time
from collections import defaultdict
from contextlib import contextmanager

import torch
from tqdm import tqdm

from datafree import checkpoint
from datafree.errors import InputError
from datafree.runtime import StopSignal, load_rng_state, rng_state


class Engine:
    """Runs a learner on a source, with everything that must survive a restart in one place.

    schedule: epochs, rounds (per epoch), kd_steps, warmup, batch_size.
    evaluate: () -> {acc1, acc5, loss} in %, or None where there is nothing to evaluate on.
    describe: () -> (numbers of the latest images, alarms), or None.
    facts: plain values saved beside the student's weights; its ``settings`` (option -> value) must be the same
    when the run is resumed, but for the epochs.
    """

    def __init__(self, learner, source, schedule, folder, run, *, evaluate=None, describe=None, facts=None):
        self.learner, self.source, self.schedule, self.folder, self.run = learner, source, schedule, folder, run
        self.evaluate, self.describe, self.facts = evaluate, describe, facts or {}
        self.position = {"epoch": 0, "round": 0, "step": 0}
        self.means = Means()
        self.best = {"acc1": -1.0, "epoch": -1}
        self.seconds = {"synthesis": 0.0, "student": 0.0, "evaluation": 0.0}
        self.result = {}

    def train(self):
        """Run the remaining epochs -> the last epoch's numbers. A stop signal saves and exits with 128 + its number."""
        s, at = self.schedule, self.position
        with (
            StopSignal() as stop,
            tqdm(
                total=self._steps_until(s.epochs),
                initial=self._steps_until(at["epoch"]),
                unit="step",
                desc="epoch",
                smoothing=0.05,
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 30,
            ) as self.bar,
        ):
            self.source.tick = self.bar.update
            while at["epoch"] < s.epochs:
                self.bar.set_description(f"epoch {at['epoch'] + 1}/{s.epochs}")
                self._epoch(stop)
                if stop.received:
                    self._save_run()
                    self.folder.log("Stopped by a signal; everything is saved, --resume auto goes on from here.")
                    raise SystemExit(128 + signal.Signals[stop.received])
                self._close_epoch()
        return self.result

    def _steps_until(self, epoch):
        """Steps of both phases in the epochs before ``epoch``."""
        s = self.schedule
        return s.rounds * (epoch * self.source.g_steps + max(epoch - s.warmup, 0) * s.kd_steps)

    def _epoch(self, stop):
        at, s = self.position, self.schedule
        warm = at["epoch"] < s.warmup
        while at["round"] < s.rounds and not stop.received:
            if at["step"] == 0:
                self._synthesize(with_student=not warm)
            with self._clock("student"):
                # Once a round's images are made it takes a step, or resuming would make them again.
                while at["step"] < s.kd_steps and not warm and not (stop.received and at["step"]):
                    self._student_step()
            if warm or at["step"] == s.kd_steps:
                require_finite(self.means.values(), "mean of")
                at["round"], at["step"] = at["round"] + 1, 0

    def _synthesize(self, with_student):
        self.source.epoch, self.source.with_student = self.position["epoch"], with_student
        with self._clock("synthesis"), out_of_memory_in("synthesis", "--synthesis_batch_size"):
            terms = self.source.synthesize()
        require_finite(terms, "synthesis term")
        self.means.add("synthesis", terms)

    def _student_step(self):
        at, s = self.position, self.schedule
        done = (at["epoch"] * s.rounds + at["round"]) * s.kd_steps + at["step"]
        with out_of_memory_in("a training step", "--batch_size"):
            terms = self.learner.step(
                *self.source.sample(s.batch_size), progress=done / (s.epochs * s.rounds * s.kd_steps)
            )
        self.means.add("student", terms)
        at["step"] += 1
        self.bar.update()
        if self.run.print_freq and (done + 1) % self.run.print_freq == 0:
            shown = " ".join(f"{name}={value:.4f}" for name, value in require_finite(terms, "student term").items())
            self.folder.log(f"[Train] Epoch={at['epoch']} Step={done + 1} {shown} Lr={self.learner.lr:.4f}")

    def _close_epoch(self):
        """Evaluate, log, draw and save; then the next epoch begins."""
        epoch = self.position["epoch"]
        last = epoch == self.schedule.epochs - 1
        numbers = require_finite(self.means.values(), "mean of")
        if self.describe:
            described, warnings = self.describe()
            numbers.update({f"images/{name}": value for name, value in described.items()})
            for warning in warnings if epoch >= self.schedule.warmup else ():
                self.folder.log(f"[Alarm] {warning}")
        improved = self._evaluate(epoch, numbers) if last or (epoch + 1) % self.run.eval_every == 0 else False
        numbers.update(
            self.learner.numbers(),
            lr=self.learner.lr,
            images=self.source.images_made,
            **{f"seconds/{name}": value for name, value in self.seconds.items()},
        )
        self.result = numbers
        self.folder.metrics(epoch, numbers)
        if last or epoch % self.run.grid_every == 0:
            self._draw(epoch)
        self.position.update(epoch=epoch + 1, round=0, step=0)
        self.means = Means()
        self._save_epoch(improved)

    def _evaluate(self, epoch, numbers):
        """Add the test numbers and log them -> whether this epoch is the best so far."""
        if self.evaluate is None:
            return False
        self.learner.network.eval()
        with self._clock("evaluation"):
            numbers.update(self.evaluate())
        improved = numbers["acc1"] > self.best["acc1"]
        if improved:
            self.best = {"acc1": numbers["acc1"], "epoch": epoch}
        numbers["best_acc1"] = self.best["acc1"]
        self.folder.log(
            f"[Eval] Epoch={epoch} Acc@1={numbers['acc1']:.4f} Acc@5={numbers['acc5']:.4f} "
            f"Loss={numbers['loss']:.4f} Lr={self.learner.lr:.4f}"
        )
        return improved

    def _draw(self, epoch):
        images, targets = self.source.latest()
        self.folder.grid(f"epoch_{epoch:04d}", *grid_rows(images, targets))

    @contextmanager
    def _clock(self, phase):
        """Add the wall-clock seconds of the block to a phase; the GPU is waited for once, at its end."""
        started = time.perf_counter()
        yield
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)
        self.seconds[phase] += time.perf_counter() - started

    def _save_run(self):
        """Write last.pth, which a run is resumed from."""
        checkpoint.save(self.folder.checkpoints / "last.pth", self.state_dict())

    def _save_epoch(self, improved):
        """Write last.pth and the student alone; the same as best where this epoch is the best so far."""
        folder = self.folder.checkpoints
        self._save_run()
        facts = {**self.facts, "epoch": self.position["epoch"], "acc1": self.result.get("acc1")}
        checkpoint.save(folder / "student_last.pth", {"state_dict": self.learner.network.model.state_dict(), **facts})
        if improved:
            checkpoint.link(folder / "last.pth", folder / "best.pth")
            checkpoint.link(folder / "student_last.pth", folder / "student_best.pth")

    def state_dict(self):
        return {
            "learner": self.learner.state_dict(),
            "source": self.source.state_dict(),
            "rng": rng_state(),
            "position": dict(self.position),
            "means": self.means.state_dict(),
            "best": dict(self.best),
            "seconds": dict(self.seconds),
            "result": dict(self.result),
            "facts": dict(self.facts),
        }

    def load(self, path):
        """Go on from a checkpoint of this run, or of one that differs in no more than its length."""
        state = checkpoint.load(path)
        checkpoint.require(state, *self.state_dict(), path=path)
        self._check_origin(state, path)
        try:
            self.learner.load_state_dict(state["learner"])
            self.source.load_state_dict(state["source"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} does not fit this run ({str(error).splitlines()[0]}); resume with the "
                "options that it was written with"
            ) from error
        self.means.load_state_dict(state["means"], self.learner.device)
        for name in ("position", "best", "seconds", "result"):
            setattr(self, name, state[name])
        load_rng_state(state["rng"])
        self.folder.truncate_metrics(self.position["epoch"])
        self.folder.log(
            f"Resumed from {path.name}: epoch {self.position['epoch']}, round {self.position['round']}, "
            f"student step {self.position['step']}."
        )

    def _check_origin(self, state, path):
        theirs, ours = (facts.get("settings", {}) for facts in (state["facts"], self.facts))
        for name in theirs | ours:
            if name != "epochs" and theirs.get(name) != ours.get(name):
                raise InputError(
                    f"{path} is of a run with --{name} {theirs.get(name)}, not {ours.get(name)}; resume "
                    "with the options that it was written with, or begin anew under --log_tag NEW"
                )
        if state["position"]["epoch"] > self.schedule.epochs:
            raise InputError(
                f"{path} is at epoch {state['position']['epoch']} already; raise --epochs "
                f"{self.schedule.epochs} to go on from it"
            )


class Means:
    """Running means of terms, kept on the device so that no step waits for the host."""

    def __init__(self):
        self.sums, self.counts = {}, defaultdict(int)

    def add(self, phase, terms):
        for name, value in terms.items():
            key = f"{phase}/{name}"
            self.sums[key] = self.sums[key] + value.float() if key in self.sums else value.float()
            self.counts[key] += 1

    def values(self):
        return {key: total / self.counts[key] for key, total in self.sums.items()}

    def state_dict(self):
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state, device):
        self.sums = {key: total.to(device) for key, total in state["sums"].items()}
        self.counts = defaultdict(int, state["counts"])


@contextmanager
def out_of_memory_in(phase, remedy):
    """The block's out of memory, on whatever device, as one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise InputError(f"the memory does not suffice for {phase}; lower {remedy}, or use smaller networks") from error


def require_finite(terms, where):
    """Terms as floats; a term that is not finite stops the run and is named."""
    if not terms:
        return {}
    values = dict(zip(terms, torch.stack([term.float() for term in terms.values()]).tolist()))
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                f"the {where} {name} became {value}; lower its weight or the learning rate, and "
                "check the teacher; the last epoch's checkpoint is kept"
            )
    return values


def grid_rows(images, targets, per_class=8, classes=10):
    """Images, captions and columns of a grid that reads by class: one row for each of the first 10 classes."""
    if targets is None:
        return images[: per_class * classes], None, per_class
    shown = targets.unique()[:classes]
    members = [(targets == target).nonzero().flatten() for target in shown]
    columns = min(per_class, *(len(m) for m in members)) if len(members) > 1 else per_class
    chosen = torch.cat([m[:columns] for m in members])
    return images[chosen], [f"class {target}" for target in shown.tolist()], columns
