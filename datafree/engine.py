"""The loop: epochs of rounds, each some synthesis steps and some student steps.

    for every epoch:
        for every round:
            source.round(...)                        phase 1: images from the teacher
            for every student step:
                learner.step(source.batch(n))        phase 2: the student is trained on images
        evaluate, log, draw, save

The engine knows only a source of images (``synthesis/``) and a learner that is trained on them
(``learners/``). Distillation, its controls and teacher training are choices of the two.
"""

import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from datafree import checkpoint
from datafree.config import Run
from datafree.errors import InputError, out_of_memory_in
from datafree.evaluators import scores_line
from datafree.grids import draw_grid, grid_rows
from datafree.learners.base import Learner
from datafree.logger import RunFolder
from datafree.plugins import first_line, is_same_code
from datafree.runtime import StopSignal, load_rng_state, rng_state
from datafree.schedule import Schedule
from datafree.synthesis.base import BaseSynthesis

FORMAT = 2  # of the checkpoints that a run is resumed from; to be raised whenever an older one would not fit


class Monitor(Protocol):
    """Called as monitor() -> (metrics of the latest images, warnings); its state is part of the checkpoint."""

    def __call__(self) -> tuple[dict[str, float], list[str]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Engine:
    """Runs a learner on a source, with everything that must survive a restart in one place.

    run: the section of the options. evaluate: () -> scores with acc1 (%), or None if there is no test set.
    monitor: called after each epoch, or None. classes: their names, for the image grids; empty if they are unknown.
    metadata: plain values saved beside the trained weights; its ``options`` (option -> value) must be the same
    when the run is resumed, except the number of epochs.
    """

    def __init__(
        self,
        learner: Learner,
        source: BaseSynthesis,
        schedule: Schedule,
        folder: RunFolder,
        run: Run,
        *,
        evaluate: Callable[[], dict[str, float]] | None = None,
        monitor: Monitor | None = None,
        classes: Sequence[str] = (),
        metadata: dict[str, Any] | None = None,
    ):
        self.learner, self.source, self.schedule, self.folder, self.run = learner, source, schedule, folder, run
        self.evaluate, self.monitor, self.classes, self.metadata = evaluate, monitor, classes, metadata or {}
        self.position = {"epoch": 0, "round": 0, "step": 0}
        self.means = Means()
        self.best: dict[str, float] = {"acc1": -1.0, "epoch": -1}
        self.seconds = {"synthesis": 0.0, "student": 0.0, "evaluation": 0.0}
        self.result: dict[str, Any] = {}

    def train(self) -> dict[str, Any]:
        """Run the remaining epochs -> the last epoch's metrics. A stop signal saves and exits with 128 + its number."""
        s, at = self.schedule, self.position
        with (
            StopSignal() as stop,
            tqdm(
                total=s.steps_until(s.epochs),
                initial=s.steps_until(at["epoch"]),
                unit="step",
                desc="epoch",
                smoothing=0.05,
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 30,
            ) as self.bar,
        ):
            self.source.tick = self.bar.update  # type: ignore[method-assign]
            while at["epoch"] < s.epochs:
                self.bar.set_description(f"epoch {at['epoch'] + 1}/{s.epochs}")
                self._epoch(stop)
                if stop.received:
                    self._save_run()
                    self.folder.log("Stopped by a signal; everything is saved, --resume auto continues from here.")
                    raise SystemExit(128 + signal.Signals[stop.received])
                self._close_epoch()
        return self.result

    def _epoch(self, stop: StopSignal) -> None:
        at, s = self.position, self.schedule
        warm = at["epoch"] < s.warmup
        while at["round"] < s.rounds and not stop.received:
            if at["step"] == 0 and s.synthesises(at["epoch"], at["round"]):
                self._synthesize(with_student=not warm)
            with self._clock("student"):
                # Once a round's images are made, one step follows, or resuming would make them again.
                while at["step"] < s.kd_steps and not warm and not (stop.received and at["step"]):
                    self._student_step()
            if warm or at["step"] == s.kd_steps:
                require_finite(self.means.values(), "mean of")
                at["round"], at["step"] = at["round"] + 1, 0

    def _synthesize(self, with_student: bool) -> None:
        with self._clock("synthesis"), out_of_memory_in("synthesis", "--synthesis_batch_size"):
            terms = self.source.round(self.position["epoch"], with_student)
        require_finite(terms, "synthesis term")
        self.means.add("synthesis", terms)

    def _student_step(self) -> None:
        at, s = self.position, self.schedule
        done = s.student_steps_done(**at)
        with out_of_memory_in("a training step", "--batch_size"):
            terms = self.learner.step(self.source.batch(s.batch_size), s.progress(**at))
        self.means.add("student", terms)
        at["step"] += 1
        self.bar.update()
        if self.run.print_freq and (done + 1) % self.run.print_freq == 0:
            shown = " ".join(f"{name}={value:.4f}" for name, value in require_finite(terms, "student term").items())
            self.folder.log(f"[Train] Epoch={at['epoch']} Step={done + 1} {shown} Lr={self.learner.lr:.4f}")

    def _close_epoch(self) -> None:
        """Evaluate, log, draw and save; then the next epoch begins."""
        epoch = self.position["epoch"]
        last = epoch == self.schedule.epochs - 1
        if epoch < self.schedule.warmup:
            self.learner.end_warmup_epoch(lambda: self.source.batch(self.schedule.batch_size))
        metrics: dict[str, Any] = require_finite(self.means.values(), "mean of")
        if self.monitor:
            of_images, warnings = self.monitor()
            metrics.update({f"images/{name}": value for name, value in of_images.items()})
            for warning in warnings if epoch >= self.schedule.warmup else ():
                self.folder.log(f"[Alarm] {warning}")
        improved = self._evaluate(epoch, metrics) if last or (epoch + 1) % self.run.eval_every == 0 else False
        metrics.update(
            self.learner.metrics(),
            lr=self.learner.lr,
            images=self.source.images_made,
            **{f"seconds/{name}": value for name, value in self.seconds.items()},
        )
        self.result = metrics
        self.folder.metrics(epoch, metrics)
        if last or epoch % self.run.grid_every == 0:
            self._draw(epoch)
        self.position.update(epoch=epoch + 1, round=0, step=0)
        self.means = Means()
        self._save_epoch(improved)

    def _evaluate(self, epoch: int, metrics: dict[str, Any]) -> bool:
        """Add the test scores and log them -> whether this epoch is the best so far."""
        if self.evaluate is None:
            return False
        self.learner.network.eval()
        with self._clock("evaluation"):
            scores = self.evaluate()
        improved = scores["acc1"] > self.best["acc1"]
        if improved:
            self.best = {"acc1": scores["acc1"], "epoch": epoch}
        metrics.update(scores, best_acc1=self.best["acc1"])
        self.folder.log(f"[Eval] Epoch={epoch} {scores_line(scores)} Lr={self.learner.lr:.4f}")
        return improved

    def _draw(self, epoch: int) -> None:
        images, targets = self.source.latest()
        if not len(images):
            return
        try:
            self.folder.grid(epoch, draw_grid(*grid_rows(images, targets, self.classes)))
        except Exception as error:  # a picture is not worth the epoch, which is not saved yet
            self.folder.log(f"[Alarm] the image grid of epoch {epoch} could not be drawn: {first_line(error)}")

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to a phase; the GPU is waited for once, at its end."""
        started = time.perf_counter()
        yield
        if self.learner.network.device.type == "cuda":
            torch.cuda.synchronize(self.learner.network.device)
        self.seconds[phase] += time.perf_counter() - started

    def _save_run(self) -> None:
        """Write last.pth, from which the run can be resumed."""
        checkpoint.save(self.folder.checkpoints / "last.pth", self.state_dict())

    def _save_epoch(self, improved: bool) -> None:
        """Write last.pth and the trained weights alone; the same as best if this epoch is the best so far."""
        folder = self.folder.checkpoints
        self._save_run()
        metadata = {**self.metadata, "epoch": self.position["epoch"], "acc1": self.result.get("acc1")}
        checkpoint.save(folder / "model_last.pth", {"state_dict": self.learner.network.model.state_dict(), **metadata})
        if improved:
            checkpoint.link(folder / "last.pth", folder / "best.pth")
            checkpoint.link(folder / "model_last.pth", folder / "model_best.pth")

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "learner": self.learner.state_dict(),
            "source": self.source.state_dict(),
            "rng": rng_state(),
            "position": dict(self.position),
            "means": self.means.state_dict(),
            "monitor": self.monitor.state_dict() if self.monitor else {},
            "best": dict(self.best),
            "seconds": dict(self.seconds),
            "result": dict(self.result),
            "metadata": dict(self.metadata),
        }

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of this run, or of one that differs only in its length."""
        state = checkpoint.load(path)
        checkpoint.require(state, "learner", "source", path=path)
        if state.get("format") != FORMAT:
            raise InputError(
                f"{path} has the checkpoint format {state.get('format', 1)} of another version, not {FORMAT}; finish "
                "its run with the commit in its env.json, or start a new one by --log_tag NEW"
            )
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
        self.means.load_state_dict(state["means"], self.learner.network.device)
        if self.monitor:
            self.monitor.load_state_dict(state["monitor"])
        for name in ("position", "best", "seconds", "result"):
            setattr(self, name, state[name])
        load_rng_state(state["rng"])
        self.folder.truncate_metrics(self.position["epoch"])
        self.folder.log(
            f"Resumed from {path.name}: epoch {self.position['epoch']}, round {self.position['round']}, "
            f"student step {self.position['step']}."
        )

    def _check_origin(self, state: dict[str, Any], path: Path) -> None:
        theirs, ours = (metadata.get("options", {}) for metadata in (state["metadata"], self.metadata))
        # Without any epochs other options are unused, so that a run of none is another run.
        but = ("epochs",) if theirs.get("epochs") and ours.get("epochs") else ()
        require_same_options(theirs, ours, path, but=but)
        if state["position"]["epoch"] > self.schedule.epochs:
            raise InputError(
                f"{path} is at epoch {state['position']['epoch']} already; raise --epochs "
                f"{self.schedule.epochs} to continue from it"
            )


def require_same_options(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path, but: Sequence[str] = ()
) -> None:
    """Raise InputError if ``path`` was written with other options than ours, but for those that may change."""
    for name in {**theirs, **ours}:
        then, now = theirs.get(name), ours.get(name)
        if name in but or then == now:
            continue
        if is_same_code(then, now):
            raise InputError(
                f"{path}: the code of {str(now).rpartition(':')[0]} has changed since it was written; restore it, or "
                "start a new run by --log_tag NEW"
            )
        raise InputError(
            f"{path} was written with --{name} {then}, not {now}; resume with the same options, or start a new run "
            "by --log_tag NEW"
        )


class Means:
    """Running means of terms, kept on the device so that no step waits for the host."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, phase: str, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            key = f"{phase}/{name}"
            self.sums[key] = self.sums[key] + value.float() if key in self.sums else value.float()
            self.counts[key] += 1

    def values(self) -> dict[str, Tensor]:
        return {key: total / self.counts[key] for key, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {key: total.to(device) for key, total in state["sums"].items()}
        self.counts = defaultdict(int, state["counts"])


def require_finite(terms: Mapping[str, Tensor], where: str) -> dict[str, float]:
    """The terms as floats; raises InputError with the name of one that is not finite."""
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
