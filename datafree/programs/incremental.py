"""Class-incremental learning without the old images: new classes arrive in tasks, and synthetic images stand in for
those of the classes before them."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from datafree import registry
from datafree.config import IncrementalConfig
from datafree.launch import command
from datafree.program import Program, run

if TYPE_CHECKING:
    from datafree.datasets.splits import Split
    from datafree.incremental import IncrementalRun, Tasks
    from datafree.learners.incremental import ReplayedTask
    from datafree.network import Network
    from datafree.schedule import Schedule
    from datafree.session import Session
    from datafree.synthesis.base import BaseSynthesis
    from datafree.training import Training

EXAMPLES = f"""
{command("incremental")} --dataset digits --model resnet8 --init_cls 2 --increment 2
{command("incremental")} --config configs/digits/incremental_inversion.yaml --seed 1
{command("incremental")} --method rdfcil --dataset cifar100 --triplet 0.1 --striplet 0.1
"""


def incremental(session: "Session") -> "Iterator[Training]":
    """A training for every task, each from the network that the one before it left."""
    from datafree.incremental import IncrementalRun, Tasks
    from datafree.training import open_folder

    config, options = session.config, session.config.incremental
    if config.run.evaluate_only:
        evaluate(session)
        return
    tasks = Tasks.of(options, session.card)
    network = session.network("model", options.model, options.weights, key=options.weights_key, as_arrived=True)
    rehearse(session, tasks, network)
    with open_folder(session, (config.method, options.model)) if session.write else nullcontext() as folder:
        run = IncrementalRun(session, tasks, network, folder)
        for task in run.remaining():
            yield replayed(run, task) if task and options.learner == "replay" else on_real_images(run, task)
        run.summarise()


def evaluate(session: "Session") -> None:
    """The accuracy of the network of --weights on the classes that it knows; no task plays a part."""
    from datafree.class_order import seen_classes, stated_order

    options, classes = session.config.incremental, session.card.num_classes
    network = session.network("model", options.model, options.weights, key=options.weights_key, as_arrived=True)
    seen, order = seen_classes(network, classes), stated_order(network, classes) or tuple(range(classes))
    test = session.test.of_classes(order[:seen], range(seen), seen) if session.test else None
    session.evaluate_only(network.restricted_to(range(seen)), test)


def rehearse(session: "Session", tasks: "Tasks", network: "Network") -> None:
    """Build, on copies, what the second task needs, so that an error in it is found before the first one is trained."""
    import torch

    from datafree.datasets.loading import stand_in
    from datafree.learners.incremental import DistilledTask
    from datafree.runtime import same_rng

    learner = session.config.incremental.learner
    student = network.copy().restricted_to(range(tasks.ends[1]))
    old = network.copy().freeze().restricted_to(range(tasks.ends[0]))
    with same_rng():
        if learner == "replay":
            images = tasks.split_of(stand_in(session.card, "train", session.device), tasks.outputs(1))
            replay_parts(session, old, student, images)
        elif learner == "lwf":
            DistilledTask(student, old, session.augment, session.config, total_steps=1)
        elif learner == "fetril":
            student.classify(torch.zeros(1, student.tap.embed_dim, device=student.device))


def replay_parts(
    session: "Session", teacher: "Network", student: "Network", images: "Split"
) -> "tuple[BaseSynthesis, Schedule, ReplayedTask]":
    """The source of the old classes' images, the steps of a task, and what learns from them and the real ``images``."""
    from datafree.learners.incremental import ReplayedTask, candidates
    from datafree.schedule import Schedule
    from datafree.synthesis.build import build_source

    config, options = session.config, session.config.incremental
    source = build_source(session, teacher, student)
    drawn = candidates(options.replay_batch_size, teacher.num_classes, options.classes_per_batch)
    schedule = Schedule.of(config.schedule, drawn, source, config.run.eval_every)
    learner = ReplayedTask(student, teacher, session.augment, config, schedule.total_student_steps, images)
    return source, schedule, learner


def replayed(run: "IncrementalRun", task: int) -> "Training":
    """Training on a task's images and on synthetic ones of the old classes, by inversion of the old network."""
    from datafree.diagnostics import Watch

    config = run.session.config
    images, student, teacher = run.train_images(task), run.student(task), run.old_network(task)
    source, schedule, learner = replay_parts(run.session, teacher, student, images)
    old = student.restricted_to(range(teacher.num_classes))
    watch = Watch(source, teacher, old, config.relation, adversarial=bool(config.synthesis.adv))
    replayed = config.incremental.replay_batch_size
    return run.training(task, learner, source, schedule, images, replayed, watch, teacher)


def on_real_images(run: "IncrementalRun", task: int) -> "Training":
    """Training on real images alone: the first task of any run, and what needs no synthetic ones."""
    from datafree.incremental import TaskImages
    from datafree.learners.base import Learner
    from datafree.learners.incremental import DistilledTask, TranslatedTask
    from datafree.learners.supervised import SupervisedLearner
    from datafree.schedule import Schedule

    session, config, options = run.session, run.session.config, run.session.config.incremental
    images, student, given = run.train_images(task), run.student(task), config.schedule
    epochs = given.epochs if task or given.base_epochs is None else given.base_epochs
    schedule = Schedule(
        epochs, given.ep_steps // given.kd_steps, given.kd_steps, options.batch_size, eval_every=config.run.eval_every
    )
    steps = schedule.total_student_steps
    if task and options.learner == "lwf":
        learner: Learner = DistilledTask(student, run.old_network(task), session.augment, config, steps)
    elif task and options.learner == "fetril":
        old = run.tasks.outputs(task).start
        learner = TranslatedTask(student, run.means_after(task, images), old, config, steps)
    else:
        learner = SupervisedLearner(student, session.augment, config.optim, steps, config.run.precision)
    return run.training(task, learner, TaskImages(images), schedule, images)


PROGRAM = Program(IncrementalConfig, incremental, __doc__, registry.INCREMENTAL_METHODS, EXAMPLES)


def main() -> None:
    run(PROGRAM)
