"""One generator, trained throughout the run, whose images the student sees once: DAFL, ZSKT, DFAD, DFQ."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from datafree.models.generator import Generator
from datafree.pool import Batch
from datafree.synthesis import SOURCES, Traits
from datafree.synthesis.objective import ADAM_BETAS
from datafree.synthesis.optimised import OptimisedSynthesis


class GenerativeSynthesis(OptimisedSynthesis):
    """A round is ``g_steps`` steps of one generator, each on new latents; every sample is new, and none is kept.

    The adversarial term uses the student in evaluation mode, as CMI's code does. In training mode, as in the original
    code of ZSKT and DFAD, both gave far worse students (docs/results/methods.md).
    """

    traits: ClassVar[Traits] = SOURCES["generator"].traits

    def __init__(self, teacher: Any, student: Any, augment: Any, card: Any, config: Any, device: Any = "cpu"):
        super().__init__(teacher, student, augment, card, config, device)
        self.generator = Generator(self.settings.nz, self.settings.ngf, card.shape).to(self.device)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), self.settings.lr_g, ADAM_BETAS)

    def synthesize(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        with self.objective.student.frozen():
            for _ in range(self.g_steps):
                images, _, terms = self._step(self._render, self._targets(), [self.optimizer])
                sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
                self.tick()
        self.objective.end_round(images)
        return {name: total / self.g_steps for name, total in sums.items()}

    def _render(self, n: int | None = None) -> Tensor:
        z = torch.randn(n or self.settings.synthesis_batch_size, self.settings.nz, device=self.device)
        return self.generator(z)

    @torch.no_grad()
    def sample(self, n: int) -> Batch:
        self.images_made += n
        return Batch(self._render(n))

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
