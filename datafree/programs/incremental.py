"""Class-incremental learning without the old images: new classes arrive in tasks, and synthetic images stand in for
those of the classes before them."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from datafree import registry
from datafree.config import IncrementalConfig
from datafree.launch import command
from datafree.program import Program, run

if TYPE_CHECKING:
    from datafree.incremental import IncrementalRun
    from datafree.session import Session
    from datafree.training import Training

EXAMPLES = f"""
{command("incremental")} --dataset digits --model resnet8 --init_cls 2 --increment 2
{command("incremental")} --config configs/digits/incremental_inversion.yaml --seed 1
{command("incremental")} --method rdfcil --dataset cifar100 --triplet 0.1 --striplet 0.1
"""


def incremental(session: "Session") -> "Iterator[Training]":
    """A training for every task, each from the network that the one before it left."""
    from datafree.incremental import IncrementalRun, Tasks, seen_classes, stated_order
    from datafree.training import open_folder

    config, options = session.config, session.config.incremental
    tasks = Tasks.of(options, session.card)
    network = session.network("model", options.model, options.weights, key=options.weights_key)
    if config.run.evaluate_only:
        known = range(seen_classes(network, session.card.num_classes))
        tasks = replace(tasks, order=stated_order(network, session.card.num_classes) or tasks.order)
        test = tasks.split_of(session.test, known) if session.test else None
        session.evaluate_only(network.restricted_to(known), test)
        return
    with open_folder(session, (config.method, options.model)) if session.write else nullcontext() as folder:
        run = IncrementalRun(session, tasks, network, folder)
        for task in run.remaining():
            yield replayed(run, task) if task and options.learner == "replay" else on_real_images(run, task)
        run.summarise()


def replayed(run: "IncrementalRun", task: int) -> "Training":
    """Training on a task's images and on synthetic ones of the old classes, by inversion of the old network."""
    from datafree.diagnostics import Watch
    from datafree.learners.incremental import ReplayedTask, candidates
    from datafree.schedule import Schedule
    from datafree.synthesis.build import build_source

    session, config, options = run.session, run.session.config, run.session.config.incremental
    images, student, teacher = run.train_images(task), run.student(task), run.old_network(task)
    source = build_source(session, teacher, student)
    drawn = candidates(options.replay_batch_size, teacher.num_classes, options.classes_per_batch)
    schedule = Schedule.of(config.schedule, drawn, source)
    learner = ReplayedTask(student, teacher, session.augment, config, schedule.total_student_steps, images)
    old = student.restricted_to(range(teacher.num_classes))
    watch = Watch(source, teacher, old, config.relation, adversarial=bool(config.synthesis.adv))
    return run.training(task, learner, source, schedule, images, options.replay_batch_size, watch, teacher)


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
    schedule = Schedule(epochs, given.ep_steps // given.kd_steps, given.kd_steps, options.batch_size)
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
