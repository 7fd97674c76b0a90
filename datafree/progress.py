"""How far a run is and what time is left, by the measured seconds of each kind of work."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tqdm import tqdm

from datafree import launch
from datafree.results import is_number
from datafree.schedule import Schedule
from datafree.screen import silence

PHASES = 20  # latest of a kind, whose mean is the cost of the next ones
ENDS = ("ranges", "evaluation", "closing")  # kinds of work at the end of an epoch
LINE_EVERY = 60  # seconds between two lines where there is no terminal
now = time.perf_counter


class Progress(AbstractContextManager):
    """A bar on the terminal, or plain lines on stderr without one, that state the time left.

    Kinds of work (see :meth:`Schedule.work_until`) cost differently, and each is weighed by the seconds that its latest
    phases took. A kind that is not measured yet is unknown, and so is the time left; during the warm-up, in which the
    student is not trained, it is that of the warm-up.

    position: of the run, as in a checkpoint. paces: what :meth:`state` returned.
    """

    def __init__(
        self,
        schedule: Schedule,
        position: Mapping[str, int],
        paces: Mapping[str, Sequence[Sequence[float]]] | None = None,
    ):
        self.schedule, self.total = schedule, schedule.work_until(schedule.epochs)
        self.done: dict[str, float] = dict(schedule.work_until(**position))
        self.paces = {kind: deque(map(tuple, (paces or {}).get(kind, ())), PHASES) for kind in self.total}
        self._kind, self._started, self._begun, self._epoch = "", 0.0, 0.0, "epoch"
        self._steps, self._all_steps = schedule.steps_until(**position), schedule.steps_until(schedule.epochs)
        self._bar: tqdm | None = None
        self._shown, self._is_silent = now(), launch.rank() > 0  # the first of several processes speaks for all

    def __enter__(self) -> "Progress":
        """Begin the bar, where there is a terminal."""
        if sys.stderr is not None and sys.stderr.isatty() and not self._is_silent:
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"
            self._bar = tqdm(total=self._all_steps, initial=self._steps, dynamic_ncols=True, bar_format=form)
        return self

    def follow(self, schedule: Schedule) -> None:
        """Go on with another schedule, which agrees with the one before in what is done."""
        self.schedule, self.total = schedule, schedule.work_until(schedule.epochs)
        self._all_steps = schedule.steps_until(schedule.epochs)
        if self._bar is not None:
            self._bar.total = self._all_steps

    def epoch(self, number: int) -> None:
        """Name the epoch that begins, counted from 0."""
        self._epoch = f"epoch {number + 1}/{self.schedule.epochs}"

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Measure a phase of that kind, unless it ends by an exception; one within another is no part of it."""
        outer, entered = (self._kind, self._started, self._begun), now()
        self._kind, self._started, self._begun = kind, entered, self.done[kind]
        yield
        amount = self.done[kind] - self._begun
        if amount:
            self.paces[kind].append((now() - self._started, amount))
        self._kind, started, self._begun = outer
        self._started = started + now() - entered

    def advance(self, amount: float, steps: int = 0) -> None:
        """Count work of the current phase, if there is one, and the steps that it took."""
        if self._kind:
            self.done[self._kind] += amount
            self._show(steps)

    def finish(self) -> None:
        """Count the round as done, of which a user-defined source may not have counted the steps."""
        self.done[self._kind] = self._begun + 1

    def seconds_left(self) -> float | None:
        """Of the run, or of its warm-up; None while it is unknown."""
        kinds = self.schedule.work_until(self.schedule.warmup) if self.in_warmup else self.total
        left = {kind: amount - self.done[kind] for kind, amount in kinds.items() if amount > self.done[kind]}
        costs = {kind: self.cost(kind) for kind in left}
        if self.schedule.g_steps > 0 or not self.in_warmup:
            costs |= {kind: 0.0 for kind in ENDS if costs.get(kind, 0.0) is None}  # beside the steps of an epoch
        if None in costs.values():
            return None
        return sum(amount * (costs[kind] or 0) for kind, amount in left.items())

    @property
    def in_warmup(self) -> bool:
        return self.done["closing"] < self.schedule.warmup

    @staticmethod
    def fits(paces: Mapping[str, Any]) -> bool:
        """Whether ``paces`` are such as :meth:`state` returns."""
        pairs = [pair for pace in paces.values() for pair in (pace if isinstance(pace, list) else [None])]
        return all(isinstance(p, tuple) and len(p) == 2 and all(map(is_number, p)) and p[1] > 0 for p in pairs)

    def state(self) -> dict[str, list[tuple[float, ...]]]:
        """The measured seconds and amounts of the latest phases, by kind; plain values."""
        return {kind: list(pace) for kind, pace in self.paces.items()}

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._written(self._bar.close)

    def cost(self, kind: str) -> float | None:
        """Seconds for one of that kind; None if none was measured."""
        if pace := self.paces[kind]:
            return sum(seconds for seconds, _ in pace) / sum(amount for _, amount in pace)
        if kind == self._kind and self.done[kind] > self._begun:
            return (now() - self._started) / (self.done[kind] - self._begun)
        return None

    def _show(self, steps: int) -> None:
        self._steps += steps
        if (bar := self._bar) is not None:
            bar.set_description(self._epoch, refresh=False)
            bar.set_postfix_str(self._text(), refresh=False)
            self._written(lambda: bar.update(steps))
        elif now() - self._shown >= LINE_EVERY and not self._is_silent:
            self._shown = now()
            line = f"{self._epoch}: {self._steps:,} of {self._all_steps:,} steps, {self._text()}"
            self._written(lambda: print(line, file=sys.stderr, flush=True))

    def _text(self) -> str:
        left = self.seconds_left()
        return f"{'?' if left is None else tqdm.format_interval(left)} left" + " of the warm-up" * self.in_warmup

    def _written(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, ValueError):  # nobody reads it any more
            silence("stderr")
            self._bar = None
