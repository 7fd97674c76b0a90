"""What a run will do and what it will cost, in words: pure functions of its parts -> lines for the log."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datafree.config import DistillConfig, IncrementalConfig, QuantizeConfig, Synthesis
from datafree.datasets.cards import DatasetCard, composed
from datafree.errors import short
from datafree.learners import LearnersOfOtherOptions
from datafree.logger import table
from datafree.muon import Muon
from datafree.network import Network, shown_numbers
from datafree.plugins import is_custom
from datafree.pool import ImagePool
from datafree.quantizer import FLOAT, QuantizedModel
from datafree.relation import triplet_stages
from datafree.schedule import Schedule
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.objective import TRIPLET, SynthesisObjective
from datafree.synthesis.optimised import OptimisedSynthesis
from datafree.view_cache import ViewCache

if TYPE_CHECKING:
    from datafree.cost import Cost, Rate
    from datafree.incremental import Tasks

SHOWN = 5  # names of parameters at most in a line


def describe_distillation(
    config: DistillConfig,
    card: DatasetCard,
    tested: int,
    schedule: Schedule,
    teacher: Network,
    student: Network,
    source: BaseSynthesis,
    cache: ViewCache | None,
) -> list[str]:
    """The plan of a distillation. tested: number of test images."""
    pair = f"{config.teacher.teacher} -> {config.student.student}"
    lines = [
        f"Plan: distilling {pair} on {describe_images(card)}, {describe_test(tested)}, on {teacher.device}.",
        describe_normalisation(teacher),
        *describe_network(teacher),
        *describe_network(student),
        describe_source(config.synthesis, teacher),
        *describe_objective(source),
    ]
    if is_custom(config.distill.learner):
        lines.append(f"Learner: {config.distill.learner}.")
    lines += describe_cache(cache)
    in_pairs = config.distill.pair_sample and config.distill.learner not in LearnersOfOtherOptions()
    views = schedule.batch_size * (2 if in_pairs else 1)
    images, budget = config.synthesis.synthesis_batch_size, config.schedule.budget
    lines += describe_parts(config.run.micro_batch, "student and generator", views, images * bool(source.g_steps))
    return [*lines, describe_cost(schedule, source, views, images, budget)]


def describe_quantization(
    config: QuantizeConfig,
    card: DatasetCard,
    tested: int,
    schedule: Schedule,
    teacher: Network,
    student: Network,
    source: BaseSynthesis,
    cache: ViewCache | None,
) -> list[str]:
    """The plan of a quantization. tested: number of test images."""
    assert isinstance(student.model, QuantizedModel)
    images, budget = config.synthesis.synthesis_batch_size, config.schedule.budget
    return [
        f"Plan: quantising {config.teacher.teacher} on {describe_images(card)}, {describe_test(tested)}, "
        f"on {teacher.device}.",
        f"Protocol: {config.quantizer.sentence}.",
        *describe_grids(student.model),
        describe_normalisation(teacher),
        *describe_network(teacher),
        describe_source(config.synthesis, teacher),
        *describe_objective(source),
        *describe_cache(cache),
        f"Ranges are observed on {_count(config.quantizer.calibration, 'batch')} of {schedule.batch_size} images after "
        + (f"each of {_count(schedule.warmup, 'epoch')} of warm-up." if not budget else "each epoch of warm-up."),
        *(["Nothing is trained."] if schedule.epochs == schedule.warmup else []),
        *describe_parts(config.run.micro_batch, "a generator", schedule.batch_size, images * bool(source.g_steps)),
        describe_cost(schedule, source, schedule.batch_size, images, budget),
    ]


def describe_quantized(network: Network) -> dict[str, str]:
    """What stands beside every result of a quantised network: its protocol and its size."""
    model = network.model
    assert isinstance(model, QuantizedModel)
    packed, floating = model.packed_bytes / 1e3, 4 * model.sites.of / 1e3
    return {
        "protocol": model.protocol.sentence,
        "size": f"{packed:,.0f} kB if its weights were packed (computed), {floating:,.0f} kB in float32",
    }


def describe_grids(model: QuantizedModel) -> list[str]:
    """What is rounded, what is folded if that is asked for, and what stays in float."""
    sites = model.sites
    pairs = zip(sites.layers, model.weights)
    numbers = [layer.numbers for layer, grid in pairs if grid.bits < FLOAT and not layer.is_again]
    activations = sum(grid.bits < FLOAT for grid in model.activations)
    lines = [
        f"On the grid: the weights of {_count(len(numbers), 'layer')} ({sum(numbers) / sites.of:.1%} of all "
        f"parameters), and {_count(activations, 'activation')}."
    ]
    free = [layer.name for layer in sites.layers[1:] if layer.in_float] if activations else []
    if free:
        others = f" and {len(free) - SHOWN} more" * (len(free) > SHOWN)
        lines.append(
            f"The inputs of {_count(len(free), 'layer')} after the first stay in float, because no activation function "
            f"comes right before: {', '.join(free[:SHOWN])}{others}."
        )
    if model.protocol.first_last_bits is not None:
        outer = f"{sites.layers[0].name} and {sites.layers[sites.last].name}"
        lines.append(f"First and last layer, in {model.protocol.first_last_bits} bits: {outer}.")
    if model.protocol.fold_bn:
        folded = sum(bool(layer.norm) for layer in sites.layers)
        lines.append(f"BatchNorm is folded into {folded} of {_count(len(sites.layers), 'call')} of layers.")
    if sites.in_float:
        first, more = sites.in_float[:SHOWN], len(sites.in_float) - SHOWN
        lines.append(
            f"In float remain {', '.join(first)}{f' and {more} more' * (more > 0)}, which no call of a convolution or "
            "linear layer has as its weight."
        )
    return lines


def describe_cache(cache: ViewCache | None) -> list[str]:
    """The size of the view cache, if there is one."""
    if not cache:
        return []
    megabytes = len(cache) * cache.bytes_per_view / 1e6
    return [f"View cache: {len(cache):,} of {cache.possible:,} views, at most {megabytes:.0f} MB."]


def describe_parts(micro_batch: int, trained: str, *batches: int) -> list[str]:
    """How steps on batches of these sizes are computed in parts, if they are to be; see ``--micro_batch``.

    trained: what may have BatchNorm in training mode.
    """
    if not micro_batch:
        return []
    counts = {size: -(-size // micro_batch) for size in batches if size > micro_batch}
    if not counts:
        return [f"[Alarm] --micro_batch {micro_batch} makes no difference to a step, none of which has more images."]
    parts = " and ".join(f"of {size} images in {count} parts" for size, count in counts.items())
    return [
        f"Steps {parts}, of at most {micro_batch} images at once. Every term of the losses sees the whole batch, L_bn "
        f"included; BatchNorm in training mode (of {trained}) normalises by its part."
    ]


def describe_training(
    model: str, card: DatasetCard, images: int, tested: int, schedule: Schedule, network: Network, budget: str | None
) -> list[str]:
    """The plan of supervised training. images, tested: number of training and of test images. budget: its --budget."""
    length = f"for {budget}, in epochs" if budget else _count(schedule.epochs, "epoch")
    return [
        f"Plan: training {model} on {images:,} images of {describe_images(card)}, {describe_test(tested)}, "
        f"on {network.device}: "
        f"{length} of {schedule.kd_steps} steps of {schedule.batch_size} images.",
        *describe_network(network),
        *describe_parts(network.micro_batch, "the network", schedule.batch_size),
    ]


def describe_optimizer(optimizer: object) -> list[str]:
    """What Muon steps, if it is the optimiser."""
    if not isinstance(optimizer, Muon):
        return []
    if not (count := len(optimizer.filters)):
        return ["Muon finds no filters of convolutions to step here: SGD trains everything."]
    return [f"Muon steps the filters of {_count(count, 'convolution')}; SGD trains everything else."]


def describe_task(
    task: int,
    tasks: "Tasks",
    config: IncrementalConfig,
    card: DatasetCard,
    images: int,
    schedule: Schedule,
    network: Network,
    source: BaseSynthesis,
    views: int,
) -> list[str]:
    """The plan of a task of incremental learning. images: real ones that it is trained on. views: of a step."""
    options, count = config.incremental, len(tasks.outputs(task))
    old, joint = tasks.outputs(task).start, options.learner == "joint"
    lines = [
        f"Plan: task {task + 1} of {len(tasks)} on {describe_images(card)}, on {network.device}: {count} classes "
        f"({tasks.named(task)}) from {images:,} images" + f", beside {old} old ones" * (old > 0) + ".",
        *(describe_network(network) if task == 0 else []),
    ]
    if old:
        kept = (
            "images of all classes so far, as an upper bound"
            if joint
            else "no image of an earlier task is opened or kept"
        )
        lines.append(f"Learner: {options.learner}; {kept}.")
    lines += describe_objective(source)
    images = config.synthesis.synthesis_batch_size
    lines += describe_parts(config.run.micro_batch, "student and generator", views, images * bool(source.g_steps))
    return [*lines, describe_cost(schedule, source, views, images)]


def describe_images(card: DatasetCard) -> str:
    """Name, shape and classes of the images."""
    return f"{card.name}, {'x'.join(map(str, card.shape))}, {card.num_classes} classes"


def describe_test(images: int) -> str:
    """The number of test images."""
    return f"tested on {_count(images, 'image')}" if images else "without a test set"


def describe_normalisation(network: Network) -> str:
    """What its file states of the network, and its normalisation."""
    stated = [
        f"{key} {_rounded(network.metadata[key])}" for key in ("dataset", "epoch", "acc1") if key in network.metadata
    ]
    mean, std = (shown_numbers(part.flatten().tolist()) for part in (network.mean, network.std))
    about = ", ".join(stated) or "nothing else is stated with its weights"
    return f"The {network.name} ({about}) normalises images by mean {mean}, std {std}."


def describe_notes(network: Network) -> list[str]:
    """What was guessed, converted or left out when the network was built."""
    return [f"The {network.name}: {note}." for note in network.notes]


def check_order(network: Network, names: Sequence[str], where: str = "data card") -> list[str]:
    """A warning if the file of the network's weights names the classes otherwise than ``names`` in the data card."""
    stated = network.metadata.get("classes")
    pairs = zip(stated if isinstance(stated, (list, tuple)) else (), names)
    for number, (theirs, ours) in enumerate(pairs):
        if composed(str(theirs)) != ours:
            return [
                f"[Alarm] Class {number} is {short(str(theirs))} in the file of the {network.name}'s weights but "
                f"{ours} in the {where}; list `classes` in the order of the file in the card."
            ]
    return []


