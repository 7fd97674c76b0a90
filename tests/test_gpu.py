"""What only a GPU can show: the same mathematics as on the CPU, no waiting for the host, exact repeats."""

from contextlib import contextmanager

import nets
import pytest
import torch
from conftest import rows

from datafree import config
from datafree.augment import CropFlip
from datafree.learners.distill import DistillLearner
from datafree.models.generator import Generator
from datafree.network import Network
from datafree.pool import ImagePool
from datafree.synthesis.inversion import InversionSynthesis
from datafree.synthesis.objective import SynthesisObjective
from datafree.view_cache import ViewCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SHAPE, CLASSES = (3, 16, 16), 4
RELATION = config.Relation(triplet=1.0, striplet=1.0, sampling="uniform", striplet_sampling="uniform")


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch):
    """No TF32, which keeps ten bits of the fraction."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@contextmanager
def no_sync():
    """Within it an operation that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def phases(device, precision="none"):
    """A source and a learner of the same weights on any device."""
    torch.manual_seed(0)
    teacher, student = (
        Network(make(CLASSES, 3), SHAPE, (0.4,) * 3, (0.2,) * 3).to(device) for make in (nets.tiny, nets.small)
    )
    settings = config.Synthesis(bn=1.0, oh=1.0, adv=1.0, nz=4, ngf=4, synthesis_batch_size=16)
    objective = SynthesisObjective(settings, RELATION, teacher.freeze(), student)
    pool = ImagePool(32, SHAPE, CLASSES, torch.device(device))
    source = InversionSynthesis(
        objective, Generator(4, 4, SHAPE).to(device), CropFlip(), pool, settings, 3, precision=precision
    )
    return source, DistillLearner(student, teacher, CropFlip(), config.Distill(cd_loss=1.0), RELATION, 100, precision)


def test_losses_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(1)
    images, targets = torch.rand(16, *SHAPE), torch.arange(16) % CLASSES
    found = []
    for device in ("cpu", "cuda"):
        source, learner = phases(device)
        source.objective.weights["triplet"] = 0.0  # its draws are the device's own
        x = images.to(device).requires_grad_()
        with source.objective.student.frozen():
            loss, terms = source.objective(x, x, targets.to(device))
        loss.backward()
        found.append([loss.detach().cpu(), x.grad.cpu(), *(term.detach().cpu() for term in terms.values())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
def test_no_step_waits_for_the_host(precision):
    source, learner = phases("cuda", precision)
    for _ in range(2):  # cuDNN chooses its kernels in the first steps
        source.synthesize()
        learner.step(*source.sample(8))
    if precision == "fp16":
        return  # GradScaler asks once a step whether a gradient overflowed
    with no_sync():
        terms = source.synthesize()
        for _ in range(3):
            terms |= learner.step(*source.sample(8))
    assert all(term.isfinite() for term in terms.values())


def test_the_view_cache_answers_as_the_teacher():
    source, learner = phases("cuda")
    source.synthesize()
    cache = ViewCache(learner.teacher, ("logits", "embed", "stages"), 16 * 162, 10)
    for _ in range(4):
        images, _, numbers = source.sample(16)
        found, asked = cache.features(images, numbers), learner.teacher.features(images)
        torch.testing.assert_close((found.logits, found.embed), (asked.logits, asked.embed), rtol=1e-4, atol=1e-5)
    assert cache.hit_rate() == 0.75


@pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
def test_a_run_on_the_gpu_goes_on_where_it_stopped(precision, distil):
    words = ("--device", "cuda", "--precision", precision)
    distil(*words, "--epochs", 2, tag="run")
    assert len(rows(distil(*words, "--resume", "auto", tag="run"))) == 4


def test_a_deterministic_run_repeats_exactly(distil):
    first, second = (distil("--device", "cuda", "--deterministic", tag=tag) for tag in "ab")
    assert rows(first) == rows(second)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_is_the_plain_one(mode, distil):
    plain, compiled = (
        rows(distil("--device", "cuda", "--epochs", 1, "--compile", mode, tag=mode)) for mode in ("off", mode)
    )
    for name in ("synthesis/bn", "synthesis/oh", "student/kd"):
        assert compiled[0][name] == pytest.approx(plain[0][name], rel=0.2)
