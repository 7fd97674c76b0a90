"""A run that ends after a given time: its length follows from the measured seconds of its own steps."""

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from datafree.errors import OptionError, shown
from datafree.results import is_number
from datafree.schedule import Schedule

UNITS = {"s": 1, "m": 60, "h": 3600}
LONGEST = 10**9  # seconds, and student steps
FIRST = 0.05  # share of the budget that is spent when the run's own steps first decide
AGAIN = 0.25  # share of what is left after which they decide again,
UNTIL = 0.98  # up to this share of the budget
CLOSE = 0.02  # share of the budget by which a plan may miss it and stays

now = time.perf_counter

Seconds = Callable[[Schedule], float]  # what a run of that schedule takes, or what is left of it


def seconds_of(text: str | None) -> float:
    """The seconds of a text such as 900s, 30m or 1.5h; 0 for None. Raises OptionError."""
    if text is None:
        return 0.0
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh])", text)
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= LONGEST:
        raise OptionError(f"--budget cannot be {shown(text)}; it takes a time such as 900s, 30m or 1.5h")
    return seconds


class Budget:
    """The time that a run may take, counted from when this is made, and when its plan is laid anew.

    text: as given to --budget. recipe: the schedule whose epochs, warm-up and rounds of synthesis are proportions.
    costs: seconds of each kind of work of :meth:`Schedule.work_until` as measured before the run, for those that the
    run has not measured yet.
    """

    def __init__(self, text: str, recipe: Schedule):
        self.text, self.seconds, self.recipe = text, seconds_of(text), recipe
        self.costs: dict[str, float] = {}
        self._due, self._begun = FIRST * self.seconds, now()

    @property
    def spent(self) -> float:
        """Seconds of the run so far, in this process and before an interruption."""
        return now() - self._begun

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def is_due(self, plan: Schedule, done: int) -> bool:
        """Whether it is time to lay the plan anew: after a share of the time, and where its synthesis or its steps end.

        done: student steps of the run so far, as in :attr:`Schedule.steps`.
        """
        ends = plan.steps, (plan.synthesis_rounds or 0) * plan.kd_steps
        return done in ends or self._due <= min(self.spent, UNTIL * self.seconds)

    def replan(self, current: Schedule, done: int, seconds_left: Seconds) -> Schedule:
        """The plan from now on, after ``done`` student steps.

        It is the ``current`` one if that ends nearly in time.
        """
        self._due = self.spent + AGAIN * max(self.left, 0.0)
        if abs(self.left - seconds_left(current)) <= CLOSE * self.seconds:
            return current
        return fitted(self.recipe, seconds_left, self.left, current, done)

    def state(self, plan: Schedule) -> dict[str, Any]:
        """Plain values for a checkpoint of a run with this plan."""
        return {
            "spent": self.spent,
            "due": self._due,
            "costs": dict(self.costs),
            "length": plan.steps,
            "warmup": plan.warmup,
            "synthesis_rounds": plan.synthesis_rounds or plan.total_rounds,
        }

    def restore(self, state: Mapping[str, Any]) -> Schedule:
        """Go on with what :meth:`state` returned, but for the time that is spent -> its plan."""
        self._due, self.costs = state["due"], dict(state["costs"])
        kept = replace(self.recipe, warmup=state["warmup"], synthesis_rounds=state["synthesis_rounds"])
        return kept.lasting(state["length"])

    def go_on_from(self, seconds: float) -> None:
        """Count from now on, so many seconds having been spent before an interruption."""
        self._begun = now() - seconds

    @staticmethod
    def fits(state: Mapping[str, Any]) -> bool:
        """Whether ``state`` is such as :meth:`state` returns."""
        counts, numbers = ("length", "warmup", "synthesis_rounds"), ("spent", "due")
        if state.keys() != {*counts, *numbers, "costs"} or not isinstance(state["costs"], dict):
            return False
        whole = all(type(state[name]) is int and 0 <= state[name] <= LONGEST for name in counts)
        measured = [*(state[name] for name in numbers), *state["costs"].values()]
        return whole and state["length"] > 0 and all(is_number(value) and value >= 0 for value in measured)


def fitted(
    recipe: Schedule, seconds: Seconds, available: float, current: Schedule | None = None, done: int = 0
) -> Schedule:
    """The longest run like ``recipe`` for which ``seconds`` gives at most ``available``, or else the shortest one.

    It has as many whole rounds as fit. The rest of the time goes to student steps without another round of synthesis.
    current: the plan of a run that has begun, which keeps its warm-up. done: its student steps, as in
    :attr:`Schedule.steps`.
    """

    def of_rounds(rounds: int) -> Schedule:
        return in_proportion(recipe, rounds, current, -(-done // recipe.kd_steps))

    def largest(least: int, schedule_of: Callable[[int], Schedule]) -> int:
        def is_too_long(n: int) -> bool:
            return seconds(schedule_of(n)) > available

        more = 1
        while least + more < LONGEST and not is_too_long(least + more):
            more *= 2
        return least + max(0, bisect_left(range(least, least + more), True, key=is_too_long) - 1)

    warm = (current.warmup if current else min(recipe.warmup, 1)) * recipe.rounds
    whole = of_rounds(largest(max(warm + 1, -(-done // recipe.kd_steps)), of_rounds))
    return whole.lasting(largest(max(whole.warmup * recipe.rounds * recipe.kd_steps + 1, done), whole.lasting))


def in_proportion(recipe: Schedule, rounds: int, current: Schedule | None, begun: int) -> Schedule:
    """A run of so many rounds, of which as large a share synthesises, or is the warm-up, as of the recipe.

    The warm-up has whole epochs, and at least one if the recipe has any. current: the plan of a run that has begun so
    many rounds.
    """
    plan = recipe.lasting(rounds * recipe.kd_steps)
    if current:
        warmup = current.warmup
    else:
        share = recipe.warmup / recipe.epochs
        warmup = min(max(round(share * plan.epochs), min(recipe.warmup, 1)), plan.epochs - 1)
    synthesising = rounds
    if recipe.synthesis_rounds is not None:
        share = min(1.0, recipe.synthesis_rounds / recipe.total_rounds)
        beyond = recipe.synthesis_rounds > recipe.warmup * recipe.rounds  # with terms that the warm-up lacks
        synthesising = min(rounds, max(round(share * rounds), warmup * recipe.rounds + 1 if beyond else 1, begun))
    if current and current.synthesis_rounds is not None and begun > current.synthesis_rounds:
        synthesising = current.synthesis_rounds  # a round without synthesis is not made up for
    return replace(plan, warmup=warmup, synthesis_rounds=synthesising)
