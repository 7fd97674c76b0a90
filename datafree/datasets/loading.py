"""Finds a data set's card and images: class folders, torchvision's files, the digits that ship here."""

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from datafree.datasets.cards import CARDS, DatasetCard
from datafree.datasets.digits import read_digits
from datafree.datasets.folders import SPLIT_FOLDERS, SUFFIXES, WITHOUT, class_folders, decode, list_images, open_image
from datafree.datasets.splits import LazySplit, TensorSplit
from datafree.errors import InputError, OptionError
from datafree.plugins import first_line, load_object

TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
OTHER_FOLDER_NAMES = {"tiny_imagenet": "tiny-imagenet-200"}
LARGE_IMAGE = 128 * 128  # pixels
LARGE_SPLIT = 4 * 2**30  # bytes
CARD_FILE = "card.yaml"
CARD_SAMPLE = 5000  # images


def load_split(
    card: DatasetCard,
    data_root: str | Path,
    split: str,
    download: bool = True,
    device: torch.device | str = "cpu",
    workers: int = 2,
) -> TensorSplit | LazySplit:
    """The images of ``split`` ("train" or "test") of the data set that ``card`` names.

    Folders ``data_root/<name>/{train,test}/<class>/*`` take precedence, then the card's loader, the digits that ship
    here, and torchvision's files in ``data_root`` or ``data_root/<name>``; missing ones are downloaded into the latter
    if ``download``. Returns a TensorSplit on ``device``, or, for folders with images of at least 128x128
    pixels or more than 4 GiB of pixels, a LazySplit with ``workers`` processes. Raises InputError for data that
    is missing, corrupt or inconsistent with the card.
    """
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split must be one of {', '.join(SPLIT_FOLDERS)}, not {split!r}")
    root = _folder_of(card.name, data_root)
    if root:
        return _folder_split(card, root, split, device, workers)
    if card.loader:
        images, labels, source = *_load_with(card.loader, Path(data_root), split), card.loader
    elif card.name == "digits":
        images, labels, source = *read_digits(split), "the shipped digits"
    elif card.name in TORCHVISION:
        images, labels = _torchvision_images(card.name, Path(data_root), split, download)
        source = "torchvision's files"
    else:
        raise _missing(card.name, data_root, split)
    if images.shape[1:] != card.shape:
        raise InputError(
            f"{source} hold images of shape {tuple(images.shape[1:])} but the data card "
            f"{card.name} states {card.shape}; correct the card or give it another name"
        )
    _check_classes(card, int(labels.max()) + 1, source)
    return TensorSplit(images, labels, card.num_classes).to(device)


