"""What :mod:`datafree.doctor` looks at before a long run: one finding for each thing that could be wrong."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from datafree import criterions
from datafree.augment import CropFlip
from datafree.batchnorm import BatchNormTap, running_statistics
from datafree.config import DistillConfig, ScheduleOptions, Synthesis
from datafree.cost import Cost, Rate, describe, forecasts
from datafree.datasets.cards import IMAGENET_MEAN, IMAGENET_STD, DatasetCard
from datafree.datasets.splits import Split, StandIn
from datafree.diagnostics import alarms
from datafree.diagnostics import describe as describe_images
from datafree.network import Network, shown_numbers
from datafree.plan import check_teacher, least_useful
from datafree.session import Session
from datafree.synthesis.inversion import PixelSynthesis
from datafree.training import Training

SECONDS = 10  # that the test of a teacher takes
IMAGES = 64  # on which normalisations are compared
INVERTED, STEPS = 32, 20  # images that stand in for a test set, and the steps in which they are optimised
COMMON = ((0.5, 0.5), (0.0, 1.0))  # mean and std that many networks are trained with
NEAR = 0.1  # distance of BatchNorm statistics, in nats, below which there is nothing to mend


class Finding(NamedTuple):
    """grade: ok, warning or fault. about: a word or two. text: what was found, and the remedy."""

    grade: str
    about: str
    text: str


def findings(session: Session, trainings: Iterable[Training]) -> Iterator[Finding]:
    """Check a run that is not made; its trainings are measured, and of no use afterwards."""
    costs, told = list[Cost](), set[str]()
    for training, rates, cost in forecasts(session, trainings):
        if not costs:
            yield from _files(session)
            if training.teacher:
                yield from teacher_findings(session, training.teacher, rates.phases.get("teacher") if rates else None)
            yield _features(training.learner.network)
        for line in (*training.plan, *session.notes):
            if line.startswith("[Alarm] ") and line not in told:
                told.add(line)
                yield Finding("warning", "plan", line.removeprefix("[Alarm] "))
        costs.append(cost)
    for line in describe(session, costs):
        about, _, text = line.partition(": ")
        alarm = line.startswith("[Alarm] ")
        yield Finding("fault", "cost", line.removeprefix("[Alarm] ")) if alarm else Finding("ok", about.lower(), text)


def _files(session: Session) -> Iterator[Finding]:
    """What is missing, and what is to be known of the images."""
    for error in session.missing:
        yield Finding("fault", "files", f"{error}.")
    for note in session.notes:
        if not note.startswith("[Alarm] "):
            yield Finding("ok", "files", note)
    for line in session.to_download:
        yield Finding("warning", "files", f"{line.removesuffix('.')}, which needs a network; or give --data_root.")
    if not session.missing and not session.to_download:
        yield Finding("ok", "files", "all weights and images that the run needs are here.")


def _features(network: Network) -> Finding:
    """The classes, the embedding and the stages that were found."""
    tap = network.tap
    stages = ", ".join(
        f"{name} {c}x{'x'.join(map(str, s))}"
        for name, c, s in zip(tap.stage_names, tap.stage_channels, tap.stage_sizes)
    )
    found = f"{network.num_classes} classes, an embedding of {tap.embed_dim}, stages {stages or 'none'}"
    if tap.head is None:
        return Finding(
            "warning",
            network.name,
            f"{found}; no layer was found whose output is the logits, so the embedding is the last stage, pooled; end "
            "the network with one nn.Linear if that is not what it is.",
        )
    return Finding("ok", network.name, f"{found}.")


def teacher_findings(session: Session, teacher: Network, rate: Rate | None) -> Iterator[Finding]:
    """Its features, its accuracy or what stands in for it, its BatchNorm layers, its normalisation.

    rate: of its evaluation, if there are test images.
    """
    yield _features(teacher)
    if "teacher_weights" not in session.digests:
        return  # they are missing, which was said
    test = session.test if rate and not isinstance(session.test, StandIn) else None
    if test and rate:
        affordable = int(SECONDS / rate.seconds * rate.images)
        yield _accuracy(session, teacher, test.some(max(affordable, rate.images)), whole=len(test))
    else:
        yield _confidence(session, teacher)
    yield _batch_norm([found for module in teacher.modules() if (found := running_statistics(module)) is not None])
    yield _normalisation(session, teacher, test.some(IMAGES) if test else None)


def _accuracy(session: Session, teacher: Network, test: Split, whole: int) -> Finding:
    scores = session.score(teacher, test=test)
    assert scores
    accuracy, stated = scores["acc1"], teacher.metadata.get("acc1")
    expected = max(session.config.teacher.teacher_acc, stated if isinstance(stated, float) else 0.0)
    # A part of the test set is off by two standard deviations, now and then.
    margin = 2 * math.sqrt(accuracy * (100 - accuracy) / len(test)) if len(test) < whole else 0.0
    tried = f"on {len(test):,} of {whole:,} test images"
    for alarm in check_teacher(accuracy, round(expected - margin, 2), session.card.num_classes):
        grade = "fault" if accuracy < least_useful(session.card.num_classes) else "warning"
        return Finding(grade, "teacher", f"{tried} {alarm.removeprefix('[Alarm] ')}.")
    return Finding("ok", "teacher", f"{accuracy:.2f} % {tried}.")


def _confidence(session: Session, teacher: Network) -> Finding:
    """What the teacher says of images that are optimised for it, which tells whether it can be inverted at all."""
    has_statistics = any(running_statistics(module) is not None for module in teacher.modules())
    config = DistillConfig(
        schedule=ScheduleOptions(epochs=1, ep_steps=1, kd_steps=1, g_steps=STEPS),
        synthesis=Synthesis("pixels", synthesis_batch_size=INVERTED, lr_g=0.1, oh=1.0, bn=0.1 * has_statistics),
    )
    source = PixelSynthesis(teacher, teacher, CropFlip(0, False), session.card, config, session.device)
    source.round(0, with_student=False)
    seen = describe_images(*source.latest(), teacher, teacher)
    found = (
        f"without a test set its accuracy is not known; of {INVERTED} images that were optimised for it in {STEPS} "
        f"steps it predicts the target class for {seen['target_agreement']:.0%}, with a confidence of "
        f"{seen['teacher_confidence']:.0%} and a balance of the classes of {seen['label_entropy']:.2f} (at most 1)"
    )
    if worry := alarms(seen, seen, adversarial=False):
        observed = worry[0].partition(";")[0]  # the remedy is for a run
        return Finding("warning", "teacher", f"{found}; {observed}; check its weights.")
    return Finding("ok", "teacher", f"{found}.")


def _batch_norm(running: list[tuple[Tensor, Tensor]]) -> Finding:
    if not running:
        return Finding("ok", "BatchNorm", "there is none, so that --bn has to be 0.")
    untouched = sum(bool((mean == 0).all() and (variance == 1).all()) for mean, variance in running)
    found = f"{len(running)} layers with running statistics"
    if untouched == len(running):
        return Finding(
            "fault",
            "BatchNorm",
            f"{found}, all of which are as before any training (mean 0, variance 1); give the weights of a trained "
            "network, with its buffers.",
        )
    if untouched:
        return Finding(
            "warning",
            "BatchNorm",
            f"{found}, {untouched} of which are as before any training (mean 0, variance 1); check that its file has "
            "all of its buffers.",
        )
    return Finding("ok", "BatchNorm", f"{found}.")


def _normalisation(session: Session, teacher: Network, images: Split | None) -> Finding:
    """Which normalisation gives the first BatchNorm layer the statistics that it has seen in training.

    Images that are optimised for the teacher could not tell, because they are made to have these statistics, whatever
    the normalisation; random ones with the mean and std of the training images can.
    """
    card = session.card
    if images:
        batch, rests_on = next(images.batches(IMAGES))[0], f"{len(images)} test images"
    else:
        batch = natural_images(card, IMAGES).to(session.device)
        rests_on = "random images with the mean and std that the data card states, so it is no better than these"
    used = single(teacher.mean.flatten()), single(teacher.std.flatten())
    others = [(card.mean, card.std), *(((m,) * card.channels, (s,) * card.channels) for m, s in COMMON)]
    others += [(IMAGENET_MEAN, IMAGENET_STD)] * (card.channels == 3)
    candidates = list(dict.fromkeys([used, *((single(mean), single(std)) for mean, std in others)]))
    known = {candidate: first_layer_distance(teacher, batch, *candidate) for candidate in candidates}
    distances = {candidate: distance for candidate, distance in known.items() if distance is not None}
    if not distances:
        return Finding("ok", "normalisation", "not checked, because no BatchNorm layer was called.")
    best = min(distances, key=lambda candidate: distances[candidate])
    text = {c: f"mean {shown_numbers(c[0])} std {shown_numbers(c[1])}" for c in candidates}
    found = (
        f"distance of the first BatchNorm layer's statistics {distances[used]:.3f} with {text[used]}, as used; "
        + ", ".join(f"{d:.3f} with {text[c]}" for c, d in distances.items() if c != used)
        + f" (on {rests_on})"
    )
    if distances[used] > max(2 * distances[best], NEAR):
        mean, std = map(shown_numbers, best)
        return Finding(
            "fault" if images else "warning",
            "normalisation",
            f"{found}; if it was trained with the nearest, give --teacher_mean {mean} --teacher_std {std}.",
        )
    return Finding("ok", "normalisation", f"{found}.")


def single(values: Tensor | Sequence[float]) -> tuple[float, ...]:
    """Numbers as they are in single precision."""
    return tuple(torch.as_tensor(values, dtype=torch.float32).tolist())


@torch.no_grad()
def first_layer_distance(
    teacher: Network, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> float | None:
    """Mean KL divergence (nats) of the inputs of the first BatchNorm layer from its running statistics, as Gaussians.

    images: (N, C, H, W) in [0, 1]. mean, std: with which they are normalised. None if no such layer is called.
    """
    other = teacher.copy()
    for buffer, values in ((other.mean, mean), (other.std, std)):
        buffer.copy_(torch.tensor(values).view_as(buffer))
    tap = BatchNormTap(other)
    with tap:
        other(images)
    return criterions.bn_distance(tap.statistics[:1], "gaussian").item() if tap.statistics else None


def natural_images(card: DatasetCard, count: int) -> Tensor:
    """Random images (count, C, H, W) with the card's mean and std and an amplitude of 1/f, as natural ones have."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.fft.fftfreq(size) for size in card.shape[1:])
    frequency = (rows[:, None] ** 2 + columns**2).sqrt().clamp_min(1 / max(card.shape[1:]))
    noise = torch.randn(count, 1 + card.channels, *card.shape[1:], generator=generator)
    fields = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real
    images = fields[:, :1] + 0.3 * fields[:, 1:]  # most of what they show is in all channels
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (card.mean, card.std))
    return (images * std + mean).clamp(0, 1)
