"""A term of a loss, and the weighted sum of several."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from datafree.errors import InputError
from datafree.features import FIELDS, Features


class Term(NamedTuple):
    """One term: its name, which is that of the option that weighs it, and all that its computation needs.

    compute: (teacher's Features, student's Features, ...) -> scalar tensor, without the weight.
    teacher, student: fields of the Features that it reads.
    until: fraction of the run after which a term of the student is inactive.
    """

    name: str
    weight: float
    compute: Callable[..., Tensor]
    teacher: tuple[str, ...] = ()
    student: tuple[str, ...] = ()
    until: float = 1.0


def weighted(terms: Iterable[Term]) -> list[Term]:
    """The terms of nonzero weight. Raises InputError for two of one name, and for fields that Features do not have."""
    terms = list(terms)
    names = [term.name for term in terms]
    for term in terms:
        if names.count(term.name) > 1:
            raise InputError(f"two terms of the loss are called {term.name}; give the new one another name")
        for fields, known in ((term.teacher, FIELDS), (term.student, [f for f in FIELDS if f != "batch_norm"])):
            if not isinstance(fields, tuple) or not set(fields) <= set(known):
                raise InputError(
                    f"the term {term.name} reads {fields!r}; that must be a tuple of names out of {', '.join(known)}"
                )
    return [term for term in terms if term.weight]


def fields_read(terms: Iterable[Term], network: str) -> tuple[str, ...]:
    """The fields of the ``teacher``'s or the ``student``'s Features that any of the terms reads."""
    return tuple(dict.fromkeys(name for term in terms for name in getattr(term, network)))


def weighted_sum(
    terms: Sequence[Term], teacher: Features, student: Features, *more: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, sum of weight * term, and the terms without their weights."""
    values = {term.name: term.compute(teacher.only(term.teacher), student.only(term.student), *more) for term in terms}
    return sum(term.weight * values[term.name] for term in terms), values  # type: ignore[return-value]
