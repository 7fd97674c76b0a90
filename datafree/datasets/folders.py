"""Images in class folders: finding the files, and decoding them into one tensor."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from datafree.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
WITHOUT = {"train": "", "test": ", or run without a test set: --eval none"}  # remedy to append to a message
MODES: dict[int | None, str] = {1: "L", 3: "RGB"}  # by number of channels
SMALL_FILE = 10_000  # bytes
CHUNK = 256  # files per task of a thread


def class_folders(folder: Path) -> list[Path]:
    """The subfolders of ``folder``, one per class, sorted; an empty list if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def list_images(root: Path, split: str) -> tuple[list[str], Tensor, list[str]]:
    """Paths, int64 labels (N,) and class names of ``root``'s images for ``split`` ("train" or "test").

    Layouts: ``{train,test}/<class>/*``, where ``val`` may stand for test, and that of Tiny-ImageNet
    (``train/<class>/images/*``, ``val/val_annotations.txt``). Labels are the positions of the sorted class
    names. Raises InputError for fewer than two classes and for a class without images.
    """
    annotations = root / "val" / "val_annotations.txt"
    if split == "test" and annotations.is_file():
        groups = _annotated_images(annotations)
    else:
        groups = _grouped_images(root, split)
    names = sorted(groups)
    paths = [path for name in names for path in groups[name]]
    labels = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(groups[n]) for n in names]))
    return paths, labels, names


def _grouped_images(root: Path, split: str) -> dict[str, list[str]]:
    """Class name -> paths, from class folders."""
    candidates = [root / name for name in SPLIT_FOLDERS[split]]
    folder = next((path for path in candidates if class_folders(path)), candidates[0])
    classes = class_folders(folder)
    if len(classes) < 2:
        raise InputError(
            f"{folder} holds {len(classes)} class folders but at least 2 are needed; "
            f"arrange the images as {folder}/<class>/*{SUFFIXES[0]}{WITHOUT[split]}"
        )
    groups = {path.name: _images_in(path / "images") or _images_in(path) for path in classes}
    for name, images in groups.items():
        if not images:
            raise InputError(f"{folder / name} holds no images ({' '.join(SUFFIXES)}); add images or remove the folder")
    return groups


def _images_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    return [f"{folder}{os.sep}{name}" for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]


def _annotated_images(annotations: Path) -> dict[str, list[str]]:
    """Class name -> paths, from Tiny-ImageNet's val_annotations.txt."""
    groups: dict[str, list[str]] = {}
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split("\t")
        if len(parts) < 2:
            raise InputError(f"{annotations}: line {number} is not `file<tab>class`; extract the data set again")
        groups.setdefault(parts[1], []).append(str(annotations.parent / "images" / parts[0]))
    if len(groups) < 2:
        raise InputError(
            f"{annotations} names {len(groups)} classes but at least 2 are needed; extract the data set again"
        )
    return groups


def open_image(path: str, channels: int | None) -> Image.Image:
    """The decoded PIL image, converted to 1 (grey) or 3 (RGB) channels; None keeps the mode of the file.

    Raises InputError, naming the file, if it cannot be read or has more than 8 bits per channel.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            mode = image.mode
            converted = image.convert(MODES.get(channels, mode))
    except Exception as error:  # a decoder may raise anything if the file is corrupt
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise InputError(f"cannot read the image {path} ({reason}); replace or remove it") from error
    if mode[0] in "IF":  # convert() would clip these to white
        raise InputError(f"the image {path} has more than 8 bits per channel; save it with 8 bits")
    return converted


def decode(paths: Sequence[str], shape: tuple[int, int, int]) -> Tensor:
    """The images as one uint8 tensor (N, C, H, W); those of another size are resized to ``shape`` (C, H, W).

    Resizing is bilinear with antialiasing; the number of resized images is printed. Raises InputError for a file
    that cannot be decoded, naming it, and for a number of channels other than 1 and 3.
    """
    channels, height, width = shape
    if channels not in MODES:
        raise InputError(f"image files have 1 or 3 channels but the data card states {channels}; correct the card")
    images = np.empty((len(paths), *shape), np.uint8)

    def fill(start: int) -> tuple[int, int]:
        """Decode one chunk -> how many images it has, and how many of them were resized."""
        resized = 0
        for index in range(start, min(start + CHUNK, len(paths))):
            image = open_image(paths[index], channels)
            if image.size != (width, height):
                image, resized = image.resize((width, height), Image.Resampling.BILINEAR), resized + 1
            images[index] = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
        return index + 1 - start, resized

    place, total = os.path.commonpath([paths[0], paths[-1]]), 0
    with (
        ThreadPoolExecutor(_threads(paths[0])) as pool,
        tqdm(total=len(paths), desc=f"reading {place}", unit="image", disable=None) as bar,
    ):
        for count, resized in pool.map(fill, range(0, len(paths), CHUNK)):
            bar.update(count)
            total += resized
    if total:
        print(f"{total} of {len(paths)} images in {place} were resized to {width}x{height} pixels")
    return torch.from_numpy(images)


def _threads(path: str) -> int:
    # Only the decoding runs in parallel; for small files most of the time is Python code, which holds the GIL.
    try:
        return min(16, os.cpu_count() or 1) if os.path.getsize(path) > SMALL_FILE else 1
    except OSError:
        return 1
