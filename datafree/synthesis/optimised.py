"""What the sources that optimise images share: one update under the objective, and rounds that fill a pool."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from datafree.datasets.cards import DatasetCard
from datafree.errors import InputError, OptionError
from datafree.pool import Batch, ImagePool, as_bytes
from datafree.schedule import Schedule
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.objective import SynthesisObjective
from datafree.update import Update, detached, load_part

if TYPE_CHECKING:
    from datafree.network import Network

Render = Callable[[], Tensor]  # () -> images (N, C, H, W) in [0, 1], differentiable


class OptimisedSynthesis(BaseSynthesis):
    """Images that are optimised under the weighted terms of a :class:`SynthesisObjective`.

    It reads the sections synthesis, relation, schedule and run of its ``config``.
    """

    card: DatasetCard

    def __init__(
        self,
        teacher: "Network",
        student: "Network",
        augment: Callable[[Tensor], Tensor],
        card: DatasetCard,
        config: Any,
        device: torch.device | str = "cpu",
    ):
        super().__init__(teacher, student, augment, card, config, device)
        self.settings, self.g_steps, self.num_classes = config.synthesis, config.schedule.g_steps, teacher.num_classes
        self.objective = SynthesisObjective(config.synthesis, config.relation, teacher, student)
        run = config.run
        if self.objective.by_gradient and (run.compile != "off" or run.precision == "fp16"):
            other = f"--compile {run.compile}" if run.compile != "off" else "--precision fp16"
            raise OptionError(
                f"--triplet_unit gradient does not go with {other}, as it takes several gradients of one pass, without "
                "a scale; remove one of them"
            )
        if config.schedule.warmup:
            self.objective.active(with_student=False)  # refuses a warm-up without terms before the run begins
        self.update = Update(teacher, config.run.precision)
        self._first_step = True

    def _targets(self, n: int = 0) -> Tensor:
        """n target classes, by default those of a synthesis step, sorted so that a grid reads by class."""
        n = n or self.settings.synthesis_batch_size
        return torch.randint(self.num_classes, (n,), device=self.device).sort().values

    def _step(
        self,
        render: Render,
        targets: Tensor,
        optimizers: Sequence[torch.optim.Optimizer],
        before_step: Callable[[], Any] | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One step of ``optimizers`` -> the images before it, their loss and terms.

        before_step: called after the backward pass, before the optimisers step.
        """

        def compute() -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            images = render()
            if self._first_step:  # later ones would wait for the device
                self._check_images(images, len(targets), "the function that renders images", check_range=True)
                self._first_step = False
            loss, terms = self.objective(images, self.augment(images), targets, self.with_student)
            return loss, (images, terms)

        loss, (images, terms) = self.update(compute, [*optimizers, *self.objective.optimizers], before_step)
        return images.detach().float(), loss, detached(terms)

    def _parts(self) -> dict[str, Any]:
        """What a subclass trains, and the optimisers that live on: name -> object with state_dict, load_state_dict."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "scaler": self.update.scaler.state_dict(),
            "objective": self.objective.state_dict(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.update.scaler.load_state_dict(state["scaler"])
        self.objective.load_state_dict(state["objective"])
        for name, part in self._parts().items():
            load_part(part, state[name])


class Made(NamedTuple):
    """A batch of images (N, C, H, W) as bytes, their target classes (N,), and the loss and terms of its step."""

    images: Tensor
    targets: Tensor
    loss: Tensor
    terms: dict[str, Tensor]


class RoundSynthesis(OptimisedSynthesis):
    """Phase 1 of RGAL, CMI, Fast, NAYER and DeepInversion: ``g_steps`` steps on a batch, which enters the pool.

    A round has one batch or several (``batches``, in the warm-up ``warmup_batches``), one after another. A subclass
    states what is optimised by :meth:`_begin_round`, and by :meth:`_before_step` and :meth:`_end_round` if there is
    more to do; they are called for each batch.
    """

    _pool_is_saved = True

    def __init__(self, *parts: Any, **named: Any):
        super().__init__(*parts, **named)
        self.pool = make_pool(self.config, self.card, self.device)
        plan = Schedule.of(self.config.schedule, self.settings.synthesis_batch_size)
        self.batches, self.warmup_batches = plan.batches, plan.warmup_batches

    def _begin_round(self, targets: Tensor) -> tuple[Render, list[torch.optim.Optimizer]]:
        """A function that renders images of these target classes (N,), and the optimisers of its parameters."""
        raise InputError(
            f"{type(self).__name__} has no method _begin_round(targets), which returns (render, optimisers)"
        )

    def _checked_round(self, begun: Any) -> tuple[Render, list[torch.optim.Optimizer]]:
        if isinstance(begun, tuple) and len(begun) == 2 and callable(begun[0]) and isinstance(begun[1], (list, tuple)):
            if all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in begun[1]):
                return begun[0], list(begun[1])
        raise InputError(
            f"{type(self).__name__}._begin_round returned {type(begun).__name__}; it must return (render, optimisers): "
            "a function without arguments, and a list of torch optimisers"
        )

    def _before_step(self) -> None:
        """Called in each step after the backward pass, before the optimisers step."""

    def _end_round(self) -> None:
        """Called after a batch's last step."""

    def synthesize(self) -> dict[str, Tensor]:
        # The pool gets them when all are made, so that a round that is stopped leaves nothing in it.
        made = [self._make_batch() for _ in range(self.batches if self.with_student else self.warmup_batches)]
        for batch in made:
            self.pool.add(batch.images, batch.targets)
        self.images_made = self.pool.added
        self.round_loss = torch.stack([batch.loss for batch in made]).mean()
        return {name: torch.stack([batch.terms[name] for batch in made]).mean() for name in made[0].terms}

    def _make_batch(self) -> Made:
        """Optimise one batch."""
        targets = self._targets()
        render, optimizers = self._checked_round(self._begin_round(targets))
        kept = torch.zeros(len(targets), *self.pool.shape, device=self.device)
        kept_terms: dict[str, Tensor] = {}
        lowest = torch.full((), float("inf"), device=self.device)
        with self.objective.student.frozen():
            for _ in range(self.g_steps):
                images, loss, terms = self._step(render, targets, optimizers, self._before_step)
                better = (loss < lowest) | (self.settings.keep == "last")
                # Chosen on the device, so that no step waits for the host.
                lowest, kept = torch.where(better, loss, lowest), torch.where(better, images, kept)
                kept_terms = {
                    name: torch.where(better | lowest.isinf(), term, kept_terms.get(name, term))
                    for name, term in terms.items()
                }
                self.tick()
        self._end_round()
        self.objective.end_round(kept)
        return Made(as_bytes(kept), targets, lowest, kept_terms)

    def sample(self, n: int) -> Batch:
        return self.pool.sample(n, self.settings.balanced_sampling, self.settings.pool_order == "passes")

    def follow(self, schedule: Schedule) -> None:
        self.pool.resize(pool_capacity(self.config, schedule))

    def latest(self) -> tuple[Tensor, Tensor | None]:
        return self.pool.newest(self.settings.synthesis_batch_size)

    @contextmanager
    def _without_pool(self) -> Iterator[None]:
        """Its images may be many, and a round adds to them when all of its steps are done."""
        self._pool_is_saved = False
        try:
            yield
        finally:
            self._pool_is_saved = True

    def round_state(self) -> dict[str, Any]:
        with self._without_pool():
            return super().round_state()

    def restore_round(self, state: dict[str, Any]) -> None:
        with self._without_pool():
            super().restore_round(state)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **({"pool": self.pool.state_dict()} if self._pool_is_saved else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self._pool_is_saved:
            self.pool.load_state_dict(state["pool"])


def make_pool(config: Any, card: DatasetCard, device: torch.device) -> ImagePool:
    """A pool for all images of a run, or for ``pool_size``. Raises InputError if that cannot hold one round."""
    size, batch = config.synthesis.pool_size, config.synthesis.synthesis_batch_size
    plan = Schedule.of(config.schedule, batch)
    most = max(plan.batches, plan.warmup_batches) * batch
    if 0 < size < most:
        several = "" if most == batch else f" times {most // batch} batches"
        raise InputError(
            f"--pool_size {size} cannot hold the images of one round; raise it to {most} (--synthesis_batch_size "
            f"{batch}{several}) or more, or give 0 to keep all"
        )
    return ImagePool(pool_capacity(config, plan), card.shape, card.num_classes, device)


def pool_capacity(config: Any, schedule: Schedule) -> int:
    """Images that a pool has to hold: all that the schedule makes, or ``pool_size``."""
    images = schedule.total_batches * config.synthesis.synthesis_batch_size
    return min(config.synthesis.pool_size or images, images)
