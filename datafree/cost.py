"""What a run will cost, measured before it: a few of its own steps, on fewer images where they are slow, and scaled."""

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datafree import distributed, launch, plan
from datafree.budget import fitted
from datafree.budget import seconds_of as budget_seconds
from datafree.checkpoint import LAST
from datafree.config import Run
from datafree.datasets.loading import stand_in
from datafree.datasets.splits import Split
from datafree.engine import Engine
from datafree.errors import InputError, batch_or_parts, out_of_memory_in, printable
from datafree.files import writing
from datafree.logger import RunFolder
from datafree.network import Network
from datafree.options import default_options
from datafree.pool import ImagePool
from datafree.runtime import free_memory, peak_memory, reset_peak
from datafree.schedule import Schedule
from datafree.session import Session
from datafree.signals import handled, leave
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.optimised import RoundSynthesis, pool_capacity
from datafree.training import Training, gallery, test_images, weights_metadata
from datafree.trial import trial_images, unchanged
from datafree.view_cache import expected_new_views

SECONDS = 4.0  # of a phase, after which no more images are tried,
MEASURED = 0.01  # or, if that is less, a share of the run's budget
REPEATS = 5  # timed steps at most, spread over the run, in which terms of a loss come and go
SHARES = (8, 4, 2, 1)  # of a batch, its n-th part: on which a step is tried, in turn
GPU_SHARES = SHARES[-2:]  # on a GPU, where small batches can be as slow as large ones, and each size chooses kernels
SMALLEST = 8  # images to begin with, if the first of these is less
ROUND = 2  # synthesis steps of a measured round
BATCHES = ("synthesis_batch_size", "batch_size", "replay_batch_size")  # options that steps read
FAR = 10**9  # an epoch that never comes
KINDS = {  # of work, and the phases that it consists of
    "synthesis": ("warmup", "synthesis"),
    "student": ("student", "views"),
    "evaluation": ("evaluation", "teacher"),
    "observing ranges": ("ranges",),
    "ends of epochs": ("closing", "grid"),
}

Step = Callable[[int, float], Any]  # (images, position in the run): take a step on so many images


class Rate(NamedTuple):
    """What one step of a phase takes at its full size; ``measured`` of its ``images`` were tried.

    seconds. flop: two per multiplication, at the beginning of the run. peak: MB in use at most, by the whole process
    (on a GPU by tensors); None where that is not known.
    """

    seconds: float
    flop: float
    peak: float | None
    images: int = 1
    measured: int = 1


class Rates(NamedTuple):
    """What was measured of a training: a :class:`Rate` for each phase, MB in use between the steps, bytes of files.

    phases: "warmup" and "synthesis" for a step of synthesis (of a source that counts none, a round), "student" for one
    of the student with new views, "views" for the teacher's pass over these, which the view cache saves, "evaluation"
    and "teacher" for a batch of the test set, "ranges" for observing those of a quantised network after an epoch of
    warm-up, "closing" for the rest of the end of an epoch, "grid" for a picture of the images.
    """

    phases: dict[str, Rate]
    in_use: float | None
    checkpoint: int
    weights: int
    picture: int


@dataclass
class Cost:
    """Of a whole training: seconds by kind of work, FLOP, bytes of memory in use at most (None: not known) and now,
    bytes on the disk at most, and the share of the views that the view cache will know."""

    seconds: dict[str, float]
    flop: float
    memory: float | None
    in_use: float
    disk: float
    known: float


def preview(session: Session, trainings: Iterable[Training]) -> None:
    """A dry run: print the plans of ``trainings`` and what they will cost, and write nothing.

    What is missing is named, and the InputError with which a run would end is raised when all is said.
    """
    costs, told = list[Cost](), set[str]()
    for training, rates, cost in forecasts(session, trainings):
        lines = [*training.lines, *(note for note in session.notes if note not in told)]
        told.update(session.notes)
        lines += plan.describe_rates(rates.phases) if rates else []
        costs.append(cost)
        print("\n".join(map(printable, lines)), flush=True)
    lines = [*session.to_download, *(f"Missing: {error}." for error in session.missing)]
    lines += ["The plan has random weights and noise in place of what is not there."] * bool(lines)
    if (processes := launch.processes()) > 1:
        lines.append(f"Measured in one process alone; the {processes} of the run divide each batch.")
    for line in [*lines, *describe(session, costs)]:
        print(printable(line), flush=True)
    if session.missing:
        raise session.missing[0]


