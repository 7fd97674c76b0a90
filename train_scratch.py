"""Trains a network on real images: a teacher, or a student as the upper bound."""

import sys
from types import SimpleNamespace

import registry  # noqa: F401  makes registered models and data sets known
from datafree import checkpoint, cli
from datafree.config import ScratchConfig
from datafree.engine import Engine
from datafree.errors import InputError, exit_on_input_error
from datafree.learners.supervised import SupervisedLearner
from datafree.session import Session, teacher_place
from datafree.synthesis.sources import RealSource

EXAMPLES = """
python train_scratch.py --dataset cifar10 --model wrn40_2
python train_scratch.py --dataset digits --model resnet20 --epochs 15
python train_scratch.py --dataset cifar10 --model wrn40_2 --weights teacher.pth --evaluate_only
"""


def main():
    config, call = cli.parse(ScratchConfig, sys.argv[1:], description=__doc__, examples=EXAMPLES)
    if call.print_config:
        print(cli.to_yaml(config), end="")
        return
    session, options = Session(config, derive_card=True, write=not call.dry_run), config.training
    network = session.network("model", options.model, options.weights)
    if config.run.evaluate_only:
        session.evaluate_only(network, "--weights", options.weights)
        return
    split = session.split("train")
    batch = min(options.batch_size, len(split))
    schedule = SimpleNamespace(
        epochs=options.epochs, rounds=1, kd_steps=max(len(split) // batch, 1), warmup=0, batch_size=batch
    )
    plan = (
        f"Plan: {options.model} is trained on {len(split):,} images of {session.card.name}, "
        f"{'x'.join(map(str, session.card.shape))} in {session.card.num_classes} classes, on {session.device}: "
        f"{schedule.epochs} epochs of {schedule.kd_steps} steps of {batch} images."
    )
    if call.dry_run:
        print(plan)
        return
    with session.open_folder("scratch", options.model) as folder:
        folder.log(plan)
        learner = SupervisedLearner(
            network, session.augment, options, schedule.epochs * schedule.kd_steps, config.run.precision
        )
        facts = session.facts(network, options.model)
        engine = Engine(
            learner,
            RealSource(split),
            schedule,
            folder,
            config.run,
            facts=facts,
            evaluate=(lambda: session.score(network)) if session.test else None,
        )
        session.train(engine)
        publish(session, folder)


def publish(session, folder):
    """Copy the last weights to where datafree_kd.py looks for a teacher, unless those there are known as no worse."""
    place = teacher_place(session.card.name, session.config.training.model)
    source = folder.checkpoints / "student_last.pth"
    weights = checkpoint.load(source)
    if place.exists():
        there, here = stored_accuracy(place, weights["model"]), weights.get("acc1")
        if there is None or here is None or here <= there:
            folder.log(f"{place} stays as it is (top-1 {there}, these {here}); the new weights are {source}")
            return
    checkpoint.save(place, weights)
    folder.log(f"The weights are in {place}, where datafree_kd.py finds them.")


def stored_accuracy(place, model):
    """The top-1 (%) that a file of weights of ``model`` states; None where it does not or cannot be read."""
    try:
        stored = checkpoint.load(place)
    except InputError:
        return None
    accuracy = stored.get("acc1") if stored.get("model") == model else None
    return accuracy if isinstance(accuracy, (int, float)) else None


if __name__ == "__main__":
    exit_on_input_error(main)
