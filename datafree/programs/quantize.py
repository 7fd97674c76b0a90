"""Data-free quantization: a network at low bit widths, by images that are synthesised from the network itself."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from datafree import registry
from datafree.config import QuantizeConfig
from datafree.errors import InputError
from datafree.launch import command
from datafree.program import Program, run

if TYPE_CHECKING:
    from datafree.logger import RunFolder
    from datafree.network import Network
    from datafree.session import Session
    from datafree.synthesis.base import BaseSynthesis
    from datafree.training import Training

EXAMPLES = f"""
{command("quantize")} --teacher cifar_resnet20 --teacher_weights resnet20.th --w_bits 4 --a_bits 4
{command("quantize")} --teacher cifar_resnet20 --teacher_weights resnet20.th --w_bits 8 --a_bits 8 --epochs 0
{command("quantize")} --config configs/digits/quantize_resnet8.yaml --method gdfq
"""


def quantization(session: "Session") -> "Iterator[Training]":
    """The teacher on a grid: ranges observed on images of a source, then training in turns with their synthesis."""
    from datafree.diagnostics import Watch
    from datafree.exporting.packages import require_packages
    from datafree.learners.quantize import QuantizeLearner
    from datafree.plan import describe_quantization, describe_quantized
    from datafree.quantizer import quantise
    from datafree.schedule import Schedule
    from datafree.synthesis.build import build_source
    from datafree.training import Training, find_held_out
    from datafree.view_cache import build_cache

    config, model = session.config, session.config.teacher.teacher
    if config.run.evaluate_only:
        _evaluate(session)
        return
    if config.quantizer.onnx:
        require_packages()
    teacher = session.load_teacher()
    student = quantise(teacher, config.quantizer)
    student.try_run()
    if config.schedule.epochs:
        student.require_full_precision()
    source = build_source(session, teacher, student)
    schedule = Schedule.of(config.schedule, config.finetune.batch_size, source, config.run.eval_every)
    learner = QuantizeLearner(student, teacher, session.augment, config, schedule.total_student_steps)
    tested = len(session.test or ())  # as late as possible, because the images may take long to read
    learner.cache = build_cache(session, teacher, source, learner, config.finetune.view_cache)

    yield Training(
        learner,
        source,
        schedule,
        model=model,
        name=(config.method, model, config.quantizer.short),
        plan=describe_quantization(config, session.card, tested, schedule, teacher, student, source, learner.cache),
        teacher=teacher,
        monitor=Watch(source, teacher, student, config.relation, adversarial=bool(config.synthesis.adv)),
        facts=describe_quantized(student),
        finish=partial(_write_integers, session, teacher, student, source) if config.quantizer.onnx else None,
        budget=config.schedule.budget,
        held_out=find_held_out(session),
    )


def _write_integers(
    session: "Session", teacher: "Network", student: "Network", source: "BaseSynthesis", folder: "RunFolder"
) -> None:
    """The network in integers, with ranges of activations that are observed on batches of the source."""
    from datafree import distributed
    from datafree.exporting.integers import write_integer_network

    config = session.config
    batches = [source.batch(config.finetune.batch_size).images for _ in range(config.quantizer.calibration)]
    if distributed.rank() == 0:
        with distributed.apart():
            write_integer_network(folder, teacher, student, batches, session.test)


def _evaluate(session: "Session") -> None:
    """The accuracy of the network of --student_weights. Raises InputError for one in float."""
    from datafree.quantizer import QuantizedModel

    weights = session.config.student.student_weights
    network = session.network("student", session.config.teacher.teacher, weights)
    if not isinstance(network.model, QuantizedModel):
        raise InputError(
            f"--student_weights {weights}: the network is in float; evaluate it by {command('train')} --evaluate_only"
        )
    session.evaluate_only(network)


PROGRAM = Program(QuantizeConfig, quantization, __doc__, registry.QUANTIZATION_METHODS, EXAMPLES)


def main() -> None:
    run(PROGRAM)
