"""A term of a loss, and the weighted sum of several."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from datafree.features import Features


class Term(NamedTuple):
    """One term: its name, which is that of the option that weighs it, and all that its computation needs.

    compute: (teacher's Features, student's Features, ...) -> scalar tensor, without the weight.
    teacher, student: fields of the Features that it reads; a network whose features no term reads is not run.
    until: fraction of the run after which the term rests.
    """

    name: str
    weight: float
    compute: Callable[..., Tensor]
    teacher: tuple[str, ...] = ()
    student: tuple[str, ...] = ()
    until: float = 1.0


def fields_read(terms: Iterable[Term], network: str) -> tuple[str, ...]:
    """The fields of the ``teacher``'s or the ``student``'s Features that any of the terms reads."""
    return tuple(dict.fromkeys(name for term in terms for name in getattr(term, network)))


def weighted_sum(
    terms: Sequence[Term], teacher: Features, student: Features, *more: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, sum of weight * term, and the terms without their weights."""
    values = {term.name: term.compute(teacher.only(term.teacher), student.only(term.student), *more) for term in terms}
    return sum(term.weight * values[term.name] for term in terms), values  # type: ignore[return-value]
