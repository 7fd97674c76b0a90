"""Trains a network on real images: a teacher, or a student as the upper bound."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import registry  # noqa: F401  makes registered models and data sets known
from datafree import program
from datafree.config import ScratchConfig

if TYPE_CHECKING:
    from datafree.logger import RunFolder
    from datafree.session import Session
    from datafree.training import Training

EXAMPLES = """
python train_scratch.py --dataset cifar10 --model wrn40_2
python train_scratch.py --dataset digits --model resnet20 --epochs 15
python train_scratch.py --dataset cifar10 --model wrn40_2 --weights teacher.pth --evaluate_only
"""


def supervised(session: "Session") -> "Iterator[Training]":
    """Training on the labelled training images."""
    from datafree.learners.supervised import SupervisedLearner
    from datafree.plan import describe_training
    from datafree.schedule import Schedule
    from datafree.synthesis.controls import RealSource
    from datafree.training import Training

    config, options = session.config, session.config.training
    network = session.network("model", options.model, options.weights)
    if config.run.evaluate_only:
        session.evaluate_only(network, "--weights", options.weights)
        return
    split = session.split("train")
    batch_size = min(options.batch_size, len(split))
    schedule = Schedule(options.epochs, rounds=1, kd_steps=max(len(split) // batch_size, 1), batch_size=batch_size)
    learner = SupervisedLearner(
        network, session.augment, config.optim, schedule.total_student_steps, config.run.precision
    )
    yield Training(
        learner,
        RealSource(split),
        schedule,
        model=options.model,
        name=("scratch", options.model),
        plan=describe_training(options.model, session.card, len(split), schedule, network),
        finish=lambda folder: publish(session, folder),
    )


def publish(session: "Session", folder: "RunFolder") -> None:
    """Copy the last weights to where datafree_kd.py looks for a teacher, unless better ones are there."""
    from datafree import checkpoint
    from datafree.session import published_weights

    source, place = (
        checkpoint.weights_file(folder.root),
        published_weights(session.card.name, session.config.training.model),
    )
    weights = checkpoint.load(source)
    if place.exists():
        there, here = checkpoint.stored_accuracy(place, weights["model"]), weights.get("acc1")
        if there is None or here is None or here <= there:
            folder.log(f"{place} stays as it is (top-1 {there}, these {here}); the new weights are {source}")
            return
    checkpoint.save(place, weights)
    folder.log(f"The weights are in {place}, where datafree_kd.py finds them.")


def main() -> None:
    program.run(ScratchConfig, supervised, description=__doc__, examples=EXAMPLES, derive_card=True)


if __name__ == "__main__":
    program.exit_on_input_error(main)