def lay_plan(session: Session, training: Training, engine: Engine) -> None:
    """Give the engine of a run that begins a length for its budget, by a few steps; all is then as it was before them.

    The run's own steps correct it. Raises InputError for a budget that is too short.
    """
    training.learner.follow(training.schedule.total_student_steps)  # refuses one that cannot, before it is measured
    budget, before, found = engine.budget, copy.deepcopy(engine.state_dict()), None
    assert budget
    if not distributed.rank():
        with distributed.apart():
            rates = measure_training(session, training, compiled=session.run.compile != "off")
        rates.phases.pop("teacher", None)  # which is evaluated already
        schedule = planned_schedule(session, training, rates, budget.spent)
        cost = total(session, replace(training, schedule=schedule), rates)
        found = schedule, costs_of(cost, schedule)
    engine.restore(before)
    if cache := training.learner.cache:
        cache.forget()
    schedule, budget.costs = distributed.gathered(found)[0]
    engine.follow(schedule)
    engine.folder.log(f"Budget {budget.text}, by steps tried before the run: {plan.describe_length(schedule)}.")
    engine.save()


def planned_schedule(session: Session, training: Training, rates: Rates, spent: float = 0.0) -> Schedule:
    """The longest schedule like that of ``training`` that ends within its budget, of which some seconds are spent.

    Raises InputError if there is none.
    """
    left = budget_seconds(training.budget) - spent

    def taken(schedule: Schedule) -> float:
        cost = total(session, replace(training, schedule=schedule), rates)
        return sum(cost.seconds.values()) / launch.processes()

    schedule = fitted(training.schedule, taken, left)
    if (least := taken(schedule)) > left:
        raise InputError(
            f"--budget {training.budget} is too short: the shortest run of this kind, with one student step after a "
            f"round of synthesis and any warm-up, would take about {plan.duration(least + spent)} here; give it more"
        )
    return schedule


def costs_of(cost: Cost, schedule: Schedule) -> dict[str, float]:
    """Seconds of each kind of work of :meth:`Schedule.work_until`, on average over the run of that ``cost``."""
    work, seconds = schedule.work_until(schedule.epochs), cost.seconds
    batch = seconds["synthesis"] / max(schedule.total_batches, 1)
    costs = {
        "warmup": batch * schedule.warmup_batches,
        "synthesis": batch * schedule.batches,
        "student": seconds["student"] / max(work["student"], 1),
        "ranges": seconds["observing ranges"] / max(work["ranges"], 1),
        "evaluation": seconds["evaluation"] / work["evaluation"],
        "closing": seconds["ends of epochs"] / schedule.epochs,
    }
    return {kind: cost / launch.processes() for kind, cost in costs.items()}


def forecasts(session: Session, trainings: Iterable[Training]) -> Iterator[tuple[Training, Rates | None, Cost]]:
    """Each training with its rates, which are None where those of an earlier one hold, and its cost.

    They hold for all trainings with the same kinds of learner and source.
    """
    measured = dict[Any, Rates]()
    for training in trainings:
        kind = (type(training.learner), type(training.source))
        known = kind in measured
        if not known:
            measured[kind] = measure_training(session, training)
        if training.budget:
            schedule = planned_schedule(session, training, measured[kind])
            training.learner.follow(schedule.total_student_steps)
            training.source.follow(schedule)
            processes = launch.processes()
            evenly = f", as if {processes} processes divided the time evenly" * (processes > 1)
            line = f"Budget {training.budget}, by steps tried here{evenly}: {plan.describe_length(schedule)}."
            training = replace(training, schedule=schedule, plan=[*training.plan, line])
        yield training, None if known else measured[kind], total(session, training, measured[kind])


def describe(session: Session, costs: Sequence[Cost]) -> list[str]:
    """The lines of :func:`datafree.plan.describe_costs` for this machine as it is now."""
    folder = session.run.save_dir
    if session.device.type == "cuda":
        torch.cuda.empty_cache()  # which is free, too
    options = default_options(session.config)
    return plan.describe_costs(costs, free_memory(session.device), folder, free_disk(folder), options) if costs else []


