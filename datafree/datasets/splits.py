"""A split of a data set: in memory as one uint8 tensor, or decoded from its files as needed."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from datafree.datasets.folders import open_image
from datafree.errors import InputError

EVALUATION_MARGIN = 256 / 224


class Shuffle:
    """Endless passes over ``range(size)``; every pass has an order of its own and repeats nothing.

    The order is a function of a seed, which :meth:`begin` draws, and of the number of the pass; so seed
    and number of drawn indices are all that resuming needs.
    """

    def __init__(self, size, device="cpu"):
        self.size, self.device = size, device
        self.seed, self.drawn = None, 0
        self._pass, self._order = None, None

    def to(self, device):
        self.device, self._pass = device, None

    def begin(self):
        """Draw the seed if there is none yet."""
        if self.seed is None:
            self.seed = int(torch.randint(2**31, ()))

    def take(self, n):
        """The next ``n`` indices, int64 on the device."""
        parts = []
        while n > 0:
            current, position = divmod(self.drawn, self.size)
            parts.append(self._order_of(current)[position : position + n])
            n -= len(parts[-1])
            self.drawn += len(parts[-1])
        return torch.cat(parts)

    def _order_of(self, current):
        if self._pass != current:
            generator = torch.Generator().manual_seed(self.seed + current)
            self._pass, self._order = current, torch.randperm(self.size, generator=generator).to(self.device)
        return self._order

    def state_dict(self):
        return {"size": self.size, "seed": self.seed, "drawn": self.drawn}

    def load_state_dict(self, state):
        """Go on where ``state`` was taken; raises InputError if it belongs to another number of images."""
        if state["size"] != self.size:
            raise InputError(
                f"the checkpoint was made with {state['size']} images but there are {self.size} "
                "now; give the same data by --data_root"
            )
        self.seed, self.drawn, self._pass = state["seed"], state["drawn"], None


class Split(Protocol):
    """Images and labels of a split of a data set, on ``device``."""

    num_classes: int

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (float, in [0, 1]) and labels of the whole split, in order."""
        ...

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Images (float, in [0, 1]) and labels of the next ``n`` indices of an endless shuffled stream."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TensorSplit:
    """Images and labels on one device: uint8 (N, C, H, W) and int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int

    def __post_init__(self):
        self._shuffle = Shuffle(len(self), self.images.device)

    def __len__(self):
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device):
        """Move to ``device`` and return self."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self._shuffle.to(self.images.device)
        return self

    def batches(self, batch_size):
        """Yield images (float, in [0, 1]) and labels of the whole split, in order."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size)):
            yield images.float() / 255, labels

    def sample(self, n):
        """Images (float, in [0, 1]) and labels of the next ``n`` indices of an endless shuffled stream."""
        self._shuffle.begin()
        chosen = self._shuffle.take(n)
        return self.images[chosen].float() / 255, self.labels[chosen]

    def state_dict(self):
        """Where the stream of :meth:`sample` stands."""
        return self._shuffle.state_dict()

    def load_state_dict(self, state):
        self._shuffle.load_state_dict(state)


class LazySplit:
    """The interface of :class:`TensorSplit` over files, decoded by ``workers`` processes as they are needed.

    :meth:`sample` crops at random (RandomResizedCrop); :meth:`batches` crops the centre after resizing
    the short side to 256/224 of the size, and leaves an image that has the size already as it is.
    """

    def __init__(self, paths, labels, shape, num_classes, device="cpu", workers=2):
        self.paths, self.labels, self.shape, self.num_classes = paths, labels, shape, num_classes
        self.device, self.workers = torch.device(device), workers
        self._shuffle = Shuffle(len(paths))
        self._stream, self._stream_size = None, None

    def __len__(self):
        return len(self.paths)

    def batches(self, batch_size):
        """Yield images (float, in [0, 1]) and labels of the whole split, in order."""
        in_order = torch.arange(len(self)).split(batch_size)
        yield from self._load([(int(index), None) for index in part] for part in in_order)

    def sample(self, n):
        """Images (float, in [0, 1]) and labels of the next ``n`` files of an endless shuffled stream."""
        if self._stream is None or self._stream_size != n:
            self._shuffle.begin()
            self._stream, self._stream_size = self._load(self._random_batches(n)), n
        batch = next(self._stream)
        self._shuffle.drawn += n
        return batch

    def state_dict(self):
        """Where the stream of :meth:`sample` stands; the crops, too, go on from there."""
        return self._shuffle.state_dict()

    def load_state_dict(self, state):
        self._shuffle.load_state_dict(state)
        self._stream = None

    def _random_batches(self, n):
        # The workers read ahead, on a copy: the split's own count is of what was handed out.
        ahead = copy.copy(self._shuffle)
        for first in itertools.count(ahead.drawn, n):
            seeds = range(ahead.seed + first, ahead.seed + first + n)
            yield list(zip(ahead.take(n).tolist(), seeds))

    def _load(self, index_batches):
        loader = DataLoader(
            _Files(self.paths, self.labels, self.shape),
            batch_sampler=index_batches,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
        )
        try:
            for images, labels in loader:
                images = images.to(self.device, non_blocking=True)
                yield images.float() / 255, labels.to(self.device, non_blocking=True)
        except InputError as error:  # a worker's arrives wrapped in its traceback
            raise InputError(str(error).strip().rpartition("InputError: ")[2]) from None


class _Files:
    """Map from (index, seed of the random crop or None for the centre) to uint8 image and label."""

    def __init__(self, paths, labels, shape):
        self.paths, self.labels, self.shape = paths, labels, shape

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, seed = key
        image = open_image(self.paths[index], self.shape[0])
        size = self.shape[1:]
        image = _centre_crop(image, size) if seed is None else _random_crop(image, size, seed)
        return TF.pil_to_tensor(image), self.labels[index]


def _random_crop(image, size, seed):
    # Only the CPU's generator: torch.manual_seed would reset the GPU's as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return RandomResizedCrop(size)(image)


def _centre_crop(image, size):
    height, width = size
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width) * EVALUATION_MARGIN
    short_side = round(min(image.size) * scale)
    return TF.center_crop(TF.resize(image, short_side), size)
