"""Images in class folders: finding the files, the order of the classes, and decoding."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from datafree.datasets.cards import DatasetCard, composed
from datafree.errors import InputError, printable
from datafree.untrusted import is_name, read_text

SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
WITHOUT = {"train": "", "test": ", or run without a test set: --eval none"}  # remedy to append to a message
# Of the formats that Pillow knows, those that it cannot decode by itself.
UNSUITABLE = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
ORIENTATION = 0x0112  # tag of EXIF
MODES = {1: "L", 3: "RGB"}  # by number of channels
CONVERTED = {1: "converted to grey", 3: "converted from grey to colour"}
GREY_MODES = {"1", "L", "LA", "La"}
SMALL_FILE, LARGE_FILE = 10_000, 1_000_000  # bytes
MOST_ANNOTATIONS = 2**26  # bytes
HUGE = 2**24  # pixels, of which there is one image in memory at a time
one_huge_image = Lock()
CHUNK = 256  # files per task of a thread
SHOWN = 12  # names that a message lists
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # of large photographs, which are welcome

Groups = dict[str, list[str]]  # name of a class, composed -> paths of its images


@dataclass
class Listing:
    """The image files of a split, their labels int64 (N,), the classes in order, and what should be known of them.

    notes: sentences for the log: about the order of the classes, absent classes, files that are left out.
    """

    paths: list[str]
    labels: Tensor
    classes: tuple[str, ...]
    notes: list[str]


@cache
def readable() -> dict[str, str]:
    """Suffix of a file, such as ``.png`` -> its format, for all that Pillow decodes by itself."""
    formats = {**Image.registered_extensions(), ".mpo": "JPEG"}  # MPO has no decoder but that of JPEG
    return {suffix: name for suffix, name in formats.items() if name in Image.OPEN and name not in UNSUITABLE}


def class_folders(folder: Path) -> list[Path]:
    """The subfolders of ``folder``, one per class, sorted; an empty list if it does not exist."""
    if not os.path.isdir(folder):
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def list_images(root: Path, split: str, card: DatasetCard | None = None) -> Listing:
    """The images of ``root`` for ``split`` ("train" or "test").

    Layouts: ``{train,test}/<class>/**``, where ``val`` stands for a test with fewer than two folders, such as one of
    images without labels, and that of Tiny-ImageNet
    (``train/<class>/images/*``, ``val/val_annotations.txt``). The label of an image is the position of its class among
    the card's classes, or else among the sorted class names. Raises InputError if the classes are not the card's.
    """
    annotations = root / "val" / "val_annotations.txt"
    if split == "test" and annotations.is_file():
        place, (groups, left_out) = annotations.parent, _annotated_images(annotations)
    else:
        place, groups, left_out = _grouped_images(root, split)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common())
    classes, notes = _ordered_classes(groups, place, split, card, kinds)
    if kinds:
        notes.append(f"Not read in {place}: {kinds}.")
    folders = Counter(composed(path.name) for path in class_folders(place))
    if alike := [name for name, count in folders.items() if count > 1]:
        notes.append(
            f"Folders of {place} that differ in the Unicode form of their names are one class: {listed(alike)}."
        )
    for other in (root / name for name in SPLIT_FOLDERS[split]):
        if other != place and class_folders(other):
            notes.append(f"The {split} images are those of {place}; {other} is not read.")
    paths = [path for name in classes for path in groups.get(name, ())]
    counts = torch.tensor([len(groups.get(name, ())) for name in classes])
    return Listing(paths, torch.repeat_interleave(torch.arange(len(classes)), counts), classes, notes)


def _grouped_images(root: Path, split: str) -> tuple[Path, Groups, Counter[str]]:
    """The folder of a split, the images of its class folders, and how many files of each kind are left out."""
    candidates = [root / name for name in SPLIT_FOLDERS[split]]
    folder = next((path for path in candidates if len(class_folders(path)) > 1), None)
    folder = folder or next((path for path in candidates if path.is_dir()), candidates[0])
    groups: Groups = {}
    left_out: Counter[str] = Counter()
    for path in class_folders(folder):
        _check_encoding(path)
        images, others = images_in(path)
        groups.setdefault(composed(path.name), []).extend(images)
        left_out += others
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith("."):
            left_out["hidden"] += 1
        elif not path.is_dir():
            left_out["outside the class folders" if path.exists() else "broken links"] += 1
    return folder, groups, left_out


def _check_encoding(folder: Path) -> None:
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise InputError(f"the name of the folder {ascii(str(folder))} is not in UTF-8; rename it") from None
    if not folder.name.isprintable():
        raise InputError(f"the name of the folder {ascii(str(folder))} has control characters; rename it")


def images_in(folder: Path) -> tuple[list[str], Counter[str]]:
    """Paths of the images in ``folder`` and below, sorted, and how many other files there are of each kind."""
    images: list[str] = []
    others: Counter[str] = Counter()
    visited = set()
    for place, folders, names in os.walk(folder, onerror=_cannot_list, followlinks=True):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()  # a link to a folder above it
            continue
        visited.add(real)
        others["hidden"] += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            kind = "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower()
            path = f"{place}{os.sep}{name}"
            if kind in readable() or (not kind and _is_image(path)):
                images.append(path)
            else:
                others[kind or "without a suffix"] += 1
    return images, +others


def _is_image(path: str) -> bool:
    """Whether the contents of a file, whose name does not tell, begin as those of an image."""
    try:
        with open_image(path):
            return True
    except InputError:
        return False


def _cannot_list(error: OSError) -> None:
    raise InputError(f"cannot list the folder {error.filename} ({error.strerror}); make it readable or remove it")


def _annotated_images(annotations: Path) -> tuple[Groups, Counter[str]]:
    """Images of Tiny-ImageNet's val_annotations.txt, and the number of those that it does not name."""
    groups: Groups = {}
    folder = annotations.parent / "images"
    try:
        lines = read_text(annotations, MOST_ANNOTATIONS).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {annotations} ({error}); extract the data set again") from error
    for number, line in enumerate(lines, start=1):
        parts = line.split("\t")
        if len(parts) < 2 or not is_name(parts[0]) or not parts[1].isprintable():
            raise InputError(f"{annotations}: line {number} is not `file<tab>class`; extract the data set again")
        groups.setdefault(composed(parts[1]), []).append(str(folder / parts[0]))
    present = len(os.listdir(folder)) if folder.is_dir() else 0
    return groups, +Counter({"without an annotation": present - sum(map(len, groups.values()))})


def _ordered_classes(
    groups: Groups, place: Path, split: str, card: DatasetCard | None, left_out: str
) -> tuple[tuple[str, ...], list[str]]:
    """The classes in the order of their labels, and notes about it: the card's order, or else that of their names.

    left_out: kinds of the files that are not read.
    """
    filled = sorted(name for name, paths in groups.items() if paths)
    stated = card.classes if card else ()
    expected = card.num_classes if card else len(groups)
    if len(groups) < (1 if stated else 2):
        found = f"{place} holds {len(groups)} class folders but at least 2 are needed" if place.is_dir() else ""
        raise InputError(
            f"{found or f'there is no folder {place}'} ({_contents(place if found else place.parent)}); "
            f"arrange the images as {place}/<class>/*.png{WITHOUT[split]}"
        )
    if unknown := sorted(set(filled) - set(stated or filled)):
        raise InputError(
            f"{place} has folders that are none of the classes of the data card: {listed(unknown)}, where the card "
            f"names {listed(stated)}; rename the folders, or correct the card"
        )
    empty = [name for name in stated or sorted(groups) if not groups.get(name)]
    if empty and (split == "train" or not filled):
        unread = f" (not read in {place}: {left_out})" if left_out else ""
        raise InputError(f"{place / empty[0]} holds no images{unread}; add images, or remove the folder and the class")
    # A folder without images is a class if the folders are as many as the card's classes, or else something different.
    classes = stated or tuple(sorted(groups) if len(groups) == expected else filled)
    if card and len(classes) != expected:
        raise InputError(
            f"{len(classes)} classes in {place} but {expected} in the data card {card.name}; correct the folders or "
            "the card (--card), or list `classes` in the card, so that those without images are known"
        )
    return classes, [*_order_notes(classes, place, bool(stated)), *_empty_notes(classes, groups, place)]


def _contents(folder: Path) -> str:
    """What is in a folder, to tell other layouts by."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    return f"found in {folder}: {listed(names) or 'nothing'}"


def _order_notes(classes: tuple[str, ...], place: Path, stated: bool) -> list[str]:
    """What to say of an order of the classes that may be another than the teacher's."""
    natural = tuple(sorted(classes, key=_natural))
    if classes == tuple(sorted(classes)) != natural:
        alarm = "" if stated else "[Alarm] "
        return [
            f"{alarm}The classes of {place} are in the order of plain text: {listed(classes)}; for a teacher that "
            f"counts them as {listed(natural)}, list `classes` in that order in the data card."
        ]
    if stated:
        return []
    return [
        f"The classes of {place} are in the order of their names: {listed(classes)}; for a teacher with another order, "
        "list `classes` in its order in the data card."
    ]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which numbers count as numbers, and capitals as small letters."""
    parts = re.findall(r"\d+|\D+", name.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _empty_notes(classes: tuple[str, ...], groups: Groups, place: Path) -> list[str]:
    """What to say of classes and folders without images."""
    notes = []
    if absent := [name for name in classes if not groups.get(name)]:
        notes.append(f"{place} has no images of {len(absent)} of {len(classes)} classes: {listed(absent)}.")
    if others := sorted(name for name in groups if name not in classes):
        notes.append(f"Folders without images in {place} are left out: {listed(others)}.")
    return notes


def listed(names: Sequence[str]) -> str:
    """The first names, and how many there are if they are many."""
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")


def open_image(path: str) -> Image.Image:
    """The image file, of which only the header is read yet; raises InputError, naming the file, if that fails."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for, a device never ends
            raise OSError("no file" if os.path.exists(path) else "a broken link, or gone")
        return Image.open(path, formats=_formats(os.path.splitext(path)[1].lower()))
    except Exception as error:  # a decoder may raise anything if the file is corrupt
        raise _unreadable(path, error) from error


@cache
def _formats(suffix: str) -> list[str]:
    """Formats to try for a file: its own first; of those without a signature, which any bytes may pass as, no other."""
    own = readable().get(suffix, "PNG")
    signed = [name for name in dict.fromkeys([own, *readable().values()]) if Image.OPEN[name][1]]
    return [*signed, own]


def _unreadable(path: str, error: Exception) -> InputError:
    reason: object = error.strerror if isinstance(error, OSError) and error.strerror else error
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "unknown format"
    elif isinstance(error, Image.DecompressionBombError):
        reason = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    return InputError(f"cannot read the image {path} ({reason}); replace or remove it")


def channels_of(image: Image.Image) -> int:
    """1 for a grey image, 3 for one in colour."""
    return 1 if image.mode in GREY_MODES else 3


def changes_of(image: Image.Image, path: str, channels: int) -> Counter[str]:
    """What is changed or left out where an image that is not decoded yet is read as ``channels`` channels.

    Raises InputError, naming the file, for more than 8 bits of grey.
    """
    if image.mode[0] in "IF":  # convert() would clip these to white
        raise InputError(f"the image {path} has more than 8 bits per channel; save it with 8 bits")
    # The second image of a MPO file is a preview or another eye's view.
    several = image.format != "MPO" and getattr(image, "is_animated", False)
    # Pillow turns TIFF by itself, and would decode other formats to look for EXIF data at their end.
    turned = image.format != "TIFF" and "exif" in image.info and image.getexif().get(ORIENTATION, 1) != 1
    found = {
        CONVERTED[channels]: channels_of(image) != channels,
        "read without their further frames or pages": several,
        "read without their transparency": image.mode[-1] in "Aa" or "transparency" in image.info,
        "reduced from 16 to 8 bits per channel": ";16" in str(getattr(image, "tile", "")),
        "not turned as their EXIF data ask": turned,
    }
    return Counter(change for change, applies in found.items() if applies)


def read_image(path: str, channels: int) -> tuple[Image.Image, Counter[str]]:
    """The decoded image, converted to 1 (grey) or 3 (RGB) channels, and what was changed or left out.

    Raises InputError, naming the file, if it cannot be read.
    """
    with open_image(path) as image:
        try:
            changes = changes_of(image, path, channels)
            with one_huge_image if image.width * image.height > HUGE else nullcontext():
                return image.convert(MODES[channels]), changes
        except InputError:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error


def changes_in(paths: Sequence[str], shape: tuple[int, int, int]) -> Counter[str]:
    """How the images are changed where they are read on demand as crops of ``shape`` (C, H, W); by their headers."""
    channels, height, width = shape
    changes = Counter[str]()
    for path in paths:
        with open_image(path) as image:
            changes += changes_of(image, path, channels)
            if image.size != (width, height):
                changes[f"scaled and cropped to {width}x{height} pixels"] += 1
    return changes


def survey(paths: Sequence[str]) -> tuple[Counter[int], Counter[tuple[int, int]]]:
    """How many of the images have which channels, and which (height, width); by their headers."""
    channels, sizes = Counter[int](), Counter[tuple[int, int]]()
    for path in paths:
        with open_image(path) as image:
            channels[channels_of(image)] += 1
            sizes[image.height, image.width] += 1
    return channels, sizes


def evenly_spaced(paths: Sequence[str], most: int) -> Sequence[str]:
    """At most ``most`` of the paths."""
    return paths[:: -(-len(paths) // most)]


def decode(paths: Sequence[str], shape: tuple[int, int, int]) -> tuple[Tensor, list[str]]:
    """The images as one uint8 tensor (N, C, H, W), and notes on how many were converted; see :func:`for_each_image`."""
    images = np.empty((len(paths), *shape), np.uint8)
    notes = for_each_image(paths, shape, images.__setitem__)
    return torch.from_numpy(images), notes


def histograms(paths: Sequence[str], shape: tuple[int, int, int]) -> tuple[Tensor, list[str]]:
    """How often each value occurs in each channel, int64 (C, 256), and notes; see :func:`for_each_image`.

    The images are counted one by one, so that a set of photographs does not fill the memory.
    """
    counts, lock = np.zeros((shape[0], 256), np.int64), Lock()

    def count(index: int, pixels: np.ndarray) -> None:
        one = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in pixels])
        with lock:
            np.add(counts, one, out=counts)

    notes = for_each_image(paths, shape, count)
    return torch.from_numpy(counts), notes


def for_each_image(
    paths: Sequence[str], shape: tuple[int, int, int], receive: Callable[[int, np.ndarray], Any]
) -> list[str]:
    """Call ``receive(index, pixels)`` with each image, uint8 (C, H, W), in any order -> notes on conversions.

    Images of another size are resized to ``shape`` (C, H, W), bilinearly with antialiasing. Raises InputError for a
    file that cannot be decoded, naming it.
    """
    channels, height, width = shape
    threads, chunk = _threads(paths[0])

    def read(start: int) -> tuple[int, Counter[str]]:
        """Decode one chunk -> how many images it has, and how they were changed."""
        changes: Counter[str] = Counter()
        for index in range(start, min(start + chunk, len(paths))):
            image, changed = read_image(paths[index], channels)
            changes += changed
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
                changes[f"resized to {width}x{height} pixels"] += 1
            receive(index, np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1))
        return index + 1 - start, changes

    place, total = printable(os.path.commonpath([paths[0], paths[-1]])), Counter[str]()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(paths), desc=f"reading {place}", unit="image", disable=None) as bar,
    ):
        for count, changes in pool.map(read, range(0, len(paths), chunk)):
            bar.update(count)
            total += changes
    return [f"{count:,} of {len(paths):,} images in {place} were {change}." for change, count in total.items()]


def _threads(path: str) -> tuple[int, int]:
    """How many threads decode, and how many files each takes at a time, for files like this one."""
    # Only the decoding runs in parallel; for small files most of the time is Python code, which holds the GIL.
    # Each thread holds an image in memory, which may be a photograph of a hundred megabytes.
    try:
        size = os.path.getsize(path)
    except OSError:
        size = 0
    most = 1 if size <= SMALL_FILE else 16 if size <= LARGE_FILE else 4
    return min(most, os.cpu_count() or 1), CHUNK if size <= SMALL_FILE else CHUNK // 16
