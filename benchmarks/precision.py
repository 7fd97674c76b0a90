"""How far half precision turns the gradients on a trained teacher:

python -m benchmarks.precision DATASET TEACHER STUDENT WEIGHTS [PRECISION]

A generator and a student are trained in fp32 with RGAL's weights, 128 images a step. Before some of the steps the
gradient of the same views is taken in fp32 and in PRECISION (bf16, or fp16 on a GPU, whose loss is scaled as in
training): their cosine, and the ratio of their norms.
"""

import sys
from functools import partial

import torch

from datafree.augment import CropFlip
from datafree.checkpoint import load_weights
from datafree.config import Distill, Relation, Synthesis
from datafree.datasets.loading import resolve_card
from datafree.errors import exit_on_input_error, usage
from datafree.learners.distill import DistillLearner
from datafree.logger import table
from datafree.models.custom import build_model
from datafree.models.generator import Generator
from datafree.network import Network
from datafree.pool import ImagePool
from datafree.runtime import autocast, choose_device, load_rng_state, rng_state, seed_everything
from datafree.synthesis.inversion import InversionSynthesis
from datafree.synthesis.objective import ADAM_BETAS, SynthesisObjective

LOOKS = (0, 1, 5, 20, 50, 100)
RELATION = Relation(triplet=0.1, striplet=0.1)


def flat_gradient(loss, parameters):
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])


def compare(make_loss, parameters, device, precision):
    """Cosine of the two gradients, and norm of the second over that of the first; the same random numbers in both."""
    found = []
    state = rng_state()
    for chosen, scale in (("none", 1), (precision, 2**16 if precision == "fp16" else 1)):
        load_rng_state(state)
        with autocast(device, chosen):
            loss = make_loss() * scale
        found.append(flat_gradient(loss, parameters) / scale)
    exact, rounded = found
    return {
        "cosine": torch.cosine_similarity(exact, rounded, dim=0).item(),
        "norm ratio": (rounded.norm() / exact.norm()).item(),
    }


def synthesis_rows(source, z, targets, device, precision):
    make, optimizers = partial(source.generator, z), [source.optimizer, torch.optim.Adam([z], 1e-3, ADAM_BETAS)]

    def loss():
        images = make()
        return source.objective(images, source.augment(images), targets)[0]

    rows = []
    with source.objective.student.frozen():
        for step in range(max(LOOKS) + 1):
            if step in LOOKS:
                parameters = [z, *source.generator.parameters()]
                rows.append({"phase": "synthesis", "step": step, **compare(loss, parameters, device, precision)})
            images, *_ = source._update(make, targets, optimizers)
    source.pool.add(images, targets)
    return rows


def student_loss(learner, batch):
    return learner.loss(*batch, 0.0)[0]


def student_rows(learner, pool, n, device, precision):
    rows = []
    for step in range(max(LOOKS) + 1):
        batch = pool.sample(n)
        if step in LOOKS:
            learner.network.train()
            statistics = {name: buffer.clone() for name, buffer in learner.network.named_buffers()}
            rows.append(
                {
                    "phase": "student",
                    "step": step,
                    **compare(
                        partial(student_loss, learner, batch), list(learner.network.parameters()), device, precision
                    ),
                }
            )
            for name, buffer in learner.network.named_buffers():
                buffer.copy_(statistics[name])
        learner.step(*batch)
    return rows


def main():
    usage(__doc__, at_least=4)
    dataset, teacher_name, student_name, weights, precision = [*sys.argv[1:], "bf16"][:5]
    device = choose_device("auto")
    seed_everything(0, False)
    card = resolve_card(dataset, "data")
    models = [build_model(name, card.num_classes, card.channels) for name in (teacher_name, student_name)]
    stored = load_weights(models[0], weights)
    mean, std = stored.get("mean", card.mean), stored.get("std", card.std)
    teacher, student = (Network(model, card.shape, mean, std).to(device) for model in models)
    settings = Synthesis(synthesis_batch_size=128, bn=1, oh=1, adv=1)
    objective = SynthesisObjective(settings, RELATION, teacher.freeze(), student)
    pool, crop = ImagePool(128, card.shape, card.num_classes, device), CropFlip(4, card.flip)
    source = InversionSynthesis(objective, Generator(256, 64, card.shape).to(device), crop, pool, settings, 1)
    learner = DistillLearner(student, teacher, crop, Distill(cd_loss=0.1), RELATION, 10**6)
    z = torch.randn(128, settings.nz, device=device, requires_grad=True)
    targets = torch.randint(card.num_classes, (128,), device=device).sort().values
    rows = synthesis_rows(source, z, targets, device, precision)
    print(table(rows + student_rows(learner, pool, 128, device, precision), decimals=4))


if __name__ == "__main__":
    exit_on_input_error(main)
