"""The source of images that the options name."""

from datafree.errors import InputError
from datafree.models.custom import load_object
from datafree.models.generator import Generator
from datafree.pool import ImagePool
from datafree.synthesis.base import BaseSynthesis, checked
from datafree.synthesis.inversion import InversionSynthesis, PixelSynthesis
from datafree.synthesis.objective import SynthesisObjective
from datafree.synthesis.sources import NoiseSource, RealSource
from datafree.synthesis.stream import StreamSynthesis


def build_source(session, teacher, student):
    """Where the images come from, by ``synthesis.source`` -> a BaseSynthesis."""
    options, run = session.config.synthesis, session.config.run
    if options.cr and run.deterministic and session.device.type == "cuda":
        raise InputError("the crops of --cr have no deterministic kernel on a GPU; drop --cr or --deterministic")
    if ":" in options.source:
        return _own(options.source, teacher, student, session)
    if options.source == "noise":
        return NoiseSource(session.card, session.device)
    if options.source == "real":
        return RealSource(session.split("train"))
    return _optimised(session, teacher, student)


def _optimised(session, teacher, student):
    config = session.config
    options, g_steps, precision = config.synthesis, config.schedule.g_steps, config.run.precision
    objective = SynthesisObjective(options, config.relation, teacher, student)
    if config.schedule.warmup:
        objective.wanted(with_student=False)
    if options.source == "generator":
        return StreamSynthesis(objective, _generator(session), session.augment, options, g_steps, precision)
    given = (session.augment, make_pool(config, session.card, session.device), options, g_steps)
    more = {"balanced": config.distill.balanced_sampling, "precision": precision}
    if options.source == "pixels":
        return PixelSynthesis(objective, *given, **more)
    return InversionSynthesis(objective, _generator(session), *given, **more)


def _generator(session):
    options = session.config.synthesis
    return Generator(options.nz, options.ngf, session.card.shape).to(session.device)


def make_pool(config, card, device):
    """An ImagePool for the rounds of a run, of ``pool_size`` images at most."""
    options, schedule = config.synthesis, config.schedule
    if 0 < options.pool_size < options.synthesis_batch_size:
        raise InputError(
            f"--pool_size {options.pool_size} cannot hold the images of one round; raise it to "
            f"--synthesis_batch_size {options.synthesis_batch_size} or more, or give 0 to hold all"
        )
    images = schedule.epochs * (schedule.ep_steps // schedule.kd_steps) * options.synthesis_batch_size
    return ImagePool(min(options.pool_size or images, images), card.shape, card.num_classes, device)


def _own(name, teacher, student, session):
    """The source of images that a class of the user's makes (see BaseSynthesis)."""
    make = load_object(name)
    session.count_code(name, make)
    try:
        source = make(
            teacher=teacher,
            student=student,
            augment=session.augment,
            card=session.card,
            config=session.config,
            device=session.device,
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the source {name} failed when it was made: {type(error).__name__}: {error}") from error
    if not isinstance(source, BaseSynthesis):
        raise InputError(f"the source {name} made a {type(source).__name__}; its class has to be a BaseSynthesis")
    return checked(source, session.card.shape, session.device)
