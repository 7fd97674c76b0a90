"""Data-free knowledge distillation: a student from a trained teacher, without the teacher's training data."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from datafree import program, registry
from datafree.config import DistillConfig
from datafree.plugins import is_custom

if TYPE_CHECKING:
    from datafree.session import Session
    from datafree.training import Training

EXAMPLES = """
python datafree_kd.py --method rgal --teacher wrn40_2 --student wrn16_1
python datafree_kd.py --config configs/cifar10/rgal_wrn40_2_wrn16_1.yaml --seed 1
python datafree_kd.py --dataset digits --teacher resnet20 --student resnet8 --epochs 10
"""


def distillation(session: "Session") -> "Iterator[Training]":
    """A student's training on the images of a source, in turns with their synthesis."""
    from datafree.diagnostics import Watch
    from datafree.learners.build import build_learner
    from datafree.plan import describe_distillation
    from datafree.schedule import Schedule
    from datafree.synthesis.build import build_source
    from datafree.training import Training
    from datafree.view_cache import build_cache

    config, options = session.config, session.config.student
    student = session.network("student", options.student, options.student_weights, key=options.student_weights_key)
    if config.run.evaluate_only:
        session.evaluate_only(student)
        return
    teacher = session.load_teacher()
    source = build_source(session, teacher, student)
    schedule = Schedule.of(config.schedule, config.distill.batch_size, source.g_steps)
    learner = build_learner(session, teacher, student, schedule.total_student_steps)
    learner.cache = build_cache(session, teacher, source, learner, config.distill.view_cache)
    tested = len(session.test or ())  # as late as possible, because the images may take long to read
    yield Training(
        learner,
        source,
        schedule,
        model=options.student,
        name=(config.method, config.teacher.teacher, options.student, *custom_learner(config)),
        plan=describe_distillation(config, session.card, tested, schedule, teacher, student, source, learner.cache),
        teacher=teacher,
        monitor=Watch(source, teacher, student, config.relation, adversarial=bool(config.synthesis.adv)),
    )


def custom_learner(config: DistillConfig) -> list[str]:
    """The user-defined learner, which is part of the name of its runs."""
    return [config.distill.learner] if is_custom(config.distill.learner) else []


def main(run: program.Runner = program.run) -> None:
    run(DistillConfig, distillation, description=__doc__, method_files=registry.METHODS, examples=EXAMPLES)
