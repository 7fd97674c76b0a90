"""Finds a data set's card and images: class folders, torchvision's files, the digits that ship here."""

import os
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datafree import distributed
from datafree.datasets.cards import CARDS, SMALLEST_STD, DatasetCard, composed
from datafree.datasets.digits import read_digits
from datafree.datasets.folders import (
    MODES,
    SPLIT_FOLDERS,
    WITHOUT,
    changes_in,
    class_folders,
    decode,
    evenly_spaced,
    histograms,
    list_images,
    listed,
    survey,
)
from datafree.datasets.splits import LazySplit, StandIn, TensorSplit, chosen_images
from datafree.datasets.torchvision_files import TORCHVISION, Missing, read_torchvision, split_files
from datafree.errors import InputError, MissingError, OptionError, printable
from datafree.launch import command
from datafree.plugins import FAILURES, first_line, load_custom
from datafree.screen import show
from datafree.untrusted import is_name

OTHER_FOLDER_NAMES = {"tiny_imagenet": "tiny-imagenet-200"}
LARGE_IMAGE = 128 * 128  # pixels
LARGE_SPLIT = 4 * 2**30  # bytes
CARD_FILE = "card.yaml"
PUBLISHED = {  # training and test images of the registered data sets
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "svhn": (73_257, 26_032),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tiny_imagenet": (100_000, 10_000),
    "imagenet": (1_281_167, 50_000),
}
ASSUMED = 1000  # images of a split of any other one
CARD_SAMPLE, SURVEY = 5000, 500  # images
LARGEST_DERIVED = 512  # pixels a side; larger images need --image_size


def load_split(
    card: DatasetCard,
    data_root: str | Path,
    split: str,
    download: bool = True,
    device: torch.device | str = "cpu",
    workers: int = 2,
    classes: Sequence[int] | None = None,
) -> TensorSplit | LazySplit:
    """The images of ``split`` ("train" or "test") of the data set that ``card`` names; of ``classes`` alone, if given.

    They come from the card's loader, or else from the first of these that is there: folders
    ``data_root/<name>/{train,test}/<class>/*``, the digits that ship here, torchvision's files in ``data_root`` or
    ``data_root/<name>``; missing ones are downloaded into the latter if ``download``. Returns a TensorSplit on
    ``device``, or, for folders with images of at least 128x128 pixels or more than 4 GiB of pixels, a LazySplit with
    ``workers`` processes. Raises MissingError for data that is missing, and InputError for data that is corrupt or
    inconsistent with the card.
    With ``classes``, labels are positions among them, and files in the folders of other classes are not opened.
    """
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be one of {', '.join(SPLIT_FOLDERS)}, not {split!r}")
    root = None if card.loader else folder_of(card.name, data_root)
    if root:
        return _folder_split(card, root, split, device, workers, classes)
    if card.loader:
        images, labels, source = *_load_with(card.loader, Path(data_root), split), card.loader
    elif card.name == "digits":
        images, labels, source = *read_digits(split), "the shipped digits"
    elif card.name in TORCHVISION:
        source = f"torchvision's files {split_files(card.name, split)}"
        try:
            with distributed.in_turn():
                images, labels = read_torchvision(card.name, Path(data_root), split, download)
        except Missing as error:
            reasons = [str(error), "" if download else "--download false and a dry run download nothing"]
            raise _missing(card.name, data_root, split, f" ({'; '.join(filter(None, reasons))})") from error
    else:
        raise _missing(card.name, data_root, split)
    if len(images) != len(labels):
        raise InputError(f"{source} hold {len(images)} images but {len(labels)} labels; they do not belong together")
    if images.shape[1:] != card.shape:
        culprit = "the loader or the card" if card.loader else "the card, or give it another name"
        raise InputError(
            f"{source} hold images of shape {tuple(images.shape[1:])} but the data card {card.name} states "
            f"{card.shape}, channels first; correct {culprit}, and give --image_size for folders of images only"
        )
    whole = TensorSplit(images, labels, card.num_classes, _check_labels(card, labels, source))
    return (whole if classes is None else whole.of_classes(classes, range(len(classes)), len(classes))).to(device)


