"""Public data sets in the files that torchvision downloads; a split is read from its own files alone.

torchvision's own classes verify, or require, the files of all splits before they return one. The training images of a
network that is distilled without its data may be absent, and must not be opened where they are present.
"""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from datafree.errors import InputError

TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
ABSENT, ADVICE = ("", "Dataset not found"), ". You can use download=True to download it"  # in torchvision's words
IN_PICKLES = {  # all that a pickled array needs; what else a pickle names is refused
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
}


class Missing(Exception):
    """The files of a split are in none of the places, or not intact; the message says why, if there is more to say."""


def read_torchvision(name: str, data_root: Path, split: str, download: bool) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) and int64 labels (N,) of ``split`` ("train" or "test") of the data set ``name``.

    The files are looked for in ``data_root`` and ``data_root/<name>``, and downloaded into the latter if ``download``.
    Those of CIFAR come as one archive of both splits, those of the others split by split. Raises :class:`Missing`.
    """
    own, reasons = data_root / name, []
    for place, fetch in [(data_root, False), (own, False), *[(own, True)] * download]:
        try:
            return _read(name, place, split, fetch)
        except ImportError as error:
            raise InputError(f"{name} needs the package {error.name}; run `pip install {error.name}`") from error
        except Exception as error:  # missing, corrupt and unreachable files raise different types
            reasons.append(" ".join(str(error).split()).removesuffix(ADVICE))
    more = dict.fromkeys(reason for reason in reasons if reason not in ABSENT)
    raise Missing(f"download failed: {reasons[-1]}" if download else "; ".join(more))


def split_files(name: str, split: str) -> str:
    """The files of a split, as a pattern below the folder that contains them."""
    published = getattr(torchvision.datasets, TORCHVISION[name])
    if name.startswith("cifar"):
        return f"{published.base_folder}/{published.test_list[0][0] if split == 'test' else published.train_list[0][0]}"
    return f"{split}_32x32.mat" if name == "svhn" else f"{TORCHVISION[name]}/raw/{_idx_prefix(split)}-*-ubyte"


def _read(name: str, place: Path, split: str, download: bool) -> tuple[Tensor, Tensor]:
    published = getattr(torchvision.datasets, TORCHVISION[name])
    if name.startswith("cifar"):
        if download:
            published(str(place), train=split == "train", download=True)
        return _read_cifar(published, place, split)
    if name == "svhn":
        data = published(str(place), split=split, download=download)
        return torch.from_numpy(data.data).contiguous(), torch.from_numpy(data.labels).long()
    data = _one_split(published, split)(str(place), train=split == "train", download=download)
    return data.data.unsqueeze(1), data.targets.long()


def _one_split(published: Any, split: str) -> Any:
    """MNIST or a data set in its format, of which only the files of ``split`` are required and downloaded.

    What early versions of torchvision wrote, processed/*.pt, is not read: it could hold anything, without a checksum.
    """
    resources = [part for part in published.resources if part[0].startswith(_idx_prefix(split))]
    return type(published.__name__, (published,), {"resources": resources, "_check_legacy_exist": lambda self: False})


def _idx_prefix(split: str) -> str:
    return "train" if split == "train" else "t10k"


def _read_cifar(published: Any, place: Path, split: str) -> tuple[Tensor, Tensor]:
    listed = published.train_list if split == "train" else published.test_list
    parts = [_unpickle(place / published.base_folder / file, md5) for file, md5 in listed]
    images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = [label for part in parts for label in part.get("labels", part.get("fine_labels"))]
    return torch.from_numpy(images), torch.tensor(labels)


def _unpickle(path: Path, md5: str) -> Any:
    """Contents of a published file, after a check that it is intact; none of its code is run."""
    if not path.is_file():
        raise Missing
    with path.open("rb") as file:
        found = hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
        if found != md5:
            raise Missing(f"{path} is corrupt or another file: its MD5 is {found}, not {md5}")
        file.seek(0)
        return _Arrays(file, encoding="latin1").load()


class _Arrays(pickle.Unpickler):
    """Reads plain values and arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in IN_PICKLES:
            raise pickle.UnpicklingError(f"a pickled {module}.{name} is refused; nothing was executed")
        return IN_PICKLES[module, name]
