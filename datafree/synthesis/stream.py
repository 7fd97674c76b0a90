"""One generator all along, whose images the student sees once: DAFL, ZSKT, DFAD, DFQ."""

import torch

from datafree.synthesis.objective import ADAM_BETAS
from datafree.synthesis.optimised import OptimisedSynthesis


class StreamSynthesis(OptimisedSynthesis):
    """A round is ``g_steps`` steps of one generator, each on new noise; every sample is new, and none is kept.

    The adversary looks at the student in evaluation mode, as in CMI's code. In training mode, as ZSKT's and DFAD's own
    codes have it, both made far worse students (docs/results/methods.md).
    """

    def __init__(self, objective, generator, *arguments, **options):
        super().__init__(objective, *arguments, **options)
        self.generator = generator
        self.optimizer = torch.optim.Adam(generator.parameters(), self.settings.lr_g, ADAM_BETAS)

    def synthesize(self):
        sums = {}
        with self.objective.student.frozen():
            for _ in range(self.g_steps):
                images, _, terms = self._update(self._make, self._targets(), [self.optimizer])
                sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
                self.tick()
        self.objective.end_round(images)
        return {name: total / self.g_steps for name, total in sums.items()}

    def _make(self, n=None):
        noise = torch.randn(n or self.settings.synthesis_batch_size, self.settings.nz, device=self.device)
        return self.generator(noise)

    @torch.no_grad()
    def sample(self, n):
        self.images_made += n
        return self._make(n), None

    def state_dict(self):
        return {
            **super().state_dict(),
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "images_made": self.images_made,
        }

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.images_made = state["images_made"]
