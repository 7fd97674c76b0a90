"""Learners: how the student is trained on the images (phase 2), by name."""

from datafree.plugins import is_custom, load_custom

LEARNERS = {"distill": "datafree.learners.distill:DistillLearner"}


class LearnersOfOtherOptions:
    """The names of user-defined learners that do not read the options of distillation, as a container."""

    def __contains__(self, learner: str) -> bool:
        return is_custom(learner) and not getattr(load_custom(learner), "reads_distill_options", False)
