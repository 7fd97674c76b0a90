"""The interface between engine and source of images."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from datafree.datasets.cards import DatasetCard
from datafree.errors import InputError
from datafree.pool import Batch
from datafree.schedule import Schedule
from datafree.synthesis import Traits
from datafree.update import are_terms

if TYPE_CHECKING:
    from datafree.network import Network


ROUNDING = 1e-3  # by which images may leave [0, 1]


class BaseSynthesis:
    """Makes images and hands them out; a user-defined source overrides ``synthesize`` and ``sample``.

    ``--method path/to/file.py:Class`` constructs it with what becomes its attributes: teacher, student
    (:class:`datafree.network.Network`), augment (images -> views), card, config (all options), device.

    traits: what kind of source it is (:class:`datafree.synthesis.Traits`).
    images_made: how many images were synthesised so far.
    round_loss: the weighted loss of the last round, a scalar, of which the engine checks that it is finite.
    g_steps: steps of a batch, after each of which it calls ``tick``; 0 if it does not. batches, warmup_batches: of a
    round, after the warm-up and in it.
    epoch: of the current round, counted from 0. with_student: False during warm-up, when terms that use the student
    are inactive. Both are set by :meth:`round`.
    tick: set by the engine; called after each synthesis step. It counts the step, and may end the round by an exception
    that is to pass: the round is then made again from the state before it.
    """

    traits: ClassVar[Traits] = Traits()
    teacher: "Network"
    student: "Network"
    augment: Callable[[Tensor], Tensor]
    card: DatasetCard | None = None
    config: Any
    images_made = 0
    round_loss: Tensor | None = None
    g_steps = 0
    batches = warmup_batches = 1
    epoch = 0
    with_student = True
    device = torch.device("cpu")
    _range_is_checked = False

    def __init__(
        self,
        teacher: "Network | None" = None,
        student: "Network | None" = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        card: DatasetCard | None = None,
        config: Any = None,
        device: torch.device | str = "cpu",
    ):
        self.teacher, self.student, self.augment = teacher, student, augment  # type: ignore[assignment]
        self.card, self.config = card, config
        self.device = torch.device(device)

    @staticmethod
    def tick() -> Any:
        """Nothing, until an engine sets it."""

    def synthesize(self) -> dict[str, Tensor]:
        """One round of synthesis -> unweighted terms, name -> scalar tensor; {} if there is nothing to do."""
        return {}

    def sample(self, n: int) -> tuple[Tensor, Tensor | None] | Batch:
        """n images (n, C, H, W) in [0, 1] on the device, and their target classes (n,) or None.

        A source that keeps its images in a :class:`datafree.pool.ImagePool` called ``pool`` may return what its
        ``sample`` does, a :class:`Batch` with ids, so that outputs of the teacher can be cached.
        """
        raise InputError(f"{type(self).__name__} has no method sample(n); it must return n images and their classes")

    def round(self, epoch: int, with_student: bool) -> dict[str, Tensor]:
        """:meth:`synthesize` as the engine calls it -> its terms. Raises InputError for a wrong return value."""
        self.epoch, self.with_student = epoch, with_student
        terms = self.synthesize()
        terms = {} if terms is None else terms
        if not are_terms(terms):
            raise InputError(
                f"{type(self).__name__}.synthesize() returned {terms!r}; it must return the terms to log, name -> "
                "scalar tensor, or nothing"
            )
        return terms

    def batch(self, n: int) -> Batch:
        """:meth:`sample` as the engine calls it. Raises InputError for a wrong return value.

        The range of the values is checked on the first batch only, because that waits for the device.
        """
        call, batch = f"{type(self).__name__}.sample({n})", self.sample(n)
        if not isinstance(batch, tuple) or len(batch) not in (2, 3) or not torch.is_tensor(batch[0]):
            raise InputError(
                f"{call} returned a {type(batch).__name__}; it must return (images, targets) or a Batch, targets None "
                "if there are none"
            )
        batch = Batch(*batch)
        self._check_images(batch.images, n, call, check_range=not self._range_is_checked)
        self._range_is_checked = True
        if batch.targets is not None and not (torch.is_tensor(batch.targets) and batch.targets.shape == (n,)):
            raise InputError(
                f"{call} returned target classes {tuple(getattr(batch.targets, 'shape', ()))}; they must be a tensor "
                f"of shape ({n},), or None"
            )
        return batch

    def _check_images(self, images: Tensor, n: int, call: str, check_range: bool) -> None:
        shape = (n, *(self.card.shape if self.card else images.shape[1:]))
        if images.shape != shape or not images.is_floating_point() or images.device.type != self.device.type:
            raise InputError(
                f"{call} returned images {tuple(images.shape)} of {images.dtype} on {images.device.type}; they must be "
                f"floats of shape {shape} on {self.device.type}"
            )
        if check_range and not ((images >= -ROUNDING) & (images <= 1 + ROUNDING)).all():
            raise InputError(
                f"{call} returned images from {images.min():.4g} to {images.max():.4g}; they must be in [0, 1]"
            )

    def latest(self) -> tuple[Tensor, Tensor | None]:
        """Up to 256 images that show what the source makes now, with their target classes or None."""
        # Must not advance the random stream, or drawing a grid would change the training.
        made = self.images_made
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            batch = self.batch(256)
        self.images_made = made
        return batch.images, batch.targets

    def follow(self, schedule: Schedule) -> None:
        """Take over that the run has another length now, as one with a time budget may; nothing depends on it here."""

    def round_state(self) -> dict[str, Any]:
        """A copy of the state that a round changes before it ends, for :meth:`restore_round`."""
        return copy.deepcopy(self.state_dict())

    def restore_round(self, state: dict[str, Any]) -> None:
        """Make everything as before a round that did not end, as if it had not begun."""
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs, beside the random state; a user-defined source adds its own state."""
        return {"images_made": self.images_made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if type(state["images_made"]) is not int:
            raise ValueError("its number of images is damaged")
        self.images_made = state["images_made"]