def _load_with(name: str, data_root: Path, split: str) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) and int64 labels (N,) of the function that a card names as its loader."""
    loader = load_object(name)
    try:
        images, labels = (torch.as_tensor(part) for part in loader(data_root, split))
    except Exception as error:
        raise InputError(f"the loader {name} failed for the split {split}: {first_line(error)}") from error
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if images.dtype != torch.uint8 or images.dim() != 4 or labels.shape != images.shape[:1] or not whole:
        raise InputError(
            f"the loader {name} returned images {tuple(images.shape)} of {images.dtype} and labels "
            f"{tuple(labels.shape)} of {labels.dtype}; they must be uint8 (N, C, H, W) and integers (N,)"
        )
    if len(labels) == 0 or labels.amin() < 0:
        raise InputError(f"the loader {name} returned no images, or labels below 0; classes are counted from 0")
    if images.amax() <= 1:
        raise InputError(f"the loader {name} returned bytes of at most {images.amax()}; they must be from 0 to 255")
    return images, labels.long()


def resolve_card(
    name: str, data_root: str | Path, card_path: str | Path = "", may_derive: bool = False, write: bool = True
) -> DatasetCard:
    """The card of data set ``name``: ``card_path`` if given, a registered card, or ``data_root/<name>/card.yaml``.

    A card given as ``card_path`` keeps its own name. If there is no card and ``may_derive``, it is derived from the
    training images and, if ``write``, saved as ``data_root/<name>/card.yaml``, so that they are not needed again.
    Raises InputError if there is no card, and OptionError if ``name`` is neither registered nor a folder.
    """
    if card_path:
        return DatasetCard.from_yaml(card_path)
    if name in CARDS:
        return CARDS[name]
    root = Path(data_root) / name
    if not root.is_dir():
        raise _unknown(name, Path(data_root))
    path = root / CARD_FILE
    if path.is_file():
        return replace(DatasetCard.from_yaml(path), name=name)
    if not may_derive:
        raise InputError(
            f"there is no data card {path}; `python train_scratch.py --dataset {name}` derives "
            "it from the training images, or give one with --card"
        )
    card = derive_card(name, root)
    if not write:
        return card
    card.to_yaml(path)
    print(f"data card derived from the training images and written to {path}: {card}")
    return card


def derive_card(name: str, root: Path) -> DatasetCard:
    """The card of the class folders in ``root/train``.

    Size and channels are those of the first image; mean and standard deviation are over all pixels of up to
    5,000 images, evenly spaced in the list of files, which is sorted by class.
    """
    paths, _, classes = list_images(root, "train")
    first = open_image(paths[0], channels=None)
    shape = (1 if first.mode in ("1", "L", "LA") else 3, first.height, first.width)
    step = -(-len(paths) // CARD_SAMPLE)
    pixels = decode(paths[::step], shape).transpose(0, 1).flatten(1)
    mean, std = zip(*(_mean_and_std(channel) for channel in pixels))
    return DatasetCard(name, *shape, len(classes), mean, std, classes=tuple(classes))


def _mean_and_std(values: Tensor) -> tuple[float, float]:
    """Of uint8 ``values`` (N,) scaled to [0, 1], to 6 decimals; from their histogram, which needs no float copy."""
    counts = torch.bincount(values, minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * levels).sum() / counts.sum()
    variance = (counts * (levels - mean) ** 2).sum() / counts.sum()
    return round(mean.item(), 6), round(variance.sqrt().item(), 6)


def _folder_of(name: str, data_root: str | Path) -> Path | None:
    """The folder of data set ``name`` that contains the folder of a split, or None."""
    roots = [Path(data_root) / folder for folder in (name, OTHER_FOLDER_NAMES.get(name)) if folder]
    splits = {folder for folders in SPLIT_FOLDERS.values() for folder in folders}
    return next((root for root in roots if any((root / split).is_dir() for split in splits)), None)


def _folder_split(
    card: DatasetCard, root: Path, split: str, device: torch.device | str, workers: int
) -> TensorSplit | LazySplit:
    paths, labels, classes = list_images(root, split)
    _check_classes(card, len(classes), root)
    if card.classes and card.classes != tuple(classes):
        theirs, ours = next(pair for pair in zip(classes, card.classes) if pair[0] != pair[1])
        raise InputError(
            f"the class folders of {root} for {split} differ from the data card's classes: {theirs} is in the place "
            f"of {ours}; rename the folder, or correct the card"
        )
    channels, height, width = card.shape
    if height * width >= LARGE_IMAGE or len(paths) * channels * height * width > LARGE_SPLIT:
        return LazySplit(paths, labels, card.shape, card.num_classes, device, workers)
    return TensorSplit(decode(paths, card.shape), labels, card.num_classes).to(device)


def _torchvision_images(name: str, data_root: Path, split: str, download: bool) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) and int64 labels (N,) of torchvision's data set."""
    build = getattr(torchvision.datasets, TORCHVISION[name])
    options: dict[str, Any] = {"split": split} if name == "svhn" else {"train": split == "train"}
    own = data_root / name
    attempts = [(data_root, False), (own, False)] + [(own, True)] * download
    for place, fetch in attempts:
        try:
            data = build(str(place), download=fetch, **options)
            break
        except ImportError as error:
            raise InputError(f"{name} needs the package {error.name}; run `pip install {error.name}`") from error
        except Exception as error:  # missing, corrupt and unreachable files raise different types
            reason = " ".join(str(error).split())
    else:
        raise _missing(name, data_root, split, f" ({'download failed: ' if download else ''}{reason})")
    images = torch.as_tensor(data.data)
    labels = torch.as_tensor(data.labels if name == "svhn" else data.targets)
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif name != "svhn":
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), labels.long()


def _check_classes(card: DatasetCard, found: int, source: str | Path) -> None:
    if found != card.num_classes:
        raise InputError(
            f"{found} classes in {source} but {card.num_classes} in the data card {card.name}; "
            "correct the folders or give the right card with --card"
        )


def _missing(name: str, data_root: str | Path, split: str, reason: str = "") -> InputError:
    root = Path(data_root) / name
    files = f" and for torchvision's files in {data_root} and {root}" if name in TORCHVISION else ""
    layout = f"{root}/{SPLIT_FOLDERS[split][0]}/<class>/*{{{','.join(SUFFIXES)}}}"
    return InputError(
        f"no {split} images of {name}: looked for {layout}{files}{reason}; "
        f"give their folder with --data_root{WITHOUT[split]}"
    )


def _unknown(name: str, data_root: Path) -> OptionError:
    known = sorted({*CARDS, *(path.name for path in class_folders(data_root))})
    near = get_close_matches(name, known, n=3) or known
    return OptionError(
        f"--dataset {name} is neither a registered data set nor a folder {data_root / name}; "
        f"nearest: {', '.join(near)} (data without files needs --card)"
    )
