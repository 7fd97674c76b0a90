"""What only a GPU can show: the same mathematics as on the CPU, a host that never waits, exact repeats; and that every
method of every program runs there. bash scripts/test.sh -m gpu
"""

import json
from contextlib import contextmanager

import nets
import parts
import pytest
import torch
from conftest import QUANTIZATION_BUDGETS, command, rows, scratch
from resuming import assert_same_run, at_call, stopped, terminate
from test_incremental import incremental

import registry
from benchmarks import memory
from datafree import config
from datafree.augment import CropFlip
from datafree.engine import Engine
from datafree.network import Network
from datafree.view_cache import ViewCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and pytest -m gpu"),
]
PRECISIONS = pytest.mark.parametrize("precision", ["none", "bf16", "fp16"])
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
        x = images.clone().to(device).requires_grad_()
        with source.student.frozen():
            loss, terms = source.objective(x, x, targets.to(device))
        loss.backward()
        assert terms.keys() == {"bn", "oh", "adv"}
        found.append([loss.detach().cpu(), x.grad.cpu(), *(term.detach().cpu() for term in terms.values())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


@PRECISIONS
def test_in_no_step_the_host_waits(precision):
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


# Whole programs. Their device is "auto", which is the GPU here.

KERNELS = pytest.mark.parametrize("kernels", [(), ("--deterministic",)], ids=["any", "deterministic"])


def assert_trained_on_a_gpu(folder, epochs):
    summary = json.loads((folder / "summary.json").read_text())
    assert len(rows(folder)) == epochs and summary["last_acc1"] > 0
    assert summary["environment"]["device"] == torch.cuda.get_device_name()


@KERNELS
@pytest.mark.parametrize("method", sorted(registry.METHODS))
def test_every_method_distils_on_the_gpu(method, kernels, distil, refused):
    words = ("--epochs", 2, *kernels)
    if method == "cmi" and kernels:
        assert "is not possible with --cr" in refused(lambda: distil(*words, method=method))
    else:
        assert_trained_on_a_gpu(distil(*words, method=method), epochs=2)


@KERNELS
@pytest.mark.parametrize("method", sorted(QUANTIZATION_BUDGETS))
def test_every_method_quantises_on_the_gpu(method, kernels, quantised):
    assert_trained_on_a_gpu(quantised(*kernels, method=method), epochs=4)


@KERNELS
@pytest.mark.parametrize("method", sorted(registry.INCREMENTAL_METHODS))
def test_every_method_learns_incrementally_on_the_gpu(method, kernels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matrix = json.loads((incremental(method, "run", *kernels) / "matrix.json").read_text())
    assert [len(row) for row in matrix["accuracy"]] == [1, 2, 3]


@PRECISIONS
def test_the_other_programs_train_in_each_precision(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scratch("--model", nets.name("small"), "--epochs", 2, "--precision", precision)
    incremental("rgal", "run", "--precision", precision)


@PRECISIONS
def test_a_run_on_the_gpu_continues_where_it_stopped(precision, distil):
    words = ("--precision", precision)
    distil(*words, "--epochs", 2, tag="run")
    assert len(rows(distil(*words, "--resume", "auto", tag="run"))) == 4


@pytest.mark.parametrize("options", [(), ("--optimizer", "muon", "--mixup", 0.5), ("--view_cache", 10)], ids=str)
def test_a_deterministic_run_repeats_and_resumes_exactly(options, distil, monkeypatch):
    straight = distil("--deterministic", *options, tag="straight")
    with stopped(terminate), monkeypatch.context() as patch:
        at_call(patch, Engine, "_student_step", 13, terminate)
        distil("--deterministic", *options, tag="stopped")
    resumed = distil("--deterministic", *options, "--resume", "auto", tag="stopped")
    assert_same_run(straight, resumed)


@pytest.mark.parametrize("first, second", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_device(first, second, distil):
    distil("--device", first, "--epochs", 2, tag="run")
    assert len(rows(distil("--device", second, "--resume", "auto", tag="run"))) == 4


def test_weights_trained_on_the_gpu_give_the_same_outputs_on_the_cpu(distil):
    network = Network.from_file(distil("--epochs", 2), nets.name("small")).freeze()
    images = torch.rand(8, *network.shape)
    expected = network(images)
    torch.testing.assert_close(network.to("cuda")(images.to("cuda")).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_the_plan_and_its_cost_are_measured_on_the_gpu(distil, capsys):
    distil("--dry_run")
    assert "tested on 355 images, on cuda:0." in capsys.readouterr().out


@pytest.mark.parametrize("phase", memory.PHASES)
def test_the_memory_of_a_step_is_measured_on_the_gpu(phase, capsys):
    memory.measure("resnet20>resnet8,16,10,4,8", phase)
    assert int(capsys.readouterr().out) > 0


def test_the_doctor_finds_no_fault_in_a_run_on_the_gpu(teacher, tmp_path):
    pair = ("--teacher", nets.name("tiny"), "--student", nets.name("small"), "--teacher_weights", teacher)
    done = command("-m", "datafree.doctor", "--method", "rgal", "--dataset", "digits", *pair, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_is_the_plain_one(mode, distil):
    plain, compiled = (rows(distil("--epochs", 1, "--compile", mode, tag=mode)) for mode in ("off", mode))
    for name in ("synthesis/bn", "synthesis/oh", "student/kd"):
        assert compiled[0][name] == pytest.approx(plain[0][name], rel=0.2)
