"""What the sources that optimise images share: one update under the objective, and rounds that fill a pool."""

import torch

from datafree.runtime import autocast
from datafree.synthesis.base import BaseSynthesis


class OptimisedSynthesis(BaseSynthesis):
    """Images that are made by steps on the weighted loss of a :class:`SynthesisObjective`.

    augment: images -> views. settings: the Synthesis section. g_steps: steps of a round.
    """

    def __init__(self, objective, augment, settings, g_steps, precision="none"):
        self.objective, self.augment, self.settings, self.g_steps = objective, augment, settings, g_steps
        self.precision, self.device = precision, objective.teacher.mean.device
        self.num_classes = objective.teacher.num_classes
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def _targets(self):
        """A batch of classes to ask for, sorted so that a grid reads by class."""
        n = self.settings.synthesis_batch_size
        return torch.randint(self.num_classes, (n,), device=self.device).sort().values

    def _update(self, make, targets, optimizers, between=None):
        """One step of ``optimizers`` -> the images before it, their loss and terms.

        make: () -> images in [0, 1], differentiable. between: called when all gradients are known.
        """
        optimizers = [*optimizers, *self.objective.optimizers]
        torch.compiler.cudagraph_mark_step_begin()  # what the step before made may be overwritten
        with autocast(self.device, self.precision):
            images = make()
            loss, terms = self.objective(images, self.augment(images), targets, self.with_student)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        if between:
            between()
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return images.detach().float(), loss.detach(), {name: term.detach() for name, term in terms.items()}

    def state_dict(self):
        return {"scaler": self.scaler.state_dict(), "objective": self.objective.state_dict()}

    def load_state_dict(self, state):
        self.scaler.load_state_dict(state["scaler"])
        self.objective.load_state_dict(state["objective"])


class RoundSynthesis(OptimisedSynthesis):
    """Phase 1 of RGAL, CMI, Fast and DeepInversion: a round is ``g_steps`` steps on one batch, which enters the pool.

    What is optimised is said by :meth:`_begin_round`, and by :meth:`_between` and :meth:`_end_round` where there is
    more to do. pool: :class:`datafree.pool.ImagePool`. balanced: draw the classes asked for evenly.
    """

    def __init__(self, objective, augment, pool, settings, g_steps, *, balanced=False, precision="none"):
        super().__init__(objective, augment, settings, g_steps, precision)
        self.pool, self.balanced = pool, balanced

    @property
    def images_made(self):
        return self.pool.added

    def _begin_round(self, targets):
        """() -> images (N, C, H, W) in [0, 1] of these targets (N,), and the optimisers of what they are made from."""
        raise NotImplementedError

    def _between(self):
        """Called in each step between gradients and updates."""

    def _end_round(self):
        """Called after a round's last step."""

    def synthesize(self):
        targets = self._targets()
        make, optimizers = self._begin_round(targets)
        kept, of_kept = torch.zeros(len(targets), *self.pool.shape, device=self.device), {}
        lowest = torch.full((), float("inf"), device=self.device)
        with self.objective.student.frozen():
            for _ in range(self.g_steps):
                images, loss, terms = self._update(make, targets, optimizers, self._between)
                better = (loss < lowest) | (self.settings.keep == "last")
                # Chosen on the device, so that no step waits for the host.
                lowest, kept = torch.where(better, loss, lowest), torch.where(better, images, kept)
                of_kept = {
                    name: torch.where(better | lowest.isinf(), term, of_kept.get(name, term))
                    for name, term in terms.items()
                }
                self.tick()
        self._end_round()
        self.pool.add(kept, targets)
        self.objective.end_round(kept)
        return of_kept

    def sample(self, n):
        return self.pool.sample(n, self.balanced)

    def latest(self):
        return self.pool.newest(self.settings.synthesis_batch_size)

    def state_dict(self):
        return {**super().state_dict(), "pool": self.pool.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.pool.load_state_dict(state["pool"])