def describe_network(network: Network) -> list[str]:
    """Its stages, and :func:`describe_findings`."""
    tap = network.tap
    stages = [
        f"{name} ({channels}x{'x'.join(map(str, size))})"
        for name, channels, size in zip(tap.stage_names, tap.stage_channels, tap.stage_sizes)
    ]
    lines = [f"Stages of the {network.name}: {', '.join(stages)}."] if stages else []
    return lines + describe_findings(network)


def describe_findings(network: Network) -> list[str]:
    """What the trial of a network found out, and what is guessed, converted or left out."""
    lines = describe_notes(network)
    for note in [*network.trial.notes, *network.tap.notes]:
        text = note.removeprefix("[Alarm] ")
        start = "The" if text == note else "[Alarm] the"
        lines.append(f"{start} {network.name}: {text}" + "." * (text[-1] != "?"))
    return lines


def describe_objective(source: BaseSynthesis) -> list[str]:
    """The BatchNorm layers and the features that a source's objective uses; nothing if it optimises no images."""
    if not isinstance(source, OptimisedSynthesis):
        return []
    return [*describe_statistics(source.objective), *describe_triplets(source.objective)]


def describe_statistics(objective: SynthesisObjective) -> list[str]:
    """How many of the teacher's BatchNorm layers are matched, if any are."""
    tap = objective.bn_tap
    if not any(term.name == "bn" for term in objective.terms):
        return []
    return [f"BatchNorm statistics: {tap.matched} of {tap.total} layers of the {objective.teacher.name} are matched."]