def stand_in(
    card: DatasetCard, split: str, device: torch.device | str = "cpu", classes: Sequence[int] | None = None
) -> StandIn:
    """Noise in place of a split that is missing, for a plan: as many images as are published, or else ASSUMED."""
    size = PUBLISHED[card.name][split == "test"] if card.name in PUBLISHED else ASSUMED
    image = torch.randint(256, card.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(max(size, card.num_classes), device=device) % card.num_classes
    whole = StandIn(image.expand(len(labels), *card.shape), labels, card.num_classes)
    return whole if classes is None else whole.of_classes(classes, range(len(classes)), len(classes))


def _load_with(name: str, data_root: Path, split: str) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) and int64 labels (N,) of the function that a card names as its loader."""
    loader = load_custom(name)
    try:
        images, labels = map(_as_tensor, loader(data_root, split))
    except FAILURES as error:
        raise InputError(f"the loader {name} failed for the split {split}: {first_line(error)}") from error
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    dense = images.layout is labels.layout is torch.strided
    if not dense or images.dtype != torch.uint8 or images.dim() != 4 or labels.shape != images.shape[:1] or not whole:
        raise InputError(
            f"the loader {name} returned images {tuple(images.shape)} of {images.dtype} and labels "
            f"{tuple(labels.shape)} of {labels.dtype}; they must be uint8 (N, C, H, W) and integers (N,)"
        )
    if len(labels) == 0:
        raise InputError(f"the loader {name} returned no images of the split {split}")
    if images.amax() <= 1:
        raise InputError(f"the loader {name} returned bytes of at most {images.amax()}; they must be from 0 to 255")
    return images, labels.long()


def _as_tensor(array: Any) -> Tensor:
    # A copy of what torch cannot take as it is, or warns of: reversed axes, a file that is mapped for reading.
    return array if torch.is_tensor(array) else torch.as_tensor(np.require(array, requirements=["C", "W"]))


def resolve_card(
    name: str,
    data_root: str | Path,
    card_path: str | Path = "",
    may_derive: bool = False,
    write: bool = True,
    image_size: int | None = None,
) -> DatasetCard:
    """The card of data set ``name``: ``card_path`` if given, a registered card, or ``data_root/<name>/card.yaml``.

    A card given as ``card_path`` keeps its own name; ``image_size``, in pixels, replaces height and width. If there is
    no card and ``may_derive``, it is derived from the training images and, if ``write``, saved as
    ``data_root/<name>/card.yaml``, so that they are not needed again. Raises InputError if there is no card, and
    OptionError if ``name`` is neither registered nor a folder, or is a path.
    """
    if os.path.exists(data_root) and not os.path.isdir(data_root):
        raise OptionError(f"--data_root {data_root} is no folder; give the one that contains the data sets")
    card = _stated_card(name, Path(data_root), card_path)
    if card:
        return card.resized(image_size)
    root = _folder(Path(data_root), name)
    if not may_derive:
        raise InputError(
            f"there is no data card {root / CARD_FILE}; `{command('train')} --dataset {name}` derives "
            "it from the training images, or give one with --card"
        )
    card, notes = derive_card(name, root, image_size)
    show("\n".join(map(printable, notes)))
    if write:
        card.to_yaml(root / CARD_FILE)
        show(
            f"data card derived from the training images and written to {root / CARD_FILE}: "
            f"{'x'.join(map(str, card.shape))}, {card.num_classes} classes, mean {card.mean}, std {card.std}"
        )
    return card


def _stated_card(name: str, data_root: Path, card_path: str | Path) -> DatasetCard | None:
    """The card that a file or the registry states; None for a folder without one."""
    if card_path:
        return DatasetCard.from_yaml(card_path)
    if name in CARDS:
        return CARDS[name]
    if not is_name(name):
        place = Path(name) if os.path.isdir(name) else data_root / name
        place = place if place.name else place.resolve()
        raise OptionError(
            f"--dataset {name} is a path, not a name; write --data_root {place.parent} --dataset {place.name}"
        )
    root = _folder(data_root, name)
    if not os.path.isdir(root):
        raise _unknown(name, data_root)
    path = root / CARD_FILE
    # A pipe or a link to nothing is read, too, and refused, lest the derived card be written to where it leads.
    return replace(DatasetCard.from_yaml(path), name=name) if os.path.lexists(path) else None


def derive_card(name: str, root: Path, image_size: int | None = None) -> tuple[DatasetCard, list[str]]:
    """The card of the class folders in ``root/train``, and notes on what was found and how it was decided.

    Channels, size, mean and standard deviation are those of up to 5,000 images, evenly spaced in the list of files,
    which is sorted by class: 3 channels if any of them is in colour, and ``image_size`` or else the most common size.
    Raises InputError if there is no ``image_size`` and the images are too large to be taken as they are.
    """
    listing = list_images(root, "train")
    sample = evenly_spaced(listing.paths, CARD_SAMPLE)
    channels, sizes = survey(sample)
    (height, width), most = sizes.most_common(1)[0]
    if image_size:
        height = width = image_size
    elif max(height, width) > LARGEST_DERIVED:
        raise InputError(
            f"the images of {root / 'train'} have up to {max(map(max, sizes))} pixels a side, most of them "
            f"{width}x{height}, which is large for a network; give --image_size N, such as 224, or write a data card"
        )
    elif len(sizes) > 1:
        listing.notes.append(
            f"The images of {root / 'train'} have {len(sizes)} different sizes; {width}x{height} is the most common, "
            f"with {most:,} of {len(sample):,} images. --image_size N gives all of them another."
        )
    shape = (max(channels), height, width)
    counts, notes = histograms(sample, shape)
    mean, std = zip(*map(_mean_and_std, counts.double()))
    if min(std) < SMALLEST_STD:
        raise InputError(
            f"all pixels of a channel have the same value in the {len(sample):,} images sampled from {root / 'train'} "
            f"(mean {mean}, std {std}), which cannot be normalised; check the images"
        )
    card = DatasetCard(name, *shape, len(listing.classes), mean, std, classes=listing.classes)
    return card, [*listing.notes, *notes]


def _mean_and_std(counts: Tensor) -> tuple[float, float]:
    """Of values 0..255 scaled to [0, 1], to 6 decimals, from the number of each of them, float64 (256,)."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * levels).sum() / counts.sum()
    variance = (counts * (levels - mean) ** 2).sum() / counts.sum()
    return round(mean.item(), 6), round(variance.sqrt().item(), 6)


