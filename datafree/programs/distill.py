"""Data-free knowledge distillation: a student from a trained teacher, without the teacher's training data."""

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datafree import registry
from datafree.config import DistillConfig
from datafree.errors import OptionError
from datafree.launch import command
from datafree.plugins import is_custom, named_by_caller
from datafree.program import Program, run

if TYPE_CHECKING:
    from torch import nn

    from datafree.datasets.cards import DatasetCard
    from datafree.network import Network
    from datafree.session import Session
    from datafree.training import Training

EXAMPLES = f"""
{command("kd")} --method rgal --teacher wrn40_2 --student wrn16_1
{command("kd")} --config configs/cifar10/rgal_wrn40_2_wrn16_1.yaml --seed 1
{command("kd")} --dataset digits --teacher resnet20 --student resnet8 --epochs 10
"""
# Options of the command line alone: what they ask for is no training, or is given as an argument.
NOT_HERE = {"help", "version", "print_config", "dry_run", "evaluate_only", "dataset"}


def distillation(session: "Session") -> "Iterator[Training]":
    """A student's training on the images of a source, in turns with their synthesis."""
    from datafree.diagnostics import Watch
    from datafree.learners.build import build_learner
    from datafree.plan import describe_distillation
    from datafree.schedule import Schedule
    from datafree.synthesis.build import build_source
    from datafree.training import Training, find_held_out
    from datafree.view_cache import build_cache

    config, options = session.config, session.config.student
    student = session.network("student", options.student, options.student_weights, key=options.student_weights_key)
    if config.run.evaluate_only:
        session.evaluate_only(student)
        return
    teacher = session.load_teacher()
    source = build_source(session, teacher, student)
    schedule = Schedule.of(config.schedule, config.distill.batch_size, source, config.run.eval_every)
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
        budget=config.schedule.budget,
        held_out=find_held_out(session),
    )


class Distilled(NamedTuple):
    """What :func:`datafree.distill` returns.

    student: the trained network, in evaluation mode; it takes images (N, C, H, W) in [0, 1]. numbers: those of the
    run's summary, such as last_acc1 (top-1 in % after the last epoch), teacher_acc1, images; None for what was not
    measured. folder: of the run, with its log, image grids and checkpoints.
    """

    student: "Network"
    numbers: dict[str, float | None]
    folder: Path


def distil_objects(
    teacher: "nn.Module | str",
    student: "nn.Module | str",
    card: "Mapping[str, Any] | DatasetCard | str | Path",
    method: str,
    options: Mapping[str, Any],
) -> Distilled:
    """The program for networks and a card that are there already; see :func:`datafree.distill`."""
    from datafree import checkpoint, cost
    from datafree.datasets.cards import DatasetCard
    from datafree.results import is_number, read_summary
    from datafree.runtime import same_rng
    from datafree.session import Session
    from datafree.training import run_training

    if isinstance(card, Mapping):
        card = DatasetCard.from_mapping(card, "the card")
    given = {role: part for role, part in (("teacher", teacher), ("student", student)) if not isinstance(part, str)}
    config = _config_of({"teacher": teacher, "student": student}, card, method, options)
    with same_rng():
        session = Session(config, given=given, card=card if isinstance(card, DatasetCard) else None)
        (training,) = distillation(session)
        try:
            folder = run_training(session, training, cost.lay_plan)
        except SystemExit as stop:
            if stop.code == 128 + signal.SIGINT:
                raise KeyboardInterrupt("the run is saved; the same call with resume='auto' continues it") from None
            raise
    assert folder
    network = training.learner.network.eval()
    network.metadata = checkpoint.read_weights(folder)[1]
    summary = read_summary(folder / "summary.json")
    return Distilled(network, {k: v for k, v in summary.items() if v is None or is_number(v)}, folder)


def _config_of(
    networks: "Mapping[str, nn.Module | str]", card: "DatasetCard | str | Path", method: str, options: Mapping[str, Any]
) -> DistillConfig:
    """The configuration that these arguments make, read as words of a command line. Raises InputError."""
    from torch import nn

    from datafree.datasets.cards import DatasetCard
    from datafree.network import model_name

    for role, network in networks.items():
        if not isinstance(network, (nn.Module, str)):
            raise OptionError(
                f"the {role} is a {type(network).__name__}; give a torch.nn.Module, or the name of a registered model"
            )
    if not isinstance(card, (DatasetCard, str, Path)):
        raise OptionError(
            f"the card is a {type(card).__name__}; give the name of a data set, a dict, a DatasetCard, or the path of "
            "its YAML file"
        )
    if refused := sorted(options.keys() & NOT_HERE):
        raise OptionError(f"datafree.distill takes no {refused[0]}, which the command line does; remove it")
    words = {"method": method, **{role: model_name(network) for role, network in networks.items()}}
    if isinstance(card, Path) or str(card).endswith((".yaml", ".yml")):
        words["card"] = str(card)
    elif isinstance(card, str):
        words |= {"dataset": card, "card": ""}
    else:
        words |= {"dataset": card.name, "card": "", "eval": "none"}
    words |= {name: _as_word(value) for name, value in options.items()}
    for value in filter(is_custom, words.values()):
        named_by_caller(value)
    config: DistillConfig = PROGRAM.parse([f"--{name}={value}" for name, value in words.items()])[0]
    for role, network in networks.items():
        for name in (f"{role}_weights", f"{role}_weights_key"):
            if not isinstance(network, str) and getattr(getattr(config, role), name):
                raise OptionError(f"{name} has no effect because the {role} is an object with its weights; remove it")
    config.validate()
    return config


def _as_word(value: Any) -> str:
    """The value of an option as it would be written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(_as_word, value))
    return "" if value is None else str(value)


def custom_learner(config: DistillConfig) -> list[str]:
    """The user-defined learner, which is part of the name of its runs."""
    return [config.distill.learner] if is_custom(config.distill.learner) else []


PROGRAM = Program(DistillConfig, distillation, __doc__, registry.METHODS, EXAMPLES)


def main() -> None:
    run(PROGRAM)