def describe_source(options: Synthesis, teacher: Network) -> str:
    """Where the images come from, and whether that is data-free."""
    name, folder = options.source, options.pool_images
    kinds = {
        "noise": "Gaussian noise",
        "real": "the real training images: not data-free",
        "folder": f"those of {folder}",
    }
    start = "noise"
    if name == "noisy_layer":
        given = f"the embeddings in {options.class_embeddings}" if options.class_embeddings else "random embeddings"
        start = f"{given} of the classes, through noisy layers"
    made = f"by {name}" if is_custom(name) else f"from {start}, guided by the {teacher.name}"
    opened = f"no training image is opened, if none is in {folder}" if folder else "no training image is opened"
    return f"Images: {kinds.get(name) or f'synthesised {made}; {opened}'}."


def describe_triplets(objective: SynthesisObjective) -> list[str]:
    """The features that the triplet loss of synthesis uses, if it has a weight."""
    if not any(term.name == TRIPLET for term in objective.terms):
        return []
    network = objective.teacher if objective.triplets.triplet_target == "teacher" else objective.student
    channels, sizes = network.tap.stage_channels, network.tap.stage_sizes
    stages = [
        f"stage {i} of 0-{len(sizes) - 1} ({channels[i]}x{'x'.join(map(str, sizes[i]))})"
        for i in triplet_stages(len(sizes), objective.triplets)
    ]
    ratio = f", with {objective.triplets.triplet:g} times the gradient of the other terms" * objective.by_gradient
    return [f"Synthesis triplet loss: {network.name}, {', '.join(stages) or 'embedding'}{ratio}."]


