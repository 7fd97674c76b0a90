"""How far half precision changes the gradients, on a trained teacher:

python -m benchmarks.precision DATASET TEACHER STUDENT WEIGHTS [PRECISION]

A generator and a student are trained in fp32 with RGAL's weights of the terms, 128 images per step. Before some of the
steps the gradient for the same views is computed in fp32 and in PRECISION (bf16, or fp16 on a GPU, with the loss scaled
as in training); the table gives the cosine of the two and the ratio of their norms.
"""

import sys
from functools import partial

import torch

from datafree.arguments import usage
from datafree.augment import CropFlip
from datafree.config import Distill, DistillConfig, Relation, Synthesis
from datafree.datasets.loading import resolve_card
from datafree.errors import exit_on_input_error
from datafree.learners.distill import DistillLearner
from datafree.logger import table
from datafree.network import Network
from datafree.runtime import autocast, choose_device, load_rng_state, rng_state, seed_everything
from datafree.synthesis.inversion import InversionSynthesis
from datafree.synthesis.objective import ADAM_BETAS

STEPS = (0, 1, 5, 20, 50, 100)  # before which the gradients are compared
CONFIG = DistillConfig(
    synthesis=Synthesis(synthesis_batch_size=128, pool_size=128, bn=1, oh=1, adv=1),
    relation=Relation(triplet=0.1, striplet=0.1),
    distill=Distill(cd_loss=0.1),
)


def flat_gradient(loss, parameters):
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])


def compare(compute_loss, parameters, device, precision):
    """Cosine of the two gradients, and norm of the second over that of the first; with the same random numbers."""
    found = []
    state = rng_state()
    for chosen, scale in (("none", 1), (precision, 2**16 if precision == "fp16" else 1)):
        load_rng_state(state)
        with autocast(device, chosen):
            loss = compute_loss() * scale
        found.append(flat_gradient(loss, parameters) / scale)
    exact, rounded = found
    return {
        "cosine": torch.cosine_similarity(exact, rounded, dim=0).item(),
        "norm ratio": (rounded.norm() / exact.norm()).item(),
    }


def synthesis_rows(source, precision):
    """The rows of a round of synthesis, whose last images enter the pool."""
    n, settings = source.settings.synthesis_batch_size, source.settings
    z = torch.randn(n, settings.nz, device=source.device, requires_grad=True)
    targets = source._targets()
    render, optimizers = partial(source.generator, z), [source.optimizer, torch.optim.Adam([z], 1e-3, ADAM_BETAS)]

    def loss():
        images = render()
        return source.objective(images, source.augment(images), targets)[0]

    rows = []
    with source.student.frozen():
        for step in range(max(STEPS) + 1):
            if step in STEPS:
                found = compare(loss, [z, *source.generator.parameters()], source.device, precision)
                rows.append({"phase": "synthesis", "step": step, **found})
            images, *_ = source._step(render, targets, optimizers)
    source.pool.add(images, targets)
    return rows


def student_rows(learner, pool, n, precision):
    rows, network = [], learner.network
    for step in range(max(STEPS) + 1):
        batch = pool.sample(n)
        if step in STEPS:
            learner.prepare()
            buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
            found = compare(
                lambda batch=batch: learner.loss(batch, 0.0)[0], list(network.parameters()), network.device, precision
            )
            rows.append({"phase": "student", "step": step, **found})
            for name, buffer in network.named_buffers():
                buffer.copy_(buffers[name])
        learner.step(batch)
    return rows


def main():
    usage(__doc__, at_least=4)
    dataset, teacher_name, student_name, weights, precision = [*sys.argv[1:], "bf16"][:5]
    device = choose_device("auto")
    seed_everything(0, False)
    card = resolve_card(dataset, "data")
    teacher = Network.from_file(weights, teacher_name, card).to(device).freeze()
    student, crop = Network.build(student_name, card).to(device), CropFlip(4, card.flip)
    source = InversionSynthesis(teacher, student, crop, card, CONFIG, device)
    learner = DistillLearner(student, teacher, crop, CONFIG, 10**6)
    rows = synthesis_rows(source, precision)
    print(table(rows + student_rows(learner, source.pool, 128, precision), decimals=4))


if __name__ == "__main__":
    exit_on_input_error(main)
