"""Where a data set's card and images come from: class folders, torchvision's files, the shipped digits."""

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
import torchvision

from datafree.datasets.cards import CARDS, DatasetCard
from datafree.datasets.digits import read_digits
from datafree.datasets.folders import SPLIT_FOLDERS, SUFFIXES, WITHOUT, class_folders, decode, list_images, open_image
from datafree.datasets.splits import LazySplit, TensorSplit
from datafree.errors import InputError, OptionError

TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
OTHER_FOLDER_NAMES = {"tiny_imagenet": "tiny-imagenet-200"}
LARGE_IMAGE = 128 * 128
LARGE_SPLIT = 4 * 2**30
CARD_FILE = "card.yaml"
CARD_SAMPLE = 5000


def load_split(card, data_root, split, download=True, device="cpu", workers=2):
    """The images of ``split`` ("train" or "test") of the data set that ``card`` names.

    A folder ``data_root/<name>/{train,test}/<class>/*`` comes first, then the shipped digits, then
    torchvision's files in ``data_root`` or ``data_root/<name>``; what is missing is downloaded into the
    latter if ``download``. Returns a TensorSplit on ``device``; a LazySplit for folders with images of
    128x128 pixels and more, or more than 4 GiB of pixels. Raises InputError for data that is missing,
    broken or does not fit the card.
    """
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split is {split!r}, not one of {', '.join(SPLIT_FOLDERS)}")
    root = _folder_of(card.name, data_root)
    if root:
        return _folder_split(card, root, split, device, workers)
    if card.name == "digits":
        images, labels, source = *read_digits(split), "the shipped digits"
    elif card.name in TORCHVISION:
        images, labels = _torchvision_images(card.name, Path(data_root), split, download)
        source = "torchvision's files"
    else:
        raise _missing(card.name, data_root, split)
    if images.shape[1:] != card.shape:
        raise InputError(
            f"{source} hold images of shape {tuple(images.shape[1:])} but the data card "
            f"{card.name} says {card.shape}; correct the card or give it another name"
        )
    _check_classes(card, int(labels.max()) + 1, source)
    return TensorSplit(images, labels, card.num_classes).to(device)


def resolve_card(name, data_root, card_path="", may_derive=False, write=True):
    """The card of data set ``name``; the name inside an explicit ``card_path`` takes its place.

    After ``card_path`` come the registered cards, then ``data_root/<name>/card.yaml``. Failing these, and
    only if ``may_derive``, the card is derived from the training images and, if ``write``, written there, so
    that they are not needed again. Raises InputError where there is no card, OptionError for a name without any folder.
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
            f"there is no data card {path}; `python train_scratch.py --dataset {name}` writes "
            "it from the training images, or give one by --card"
        )
    card = derive_card(name, root)
    if not write:
        return card
    card.to_yaml(path)
    print(f"data card derived from the training images and written to {path}: {card}")
    return card


def derive_card(name, root):
    """Card of the class folders ``root/train``.

    Size and channels are the first image's; mean and standard deviation are over all pixels of up to
    5,000 images, evenly spaced over the classes' files.
    """
    paths, _, classes = list_images(root, "train")
    first = open_image(paths[0], channels=None)
    shape = (1 if first.mode in ("1", "L", "LA") else 3, first.height, first.width)
    step = -(-len(paths) // CARD_SAMPLE)
    pixels = decode(paths[::step], shape).transpose(0, 1).flatten(1)
    moments = [_mean_and_std(channel) for channel in pixels]
    return DatasetCard(name, *shape, len(classes), *(tuple(values) for values in zip(*moments)), classes=tuple(classes))


def _mean_and_std(values):
    """Of uint8 ``values`` scaled to [0, 1], to 6 digits; from their histogram, which needs no float copy."""
    counts = torch.bincount(values, minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * levels).sum() / counts.sum()
    variance = (counts * (levels - mean) ** 2).sum() / counts.sum()
    return round(mean.item(), 6), round(variance.sqrt().item(), 6)


def _folder_of(name, data_root):
    """Folder of data set ``name`` if it holds folders of splits, else None."""
    roots = [Path(data_root) / folder for folder in (name, OTHER_FOLDER_NAMES.get(name)) if folder]
    splits = {folder for folders in SPLIT_FOLDERS.values() for folder in folders}
    return next((root for root in roots if any((root / split).is_dir() for split in splits)), None)


def _folder_split(card, root, split, device, workers):
    paths, labels, classes = list_images(root, split)
    _check_classes(card, len(classes), root)
    if card.classes and card.classes != tuple(classes):
        theirs, ours = next(pair for pair in zip(classes, card.classes) if pair[0] != pair[1])
        raise InputError(
            f"the class folders of {root} for {split} are not the data card's: {theirs} stands where the "
            f"card names {ours}; rename the folder, or correct the card"
        )
    channels, height, width = card.shape
    if height * width >= LARGE_IMAGE or len(paths) * channels * height * width > LARGE_SPLIT:
        return LazySplit(paths, labels, card.shape, card.num_classes, device, workers)
    return TensorSplit(decode(paths, card.shape), labels, card.num_classes).to(device)


def _torchvision_images(name, data_root, split, download):
    """uint8 images (N, C, H, W) and int64 labels of torchvision's data set."""
    build = getattr(torchvision.datasets, TORCHVISION[name])
    options = {"split": split} if name == "svhn" else {"train": split == "train"}
    own = data_root / name
    attempts = [(data_root, False), (own, False)] + [(own, True)] * download
    for place, fetch in attempts:
        try:
            data = build(str(place), download=fetch, **options)
            break
        except ImportError as error:
            raise InputError(f"{name} needs {error.name}; `pip install {error.name}`") from error
        except Exception as error:  # absent, broken and unreachable files each raise something else
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


def _check_classes(card, found, source):
    if found != card.num_classes:
        raise InputError(
            f"{found} classes in {source} but {card.num_classes} in the data card {card.name}; "
            "correct the folders or give the right card by --card"
        )


def _missing(name, data_root, split, reason=""):
    root = Path(data_root) / name
    files = f" and for torchvision's files in {data_root} and {root}" if name in TORCHVISION else ""
    layout = f"{root}/{SPLIT_FOLDERS[split][0]}/<class>/*{{{','.join(SUFFIXES)}}}"
    return InputError(
        f"no {split} images of {name}: looked for {layout}{files}{reason}; "
        f"name their folder by --data_root{WITHOUT[split]}"
    )


def _unknown(name, data_root):
    known = sorted({*CARDS, *(path.name for path in class_folders(data_root))})
    near = get_close_matches(name, known, n=3) or known
    return OptionError(
        f"--dataset {name}: no registered data set and no folder {data_root / name}; "
        f"nearest: {', '.join(near)} (data without files needs --card)"
    )
