"""What only a GPU can show: the same mathematics as on the CPU, no waiting for the host, exact repeats."""

from contextlib import contextmanager

import nets
import parts
import pytest
import torch
from conftest import rows

from datafree import config
from datafree.augment import CropFlip
from datafree.view_cache import ViewCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SECTIONS = (
    config.Synthesis(bn=1.0, oh=1.0, adv=1.0, nz=4, ngf=4, synthesis_batch_size=16, pool_size=32),
    config.Relation(triplet=1.0, striplet=1.0, sampling="uniform", striplet_sampling="uniform"),
    config.Distill(cd_loss=1.0),
)


@pytest.fixture(autouse=True)
def exact_fp32():
    """No TF32, which keeps ten bits of the fraction."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:  # not by monkeypatch, which cannot restore what these objects look up dynamically
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@contextmanager
def no_sync():
    """A context in which an operation that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def phases(device, precision="none"):
    """A source and a learner of the same weights on any device."""
    torch.manual_seed(0)
    options = parts.options(*SECTIONS, precision=precision, g_steps=3)
    teacher, student = (parts.network(factory).to(device) for factory in (nets.tiny, nets.small))
    teacher.freeze()
    # The learner first: a source advances the random stream of its device, which differs.
    learner = parts.make_learner(options, teacher, student, CropFlip())
    return parts.make_source(options, teacher, student, CropFlip()), learner


def test_losses_and_gradients_are_those_of_the_cpu():
    torch.manual_seed(1)
    images, targets = torch.rand(16, *parts.SHAPE), torch.arange(16) % parts.CLASSES
    found = []
    for device in ("cpu", "cuda"):
        source, _ = phases(device)
        # The triplets are left out, because their random numbers differ between devices.
        source.objective.terms = [term for term in source.objective.terms if term.name != "triplet"]
        x = images.to(device).requires_grad_()
        with source.student.frozen():
            loss, terms = source.objective(x, x, targets.to(device))
        loss.backward()
        assert terms.keys() == {"bn", "oh", "adv"}
        found.append([loss.detach().cpu(), x.grad.cpu(), *(term.detach().cpu() for term in terms.values())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
def test_no_step_waits_for_the_host(precision):
    source, learner = phases("cuda", precision)
    for epoch in range(2):  # cuDNN chooses its kernels in the first steps, and the first batch is checked
        source.round(epoch, with_student=True)
        learner.step(source.batch(8))
    if precision == "fp16":
        return  # GradScaler waits once a step, to know whether a gradient overflowed
    with no_sync():
        terms = source.round(2, with_student=True)
        for _ in range(3):
            terms |= learner.step(source.batch(8))
    assert all(term.isfinite() for term in terms.values())


def test_the_view_cache_returns_the_features_of_the_teacher():
    source, learner = phases("cuda")
    source.synthesize()
    cache = ViewCache(learner.teacher, ("logits", "embed", "pooled"), 16 * 162, 10)
    for _ in range(4):
        batch = source.sample(16)
        cached, computed = cache.features(batch.images, batch.ids), learner.teacher.features(batch.images)
        for name in ("logits", "embed", "pooled"):
            torch.testing.assert_close(getattr(cached, name), getattr(computed, name), rtol=1e-4, atol=1e-5)
    assert cache.hit_rate() == 0.75


@pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
def test_a_run_on_the_gpu_continues_where_it_stopped(precision, distil):
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
