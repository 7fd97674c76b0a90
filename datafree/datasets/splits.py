"""A split of a data set: in memory as one uint8 tensor, or decoded from its files on demand."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from datafree import shares
from datafree.datasets.folders import HUGE, read_image
from datafree.errors import InputError

EVALUATION_MARGIN = 256 / 224  # side of the resized image over side of its centre crop
Key = tuple[int, int | None]  # index of a file, and seed of its random crop, or None for the centre crop


class Shuffle:
    """An endless stream of the indices ``range(size)``, in a new random order at every pass.

    The order depends only on a seed, which :meth:`begin` draws, and on the number of the pass, so the seed and
    the number of indices taken are all that is needed to resume.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self.size, self.device = size, device
        self.seed: int | None = None
        self.drawn = 0
        self._pass: int | None = None  # the pass that _order belongs to
        self._order: Tensor

    def to(self, device: torch.device | str) -> None:
        """Give the indices on ``device`` from now on."""
        self.device, self._pass = device, None

    def begin(self) -> None:
        """Draw the seed if there is none yet."""
        if self.seed is None:
            self.seed = int(torch.randint(2**31, ()))

    def take(self, n: int) -> Tensor:
        """The next ``n`` indices, int64 (n,) on the device; :meth:`begin` must have been called."""
        parts = []
        while n > 0:
            current, position = divmod(self.drawn, self.size)
            parts.append(self._order_of(current)[position : position + n])
            n -= len(parts[-1])
            self.drawn += len(parts[-1])
        return torch.cat(parts)

    def _order_of(self, current: int) -> Tensor:
        if self._pass != current:
            generator = torch.Generator().manual_seed(self.seed + current)  # type: ignore[operator]
            self._pass, self._order = current, torch.randperm(self.size, generator=generator).to(self.device)
        return self._order

    def state_dict(self) -> dict[str, Any]:
        """Seed, number of indices taken, and size."""
        return {"size": self.size, "seed": self.seed, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; raises InputError if it is of another number of images."""
        if state["size"] != self.size:
            raise InputError(
                f"the checkpoint was made with {state['size']} images but there are {self.size} "
                "now; give the same data with --data_root"
            )
        seed, drawn = state["seed"], state["drawn"]
        if not (seed is None or type(seed) is int and 0 <= seed < 2**31) or type(drawn) is not int or drawn < 0:
            raise ValueError("its position in the images is damaged")
        self.seed, self.drawn, self._pass = seed, drawn, None


def chosen_images(labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Places (M,) of the images of ``classes`` among ``labels`` (N,), and the positions (M,) of their classes there."""
    position = torch.full((int(labels.max()) + 1,), -1, device=labels.device)
    for number, chosen in enumerate(classes):
        position[chosen : chosen + 1] = number  # of a class beyond the largest label, nothing
    places = (position[labels] >= 0).nonzero().flatten()
    return places, position[labels[places]]


def some_places(size: int, n: int) -> Tensor:
    """Up to ``n`` of range(size), the same ones each time, in their order."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:n].sort().values


class Split(Protocol):
    """Images and labels of a split of a data set, on ``device``.

    notes: sentences about it for the log. folders: of its classes, in the order of the labels, if it has any.
    """

    num_classes: int
    notes: Sequence[str]
    folders: Sequence[str]

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    labels: Tensor

    def of_classes(self, classes: Sequence[int], labels: Sequence[int], num_classes: int) -> "Split":
        """The images of ``classes`` alone, relabelled: those of the k-th have the k-th of the new ``labels``."""
        ...

    def at(self, places: Tensor) -> Tensor:
        """The images (float, in [0, 1]) at these places, as :meth:`batches` gives them."""
        ...

    def some(self, n: int) -> "Split":
        """Up to ``n`` of its images, the same ones each time, as if drawn at random."""
        ...

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (float, in [0, 1]) and labels of the whole split, in order."""
        ...

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Images (float, in [0, 1]) and labels of the next ``n`` indices of an endless shuffled stream."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream of :meth:`sample`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream where ``state`` was taken; raises InputError if it is of another number of images."""
        ...


@dataclass
class TensorSplit:
    """Images and labels on one device: uint8 (N, C, H, W) and int64 (N,). notes, folders: as of a :class:`Split`."""

    images: Tensor
    labels: Tensor
    num_classes: int
    notes: Sequence[str] = ()
    folders: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._shuffle = Shuffle(len(self), self.images.device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> "TensorSplit":
        """Move to ``device`` and return self."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self._shuffle.to(self.images.device)
        return self

    def of_classes(self, classes: Sequence[int], labels: Sequence[int], num_classes: int) -> "TensorSplit":
        """The images of ``classes`` alone, relabelled: those of the k-th have the k-th of the new ``labels``."""
        places, positions = chosen_images(self.labels, classes)
        relabelled = torch.tensor(labels, device=self.device)[positions]
        return TensorSplit(self.images[places], relabelled, num_classes, self.notes)

    def at(self, places: Tensor) -> Tensor:
        """The images (float, in [0, 1]) at these places, as :meth:`batches` gives them."""
        return self.images[places].float() / 255

    def some(self, n: int) -> "TensorSplit":
        """Up to ``n`` of its images, the same ones each time, as if drawn at random."""
        places = some_places(len(self), n).to(self.device)
        return TensorSplit(self.images[places], self.labels[places], self.num_classes, self.notes)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (float, in [0, 1]) and labels of the whole split, in order."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size)):
            yield images.float() / 255, labels

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Images (float, in [0, 1]) and labels of the next ``n`` indices of an endless shuffled stream."""
        self._shuffle.begin()
        chosen = self._shuffle.take(n)
        return self.images[chosen].float() / 255, self.labels[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream of :meth:`sample`."""
        return self._shuffle.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream where ``state`` was taken; raises InputError if it is of another number of images."""
        self._shuffle.load_state_dict(state)


class StandIn(TensorSplit):
    """One image in place of many, which are missing: it takes the memory of one."""

    def of_classes(self, classes: Sequence[int], labels: Sequence[int], num_classes: int) -> "StandIn":
        """As many images as there are of ``classes``, relabelled."""
        _, positions = chosen_images(self.labels, classes)
        relabelled = torch.tensor(labels, device=self.device)[positions]
        return StandIn(self.images[:1].expand(len(relabelled), -1, -1, -1), relabelled, num_classes)


class LazySplit:
    """A split of image files that are decoded on demand by ``workers`` processes (0: by this one).

    shape: (C, H, W) of the crops. :meth:`sample` takes random crops (RandomResizedCrop); :meth:`batches` scales an
    image until it just covers 256/224 of the crop and takes its centre, or takes it unchanged if it has that size.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        shape: tuple[int, int, int],
        num_classes: int,
        device: torch.device | str = "cpu",
        workers: int = 2,
        notes: Sequence[str] = (),
        folders: Sequence[str] = (),
    ):
        self.notes, self.folders = notes, folders
        self.paths, self.labels, self.shape, self.num_classes = paths, labels, shape, num_classes
        self.device, self.workers = torch.device(device), workers
        self._shuffle = Shuffle(len(paths))
        self._stream: Iterator[tuple[Tensor, Tensor]] | None = None
        self._stream_size: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def of_classes(self, classes: Sequence[int], labels: Sequence[int], num_classes: int) -> "LazySplit":
        """The images of ``classes`` alone, relabelled: those of the k-th have the k-th of the new ``labels``."""
        places, positions = chosen_images(self.labels, classes)
        paths, relabelled = [self.paths[place] for place in places.tolist()], torch.tensor(labels)[positions]
        return LazySplit(paths, relabelled, self.shape, num_classes, self.device, self.workers, self.notes)

    def at(self, places: Tensor) -> Tensor:
        """The images (float, in [0, 1]) at these places, as :meth:`batches` gives them."""
        [(images, _)] = self._load([[(place, None) for place in places.tolist()]])
        return images

    def some(self, n: int) -> "LazySplit":
        """Up to ``n`` of its images, the same ones each time, as if drawn at random."""
        places = some_places(len(self), n)
        paths = [self.paths[place] for place in places.tolist()]
        return LazySplit(
            paths, self.labels[places], self.shape, self.num_classes, self.device, self.workers, self.notes
        )

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (float, in [0, 1]) and labels of the whole split, in order."""
        in_order = torch.arange(len(self)).split(batch_size)
        yield from self._load([(int(index), None) for index in part] for part in in_order)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Images (float, in [0, 1]) and labels of the next ``n`` files of an endless shuffled stream."""
        if self._stream is None or self._stream_size != n:
            self._shuffle.begin()
            self._stream, self._stream_size = self._load(self._random_batches(n)), n
        batch = next(self._stream)
        self._shuffle.drawn += n
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream of :meth:`sample`, which determines the random crops as well."""
        return self._shuffle.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream where ``state`` was taken; raises InputError if it is of another number of images."""
        self._shuffle.load_state_dict(state)
        self._stream = None

    def _random_batches(self, n: int) -> Iterator[list[Key]]:
        # On a copy, because the workers prefetch: the split itself counts only what was returned.
        ahead = copy.copy(self._shuffle)
        for first in itertools.count(ahead.drawn, n):
            seeds = range(ahead.seed + first, ahead.seed + first + n)  # type: ignore[operator]
            yield list(zip(ahead.take(n).tolist(), seeds))

    def _load(self, index_batches: Iterable[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        # Of several processes each decodes its share.
        batches, ahead = itertools.tee(map(list, index_batches))
        loader = DataLoader(
            _Files(self.paths, self.labels, self.shape),
            batch_sampler=(batch[shares.own_rows(len(batch))] for batch in ahead),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        try:
            for batch, parts in zip(batches, loader):
                images, labels = (shares.whole(part.to(self.device, non_blocking=True), len(batch)) for part in parts)
                yield images.float() / 255, labels
        except InputError as error:  # one from a worker is wrapped in its traceback
            raise InputError(str(error).strip().rpartition("InputError: ")[2]) from None


class _Files(Dataset[tuple[Tensor, Tensor]]):
    """Map from a :data:`Key` to a uint8 image (C, H, W) and its label."""

    def __init__(self, paths: Sequence[str], labels: Tensor, shape: tuple[int, int, int]):
        self.paths, self.labels, self.shape = paths, labels, shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        index, seed = key
        image, _ = read_image(self.paths[index], self.shape[0])
        size = self.shape[1:]
        image = _centre_crop(image, size) if seed is None else _random_crop(image, size, seed)
        return TF.pil_to_tensor(image), self.labels[index]


def _random_crop(image: Image.Image, size: tuple[int, int], seed: int) -> Image.Image:
    # Seeds the CPU's generator alone; torch.manual_seed would also reset the GPU's.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return RandomResizedCrop(size)(image)


def _centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width) * EVALUATION_MARGIN
    if image.width * image.height * scale**2 > HUGE:
        image = TF.center_crop(image, [_enough(image.height, height / scale), _enough(image.width, width / scale)])
    short_side = round(min(image.size) * scale)
    return TF.center_crop(TF.resize(image, short_side), size)


def _enough(side: int, visible: float) -> int:
    """Pixels of a side of a strip, about its middle, to scale for a crop that shows ``visible`` of them."""
    enough = ceil(2 * visible)
    return min(side, enough + (side - enough) % 2)  # so that the middle stays between or on the same pixels
