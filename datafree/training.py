"""One run of the engine, from its plan to its summary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datafree import checkpoint, distributed, plan, quantizer
from datafree.budget import Budget
from datafree.checkpoint import LAST
from datafree.cli import to_yaml
from datafree.datasets.given import GivenImages, find_images, overlap
from datafree.datasets.loading import folder_of
from datafree.datasets.splits import Split, TensorSplit, some_places
from datafree.engine import Engine, Evaluate, Monitor, obey_alarms
from datafree.errors import InputError, OptionError, printable, traceback_in
from datafree.evaluators import scores_line
from datafree.files import locked, remove_left_over
from datafree.grids import Gallery
from datafree.launch import command
from datafree.learners.base import Learner
from datafree.logger import FINISHED, ReadOnlyFolder, RunFolder, table
from datafree.network import Network
from datafree.options import default_options, result_options
from datafree.plugins import short_name
from datafree.runtime import environment, peak_memory, same_rng
from datafree.schedule import Schedule
from datafree.session import Session, published_weights
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.build import predictions

HELD_OUT = 10_000  # images at most: as many as a test set has, so that they take its time
OF_DIVERGENCE = (
    "its training diverged: lower the learning rate or the weights of the loss; the last epoch's checkpoint is kept"
)


@dataclass
class Training:
    """What one run of the engine consists of.

    model: name of the trained network, as given to its option. name: parts of the run folder's name.
    plan: lines for the log. teacher: evaluated before the training, if there is one.
    monitor: of the latest images, called after each epoch. facts: further entries of the summary, in words, which are
    logged at the end. test: in place of the session's test split. classes: the names of the network's outputs, if they
    are not in the order of the data card. judge: whose confidence stands below the images of the grids; the teacher, if
    there is no other. task: of a run that consists of several, the name of
    its folder below the run's. stored: further plain values, which are saved beside the weights and in the summary.
    finish: called with the run's folder after the last epoch. budget: --budget, for which the run is made longer or
    shorter than the schedule, whose epochs are proportions then; None for none. held_out: images on which the trained
    network is compared with the teacher.
    """

    learner: Learner
    source: BaseSynthesis
    schedule: Schedule
    model: str
    name: Sequence[str]
    plan: Sequence[str]
    teacher: Network | None = None
    monitor: Monitor | None = None
    test: Split | None = None
    classes: Sequence[str] = ()
    judge: Network | None = None
    task: str = ""
    is_last: bool = True
    stored: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[RunFolder], None] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    budget: str | None = None
    held_out: GivenImages | None = None

    @property
    def lines(self) -> list[str]:
        """The plan, and what the optimiser steps."""
        return [*self.plan, *plan.describe_optimizer(getattr(self.learner, "optimizer", None))]

    @property
    def held_out_count(self) -> int:
        """How many of the held-out images an evaluation has."""
        return min(self.held_out.count, HELD_OUT) if self.held_out and self.teacher else 0


def run_training(session: Session, training: Training, lay_plan: Callable[[Session, Training, Engine], None]) -> Path:
    """Log the plan, train, and write the summary -> the run's folder.

    lay_plan: gives the engine of a run that begins its length, if that has a budget: :func:`datafree.cost.lay_plan`.
    """
    budget = Budget(training.budget, training.schedule) if training.budget else None
    plan_lines = [printable(line) for line in (*training.lines, *session.notes)]
    with open_folder(session, training.name, training.task) as folder, traceback_in(folder.root / "log.txt"):
        for line in plan_lines:
            folder.log(line)
        network, here, test = training.learner.network, environment(session.device), test_images(session, training)
        metadata = weights_metadata(session, network, training.model, here["commit"]) | dict(training.stored)
        distributed.require_same(metadata["options"], "has other weights, card or code; give all the same files")
        columns = evaluate_teacher(session, training.teacher, folder) if training.teacher else {}
        engine = Engine(
            training.learner,
            training.source,
            training.schedule,
            folder,
            session.run,
            evaluate=evaluation(session, training, test, folder),
            monitor=training.monitor,
            gallery=gallery(session, training),
            metadata=metadata,
            defaults=default_options(session.config),
            budget=budget,
        )
        if not resume(session, engine) and budget:
            lay_plan(session, training, engine)
        was_finished = engine.is_finished and folder.has_summary
        if was_finished:
            folder.log(FINISHED)
        else:
            folder.set_summary_aside()
            folder.record(to_yaml(session.config), here, engine.metadata["options"])
            result = engine.train()
            columns, facts = {**training.stored, **columns}, training.facts
            if budget:
                columns |= plan.length_numbers(engine.schedule)
                facts = {**facts, **report_budget(engine, budget)}
            summarise(session, engine, result, columns, facts)
        if training.finish:
            training.finish(folder)
        if not (was_finished or training.is_last):
            engine.end_if_asked()
        return folder.root


def evaluation(session: Session, training: Training, test: Split | None, folder: RunFolder) -> Evaluate | None:
    """(tick) -> the scores of the trained network on ``test`` and on the held-out images; None without either."""
    network, held_out = training.learner.network, _answered(session, training, folder)

    def evaluate(tick: Callable[[], Any]) -> dict[str, float]:
        scores = session.score(network, OF_DIVERGENCE, test, tick) or {}
        same = session.score(network, OF_DIVERGENCE, held_out, tick) if held_out else None
        return scores | ({"agreement": same["acc1"]} if same else {})

    return evaluate if test or held_out else None


def find_held_out(session: Session) -> GivenImages | None:
    """The images of --held_out, which are not read yet. Raises InputError for a folder that has none."""
    folder, trained_on = session.config.teacher.held_out, session.config.synthesis.pool_images
    if folder and trained_on and overlap(Path(folder), Path(trained_on)):
        raise OptionError(
            f"--held_out {folder} has images of --pool_images {trained_on}, on which the student is trained"
        )
    data_set = folder_of(session.card.name, session.data.data_root)
    return find_images(folder, session.card, data_set, "--held_out") if folder else None


def _answered(session: Session, training: Training, folder: RunFolder) -> Split | None:
    """The images of --held_out, or some of them, the same ones each time; their labels are the teacher's answers."""
    found, count = training.held_out, training.held_out_count
    if not found or not training.teacher:
        return None
    images = found.read()[some_places(found.count, count)]
    with same_rng():
        answers = predictions(training.teacher, images)
    for note in (*found.notes, f"Held out: {len(images):,} of {found.count:,} images of --held_out."):
        folder.log(note)
    return TensorSplit(images, answers, training.teacher.num_classes).to(session.device)