@contextmanager
def _short_rounds(source: BaseSynthesis) -> Iterator[None]:
    """Inside, a round is a few steps on one batch."""
    short = {"g_steps": min(source.g_steps, ROUND)}
    if isinstance(source, RoundSynthesis):
        short |= {"batches": 1, "warmup_batches": 1}
    before = {name: getattr(source, name) for name in short}
    for name, value in short.items():
        setattr(source, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(source, name, value)


def measure_training(session: Session, training: Training, compiled: bool = False) -> Rates:
    """Take a few steps of each phase of ``training``, and close an epoch in a folder that is removed.

    compiled: whether networks run compiled, of which the seconds alone mean something, or as they are written. The
    trained network and the random states are afterwards as before; source and optimisers are not.
    """
    learner, source, schedule, device = training.learner, training.source, training.schedule, session.device
    work, phases = schedule.work_until(schedule.epochs), dict[str, Rate]()
    test = test_images(session, training)
    if training.held_out_count and not test:
        test = stand_in(session.card, "test", device)
    steps = _Steps(session.config, training)
    limit = min(SECONDS, MEASURED * budget_seconds(training.budget)) if training.budget else SECONDS
    images, most = steps.images, session.run.micro_batch
    remedy = batch_or_parts("the batch sizes", most)
    measured = partial(measure, device=device, limit=limit, micro_batch=most, compiled=compiled)
    unharmed = unchanged(learner.network, eager=not compiled)
    with unharmed, _short_rounds(source), out_of_memory_in("the measured steps", remedy):
        if not source.traits.synthesises:
            work.update(warmup=0, synthesis=0)
        if work["warmup"] or work["synthesis"]:
            fill = steps.synthesise(not work["warmup"])  # or there were no images to learn from
            few = fewest(images, compiled)
            prepare(fill, few, device, compiled)
            if seconds_of(fill, few, 0, device) > SECONDS:
                source.g_steps = 1  # what a round does besides is no matter then
        if work["warmup"] and learner.acts_in_warmup:
            phases["ranges"] = measured(steps.observe, schedule.batch_size, tries=1)
        if work["student"]:
            steps.train(fewest(schedule.batch_size, compiled), 0)
        files = _close_epochs(session, training, phases)
        in_use = reset_peak(device)
        if test:
            count = min(session.evaluation_batch, len(test))
            phases["evaluation"] = measured(_evaluation(learner.network, test), count)
            if training.teacher:
                phases["teacher"] = measured(_evaluation(training.teacher, test), count)
        if work["student"]:
            phases["student"] = measured(steps.train, schedule.batch_size)
            if learner.cache:
                views = round(steps.views * schedule.batch_size)
                phases["views"] = measured(_passes(learner.cache.teacher), views)
        for kind in ("warmup", "synthesis"):
            if work[kind]:
                rate = measured(steps.synthesise(kind == "synthesis"), images)
                phases[kind] = rate._replace(seconds=rate.seconds / steps.ticks, flop=rate.flop / steps.ticks)
    return Rates(phases, in_use, *files)


class _Steps:
    """The steps of a training on any number of images.

    images: of a synthesis step. ticks: steps of the latest round, 1 if the source counts none. views: of an image of a
    student step, for which the view cache is asked.
    """

    def __init__(self, config: Any, training: Training):
        self.config, self.learner, self.source = config, training.learner, training.source
        self.batch, self.warmup = training.schedule.batch_size, training.schedule.warmup
        self.images = config.synthesis.synthesis_batch_size if hasattr(config, "synthesis") else 1
        self.ticks, self.views = 1, 0.0

    def synthesise(self, with_student: bool) -> Step:
        def step(images: int, progress: float) -> None:
            ticks: list[None] = []
            self.source.tick = lambda: ticks.append(None)  # type: ignore[method-assign]
            with _share_of_batches(self.config, images / self.images):
                self.source.round(self.warmup, with_student)
            self.ticks = max(len(ticks), 1)

        return step

    def observe(self, images: int, progress: float) -> None:
        self.learner.end_warmup_epoch(lambda: self.source.batch(images))

    def train(self, images: int, progress: float) -> None:
        cache = self.learner.cache
        if cache:
            cache.forget()
        with _share_of_batches(self.config, images / self.batch):
            self.learner.step(self.source.batch(images), progress)
        self.views = cache.lookups / images if cache else 0.0


@contextmanager
def _share_of_batches(config: Any, share: float) -> Iterator[None]:
    """Inside, the batch sizes among the options are a share of what they are."""
    sections = [section for section in vars(config).values() if is_dataclass(section)]
    before = [
        (section, name, getattr(section, name)) for section in sections for name in BATCHES if name in vars(section)
    ]
    try:
        for section, name, size in before:
            setattr(section, name, max(1, round(share * size)))
        yield
    finally:
        for section, name, size in before:
            setattr(section, name, size)


def measure(
    step: Step,
    images: int,
    device: torch.device,
    limit: float,
    tries: int = 2,
    micro_batch: int = 0,
    compiled: bool = False,
) -> Rate:
    """The rate of ``step`` on so many images, measured on SHARES or GPU_SHARES of them, while that is quick.

    limit: seconds, after which no more images are tried. tries: sizes at least. Beyond what was tried, seconds and FLOP
    grow with the images, and memory as it did from the last but one size to the last. micro_batch: images at most that
    are computed at once; fewer than two such parts are not tried, because from there on memory grows less. compiled:
    whether networks run compiled, which takes minutes for a first number of images, so that no other is tried.
    """
    least = max(fewest(images, compiled), min(images, 2 * micro_batch))
    shares = GPU_SHARES if device.type == "cuda" else SHARES
    sizes = sorted({max(least, images // part) for part in shares})
    prepare(step, sizes[0], device, compiled)
    started, peaks = now(device), dict[int, float | None]()
    with FlopCounterMode(display=False) as counter:  # which keeps tensors, so that memory is measured without it
        seconds = seconds_of(step, sizes[0], 0, device)
    is_slow = seconds > SECONDS  # so that what only a first step of a size does is no matter
    for size in sizes:
        if len(peaks) >= tries and now(device) - started + 4 * seconds > limit:
            break
        reset_peak(device)
        if peaks and not is_slow:
            step(size, 0)  # the first one of a size is slower
        seconds = seconds_of(step, size, 0.5, device)
        peaks[size] = peak_memory(device)
    tried = max(peaks)
    repeats = min(REPEATS, int((limit - now(device) + started) / max(seconds, 1e-9)))
    if repeats > 0:
        seconds = sum(seconds_of(step, tried, (i + 0.5) / repeats, device) for i in range(repeats)) / repeats
    flop = counter.get_total_flops() * images / sizes[0]
    return Rate(seconds * images / tried, flop, _at(images, peaks), images, tried)


def _at(images: int, peaks: dict[int, float | None]) -> float | None:
    """The peak at ``images``, on the line through the two largest sizes of which it is known."""
    *_, (size, peak) = points = [(0, None), *peaks.items()][-2:]
    before, lower = points[0]
    if peak is None or lower is None or size >= images:
        return peak
    return peak + max(0.0, peak - lower) * (images - size) / (size - before)


def fewest(images: int, compiled: bool) -> int:
    """On how many images a step of so many is tried first."""
    return images if compiled else min(images, max(SMALLEST, images // SHARES[0]))


def now(device: torch.device) -> float:
    """Seconds of a clock, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(step: Step, images: int, progress: float, device: torch.device) -> float:
    started = now(device)
    step(images, progress)
    return now(device) - started


def prepare(step: Step, images: int, device: torch.device, compiled: bool) -> None:
    """Take steps that are not measured: a GPU chooses its kernels for a size in the first one, networks are compiled in
    it, and CUDA graphs are captured in the second."""
    for _ in range(2 if compiled else int(device.type == "cuda")):
        step(images, 0)


def _evaluation(network: Network, test: Split) -> Step:
    """The network's pass over images, as an evaluation makes it."""
    batches: dict[int, Iterator[tuple[Tensor, Tensor]]] = {}

    def endless(images: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from test.batches(images)

    @torch.no_grad()
    def step(images: int, progress: float) -> None:
        network.eval()
        network(next(batches.setdefault(images, endless(images)))[0])

    return step


def _passes(teacher: Network) -> Step:
    """The teacher's pass over views, without their cache."""

    @torch.no_grad()
    def step(views: int, progress: float) -> None:
        teacher.features(trial_images(teacher.shape, views, teacher.device))

    return step


class _Silent(RunFolder):
    """The folder of a run that nobody reads."""

    def log(self, message: str) -> None:
        pass


def _close_epochs(session: Session, training: Training, phases: dict[str, Rate]) -> tuple[int, int, int]:
    """Add the rates of the end of an epoch without evaluation -> bytes of a checkpoint, of weights, of a grid."""
    device, network = session.device, training.learner.network
    metadata = weights_metadata(session, network, training.model, "") | dict(training.stored)
    with writing(tempfile.gettempdir(), "set TMPDIR to a folder that may be written", after=""):
        place = tempfile.mkdtemp()

    def remove_and_leave(number: int, frame: Any = None) -> None:
        shutil.rmtree(place, ignore_errors=True)
        leave(number)

    try:
        with handled(remove_and_leave), _Silent(place, "trial") as folder:
            engine = Engine(
                training.learner,
                training.source,
                replace(training.schedule, epochs=FAR, length=None),
                folder,
                replace(session.run, grid_every=1),
                monitor=training.monitor,
                gallery=gallery(session, training),
                metadata=metadata,
            )
            engine.position["epoch"] = training.schedule.warmup + 1
            engine.close_epoch()  # which imports what the first one needs
            with_grid = seconds_of(lambda *_: engine.close_epoch(), 1, 0, device)
            engine.run.grid_every = FAR
            closing = seconds_of(lambda *_: engine.close_epoch(), 1, 0, device)
            phases["closing"] = Rate(closing, 0, None)
            pictures = [path.stat().st_size for path in folder.grids.iterdir()]
            if pictures:
                phases["grid"] = Rate(max(0.0, with_grid - closing), 0, None)
            files = (folder.checkpoints / name for name in (LAST, "model_last.pth"))
            checkpoint, weights = (path.stat().st_size for path in files)
            return checkpoint, weights, max(pictures, default=0)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def total(session: Session, training: Training, rates: Rates) -> Cost:
    """The cost of the whole of ``training``."""
    phases, tested = rates.phases, len(test_images(session, training) or ()) + training.held_out_count
    known = 0.0
    if "views" in phases:
        known = known_views(session, training, phases["views"].images)
    amounts = amounts_of(training.schedule, session.run, tested, known, phases)
    seconds = {phase: amounts[phase] * rate.seconds for phase, rate in phases.items()}
    by_kind = {kind: sum(seconds.get(phase, 0.0) for phase in parts) for kind, parts in KINDS.items()}
    flop = sum(amounts[phase] * rate.flop for phase, rate in phases.items())
    pool = getattr(training.source, "pool", None)
    to_come, all_of_it = _bytes_of_pool(pool) if isinstance(pool, ImagePool) else (0, 0)
    memory = None
    if rates.in_use is not None:
        peaks = [1e6 * rate.peak for rate in phases.values() if rate.peak is not None]
        memory = max([1e6 * rates.in_use + all_of_it, *peaks])  # a checkpoint takes a copy of the pool
        if session.device.type == "cpu":  # which grants memory as it is filled
            memory += to_come
            if cache := training.learner.cache:
                new = (1 - known) * amounts["student"] * phases["views"].images
                memory += min(new, len(cache)) * cache.bytes_per_view
    copies = 3 if test_images(session, training) else 2  # last.pth, the new one beside it, best.pth
    disk = copies * (rates.checkpoint + to_come + rates.weights) + 2 * amounts["grid"] * rates.picture
    return Cost(by_kind, flop, memory, 1e6 * (rates.in_use or 0), disk, known)


def amounts_of(schedule: Schedule, run: Run, tested: int, known: float, phases: Mapping[str, Rate]) -> dict[str, float]:
    """How many steps of each phase a training takes.

    tested: images of an evaluation. known: share of the views whose outputs are cached.
    """
    epochs, work = schedule.epochs, schedule.work_until(schedule.epochs)
    batches = {name: tested / phases[name].images for name in ("evaluation", "teacher") if name in phases}
    return {
        "warmup": work["warmup"] * (schedule.round_steps(True) or 1),
        "synthesis": work["synthesis"] * (schedule.round_steps(False) or 1),
        "student": work["student"],
        "views": -known * work["student"],
        "evaluation": work["evaluation"] * batches.get("evaluation", 0),
        "teacher": batches.get("teacher", 0),
        "ranges": work["ranges"],
        "closing": work["closing"],
        "grid": -(-epochs // run.grid_every) + ((epochs - 1) % run.grid_every > 0),
    }


def known_views(session: Session, training: Training, views: int) -> float:
    """The share of the ``views`` of a student step whose outputs the view cache will know."""
    cache, source, schedule = training.learner.cache, training.source, training.schedule
    pool, count, made = getattr(source, "pool", None), session.augment.count, 0
    assert cache and isinstance(pool, ImagePool)
    capacity = pool.capacity
    if isinstance(source, RoundSynthesis):  # whose pool is as large as the schedule wants
        capacity = pool.start + pool_capacity(session.config, schedule)
        made = session.config.synthesis.synthesis_batch_size * source.traits.synthesises
    places = cache.places_for(capacity * count)
    new = expected_new_views(schedule, views, made, capacity, count, places, pool.start)
    return 1 - new / max(schedule.total_student_steps * views, 1)


def _bytes_of_pool(pool: ImagePool) -> tuple[int, int]:
    """Bytes of the images that are still to come into the pool, and of all that it holds then."""
    of_one = pool.images[:1].nbytes + pool.targets[:1].nbytes
    return (pool.capacity - len(pool)) * of_one, pool.capacity * of_one


def free_disk(folder: str | Path) -> int:
    """Bytes that are free where ``folder`` is, or will be."""
    place = Path(folder).absolute()
    while not os.path.exists(place):  # a Path raises an error for a name that is too long
        place = place.parent
    return shutil.disk_usage(place).free
