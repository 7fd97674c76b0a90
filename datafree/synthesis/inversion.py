"""Images by inverting the frozen teacher, round by round: through a generator, or as pixels."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from datafree.models.generator import Generator
from datafree.schedule import Schedule
from datafree.synthesis import SOURCES, Traits
from datafree.synthesis.objective import ADAM_BETAS
from datafree.synthesis.optimised import Render, RoundSynthesis


class InversionSynthesis(RoundSynthesis):
    """Phase 1 of RGAL, CMI and Fast: per round, Adam on a generator and on the latents of one batch.

    ``generator_init`` is the initialisation of a round: ``random``, new weights (CMI, RGAL); ``reptile``, weights that
    follow the rounds (Nichol et al. 2018), with Adam's state; ``maml``, weights that the gradients of all steps of a
    round move through an outer Adam (first-order MAML, Finn et al. 2017, as in Fast). With a meta-learned
    initialisation a few steps per round are enough. Such a generator sees new latents in every round, so it can follow
    the target classes only if these are in the latents, or if it learns fast: ``class_noise`` adds a class-specific
    mean to them.
    """

    traits: ClassVar[Traits] = SOURCES["inversion"].traits

    def __init__(self, teacher: Any, student: Any, augment: Any, card: Any, config: Any, device: Any = "cpu"):
        super().__init__(teacher, student, augment, card, config, device)
        settings = self.settings
        self.generator = Generator(settings.nz, settings.ngf, card.shape, config.run.micro_batch).to(self.device)
        self.optimizer, self.meta_optimizer = self._new_optimizer(), None
        if settings.generator_init == "maml":
            rate = settings.meta_rate * settings.lr_g * self.g_steps
            self.meta_optimizer = torch.optim.Adam(self.generator.parameters(), rate, ADAM_BETAS)
        directions = torch.randn(self.num_classes, settings.nz, device=self.device)
        self.centres = settings.class_noise * F.normalize(directions)
        self.reset_epoch, self.reset_done = settings.reset_epoch, not settings.reset_epoch

    def follow(self, schedule: Schedule) -> None:
        super().follow(schedule)
        recipe = Schedule.of(self.config.schedule, 1)
        self.reset_epoch = round(self.settings.reset_epoch / recipe.epochs * schedule.epochs)

    def _begin_round(self, targets: Tensor) -> tuple[Render, list[torch.optim.Optimizer]]:
        settings = self.settings
        z = torch.randn(len(targets), settings.nz, device=self.device) + self.centres[targets]
        if settings.generator_init == "random":
            self.generator.reset()
        elif self.epoch >= self.reset_epoch and not self.reset_done:
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

    def _before_step(self) -> None:
        if self.settings.generator_init == "maml":
            for total, parameter in zip(self.meta_gradient, self.generator.parameters()):
                # A step in fp16 that overflowed counts as none, as it does for the inner optimiser.
                assert parameter.grad is not None
                total += parameter.grad.nan_to_num(0, 0, 0) if self.update.scaler.is_enabled() else parameter.grad

    @torch.no_grad()
    def _end_round(self) -> None:
        """Move the meta-learned initialisation, from which the generator continues."""
        if self.settings.generator_init == "reptile":
            for parameter, start in zip(self.generator.parameters(), self.start):
                parameter.copy_(start.lerp(parameter, self.settings.meta_rate))
        elif self.meta_optimizer is not None:
            for parameter, start, gradient in zip(self.generator.parameters(), self.start, self.meta_gradient):
                parameter.copy_(start)
                parameter.grad = gradient
            self.meta_optimizer.step()

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.generator.parameters(), self.settings.lr_g, ADAM_BETAS)

    def _parts(self) -> dict[str, Any]:
        """The generator, and what a round takes over from the one before."""
        kept: dict[str, dict[str, Any]] = {
            "random": {},
            "reptile": {"optimizer": self.optimizer},
            "maml": {"meta_optimizer": self.meta_optimizer},
        }
        return {"generator": self.generator, **kept[self.settings.generator_init]}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "centres": self.centres, "reset_done": self.reset_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["centres"].shape != self.centres.shape or type(state["reset_done"]) is not bool:
            raise ValueError("its centres of the classes are damaged")
        self.centres, self.reset_done = state["centres"].to(self.device), state["reset_done"]


class PixelSynthesis(RoundSynthesis):
    """DeepInversion (Yin et al., CVPR 2020): per round, Adam on the pixels of one batch, from Gaussian noise.

    They move in the teacher's normalised units, as does ``lr_g``, and are clipped to [0, 1] after each step.
    """

    traits: ClassVar[Traits] = SOURCES["pixels"].traits

    def _begin_round(self, targets: Tensor) -> tuple[Render, list[torch.optim.Optimizer]]:
        self.pixels = torch.randn(len(targets), *self.pool.shape, device=self.device)
        self._clip()
        optimizer = torch.optim.Adam([self.pixels.requires_grad_()], self.settings.lr_g, ADAM_BETAS)
        optimizer.register_step_post_hook(lambda *_: self._clip())
        return lambda: self.pixels * self.teacher.std + self.teacher.mean, [optimizer]

    @torch.no_grad()
    def _clip(self) -> None:
        mean, std = self.teacher.mean, self.teacher.std
        self.pixels.copy_(self.pixels.clamp(-mean / std, (1 - mean) / std))