def gallery(session: Session, training: Training) -> Gallery:
    """What draws the images of the training."""
    names, judge = training.classes or session.class_names, training.judge or training.teacher
    return Gallery(names, judge, test_images(session, training))


def test_images(session: Session, training: Training) -> Split | None:
    """The images that the training is tested on, or None."""
    return training.test or session.test


def open_folder(session: Session, parts: Sequence[str], task: str = "") -> RunFolder:
    """The run's folder ``save_dir/<dataset>_<parts>/<tag>``, or that of its ``task`` below it."""
    run = session.run
    name = "_".join([session.card.name, *map(short_name, parts)])
    root = Path(run.save_dir) / name / (run.log_tag or f"seed{run.seed}") / task
    if distributed.rank():
        return ReadOnlyFolder(root, f"{name} {task}".strip())
    # The checkpoint of another folder starts a run here, which must not overwrite one that is here.
    inside = run.resume != "none" and Path(run.resume).resolve().is_relative_to(root.resolve())
    return RunFolder(root, f"{name} {task}".strip(), resume=run.resume == "auto" or inside)


def evaluate_teacher(session: Session, teacher: Network, folder: RunFolder) -> dict[str, float]:
    """Log the teacher's test accuracy, with an alarm if it is weak -> columns of the summary."""
    scores = session.score(teacher)
    if scores is None:
        folder.log("No test set (--eval none): no accuracy is measured.")
        return {}
    folder.log(f"[Eval] teacher {scores_line(scores)}")
    alarms = plan.check_teacher(scores["acc1"], session.config.teacher.teacher_acc, session.card.num_classes)
    for alarm in alarms:
        folder.log(alarm)
    obey_alarms(session.run, folder, alarms)
    return {"teacher_acc1": scores["acc1"]}


