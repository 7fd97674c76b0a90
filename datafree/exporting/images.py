"""Images to compare an exported network on: the test set, those of its run, or noise."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datafree import checkpoint
from datafree.checkpoint import LAST
from datafree.datasets.loading import load_split
from datafree.datasets.splits import Split
from datafree.errors import InputError
from datafree.exporting.subject import Subject
from datafree.exporting.tracing import exact
from datafree.models.generator import Generator
from datafree.plugins import first_line
from datafree.runtime import same_rng
from datafree.synthesis.controls import NoiseSource

MOST_BYTES = 2**28  # of the test images, as floats, whose logits are compared; top-1 is that of all of them
OF_A_RUN, PIXELS = 2048, 2048 * 32 * 32  # images of a pool or a generator at most, and their pixels, of BATCH at least
BATCH = 64  # of a generator, whose BatchNorm layers see a whole batch; and images of noise


class Sample(NamedTuple):
    """Images (N, C, H, W) in [0, 1] such as bytes can hold, what they are, and the test set if they are of it."""

    images: Tensor
    words: str
    split: Split | None = None


def sample_images(subject: Subject, kind: str, data_root: str) -> Sample:
    """Images of ``kind``: test, pool or noise; auto: of the first of these that there are. Raises InputError."""
    if kind == "noise":
        return _noise(subject)
    if kind == "pool":
        return images_of_run(subject)
    try:
        return _test_images(subject, data_root)
    except InputError as error:
        if kind == "test":
            raise
        subject.notes.append(f"The test set is not used, because it cannot be read: {error}.")
    try:
        return images_of_run(subject)
    except InputError as error:
        subject.notes.append(f"Images of the run are not used: {error}.")
        return _noise(subject)


def images_of_run(subject: Subject) -> Sample:
    """Synthetic images of the run that trained the network: of its pool, or new ones of its generator.

    Raises InputError for a file of weights outside a run, and for a run that keeps neither.
    """
    folder = subject.file.parent
    tasks = sorted(folder.parent.glob(f"task_*/*/{LAST}")) if folder.name == "checkpoints" else []
    found = [path for path in (folder / LAST, *tasks) if path.is_file()]
    if not found:
        raise InputError(f"{subject.file} is in no run, whose {LAST} would have images beside it")
    source = checkpoint.load(found[-1]).get("source")
    if not isinstance(source, dict) or not source.keys() & {"pool", "generator"}:
        raise InputError(f"{found[-1]} has neither a pool of images nor a generator, as its source keeps none")
    most = max(BATCH, min(OF_A_RUN, PIXELS // (subject.card.height * subject.card.width)))
    try:
        images = _pooled(source["pool"]["images"], most) if "pool" in source else _generated(source, subject, most)
    except Exception as error:  # of arbitrary contents
        raise InputError(
            f"the images of {found[-1]} cannot be had ({first_line(error)}); is it of this run?"
        ) from error
    if images.shape[1:] != subject.card.shape or not len(images):
        raise InputError(f"the images of {found[-1]} are {tuple(images.shape)}, not (N, ...) of {subject.card.shape}")
    where = "the run's pool" if "pool" in source else "the run's generator, made now"
    return Sample(exact(images), f"{len(images):,} images of {where}")


def _pooled(images: Tensor, most: int) -> Tensor:
    """Evenly spaced in the pool, whose images are in the order of their age, and in each round of their classes."""
    chosen = torch.linspace(0, len(images) - 1, min(len(images), most)).long()
    return images[chosen].float() / 255


@torch.no_grad()
def _generated(source: dict[str, Any], subject: Subject, count: int) -> Tensor:
    generator = Generator.from_state(source["generator"], subject.card.shape)
    latents = generator.project.in_features
    with same_rng():
        torch.manual_seed(0)
        z = torch.randn(count, latents)
        if "embedding" in source:
            classes = source["embedding"]["weight"]
            z = z * classes[torch.randint(len(classes), (count,))]
    return torch.cat([generator(part) for part in z.split(BATCH)])


def _noise(subject: Subject) -> Sample:
    with same_rng():
        torch.manual_seed(0)
        images = NoiseSource(card=subject.card).sample(BATCH).images
    return Sample(exact(images), f"{len(images):,} images of noise")


def _test_images(subject: Subject, data_root: str) -> Sample:
    split: Split = load_split(subject.card, data_root, "test", download=False)
    subject.notes += split.notes
    if subject.order != tuple(range(split.num_classes)):
        split = split.of_classes(subject.order, range(len(subject.order)), len(subject.order))
    most = max(BATCH, MOST_BYTES // (4 * prod(subject.card.shape)))
    if len(split) <= most:
        return Sample(torch.cat([images for images, _ in split.batches(BATCH)]), f"{_tested(subject, split)}", split)
    with same_rng():
        torch.manual_seed(0)
        return Sample(split.sample(most)[0], f"{most:,} of {_tested(subject, split)}, and top-1 of all", split)


def _tested(subject: Subject, split: Split) -> str:
    return f"the {len(split):,} test images of {subject.card.name}"
