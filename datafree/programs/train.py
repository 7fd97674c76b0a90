"""Trains a network on real images: a teacher, or a student as the upper bound."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from datafree.config import ScratchConfig
from datafree.launch import command
from datafree.program import Program, run

if TYPE_CHECKING:
    from datafree.session import Session
    from datafree.training import Training

EXAMPLES = f"""
{command("train")} --dataset cifar10 --model wrn40_2
{command("train")} --dataset digits --model resnet20 --epochs 15
{command("train")} --dataset cifar10 --model wrn40_2 --weights teacher.pth --evaluate_only
"""


def supervised(session: "Session") -> "Iterator[Training]":
    """Training on the labelled training images."""
    from datafree.learners.supervised import SupervisedLearner
    from datafree.plan import describe_training
    from datafree.schedule import Schedule
    from datafree.synthesis.controls import RealSource
    from datafree.training import Training, publish_weights

    config, options = session.config, session.config.training
    network = session.network(
        "model", options.model, options.weights, options.mean or (), options.std or (), key=options.weights_key
    )
    if config.run.evaluate_only:
        session.evaluate_only(network)
        return
    tested = len(session.test or ())  # before the training images, so that a missing test set is reported at once
    split = session.split("train")
    batch_size = min(options.batch_size, len(split))
    steps = max(len(split) // batch_size, 1)
    schedule = Schedule(
        options.epochs, rounds=1, kd_steps=steps, batch_size=batch_size, eval_every=config.run.eval_every
    )
    learner = SupervisedLearner(
        network, session.augment, config.optim, schedule.total_student_steps, config.run.precision
    )
    yield Training(
        learner,
        RealSource(split),
        schedule,
        model=options.model,
        name=("scratch", options.model),
        plan=describe_training(options.model, session.card, len(split), tested, schedule, network, options.budget),
        finish=lambda folder: publish_weights(session, folder, options.model),
        budget=options.budget,
    )


PROGRAM = Program(ScratchConfig, supervised, __doc__, examples=EXAMPLES, derive_card=True)


def main() -> None:
    run(PROGRAM)