def weights_metadata(session: Session, network: Network, model: str, commit: str | None) -> dict[str, Any]:
    """Plain values stored with the weights of ``network``, enough to build and judge it."""
    return {
        "model": model,
        "dataset": session.card.name,
        "num_classes": network.num_classes,
        "classes": list(session.card.classes),
        "shape": list(network.shape),
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "options": {**result_options(session.config), **session.digests},
        "config": to_yaml(session.config),
        "commit": commit or "",
        **quantizer.stated(network.model),
    }


def report_budget(engine: Engine, budget: Budget) -> dict[str, str]:
    """How long the run took of its budget, in words, with an alarm if it is more than 5 % off."""
    spent = budget.spent
    off = 100 * (spent / budget.seconds - 1)
    if abs(off) > 5:
        engine.folder.log(
            f"[Alarm] the run took {spent:.1f} s of its budget of {budget.seconds:g} s ({off:+.1f} %): steps became "
            "slower or faster in the end, or they are too long for it"
        )
    return {"budget": f"{budget.text}, of which {spent:.1f} s ({off:+.1f} %) were taken"}


def resume(session: Session, engine: Engine) -> bool:
    """Load the checkpoint that --resume names -> whether there was one to load."""
    name, last = session.run.resume, engine.folder.checkpoints / LAST
    if name == "auto":
        distributed.require_same(
            last.is_file(), f"sees another {engine.folder.root} than the first one; give a --save_dir that they share"
        )
    if name == "auto" and not last.is_file():
        engine.folder.require_no_results()
        engine.folder.truncate_metrics(0)
        engine.folder.log("Nothing to resume yet: the run starts from the beginning.")
        return False
    if name != "none":
        engine.load(last if name == "auto" else Path(name))
    return name != "none"


def summarise(
    session: Session, engine: Engine, result: dict[str, Any], columns: Mapping[str, Any], facts: Mapping[str, str]
) -> None:
    """Write summary.json and log the result as a table.

    columns: further numbers, such as the teacher's accuracy. facts: further entries, in words.
    """
    folder = engine.folder
    summary = {
        "run": folder.name,
        "seed": session.run.seed,
        **columns,
        "last_acc1": result.get("acc1"),
        "best_acc1": result.get("best_acc1"),
        **{name: value for name, value in result.items() if name == "agreement"},
        "images": engine.source.images_made,
        **{f"{phase}_s": round(seconds, 1) for phase, seconds in engine.seconds.items()},
        "memory_MB": peak_memory(session.device),
    }
    provenance = {"options": engine.metadata["options"], "environment": environment(session.device)}
    folder.summary({**summary, **facts, **provenance})
    if result.get("acc1") is not None:
        folder.log(f"Last: {result['acc1']:.4f}")
        folder.log(f"Best: {result['best_acc1']:.4f} (chosen on the test set)")
    for name, text in facts.items():
        folder.log(f"{name.capitalize()}: {text}.")
    folder.log(f"Everything is in {folder.root}\n" + table([summary]))


def publish_weights(session: Session, folder: RunFolder, model: str) -> None:
    """Copy the last weights to where other programs look for a teacher, unless better ones are there.

    Two runs that publish one teacher at a time take turns, so that the better one stays. Of the processes of a run the
    first one publishes.
    """
    if distributed.rank():
        return
    source, place = checkpoint.weights_file(folder.root), published_weights(session.card.name, model)
    weights, where = checkpoint.load(source), f"; the new weights are {source}"
    try:
        with locked(place.with_name(f".{place.name}.lock")):
            remove_left_over(place.parent, place.name)
            if accuracies := _why_kept(weights, place):
                folder.log(f"{place} stays as it is ({accuracies}){where}")
                return
            checkpoint.save(place, weights)
    except InputError as error:
        raise InputError(f"{error}{where}") from error
    folder.log(f"The weights are in {place}, where {command('kd')} finds them.")


def _why_kept(weights: Mapping[str, Any], place: Path) -> str:
    """The accuracies of what is published and of ``weights``, unless these are better; empty if they are."""
    if not place.exists():
        return ""
    there, here = checkpoint.stored_accuracy(place, weights["model"]), weights.get("acc1")
    if there is not None and here is not None and here > there:
        return ""
    old, new = ("unknown" if value is None else f"{value:.2f} %" for value in (there, here))
    return f"top-1 {old}, the new weights' {new}"
