"""The source of images that the options name, and the images that its pool begins with."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from datafree.datasets.given import find_images
from datafree.datasets.loading import folder_of
from datafree.determinism import require_deterministic
from datafree.errors import InputError, OptionError
from datafree.network import Network
from datafree.plugins import construct, digest, is_custom
from datafree.pool import ImagePool
from datafree.synthesis import SOURCES, traits_of
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.controls import RealSource
from datafree.synthesis.optimised import RoundSynthesis

if TYPE_CHECKING:
    from datafree.session import Session

PREDICTED_AT_ONCE = 256  # images


def build_source(session: "Session", teacher: Network, student: Network) -> BaseSynthesis:
    """The source called ``synthesis.source``; of a student with more classes than the teacher it uses the first ones.

    Raises InputError for a user-defined source that cannot be constructed, and for options that it cannot honour.
    """
    name = session.config.synthesis.source
    if session.config.synthesis.cr:
        require_deterministic(["grid_sample"], "--cr", session.device)
    if traits_of(name).synthesises:
        require_deterministic(teacher.trial.nondeterministic, f"the {teacher.name}", session.device)
    if student.num_classes > teacher.num_classes:
        student = student.restricted_to(range(teacher.num_classes))
    parts = {
        "teacher": teacher,
        "student": student,
        "augment": session.augment,
        "card": session.card,
        "config": session.config,
        "device": session.device,
    }
    if name == "real":
        return RealSource(session.split("train"))
    source = construct(name, {name: source.path for name, source in SOURCES.items()}, BaseSynthesis, **parts)
    if is_custom(name):  # whose constructor may not have called that of its base class
        vars(source).update({**parts, **vars(source), "traits": traits_of(name), "card": session.card})
    if type(source).sample is BaseSynthesis.sample:
        raise InputError(f"{type(source).__name__} has no method sample(n); it must return n images and their classes")
    options = session.config.schedule
    asks = options.round_batches > 1 or options.warmup_batches
    if asks and is_custom(name) and not isinstance(source, RoundSynthesis):
        raise InputError(f"{name} is no RoundSynthesis, which alone reads --round_batches and --warmup_batches")
    if session.config.synthesis.class_embeddings:
        session.digests["class_embeddings"] = digest(vars(source)["embeddings"].cpu().numpy().tobytes())
    if session.config.synthesis.pool_images:
        begin_with_images(session, teacher, source)
    elif name == "folder":
        raise OptionError("--source folder needs --pool_images FOLDER, whose images are all that the student sees")
    return source


def begin_with_images(session: "Session", teacher: Network, source: BaseSynthesis) -> None:
    """Put the images of ``pool_images`` into the source's pool, and note what they are.

    Their classes are those of their folders or their pool, or else the teacher's predictions.
    """
    folder, pool = session.config.synthesis.pool_images, getattr(source, "pool", None)
    if not isinstance(pool, ImagePool):
        raise InputError(f"{type(source).__name__} keeps no ImagePool called pool for --pool_images; remove it")
    found = find_images(folder, session.card, folder_of(session.card.name, session.data.data_root))

    def read() -> tuple[Tensor, Tensor]:
        images = found.read()
        labels = predictions(teacher, images) if found.labels is None else found.labels
        parts = [images, *([] if found.labels is None else [found.labels])]
        session.digests["pool_images"] = digest(*(part.numpy().tobytes() for part in parts))
        return images.to(pool.device), labels.to(pool.device)

    pool.begin_with(found.count, read)
    classes = f"what the {teacher.name} predicts" if found.labels is None else "stated there"
    session.notes += [
        f"The pool begins with {found.count:,} images of {folder}, which stay in it; their classes are {classes}. "
        "Whether the run is data-free depends on what they are.",
        *found.notes,
    ]


@torch.no_grad()
def predictions(teacher: Network, images: Tensor) -> Tensor:
    """The teacher's class (N,) of each of the images, bytes (N, C, H, W)."""
    parts = images.split(PREDICTED_AT_ONCE)
    return torch.cat([teacher(part.to(teacher.device).float() / 255).argmax(1) for part in parts])
