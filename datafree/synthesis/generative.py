"""One generator, trained throughout the run, whose images the student sees once: DAFL, ZSKT, DFAD, DFQ, GDFQ."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from datafree.models.generator import Generator
from datafree.pool import Batch
from datafree.synthesis import SOURCES, Traits
from datafree.synthesis.objective import ADAM_BETAS
from datafree.synthesis.optimised import OptimisedSynthesis


class GenerativeSynthesis(OptimisedSynthesis):
    """A round is ``g_steps`` steps of one generator, each on new latents; every sample is new, and none is kept.

    With ``class_embedding`` the latents are multiplied by a learned embedding of the target class (GDFQ; Xu et al.,
    ECCV 2020), and a sample has targets.

    The adversarial term uses the student in evaluation mode, as CMI's code does. In training mode, as in the original
    code of ZSKT and DFAD, both gave far worse students (docs/results/methods.md).
    """

    traits: ClassVar[Traits] = SOURCES["generator"].traits

    def __init__(self, teacher: Any, student: Any, augment: Any, card: Any, config: Any, device: Any = "cpu"):
        super().__init__(teacher, student, augment, card, config, device)
        nz = self.settings.nz
        self.generator = Generator(nz, self.settings.ngf, card.shape, config.run.micro_batch).to(self.device)
        self.embedding = nn.Embedding(self.num_classes, nz).to(self.device) if self.settings.class_embedding else None
        trained = [parameter for network in self._networks().values() for parameter in network.parameters()]
        self.optimizer = torch.optim.Adam(trained, self.settings.lr_g, ADAM_BETAS)

    def synthesize(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        with self.objective.student.frozen():
            for _ in range(self.g_steps):
                targets = self._targets()
                images, self.round_loss, terms = self._step(partial(self._render, targets), targets, [self.optimizer])
                sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
                self.tick()
        self.objective.end_round(images)
        return {name: total / self.g_steps for name, total in sums.items()}

    def _render(self, targets: Tensor) -> Tensor:
        z = torch.randn(len(targets), self.settings.nz, device=self.device)
        return self.generator(z if self.embedding is None else z * self.embedding(targets))

    @torch.no_grad()
    def sample(self, n: int) -> Batch:
        self.images_made += n
        if self.embedding is None:
            return Batch(self._render(torch.empty(n)))
        targets = self._targets(n)
        return Batch(self._render(targets), targets)

    def _networks(self) -> dict[str, nn.Module]:
        """The networks that are trained, by name."""
        return {"generator": self.generator, **({"embedding": self.embedding} if self.embedding else {})}

    def _parts(self) -> dict[str, Any]:
        return {**self._networks(), "optimizer": self.optimizer}