def describe_cost(schedule: Schedule, source: BaseSynthesis, views: int, images: int, budget: str | None = None) -> str:
    """Steps and images of the whole run. views: of a student step. images: of a synthesis step. budget: --budget."""
    if budget:
        of_round = f"{describe_batches(schedule)}{source.g_steps} synthesis steps of {images} images and "
        steps = of_round * bool(source.g_steps)
        return f"Cost: {budget}, in rounds of {steps}{schedule.kd_steps} student steps of {views} views."
    cost = f"{schedule.total_student_steps:,} student steps of {views} views"
    if source.g_steps:
        rounds = f"{_count(schedule.total_synthesis_rounds, 'round')} of {describe_batches(schedule)}"
        cost = f"{rounds}{source.g_steps} synthesis steps, and {cost}"
    pool = getattr(source, "pool", None)
    if isinstance(pool, ImagePool):
        made, kept, megabytes = schedule.total_batches * images, pool.capacity - pool.start, pool.images.nbytes / 1e6
        given = f" beside {pool.start:,} given ones" * (pool.start > 0)
        images_of = (
            f"{made:,} images, {kept:,} of them kept in the pool{given}" if kept else f"{len(pool):,} given images"
        )
        cost += f"; {images_of} ({megabytes:.0f} MB)"
    return f"Cost: {cost}."


def describe_length(schedule: Schedule) -> str:
    """How long the run of a schedule with another length than its recipe's is."""
    numbers, rounds = length_numbers(schedule), schedule.total_synthesis_rounds
    warm = f", of which {schedule.warmup} warm-up" * bool(schedule.warmup)
    steps = _count(numbers["student_steps"], "student step")
    if schedule.g_steps:
        steps = (
            f"{_count(rounds, 'round')} of {describe_batches(schedule)}{schedule.g_steps} synthesis steps and {steps}"
        )
    return f"{numbers['epochs']:g} epochs{warm}, with {steps}"


def length_numbers(schedule: Schedule) -> dict[str, Any]:
    """Epochs of that schedule, of which the last one may be a fraction, and its student steps."""
    epochs = schedule.steps / (schedule.rounds * schedule.kd_steps)
    return {"epochs": round(epochs, 2), "student_steps": schedule.total_student_steps}


def describe_batches(schedule: Schedule) -> str:
    """How many batches of steps a round of synthesis has; nothing if that is one."""
    after, warm = schedule.batches, schedule.warmup_batches
    if after == warm == 1:
        return ""
    return f"{_count(after, 'batch')}" + f" ({warm} in the warm-up)" * (warm != after) + " of "


