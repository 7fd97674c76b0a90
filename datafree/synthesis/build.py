"""The source of images that the options name."""

from typing import TYPE_CHECKING

from datafree.determinism import require_deterministic
from datafree.errors import InputError
from datafree.network import Network
from datafree.plugins import construct, is_custom
from datafree.synthesis import SOURCES, traits_of
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.controls import RealSource

if TYPE_CHECKING:
    from datafree.session import Session


def build_source(session: "Session", teacher: Network, student: Network) -> BaseSynthesis:
    """The source called ``synthesis.source``; of a student with more classes than the teacher it uses the first ones.

    Raises InputError for a user-defined source that cannot be constructed, and for options that it cannot honour.
    """
    name = session.config.synthesis.source
    if session.config.synthesis.cr:
        require_deterministic(["grid_sample"], "--cr", session.device)
    if traits_of(name).synthesises:
        require_deterministic(teacher.trial.nondeterministic, f"the {teacher.name}", session.device)
    if student.num_classes > teacher.num_classes:
        student = student.restricted_to(range(teacher.num_classes))
    parts = {
        "teacher": teacher,
        "student": student,
        "augment": session.augment,
        "card": session.card,
        "config": session.config,
        "device": session.device,
    }
    if name == "real":
        return RealSource(session.split("train"))
    source = construct(name, {name: source.path for name, source in SOURCES.items()}, BaseSynthesis, **parts)
    if is_custom(name):  # whose constructor may not have called that of its base class
        vars(source).update({**parts, **vars(source), "traits": traits_of(name), "card": session.card})
    if type(source).sample is BaseSynthesis.sample:
        raise InputError(f"{type(source).__name__} has no method sample(n); it must return n images and their classes")
    return source
