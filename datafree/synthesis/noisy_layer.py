"""Images by a generator whose input is the class and whose randomness is a layer: NAYER."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from datafree import checkpoint
from datafree.errors import InputError
from datafree.models.generator import Generator
from datafree.synthesis import SOURCES, Traits
from datafree.synthesis.objective import ADAM_BETAS
from datafree.synthesis.optimised import Render, RoundSynthesis

LARGEST_EMBEDDING = 65_536  # numbers of a class


class NoisyLayerSynthesis(RoundSynthesis):
    """NAYER (Tran et al., CVPR 2024): images of a class differ by the weights of a layer, not by a random input.

    The input is a fixed embedding of the target class. Embeddings are normalised over the classes (BatchNorm) and
    mapped to the generator's latents by noisy layers: linear, with weights that are drawn anew for each batch and
    optimised in it together with the generator. A noisy layer renders one image of each class (the paper's K-to-1
    layer with K the number of classes), so that N images of C classes take N / C layers, rounded up. The generator,
    that BatchNorm and their Adam live on for ``generator_life`` rounds.

    embeddings: (classes, D), those of ``class_embeddings``, or else random ones, of which D is ``nz``.
    """

    traits: ClassVar[Traits] = SOURCES["noisy_layer"].traits

    def __init__(self, teacher: Any, student: Any, augment: Any, card: Any, config: Any, device: Any = "cpu"):
        super().__init__(teacher, student, augment, card, config, device)
        settings = self.settings
        if settings.class_embeddings:
            self.embeddings = read_embeddings(settings.class_embeddings, self.num_classes).to(self.device)
        else:
            self.embeddings = torch.randn(self.num_classes, settings.nz, device=self.device)
        self.norm = nn.BatchNorm1d(self.embeddings.shape[1], track_running_stats=False).to(self.device)
        self.generator = Generator(settings.nz, settings.ngf, card.shape, config.run.micro_batch).to(self.device)
        self.optimizer = self._new_optimizer()
        self.age = 0  # rounds of the generator

    def synthesize(self) -> dict[str, Tensor]:
        if self.age >= self.settings.generator_life:
            self.generator.reset()
            self.norm.reset_parameters()
            self.optimizer, self.age = self._new_optimizer(), 0
        self.age += 1
        return super().synthesize()

    def _targets(self, n: int = 0) -> Tensor:
        """n target classes, sorted: of each class as many, and one more of some random ones."""
        whole, rest = divmod(n or self.settings.synthesis_batch_size, self.num_classes)
        every = torch.arange(self.num_classes, device=self.device).repeat(whole)
        return torch.cat([every, torch.randperm(self.num_classes, device=self.device)[:rest]]).sort().values

    def _begin_round(self, targets: Tensor) -> tuple[Render, list[torch.optim.Optimizer]]:
        settings, layers = self.settings, -(-len(targets) // self.num_classes)
        weight = torch.randn(layers, settings.nz, self.embeddings.shape[1], device=self.device, requires_grad=True)
        bias = torch.zeros(layers, 1, settings.nz, device=self.device, requires_grad=True)
        rate = settings.lr_g if settings.lr_z is None else settings.lr_z
        noise_optimizer = torch.optim.Adam([weight, bias], rate, ADAM_BETAS)
        # The first image of each class has the first layer, the second one the second.
        layer = torch.arange(len(targets), device=self.device) - torch.searchsorted(targets, targets)
        return partial(self._render, weight, bias, layer, targets), [self.optimizer, noise_optimizer]

    def _render(self, weight: Tensor, bias: Tensor, layer: Tensor, targets: Tensor) -> Tensor:
        """Images of ``targets`` (N,), each by its noisy ``layer`` (N,) of ``weight`` (layers, nz, D) and ``bias``."""
        # Divided by the root of D, the latents begin with unit variance, as random ones would have, while the weights
        # have it, too, so that a step of Adam changes little of them.
        scaled = self.norm(self.embeddings) / self.embeddings.shape[1] ** 0.5
        latents = scaled @ weight.transpose(1, 2) + bias  # (layers, classes, nz)
        return self.generator(latents[layer, targets])

    def _new_optimizer(self) -> torch.optim.Adam:
        trained = [*self.generator.parameters(), *self.norm.parameters()]
        return torch.optim.Adam(trained, self.settings.lr_g, ADAM_BETAS)

    def _parts(self) -> dict[str, Any]:
        return {"generator": self.generator, "norm": self.norm, "optimizer": self.optimizer}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "embeddings": self.embeddings, "age": self.age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        embeddings, age = state["embeddings"], state["age"]
        if embeddings.shape != self.embeddings.shape or type(age) is not int or age < 0:
            raise ValueError("its embeddings of the classes, or the age of its generator, are damaged")
        self.embeddings, self.age = embeddings.to(self.device), age


def read_embeddings(path: str | Path, num_classes: int) -> Tensor:
    """The embeddings (num_classes, D) in a file of numpy.save, torch.save or safetensors, as float32.

    Raises InputError for a file that cannot be read, or holds something else.
    """
    found = checkpoint.read_array(path)
    given = f"--class_embeddings {path}"
    if found.dim() != 2 or len(found) != num_classes or not 0 < found.shape[1] <= LARGEST_EMBEDDING:
        raise InputError(
            f"{given} holds numbers of shape {tuple(found.shape)}; it must be ({num_classes}, D), a row for each "
            f"class, with D at most {LARGEST_EMBEDDING:,}"
        )
    found = found.float()
    if not found.isfinite().all():
        raise InputError(f"{given} holds numbers that are not finite (NaN or infinity); give other embeddings")
    rows, kinds = found.unique(dim=0, return_inverse=True)
    if len(rows) < num_classes:
        alike = (kinds == kinds.bincount().argmax()).nonzero().flatten().tolist()
        raise InputError(
            f"{given} gives the classes {alike[0]} and {alike[1]} the same embedding, so that they would have the same "
            "images; give each class its own"
        )
    return found
