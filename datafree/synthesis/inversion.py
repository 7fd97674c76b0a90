"""A generator trained against the frozen teacher for each round, whose best batch enters the pool."""
from itertools import chain

import torch

from datafree.runtime import autocast
from datafree.synthesis.base import BaseSynthesis

ADAM_BETAS = (0.5, 0.999)


class InversionSynthesis(BaseSynthesis):
    """Phase 1 of RGAL and CMI: per round, ``g_steps`` Adam steps on a generator and its noise.

    With ``generator_init: random`` every round starts from new weights. With ``meta`` it starts
    from weights that follow the rounds (Reptile, Nichol et al. 2018) and keeps Adam's state, so
    that a few steps a round are enough. Such a generator sees ever new noise, so it can follow the
    classes asked for only if the noise tells them: ``class_noise`` moves each class's noise its own way.

    objective: :class:`SynthesisObjective`. augment: images -> views. settings: the Synthesis section.
    """

    def __init__(self, objective, generator, augment, pool, settings, g_steps, *, balanced=False, precision="none"):
        self.objective, self.generator, self.augment, self.pool = objective, generator, augment, pool
        self.settings, self.g_steps, self.balanced, self.precision = settings, g_steps, balanced, precision
        self.scaler = torch.amp.GradScaler(pool.device.type, enabled=precision == "fp16")
        self.optimizer = self._new_optimizer()
        directions = torch.randn(pool.num_classes, settings.nz, device=pool.device)
        self.centres = settings.class_noise * torch.nn.functional.normalize(directions)

    @property
    def images_made(self):
        return self.pool.added

    def synthesize(self):
        n, device = self.settings.synthesis_batch_size, self.pool.device
        targets = torch.randint(self.pool.num_classes, (n,), device=device).sort().values
        z = torch.randn(n, self.settings.nz, device=device) + self.centres[targets]
        lr_z = self.settings.lr_g if self.settings.lr_z is None else self.settings.lr_z
        z_optimizer = torch.optim.Adam([z.requires_grad_()], lr_z, ADAM_BETAS)
        start, of_kept = self._begin_round(), {}
        kept = torch.zeros(n, *self.pool.shape, device=device)
        lowest = torch.full((), float("inf"), device=device)
        with self.objective.student.frozen():
            for _ in range(self.g_steps):
                images, loss, terms = self._step(z, targets, z_optimizer)
                better = (loss < lowest) | (self.settings.keep == "last")
                # Chosen on the device, so that no step waits for the host.
                lowest, kept = torch.where(better, loss, lowest), torch.where(better, images, kept)
                of_kept = {name: torch.where(better | lowest.isinf(), term.detach(), of_kept.get(name, term.detach()))
                           for name, term in terms.items()}
                self.tick()
        self._end_round(start)
        self._store(kept, targets)
        return of_kept

    def _step(self, z, targets, z_optimizer):
        """One update of generator and noise -> the images before it, their loss and terms."""
        with autocast(z.device, self.precision):
            images = self.generator(z)
            loss, terms = self.objective(images, self.augment(images), targets, self.with_student)
        self.optimizer.zero_grad()
        z_optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.step(z_optimizer)
        self.scaler.update()
        return images.detach().float(), loss.detach(), terms

    def _begin_round(self):
        """Set the weights that a round starts from; a copy of them is returned where they are learned."""
        if self.settings.generator_init == "random":
            self.generator.reset()
            self.optimizer = self._new_optimizer()
            return None
        return [p.detach().clone() for p in self.generator.parameters()] if self.settings.meta_rate < 1 else None

    @torch.no_grad()
    def _end_round(self, start):
        """Reptile: start <- start + meta_rate * (end - start)."""
        if start is not None:
            for parameter, before in zip(self.generator.parameters(), start):
                parameter.copy_(before.lerp(parameter, self.settings.meta_rate))

    def _store(self, images, targets):
        self.pool.add(images, targets)
        if self.objective.contrast:
            self.objective.contrast.remember(images)

    def _new_optimizer(self):
        head = self.objective.contrast.head.parameters() if self.objective.contrast else ()
        return torch.optim.Adam(chain(self.generator.parameters(), head), self.settings.lr_g, ADAM_BETAS)

    def sample(self, n):
        return self.pool.sample(n, self.balanced)

    def latest(self):
        return self.pool.newest(self.settings.synthesis_batch_size)

    def state_dict(self):
        state = {"generator": self.generator.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "scaler": self.scaler.state_dict(), "pool": self.pool.state_dict(), "centres": self.centres}
        if self.objective.contrast:
            state["contrast"] = self.objective.contrast.state_dict()
        return state

    def load_state_dict(self, state):
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.pool.load_state_dict(state["pool"])
        self.centres = state["centres"].to(self.pool.device)
        if self.objective.contrast:
            self.objective.contrast.load_state_dict(state["contrast"])
