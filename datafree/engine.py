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

import copy
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from datafree import checkpoint, distributed
from datafree.budget import Budget
from datafree.checkpoint import LAST
from datafree.config import Run
from datafree.errors import InputError, batch_or_parts, is_out_of_memory, out_of_memory_in
from datafree.evaluators import scores_line
from datafree.grids import Gallery
from datafree.learners.base import Learner
from datafree.logger import RunFolder
from datafree.plan import describe_length
from datafree.plugins import CODE, first_line, is_same_code
from datafree.progress import Progress
from datafree.results import is_number
from datafree.runtime import load_rng_state, rng_state
from datafree.schedule import Schedule
from datafree.signals import Stopped, StopSignal
from datafree.synthesis.base import BaseSynthesis
from datafree.update import is_scalar

ALARM = 3  # exit code of a run that an alarm stops
FORMAT = 2  # of the checkpoints that a run is resumed from; to be raised whenever an older one would not fit
REMOVED = {"echo": 1}  # options of earlier versions, with the value that did nothing


Evaluate = Callable[[Callable[[], Any]], dict[str, float]]


class Monitor(Protocol):
    """Called as monitor() -> (metrics of the latest images, warnings); its state is part of the checkpoint."""

    def __call__(self) -> tuple[dict[str, float], list[str]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Engine:
    """Runs a learner on a source, with everything that must survive a restart in one place.

    run: the section of the options. evaluate: (tick) -> scores, such as acc1 (%), or None without images for it; it
    calls ``tick`` before each batch, which may end it by an exception.
    monitor: called after each epoch, or None. gallery: draws the image grids.
    metadata: plain values saved beside the trained weights; its ``options`` (option -> value) must be the same
    when the run is resumed, except the number of epochs. defaults: of these options. budget: of which the length of the
    run follows, or None.
    """

    def __init__(
        self,
        learner: Learner,
        source: BaseSynthesis,
        schedule: Schedule,
        folder: RunFolder,
        run: Run,
        *,
        evaluate: Evaluate | None = None,
        monitor: Monitor | None = None,
        gallery: Gallery | None = None,
        metadata: dict[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        budget: Budget | None = None,
    ):
        self.learner, self.source, self.schedule, self.folder, self.run = learner, source, schedule, folder, run
        self.evaluate, self.monitor, self.metadata, self.budget = evaluate, monitor, metadata or {}, budget
        self.gallery, self.defaults = gallery or Gallery(()), defaults
        self.position = {"epoch": 0, "round": 0, "step": 0}
        self.means = Means()
        self.best: dict[str, float] = {"acc1": -1.0, "epoch": -1}
        self.seconds = {"synthesis": 0.0, "student": 0.0, "evaluation": 0.0}
        self.result: dict[str, Any] = {}
        self.progress = Progress(schedule, self.position)
        self._may_stop = False  # within a round of synthesis
        self._signal: str | None = None  # that ends the run
        self._alarms: list[str] = []  # of the latest epoch

    @property
    def is_finished(self) -> bool:
        """Whether no epoch is left."""
        return self.position["epoch"] >= self.schedule.epochs

    def train(self) -> dict[str, Any]:
        """Run the remaining epochs -> the last epoch's metrics. A stop signal saves and exits with 128 + its number."""
        at = self.position
        with StopSignal() as self.stop, self.progress, torch.enable_grad():
            self.source.tick = self._synthesis_step  # type: ignore[method-assign]
            while at["epoch"] < self.schedule.epochs:
                self.progress.epoch(at["epoch"])
                self._epoch()
                self._alarms = [] if self._is_stopped() else self._close_unless_stopped()
                if at["epoch"] < self.schedule.epochs:
                    self.end_if_asked()
        return self.result

    def end_if_asked(self) -> None:
        """Save and end the program if a signal has come, or if the last epoch has alarms and --on_alarm is stop."""
        obey_alarms(self.run, self.folder, self._alarms)
        if self._is_stopped():
            assert self._signal
            self.save()
            self.folder.log(f"Stopped by {self._signal}; everything is saved, --resume auto continues from here.")
            raise SystemExit(128 + signal.Signals[self._signal])

    def _is_stopped(self) -> bool:
        """Whether a signal has come, to this process or another one of the run, which all stop at the same step."""
        self._signal = self._signal or distributed.any_signal(self.stop.received)
        return self._signal is not None

    def _check_stopped(self) -> None:
        if self._is_stopped():
            raise Stopped

    def _epoch(self) -> None:
        at = self.position
        warm = at["epoch"] < self.schedule.warmup
        while at["round"] < self.schedule.rounds_of(at["epoch"]) and not self._is_stopped():
            if at["step"] == 0 and self.schedule.synthesises(at["epoch"], at["round"]):
                try:
                    self._synthesize(warm)
                except Stopped:
                    return
            with self.progress.phase("student"), self._clock("student"):
                # Once a round's images are made, one step follows, or resuming would make them again.
                while not warm and self._steps_left() and not (at["step"] and self._is_stopped()):
                    self._student_step()
            if warm or not self._steps_left():
                require_finite(self.means.values(), "mean of")
                at["round"], at["step"] = at["round"] + 1, 0

    def _steps_left(self) -> int:
        """Student steps of this round that are still to be taken."""
        at = self.position
        return max(0, self.schedule.steps_of(at["epoch"], at["round"]) - at["step"])

    def _synthesize(self, warm: bool) -> None:
        """A round of synthesis; if a signal stops it, everything is as before it, so that it can be made again.

        A round of one step is finished instead, which is as soon, and saves copying the state before each of them.
        """
        self._may_stop = self.schedule.round_steps(warm) > 1
        before, rng = (self.source.round_state(), rng_state()) if self._may_stop else ({}, {})
        try:
            with (
                self.progress.phase("warmup" if warm else "synthesis"),
                self._clock("synthesis"),
                out_of_memory_in("synthesis", batch_or_parts("--synthesis_batch_size", self.run.micro_batch)),
            ):
                terms = self.source.round(self.position["epoch"], with_student=not warm)
                self.progress.finish()
        except Stopped:
            self.source.restore_round(before)
            load_rng_state(rng)
            raise
        finally:
            self._may_stop = False
        require_finite(terms, "synthesis term")
        if self.source.round_loss is not None:  # finite terms may have a sum that is not
            require_finite({"loss": self.source.round_loss}, "synthesis", "the weights of its terms")
        self.means.add("synthesis", terms)

    def _synthesis_step(self) -> None:
        """Called by the source after each of its steps."""
        if steps := self.schedule.round_steps(self.position["epoch"] < self.schedule.warmup):
            self.progress.advance(1 / steps, steps=1)
        if self._may_stop:
            self._check_stopped()

    def _student_step(self) -> None:
        at, s = self.position, self.schedule
        done = s.student_steps_done(**at)
        with out_of_memory_in("a training step", batch_or_parts("--batch_size", self.run.micro_batch)):
            terms = self.learner.step(self.source.batch(s.batch_size), s.progress(**at))
        self.means.add("student", terms)
        at["step"] += 1
        self.progress.advance(1, steps=1)
        if self.run.print_freq and (done + 1) % self.run.print_freq == 0:
            shown = " ".join(f"{name}={value:.4f}" for name, value in require_finite(terms, "student term").items())
            self.folder.log(f"[Train] Epoch={at['epoch']} Step={done + 1} {shown} Lr={self.learner.lr:.4f}")
        if self.budget:
            self._keep_to(self.budget)

    def _keep_to(self, budget: Budget) -> None:
        """Lay the plan anew if it is time to; a new one is saved, so that a run which is killed then keeps it."""
        done = self.schedule.student_steps_done(**self.position)
        if not distributed.least(int(budget.is_due(self.schedule, done))):
            return
        self._wait_for_device()
        plan = distributed.gathered(budget.replan(self.schedule, done, self._seconds_left))[0]
        if plan == self.schedule:
            return
        before, obstacle = self.schedule, ""
        try:
            self.follow(plan)
        except InputError as error:  # such as no room for the images of a longer run
            obstacle = str(error)
        if found := [text for text in distributed.gathered(obstacle) if text]:
            self.follow(before)
            self.folder.log(f"[Alarm] Budget {budget.text}: the plan stays, because of a longer one {found[0]}")
            return
        self.folder.log(f"Budget {budget.text}, after {budget.spent:.1f} s: {describe_length(plan)}.")
        self.save()

    def _seconds_left(self, plan: Schedule) -> float:
        """What the rest of the run takes by that plan, at the rate of its own steps, or of those tried before it."""
        assert self.budget
        costs, work = self.budget.costs, plan.work_until(plan.epochs)
        measured = {kind: self.progress.cost(kind) for kind in work}
        return sum(
            max(0.0, amount - self.progress.done[kind]) * (costs.get(kind, 0.0) if cost is None else cost)
            for (kind, amount), cost in zip(work.items(), measured.values())
        )

    def follow(self, plan: Schedule) -> None:
        """Go on with a schedule of another length; before the run begins, it may differ in its warm-up, too."""
        self.learner.follow(plan.total_student_steps)
        cache = self.learner.cache
        pool: Any = getattr(self.source, "pool", None)  # there is no cache without one
        views = cache.possible // pool.capacity if cache else 0  # of an image
        self.source.follow(plan)
        if cache:
            cache.resize(views * pool.capacity)
        self.progress.follow(plan)
        self.schedule = plan

    def _close_unless_stopped(self) -> list[str]:
        """:meth:`close_epoch`; if a signal stops its evaluation, everything is as before, to be closed on resume."""
        changes = self.position["epoch"] < self.schedule.warmup and self.learner.acts_in_warmup
        before = copy.deepcopy(self.state_dict()) if changes else None
        try:
            with self.progress.phase("closing"):
                alarms = self.close_epoch()
                self.progress.advance(1)
            return alarms
        except Stopped:
            if before:
                self.restore(before)
            return []

    def close_epoch(self) -> list[str]:
        """Evaluate, log, draw and save; then the next epoch begins -> the alarms about the images of this one."""
        epoch = self.position["epoch"]
        last = epoch == self.schedule.epochs - 1
        if epoch < self.schedule.warmup:
            with self.progress.phase("ranges"):
                self.learner.end_warmup_epoch(lambda: self.source.batch(self.schedule.batch_size))
                self.progress.advance(1)
        metrics: dict[str, Any] = self._require_finite()
        alarms: list[str] = []
        if self.monitor:
            of_images, found = self.monitor()
            metrics.update({f"images/{name}": value for name, value in of_images.items()})
            alarms = found if epoch >= self.schedule.warmup else []
            for alarm in alarms:
                self.folder.log(f"[Alarm] {alarm}")
        if self.schedule.evaluates(epoch):
            with self.progress.phase("evaluation"):
                if self.evaluate:
                    self._evaluate(self.evaluate, epoch, metrics)
                self.progress.advance(1)
        metrics.update(
            self.learner.metrics(),
            lr=self.learner.lr,
            images=self.source.images_made,
            **{f"seconds/{name}": value for name, value in self.seconds.items()},
        )
        for remark in self.learner.remarks():
            self.folder.log(remark)
        self.result = metrics
        self.folder.metrics(epoch, metrics)
        if last or epoch % self.run.grid_every == 0:
            self._draw(epoch)
        self.position.update(epoch=epoch + 1, round=0, step=0)
        self.means = Means()
        self._save_epoch()
        return alarms

    def _evaluate(self, evaluate: Evaluate, epoch: int, metrics: dict[str, Any]) -> None:
        """Add the scores, log them, and remember the epoch if its accuracy is the best so far."""
        self.learner.network.eval()
        with self._clock("evaluation"):
            scores = evaluate(self._check_stopped)
        metrics.update(scores)
        if "acc1" in scores:
            if scores["acc1"] > self.best["acc1"]:
                self.best = {"acc1": scores["acc1"], "epoch": epoch}
            metrics["best_acc1"] = self.best["acc1"]
        self.folder.log(f"[Eval] Epoch={epoch} {scores_line(scores)} Lr={self.learner.lr:.4f}")

    def _draw(self, epoch: int) -> None:
        images, targets = self.source.latest()
        if not len(images) or distributed.rank():
            return
        try:
            with distributed.apart():
                self.folder.grid(epoch, *self.gallery.draw(images, targets))
                if (epoch == 0 or not self.folder.has_test_picture) and (pictures := self.gallery.draw_test()):
                    self.folder.test_picture(epoch, *pictures)
        except Exception as error:  # a picture is not worth the epoch, which is not saved yet
            self.folder.log(f"[Alarm] the image grid of epoch {epoch} could not be drawn: {first_line(error)}")

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to a phase; the GPU is waited for once, at its end."""
        started = time.perf_counter()
        try:
            yield
            self._wait_for_device()
        finally:
            self.seconds[phase] += time.perf_counter() - started

    def _wait_for_device(self) -> None:
        if self.learner.network.device.type == "cuda":
            torch.cuda.synchronize(self.learner.network.device)

    def save(self) -> None:
        """Write last.pth, from which the run can be resumed. Raises InputError if a loss or a weight is not finite."""
        self._require_finite()
        self.folder.require_own()
        checkpoint.save(self.folder.checkpoints / LAST, self.state_dict())

    def _require_finite(self) -> dict[str, float]:
        """The means of the terms. Raises InputError if one, or a weight of the network, is not finite."""
        values = require_finite(self.means.values(), "mean of")
        for name, parameter in self.learner.network.model.named_parameters():
            if not parameter.isfinite().all():
                raise InputError(
                    f"the weight {name} of the {self.learner.network.name} is not finite any more; lower the learning "
                    "rate, or clip the gradient (--clip_grad); the last epoch's checkpoint is kept"
                )
        return values

    def _save_epoch(self) -> None:
        """Write last.pth, and then the files that follow from it."""
        self.save()
        self._save_what_follows()

    def _save_what_follows(self) -> None:
        """At the end of an epoch: the trained weights alone, and the same as best if this epoch is the best so far.

        Whatever ends the process between these files, resuming from last.pth writes them again.
        """
        folder, epoch = self.folder.checkpoints, self.position["epoch"]
        metadata = {**self.metadata, "epoch": epoch, "acc1": self.result.get("acc1")}
        if self.budget:
            metadata["student_steps"] = self.schedule.work_until(epoch)["student"]
        checkpoint.save(folder / "model_last.pth", {"state_dict": self.learner.network.model.state_dict(), **metadata})
        if self.best["epoch"] == epoch - 1:
            checkpoint.link(folder / LAST, folder / "best.pth")
            checkpoint.link(folder / "model_last.pth", folder / "model_best.pth")

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "learner": self.learner.state_dict(),
            "source": self.source.state_dict(),
            "rng": rng_state(),
            "processes": distributed.gathered(rng_state()) if distributed.count() > 1 else [],
            "position": dict(self.position),
            "means": self.means.state_dict(),
            "monitor": self.monitor.state_dict() if self.monitor else {},
            "best": dict(self.best),
            "seconds": dict(self.seconds),
            "paces": self.progress.state(),
            "plan": self.budget.state(self.schedule) if self.budget else {},
            "result": dict(self.result),
            "metadata": dict(self.metadata),
        }

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of this run, or of one that differs only in its length.

        Raises InputError for one that does not fit, and the engine is as before.
        """
        # Earlier versions did not save the first three.
        state = {"paces": {}, "processes": [], "plan": {}, **checkpoint.load(path)}
        checkpoint.require(state, "learner", "source", path=path)
        if type(number := state.get("format", 1)) is int and number != FORMAT:
            raise InputError(
                f"{path} has the checkpoint format {number} of another version, not {FORMAT}; finish "
                "its run with the commit in its env.json, or start a new one by --log_tag NEW"
            )
        ours = self.state_dict()
        checkpoint.require(state, *ours, path=path)
        self._check_form(state, ours, path)
        self._check_origin(state, path)
        before = copy.deepcopy(ours)
        try:
            self.restore(state)
        except Exception as error:  # a file of arbitrary contents fails in arbitrary ways
            self.restore(before)
            if isinstance(error, InputError) or is_out_of_memory(error):
                raise
            raise InputError(
                f"{path} does not fit this run ({first_line(error)}); resume with the options that it was written "
                "with, or start a new run by --log_tag NEW"
            ) from error
        if self.budget and state["plan"]:
            self.budget.go_on_from(state["plan"]["spent"])
        self.folder.truncate_metrics(self.position["epoch"])
        if self.is_finished:
            self.metadata = state["metadata"]  # nothing is trained by the code that runs now
        self.folder.log(
            f"Resumed from {path.name}: epoch {self.position['epoch']}, round {self.position['round']}, "
            f"student step {self.position['step']}."
        )
        wrote, now = max(1, len(state["processes"])), distributed.count()
        if wrote != now:
            self.folder.log(
                f"It was written by {wrote} process{'es' * (wrote > 1)} and is continued by {now}: the numbers are the "
                "same up to rounding, and up to what networks draw at random, such as dropout."
            )
        last = self.folder.checkpoints / LAST
        if not (last.is_file() and last.samefile(path)):  # or --resume auto would begin anew
            self.save()
        if self.position["epoch"] and self.position["round"] == self.position["step"] == 0:
            self._save_what_follows()

    def restore(self, state: dict[str, Any]) -> None:
        """Make everything as it is in ``state``, a :meth:`state_dict`."""
        if self.budget and state["plan"]:
            self.follow(self.budget.restore(state["plan"]))  # which gives the parts room for their states
        self.learner.load_state_dict(state["learner"])
        self.source.load_state_dict(state["source"])
        self.means.load_state_dict(state["means"], self.learner.network.device)
        if self.monitor:
            self.monitor.load_state_dict(state["monitor"])
        for name in ("position", "best", "seconds", "result"):
            setattr(self, name, state[name])
        self.progress = Progress(self.schedule, self.position, state["paces"])
        as_many = len(state["processes"]) == distributed.count()
        load_rng_state(state["processes"][distributed.rank()] if as_many else {**state["rng"], "own": []})

    def _check_form(self, state: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
        """Raise InputError unless the parts that every run has are such as this version writes."""
        at, counts, numbers = state["position"], self.schedule, ("position", "best", "seconds")
        wrong = [name for name, value in ours.items() if type(state[name]) is not type(value)]
        wrong += [name for name in ours if checkpoint.has_odd_tensors(state[name])]
        wrong += [name for name in numbers if name not in wrong and not have_same_form(state[name], ours[name])]
        if "position" not in wrong:
            in_range = at["round"] <= counts.rounds and at["step"] <= counts.kd_steps and min(at.values()) >= 0
            wrong += ["position"] * (not in_range)
        if "means" not in wrong and not Means.fits(state["means"]):
            wrong.append("means")
        if "paces" not in wrong and not Progress.fits(state["paces"]):
            wrong.append("paces")
        if "plan" not in wrong and self.budget and state["plan"] and not Budget.fits(state["plan"]):
            wrong.append("plan")
        if "result" not in wrong:
            found = [state["result"].get(key) for key in ("acc1", "best_acc1")]
            wrong += ["result"] * (not all(value is None or is_number(value) for value in found))
        if "metadata" not in wrong and "options" in self.metadata:
            options = state["metadata"].get("options")
            plain = isinstance(options, dict) and all(map(checkpoint.is_plain, options.values()))
            wrong += ["metadata"] * (not plain)
        if wrong:
            raise InputError(
                f"{path} is damaged: its part '{wrong[0]}' is not as this program writes it; copy it again, or resume "
                "from checkpoints/best.pth by --resume FILE"
            )

    def _check_origin(self, state: dict[str, Any], path: Path) -> None:
        theirs, ours = (metadata.get("options", {}) for metadata in (state["metadata"], self.metadata))
        # Without any epochs other options are unused, so that a run of none is another run.
        but = ("epochs",) if theirs.get("epochs") and ours.get("epochs") and not self.budget else ()
        require_same_options(theirs, ours, path, but, self.defaults)
        at = state["position"]
        if not self.budget and (at["epoch"], at["round"], at["step"]) > (self.schedule.epochs, 0, 0):
            begun = at["epoch"] + (at["round"] + at["step"] > 0)
            raise InputError(
                f"{path} is at epoch {begun} already; raise --epochs {self.schedule.epochs} to continue from it"
            )


def obey_alarms(run: Run, folder: RunFolder, alarms: Sequence[str]) -> None:
    """With --on_alarm stop, end a run that is saved and has alarms, by a line that states the first of them."""
    if run.on_alarm == "stop" and alarms:
        folder.log(
            f"Stopped by an alarm (--on_alarm stop): {alarms[0].removeprefix('[Alarm] ')}; what was done is saved, "
            "--resume auto --on_alarm warn continues from here."
        )
        raise SystemExit(ALARM)


def require_same_options(
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    path: Path,
    but: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Raise InputError if ``path`` was written with other options than ours, but for those that may change.

    defaults: of the options, with which a version that did not have one of them wrote.
    """
    for name in {**theirs, **ours}:
        then, now = theirs.get(name, (defaults or {}).get(name)), ours.get(name, REMOVED.get(name))
        if name in but or then == now or name.endswith(CODE) and then is None:  # earlier versions did not state it
            continue
        if is_same_code(then, now):
            raise InputError(
                f"{path}: the code of {str(now).rpartition(':')[0]} has changed since it was written; restore it, or "
                "start a new run by --log_tag NEW"
            )
        if name in REMOVED:
            raise InputError(
                f"{path} was written with --{name} {then}, which this version no longer has; start a new run by "
                "--log_tag NEW"
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

    @staticmethod
    def fits(state: dict[str, Any]) -> bool:
        """Whether ``state`` is such as :meth:`state_dict` returns."""
        sums, counts = state.get("sums"), state.get("counts")
        return (
            isinstance(sums, dict)
            and isinstance(counts, dict)
            and sums.keys() == counts.keys()
            and all(is_scalar(total) for total in sums.values())
            and all(type(count) is int and count > 0 for count in counts.values())
        )

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {key: total.to(device) for key, total in state["sums"].items()}
        self.counts = defaultdict(int, state["counts"])


def have_same_form(given: Any, own: Any) -> bool:
    """Whether two dicts have the same keys, and whole numbers or any numbers to compute with at the same ones."""
    kinds = {key: int if type(value) is int else (int, float) for key, value in own.items()}
    return given.keys() == kinds.keys() and all(
        isinstance(given[key], kind) and is_number(given[key]) for key, kind in kinds.items()
    )


def require_finite(terms: Mapping[str, Tensor], where: str, to_lower: str = "its weight") -> dict[str, float]:
    """The terms as floats; raises InputError with the name of one that is not finite."""
    if not terms:
        return {}
    values = dict(zip(terms, torch.stack([term.float() for term in terms.values()]).tolist()))
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                f"the {where} {name} became {value}; lower {to_lower} or the learning rate, and "
                "check the teacher; the last epoch's checkpoint is kept"
            )
    return values
