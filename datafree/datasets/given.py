"""Images that a user gives in place of a data set: the files of any folder, or the pool of an earlier run."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datafree import checkpoint
from datafree.datasets.cards import DatasetCard, composed, names_of
from datafree.datasets.folders import MODES, SPLIT_FOLDERS, decode, images_in, listed
from datafree.errors import InputError

CHECKPOINT = Path("checkpoints") / checkpoint.LAST  # in the folder of a run


@dataclass
class GivenImages:
    """Images that are not read yet.

    read: () -> uint8 images (count, C, H, W). labels: their classes (count,), None if they are not known. notes:
    sentences for the log, complete once the images are read.
    """

    count: int
    read: Callable[[], Tensor]
    labels: Tensor | None
    notes: list[str]


def find_images(
    folder: str | Path, card: DatasetCard, data_set: Path | None, option: str = "--pool_images"
) -> GivenImages:
    """The images in ``folder``, for networks of the card's images.

    data_set: the folder of the card's data set, if there is one, whose splits are refused. option: named by the errors.
    Raises InputError for a folder that is not there, has no images, or images that cannot be those of the card.
    """
    place = Path(folder)
    if not os.path.isdir(place):
        raise InputError(f"{option} {folder}: there is no such folder; check the path")
    if os.path.isfile(place / CHECKPOINT):
        return _pool_of(place / CHECKPOINT, card, option)
    for name in (name for names in SPLIT_FOLDERS.values() for name in names):
        if data_set and overlap(place, data_set / name):
            raise InputError(
                f"{option} {folder} has images of the data set {card.name} itself ({data_set / name}); give "
                "others (--method real trains on these)"
            )
    if card.channels not in MODES:
        raise InputError(f"image files have 1 or 3 channels but the data card {card.name} states {card.channels}")
    paths, others = images_in(place)
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common())
    if not paths:
        raise InputError(f"{option} {folder} holds no images" + f" (not read: {left_out})" * bool(left_out))
    labels, notes = _labels_of(paths, place, card)
    notes += [f"Not read in {folder}: {left_out}."] * bool(left_out)

    def read() -> Tensor:
        images, conversions = decode(paths, card.shape)
        notes.extend(conversions)
        return images

    return GivenImages(len(paths), read, labels, notes)


def overlap(one: Path, other: Path) -> bool:
    """Whether one of two folders is within the other one."""
    if not other.is_dir():
        return False
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def _labels_of(paths: list[str], place: Path, card: DatasetCard) -> tuple[Tensor | None, list[str]]:
    """Classes (N,) by the names of the folders that the images are in; None, and a note, if not all are classes."""
    parts = [Path(path).relative_to(place).parts for path in paths]
    folders = [composed(part[0]) if len(part) > 1 else "" for part in parts]
    names = names_of(card)
    unknown = sorted({name for name in folders if name not in names})
    if not unknown:
        return torch.tensor([names.index(name) for name in folders]), []
    if not any(folders):
        return None, []
    others = listed([name or "(no folder)" for name in unknown])
    return None, [f"The folders of {place} are not taken for classes, because these are none: {others}."]


def _pool_of(path: Path, card: DatasetCard, option: str) -> GivenImages:
    """The images in the pool of a run's checkpoint, with their target classes."""
    source = checkpoint.load(path).get("source")
    pool = source.get("pool") if isinstance(source, dict) else None
    if pool is None:
        raise InputError(f"{option}: {path} has no pool of images, as the source of its run keeps none")
    images, targets = (pool.get(name) if isinstance(pool, dict) else None for name in ("images", "targets"))
    if not (torch.is_tensor(images) and torch.is_tensor(targets)) or checkpoint.has_odd_tensors(pool):
        raise InputError(f"{option}: the pool in {path} is damaged; copy the run again")
    if images.dtype != torch.uint8 or images.shape[1:] != card.shape or targets.shape != images.shape[:1]:
        raise InputError(
            f"{option}: the pool in {path} has images {tuple(images.shape[1:])} of {images.dtype}, where {card.name} "
            f"has bytes of shape {card.shape}; give the run of the same data set"
        )
    if len(images) == 0 or targets.dtype != torch.long or not ((targets >= 0) & (targets < card.num_classes)).all():
        raise InputError(f"{option}: the pool in {path} is empty, or has other classes than {card.name}")
    return GivenImages(len(images), lambda: images, targets, [])