PHASES = {  # of datafree.cost.Rates, in the order in which they are shown
    "warmup": "synthesis, warm-up",
    "synthesis": "synthesis",
    "student": "student",
    "views": "- of it: new views",  # what the view cache saves where it knows them
    "evaluation": "evaluation",
    "teacher": "- of the teacher",
    "ranges": "observing ranges",
    "closing": "end of an epoch",
    "grid": "image grid",
}


def describe_rates(phases: "Mapping[str, Rate]") -> list[str]:
    """A table of what a step of each phase takes on this machine."""
    rows = [
        {
            "a step of": PHASES[name],
            "takes": duration(rate.seconds),
            "peak": magnitude(1e6 * rate.peak, "B") if rate.peak else None,
            "FLOP": magnitude(rate.flop, "") if rate.flop else None,
            "of images": rate.images,
            "measured on": rate.measured,
        }
        for name, rate in ((name, phases[name]) for name in PHASES if name in phases)
    ]
    return ["Measured here:", *table(rows).splitlines()]


def describe_costs(
    costs: "Sequence[Cost]", free: float, folder: str, free_on_disk: float, options: Collection[str]
) -> list[str]:
    """What all trainings of a run take together, with an alarm if it does not fit.

    free, free_on_disk: bytes. options: those that the program has.
    """
    by_kind = {kind: sum(cost.seconds[kind] for cost in costs) for kind in costs[0].seconds}
    shares = ", ".join(f"{kind} {duration(seconds)}" for kind, seconds in by_kind.items() if seconds)
    known, flop = max(cost.known for cost in costs), sum(cost.flop for cost in costs)
    lines = [
        f"Time: about {duration(sum(by_kind.values()))} at this rate ({shares}), and {magnitude(flop, 'FLOP')}"
        + f"; the view cache knows {known:.0%} of the views" * (known > 0)
        + "."
    ]
    peaks = [(cost.memory, cost.in_use) for cost in costs if cost.memory is not None]
    if peaks:
        most, in_use = max(peaks)
        lines.append(
            f"Memory: about {magnitude(most, 'B')} at most, of which {magnitude(in_use, 'B')} are in use now; "
            f"{magnitude(free, 'B')} are free."
        )
        if most - in_use > free:
            sizes = [f"--{o}" for o in ("synthesis_batch_size", "pool_size", "batch_size") if o in options]
            lines.append(
                "[Alarm] The memory does not suffice; compute steps in (smaller) parts by --micro_batch, or lower "
                f"{' or '.join(sizes)}."
            )
    else:
        lines.append("Memory: not known, because it can be measured on Linux and on a GPU alone.")
    disk = sum(cost.disk for cost in costs)
    lines.append(f"Disk: up to {magnitude(disk, 'B')} in {folder}; {magnitude(free_on_disk, 'B')} are free.")
    if disk > free_on_disk:
        lines.append("[Alarm] The disk does not suffice; make room, or give another --save_dir.")
    return lines


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader expects."""
    for unit, size in (("days", 172_800), ("hours", 7200), ("minutes", 120)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'hours': 3600, 'minutes': 60}[unit]:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def magnitude(number: float, unit: str) -> str:
    """A number with a decimal prefix: 1.24 GB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            break
        number /= 1000
    else:
        prefix = "E"
    return f"{number:,.3g} {prefix}{unit}"


def check_teacher(accuracy: float, expected: float, num_classes: int) -> list[str]:
    """A warning if the teacher's test accuracy (%) is below what is expected, or near chance.

    Near is less than a tenth of the way from chance to 100 %.
    """
    if accuracy >= max(expected - 1, least_useful(num_classes)):
        return []
    wanted = f"{expected:g} % was expected" if accuracy < expected - 1 else f"chance is {100 / num_classes:.2f} %"
    return [
        f"[Alarm] the teacher reaches only {accuracy:.2f} % ({wanted}); check --teacher_weights, --teacher_mean, "
        "--teacher_std and the order of the classes (`classes` in the data card), because a student is no better than "
        "its teacher"
    ]


def least_useful(num_classes: int) -> float:
    """An accuracy (%) below which a network is near chance: a tenth of the way from there to 100 %."""
    chance = 100 / num_classes
    return chance + 0.1 * (100 - chance)


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("tch") else "s"
    return f"{number:,} {noun}{plural * (number != 1)}"


def _rounded(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else short(str(value))
