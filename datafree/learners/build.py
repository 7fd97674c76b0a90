"""The learner that the options name."""

from typing import TYPE_CHECKING

from datafree.errors import InputError
from datafree.learners import LEARNERS
from datafree.learners.base import Learner
from datafree.network import Network
from datafree.plugins import construct

if TYPE_CHECKING:
    from datafree.session import Session


def build_learner(session: "Session", teacher: Network, student: Network, total_steps: int) -> Learner:
    """The learner called ``distill.learner``. Raises InputError for a user-defined one that cannot be constructed."""
    learner = construct(
        session.config.distill.learner,
        LEARNERS,
        Learner,
        student=student,
        teacher=teacher,
        augment=session.augment,
        config=session.config,
        total_steps=total_steps,
    )
    if not hasattr(learner, "update"):
        raise InputError(f"the constructor of {type(learner).__name__} must call super().__init__(...) of its Learner")
    return learner
