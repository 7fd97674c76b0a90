"""Images by inverting the frozen teacher, round by round: through a generator, or as pixels."""

from functools import partial

import torch
from torch.nn import functional as F

from datafree.synthesis.objective import ADAM_BETAS
from datafree.synthesis.optimised import RoundSynthesis


class InversionSynthesis(RoundSynthesis):
    """Phase 1 of RGAL, CMI and Fast: per round, Adam on a generator and on the noise of one batch.

    ``generator_init`` says what a round starts from: ``random``, new weights (CMI, RGAL); ``reptile``, weights that
    follow the rounds (Nichol et al. 2018), with Adam's state; ``maml``, weights that the gradients of all of a round's
    steps move through an Adam of their own (first-order MAML, Finn et al. 2017, as Fast has it). A learned start
    makes a few steps a round enough. Such a generator sees ever new noise, so it can follow the classes asked for
    only if the noise tells them, or is learned fast: ``class_noise`` moves each class's noise its own way.
    """

    def __init__(self, objective, generator, *arguments, **options):
        super().__init__(objective, *arguments, **options)
        self.generator, settings = generator, self.settings
        self.optimizer, self.meta_optimizer = self._new_optimizer(), None
        if settings.generator_init == "maml":
            rate = settings.meta_rate * settings.lr_g * self.g_steps
            self.meta_optimizer = torch.optim.Adam(generator.parameters(), rate, ADAM_BETAS)
        directions = torch.randn(self.num_classes, settings.nz, device=self.device)
        self.centres = settings.class_noise * F.normalize(directions)
        self.reset_done = not settings.reset_epoch

    def _begin_round(self, targets):
        settings = self.settings
        z = torch.randn(len(targets), settings.nz, device=self.device) + self.centres[targets]
        if settings.generator_init == "random":
            self.generator.reset()
        elif self.epoch >= settings.reset_epoch and not self.reset_done:
            self.generator.reset_first_layer()
            self.reset_done = True
        if settings.generator_init != "reptile":
            self.optimizer = self._new_optimizer()
        if settings.generator_init != "random":
            self.start = [p.detach().clone() for p in self.generator.parameters()]
        if settings.generator_init == "maml":
            self.meta_gradient = [torch.zeros_like(p) for p in self.generator.parameters()]
        lr_z = settings.lr_g if settings.lr_z is None else settings.lr_z
        z_optimizer = torch.optim.Adam([z.requires_grad_()], lr_z, ADAM_BETAS)
        return partial(self.generator, z), [self.optimizer, z_optimizer]

    def _between(self):
        if self.settings.generator_init == "maml":
            for total, parameter in zip(self.meta_gradient, self.generator.parameters()):
                # A step in fp16 that overflowed counts as none, as it does for the inner optimiser.
                total += parameter.grad.nan_to_num(0, 0, 0) if self.scaler.is_enabled() else parameter.grad

    @torch.no_grad()
    def _end_round(self):
        """Move the learned start, from which the generator goes on."""
        if self.settings.generator_init == "reptile":
            for parameter, start in zip(self.generator.parameters(), self.start):
                parameter.copy_(start.lerp(parameter, self.settings.meta_rate))
        elif self.settings.generator_init == "maml":
            for parameter, start, gradient in zip(self.generator.parameters(), self.start, self.meta_gradient):
                parameter.copy_(start)
                parameter.grad = gradient
            self.meta_optimizer.step()

    def _new_optimizer(self):
        return torch.optim.Adam(self.generator.parameters(), self.settings.lr_g, ADAM_BETAS)

    def _parts(self):
        """What a round takes over from the one before, and the generator."""
        kept = {"random": {}, "reptile": {"optimizer": self.optimizer}, "maml": {"meta_optimizer": self.meta_optimizer}}
        return {"generator": self.generator, **kept[self.settings.generator_init]}

    def state_dict(self):
        return {
            **super().state_dict(),
            **{name: part.state_dict() for name, part in self._parts().items()},
            "centres": self.centres,
            "reset_done": self.reset_done,
        }

    def load_state_dict(self, state):
        super().load_state_dict(state)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.centres, self.reset_done = state["centres"].to(self.device), state["reset_done"]


class PixelSynthesis(RoundSynthesis):
    """DeepInversion (Yin et al., CVPR 2020): per round, Adam on the pixels of one batch, from Gaussian noise.

    They move in the teacher's normalised units, in which ``lr_g`` is, and are cut to [0, 1] after each step.
    """

    def _begin_round(self, targets):
        teacher = self.objective.teacher
        self.pixels = torch.randn(len(targets), *self.pool.shape, device=self.device)
        self._cut()
        optimizer = torch.optim.Adam([self.pixels.requires_grad_()], self.settings.lr_g, ADAM_BETAS)
        optimizer.register_step_post_hook(lambda *_: self._cut())
        return lambda: self.pixels * teacher.std + teacher.mean, [optimizer]

    @torch.no_grad()
    def _cut(self):
        teacher = self.objective.teacher
        self.pixels.copy_(self.pixels.clamp(-teacher.mean / teacher.std, (1 - teacher.mean) / teacher.std))
