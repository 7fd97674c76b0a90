"""The image pool: every synthetic image of the run, as bytes in memory on the device."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datafree.errors import InputError, out_of_memory_in
from datafree.runtime import free_memory, unfilled


class Batch(NamedTuple):
    """Images (N, C, H, W) in [0, 1], their target classes (N,) and their ids (N,) in the pool, None if there are none.

    Equal ids are equal images, so that outputs of the teacher can be cached.
    """

    images: Tensor
    targets: Tensor | None = None
    ids: Tensor | None = None


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as they are kept: rounded to uint8, 255 for 1; bytes are returned as they are."""
    if images.dtype == torch.uint8:
        return images
    return images.detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


class ImagePool:
    """A uint8 ring buffer of images (N, C, H, W) with their target classes; beyond ``capacity`` the oldest are dropped.

    It belongs to one run: images of earlier runs are never sampled, unless it begins with them.

    start: images that it begins with, which stay. added: images that were added to these.
    """

    def __init__(self, capacity: int, shape: Sequence[int], num_classes: int, device: torch.device):
        self.shape, self.num_classes, self.device = tuple(shape), num_classes, device
        self.start = self.added = 0
        self._allocate(capacity, "--pool_size")
        self._rest = torch.empty(0, dtype=torch.long, device=device)  # of the current pass

    def resize(self, capacity: int) -> None:
        """Have room for so many images beside those of the start, which stay, as do all that were added.

        Unless some were dropped, or would be: then the others are forgotten, too.
        """
        if capacity == self._ring:
            return
        if self.added > min(self._ring, capacity):
            self.added, self._rest = 0, self._rest[:0]
        held = len(self)
        images, targets = self.images[:held], self.targets[:held]
        self._allocate(self.start + capacity, "--pool_size")
        self.images[:held], self.targets[:held] = images, targets

    def _allocate(self, capacity: int, option: str) -> None:
        """Make room for so many images; InputError, which names the ``option`` to lower, if there is not enough."""
        size, free = capacity * math.prod(self.shape), free_memory(self.device)
        if size > free:  # or the system might grant it, and kill the run once the pool fills
            raise InputError(
                f"a pool of {capacity:,} images of {self.shape} takes {size / 1e9:.1f} GB but "
                f"{free / 1e9:.1f} are free; give a smaller {option}"
            )
        self.capacity = capacity
        with out_of_memory_in("allocation of the image pool", option):
            self.images = unfilled(capacity, *self.shape, dtype=torch.uint8, device=self.device)
            self.targets = unfilled(capacity, dtype=torch.long, device=self.device)

    def begin_with(self, count: int, read: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Let an empty pool begin with ``count`` images, which stay in it, beside as many others as it had room for.

        read: () -> uint8 images (count, C, H, W) and their classes (count,); called once there is room for them.
        """
        self.images = self.images.new_empty(0)  # or both would be there for a moment
        self._allocate(self.capacity + count, "--pool_size, or fewer --pool_images")
        images, targets = read()
        self.images[:count], self.targets[:count], self.start = images, targets, count

    @property
    def _ring(self) -> int:
        """Places of the images that are added."""
        return self.capacity - self.start

    def __len__(self) -> int:
        return self.start + min(self.added, self._ring)

    def add(self, images: Tensor, targets: Tensor) -> None:
        """Append images (N, C, H, W), as bytes or in [0, 1], and their target classes (N,)."""
        if tuple(images.shape[1:]) != self.shape:
            raise InputError(f"images of shape {tuple(images.shape[1:])} do not fit into a pool of {self.shape}")
        place = self.start + (self.added + torch.arange(len(images), device=self.device)) % self._ring
        last = slice(-self._ring, None)  # of a batch larger than the pool, because no place may occur twice
        self.images[place[last]] = as_bytes(images[last])
        self.targets[place[last]] = targets[last]
        self.added += len(images)
        self._rest = self._rest[:0]  # a new pass has the new images, too

    def sample(self, n: int, balanced: bool = False, passes: bool = False) -> Batch:
        """n random images; their ids count them in the order in which they were added, from 0.

        Without replacement while the pool is large enough. balanced: equally many of every class (up to one), as far
        as the pool has them. passes: in shuffled passes over the pool, of which images that are added start a new one.
        """
        size = len(self)
        if passes:
            order = self._next_of_pass(n, size)
        elif balanced:
            order = self._class_order(size)[:n]
        else:
            order = torch.randperm(size, device=self.device)[:n]
        if n > len(order):
            order = torch.cat([order, torch.randint(size, (n - len(order),), device=self.device)])
        return Batch(*self._at(order), self._ids(order))

    def _ids(self, places: Tensor) -> Tensor:
        """The number of the image at each place: those of the start, then the others in the order of their coming."""
        if not self._ring:
            return places
        newest, place = self.added - 1, places - self.start
        ids = self.start + newest - (newest - place) % self._ring
        return torch.where(place < 0, places, ids) if self.start else ids

    def _next_of_pass(self, n: int, size: int) -> Tensor:
        """The next n places, of as many passes as that takes."""
        while len(self._rest) < n:
            self._rest = torch.cat([self._rest, torch.randperm(size, device=self.device)])
        order, self._rest = self._rest[:n], self._rest[n:]
        return order

    def newest(self, n: int) -> tuple[Tensor, Tensor]:
        """The last n images, or as many as are held, with their target classes; those of the start are the first."""
        size = len(self)
        age = torch.arange(size - min(n, size), size, device=self.device)
        places = self.start + (self.added - size + age) % self._ring if self._ring else age
        return self._at(torch.where(age < self.start, age, places) if self.start else places)

    def spread(self, n: int) -> tuple[Tensor, Tensor]:
        """n images, or as many as are held, evenly spaced in the pool, with their target classes."""
        return self._at(torch.linspace(0, len(self) - 1, min(n, len(self)), device=self.device).long())

    def _at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[places].float().div_(255), self.targets[places]

    def _class_order(self, size: int) -> Tensor:
        """A random order in which the k-th image of every class comes before the (k+1)-th of any."""
        shuffled = torch.randperm(size, device=self.device)
        by_class = shuffled[self.targets[shuffled].argsort(stable=True)]
        classes = self.targets[by_class]
        start = torch.searchsorted(classes, torch.arange(self.num_classes, device=self.device))
        rank = torch.arange(size, device=self.device) - start[classes]
        # Ties between classes are broken at random, so that no class is favoured by its index.
        return by_class[(rank + torch.rand(size, device=self.device) * 0.5).argsort()]

    def state_dict(self) -> dict[str, Any]:
        # Copies, because a checkpoint of a slice would hold the whole capacity.
        size = len(self)
        return {
            "images": self.images[:size].clone(),
            "targets": self.targets[:size].clone(),
            "added": self.added,
            "rest": self._rest.clone(),
            **({"start": self.start} if self.start else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises InputError for a pool of another size, and ValueError for what is no pool's state."""
        images, targets, rest = state["images"], state["targets"], state["rest"]
        if not all(map(torch.is_tensor, (images, targets, rest))) or type(state["added"]) is not int:
            raise ValueError("its pool is damaged")
        if state.get("start", 0) != self.start:
            raise ValueError(f"its pool begins with {state.get('start', 0)} images, not {self.start}")
        if images.shape[1:] != self.images.shape[1:] or targets.shape != images.shape[:1]:
            raise ValueError(f"its pool has images of shape {tuple(images.shape[1:])}")
        if [part.dtype for part in (images, targets, rest)] != [torch.uint8, torch.long, torch.long]:
            raise ValueError("its pool is of other types")
        size, made = len(images), min(state["added"], self._ring)
        if size != self.start + made:
            raise InputError(
                f"the checkpoint's pool holds {size - self.start} of {state['added']} images made but this run's would "
                f"hold {made}; give the --pool_size it was written with"
            )
        self.images[:size] = state["images"].to(self.device)
        self.targets[:size] = state["targets"].to(self.device)
        self.added, self._rest = state["added"], state["rest"].to(self.device)