def _folder(data_root: Path, name: str) -> Path:
    """``data_root/name``, or the folder there whose name differs in its Unicode form alone."""
    alike = [path for path in class_folders(data_root) if composed(path.name) == composed(name)]
    return alike[0] if alike and not os.path.isdir(data_root / name) else data_root / name


def folder_of(name: str, data_root: str | Path) -> Path | None:
    """The folder of data set ``name`` that contains the folder of a split, or None."""
    roots = [_folder(Path(data_root), folder) for folder in (name, OTHER_FOLDER_NAMES.get(name)) if folder]
    return next((root for root in roots if _splits_in(root)), None)


def _splits_in(root: Path) -> bool:
    """Whether ``root`` contains the folder of a split."""
    return any(os.path.isdir(root / name) for names in SPLIT_FOLDERS.values() for name in names)


def _folder_split(
    card: DatasetCard,
    root: Path,
    split: str,
    device: torch.device | str,
    workers: int,
    classes: Sequence[int] | None = None,
) -> TensorSplit | LazySplit:
    if card.channels not in MODES:
        raise InputError(f"image files have 1 or 3 channels but the data card {card.name} states {card.channels}")
    listing = list_images(root, split, card)
    paths, labels, notes, num_classes = listing.paths, listing.labels, listing.notes, card.num_classes
    folders = listing.classes
    if classes is not None:
        places, labels = chosen_images(labels, classes)
        paths, num_classes = [paths[place] for place in places.tolist()], len(classes)
        folders = tuple(folders[k] for k in classes)
    channels, height, width = card.shape
    if height * width >= LARGE_IMAGE or len(paths) * channels * height * width > LARGE_SPLIT:
        sample = evenly_spaced(paths, SURVEY)
        changes = changes_in(sample, card.shape).items()
        notes += [f"{count} of {len(sample)} images sampled from {root} are {change}." for change, count in changes]
        return LazySplit(paths, labels, card.shape, num_classes, device, workers, notes, folders)
    images, converted = decode(paths, card.shape)
    return TensorSplit(images, labels, num_classes, [*notes, *converted], folders).to(device)


def _check_labels(card: DatasetCard, labels: Tensor, source: str) -> list[str]:
    """Notes on classes without images; raises InputError for labels that are none of the card's classes."""
    counts = torch.bincount(labels.clamp_min(0), minlength=card.num_classes)
    if len(counts) > card.num_classes or labels.min() < 0:
        raise InputError(
            f"the labels of {source} are from {labels.min()} to {labels.max()} but the data card {card.name} has "
            f"{card.num_classes} classes, counted from 0; correct the labels or give the right card with --card"
        )
    absent = [card.classes[k] if card.classes else str(k) for k in (counts == 0).nonzero().flatten().tolist()]
    return [f"{source} have no images of {len(absent)} of {card.num_classes} classes: {listed(absent)}."] * bool(absent)


def _missing(name: str, data_root: str | Path, split: str, reason: str = "") -> MissingError:
    root = Path(data_root) / name
    public = name in TORCHVISION
    files = f" and for torchvision's files {split_files(name, split)} in {data_root} and {root}" if public else ""
    folders = [Path(data_root) / folder for folder in (name, OTHER_FOLDER_NAMES.get(name)) if folder]
    layouts = " or ".join(f"{folder / part}/<class>/*.png" for folder in folders for part in SPLIT_FOLDERS[split])
    return MissingError(
        f"no {split} images of {name}: looked for {layouts} (or another image format){files}{reason}; "
        f"give their folder with --data_root{WITHOUT[split]}"
    )


def _unknown(name: str, data_root: Path) -> OptionError:
    names = sorted({*CARDS, *(path.name for path in class_folders(data_root))})
    known = {each.casefold(): each for each in names}
    near = [known[key] for key in get_close_matches(name.casefold(), known, n=3) or known]
    if _splits_in(data_root):
        place = data_root if data_root.name else data_root.resolve()
        return OptionError(
            f"--data_root {data_root} is a data set itself; give the folder that contains it: "
            f"--data_root {place.parent} --dataset {place.name}"
        )
    return OptionError(
        f"--dataset {name} is neither a registered data set nor a folder {data_root / name}; "
        f"nearest: {', '.join(near)} (data without files needs --card)"
    )
