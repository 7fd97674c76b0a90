"""Steps computed in parts: gradients of the whole batch, what sees a part, memory, resume, and whole programs."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import nets
import parts
import pytest
import torch
from conftest import ROOT, call, rows, scratch
from parts import count_calls
from resuming import assert_same_run, at_call, kill, stopped
from test_distributed import distilling, images, quantising, replaying, round_of, step_of
from together import assert_same_apart, connected, together
from torch import nn
from torch.nn import functional as F

import datafree_incremental
import datafree_kd
from datafree import config, micro_batch, shares
from datafree.augment import CropFlip
from datafree.config import Run
from datafree.features import Features
from datafree.learners.base import Learner
from datafree.learners.supervised import SupervisedLearner
from datafree.micro_batch import in_parts
from datafree.models import generator
from datafree.models.generator import Generator
from datafree.network import Network
from datafree.plan import describe_parts
from datafree.pool import Batch
from datafree.runtime import peak_memory, reset_peak, seed_everything
from datafree.synthesis.generative import GenerativeSynthesis
from datafree.synthesis.inversion import InversionSynthesis, PixelSynthesis

CPU = torch.device("cpu")
EVERY_IMAGE_TERM = dict(bn=1.0, oh=1.0, adv=1.0, act=0.1, balance=1.0, cr=0.5, tv=1e-3, l2=1e-3, triplet=1.0)
EVERY_TERM = dict(kd=1.0, T=1.0, cd_loss=0.5, gram_loss=0.25, at_loss=2.0, striplet=0.5)


@pytest.fixture
def passes(monkeypatch):
    """How many images every pass of a network or a generator has, but for its trial."""
    counts = []
    for owner, name in ((Network, "_forward"), (Network, "_features"), (Generator, "_render")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, x, original=original: counts.append(len(x)) or original(self, x))
    return counts


def limited(make, most):
    """``make``, whose learner computes at most so many images at once."""

    def limited_learner():
        learner = make()
        for network in (learner.network, getattr(learner, "teacher", learner.network)):
            network.micro_batch = most
        return learner

    return limited_learner


def assert_same_in_parts(work, most, rtol=2e-5, atol=1e-6):
    """``work(most)`` gives the same as for whole batches."""
    found = []
    for limit in (0, most):
        torch.manual_seed(0)
        found.append(work(limit))
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=atol)


# Gradients.


@pytest.mark.parametrize("most", [1, 3, 5, 13])
@pytest.mark.parametrize("values", [EVERY_TERM, dict(kd=1.0), dict(striplet=1.0, striplet_feature="features")])
def test_a_student_step_has_the_gradients_of_the_whole_batch_whatever_its_terms(values, most):
    """Of 14 views, in 14 to 2 parts, of which some are shorter."""

    def work(limit):
        def make():
            given = parts.options(striplet_sampling="uniform", start_layer=0, pair_sample=True, **values)
            return parts.make_learner(given, student=parts.network(nets.plain))

        return step_of(limited(make, limit), images(7))()

    assert_same_in_parts(work, most)


@pytest.mark.parametrize("most, unit", [(1, "loss"), (4, "loss"), (8, "loss"), (4, "gradient")])
def test_a_synthesis_step_has_the_gradients_of_the_whole_batch_whatever_its_terms(most, unit):
    """L_bn of the pixels, too, whose statistics are those of all parts; the head of the contrast is trained."""

    def work(limit):
        with pytest.MonkeyPatch.context() as patch:
            make = parts.make_source
            patch.setattr(parts, "make_source", lambda *a, **k: _limit(make(*a, **k), limit))
            return round_of(PixelSynthesis, **EVERY_IMAGE_TERM, triplet_unit=unit)()

    assert_same_in_parts(work, most)


def _limit(source, most):
    source.teacher.micro_batch = source.student.micro_batch = most
    return source


@pytest.mark.parametrize("kind", [InversionSynthesis, GenerativeSynthesis])
def test_a_generator_that_does_not_normalise_by_its_batch_has_the_gradients_of_the_whole_batch(kind, monkeypatch):
    monkeypatch.setattr(generator, "_batch_norm", lambda channels: nn.GroupNorm(2, channels))

    def work(limit):
        with pytest.MonkeyPatch.context() as patch:
            make = parts.make_source
            patch.setattr(parts, "make_source", lambda *a, **k: _limit(make(*a, **k), limit))
            return round_of(kind, bn=1.0, oh=1.0, adv=1.0, triplet=1.0, micro_batch=limit)()

    assert_same_in_parts(work, 4)


def test_in_evaluation_mode_batch_norm_has_no_part():
    class Frozen(SupervisedLearner):
        def prepare(self):
            self.network.eval()

    def work(limit):
        network = parts.network()
        network.micro_batch = limit
        return step_of(lambda: Frozen(network, CropFlip(1, True), config.Optim(), 10), images(8))()

    assert_same_in_parts(work, 3)


def test_batch_norm_in_training_mode_normalises_by_parts_that_are_dealt_out_in_turn():
    """Terms, gradients and running statistics are those of one network called on one part after the other."""
    batch, network = images(8)(), parts.network()
    oracle, optimizer = network.copy(), config.Optim(lr=0.0)
    network.micro_batch = 3
    terms = SupervisedLearner(network, nn.Identity(), optimizer, 10).step(batch)
    oracle.train()
    order = [0, 3, 6, 1, 4, 7, 2, 5]
    logits = torch.cat([oracle(batch.images[rows]) for rows in (order[:3], order[3:6], order[6:])])
    loss = F.cross_entropy(logits, batch.targets[order])
    loss.backward()
    torch.testing.assert_close(terms["ce"], loss.detach())
    for found, expected in zip(network.parameters(), oracle.parameters()):
        torch.testing.assert_close(found.grad, expected.grad)
    for found, expected in zip(network.buffers(), oracle.buffers()):
        torch.testing.assert_close(found, expected)


def test_a_part_that_is_computed_again_draws_the_same_random_numbers_and_the_stream_goes_on_as_after_the_first():
    def dropping(num_classes, in_channels=3):
        return nn.Sequential(nets.plain(16, in_channels), nn.Dropout(0.5), nn.Linear(16, num_classes))

    torch.manual_seed(0)
    network, batch = parts.network(dropping).train(), images(8)()
    oracle = network.copy()
    network.micro_batch = 2
    torch.manual_seed(1)
    found = network(batch.images)
    state = torch.get_rng_state()
    found.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    expected = torch.cat([oracle(batch.images[rows]) for rows in ([0, 4], [1, 5], [2, 6], [3, 7])])
    expected.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(found, expected[[0, 2, 4, 6, 1, 3, 5, 7]])
    for one, other in zip(network.parameters(), oracle.parameters()):
        torch.testing.assert_close(one.grad, other.grad)


def test_whole_maps_are_kept_for_terms_that_read_them_alone():
    network, views = parts.network(), torch.rand(5, *parts.SHAPE)
    whole = network.eval().features(views)
    network.micro_batch = 2
    found, small = network.features(views), network.features(views, with_maps=False)
    for name in ("logits", "embed", "stages"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))
    torch.testing.assert_close(list(small.pooled), list(whole.pooled))
    assert small._stages is None and isinstance(small, Features)
    for term, has_maps in (("cd_loss", False), ("gram_loss", True)):
        learner = limited(distilling(**{term: 1.0}), 2)()
        kept = learner.student_features(views, learner.terms), learner.teacher_features(views)
        assert [features._stages is not None for features in kept] == [has_maps] * 2


def test_a_batch_that_is_no_larger_is_computed_as_ever(passes, monkeypatch):
    again = count_calls(monkeypatch, micro_batch, "checkpoint")
    for limit in (9, 100):
        assert_same_in_parts(lambda most: step_of(limited(distilling(**EVERY_TERM), most), images(9))(), limit, 0, 0)
    assert not again and set(passes) == {9}


# Memory.


def peaks_of_a_step(limit):
    """MB that a step of either phase takes on 64 images, of which ``limit`` are computed at once."""
    shape = (3, 64, 64)
    teacher, student = (parts.network(lambda n, c: nets.tiny(n, c, width=32), shape) for _ in range(2))
    given = parts.options(synthesis_batch_size=64, bn=1.0, oh=1.0, adv=1.0, g_steps=1, nz=8, ngf=8)
    teacher.micro_batch = student.micro_batch = limit
    source = parts.make_source(replace(given, run=Run(micro_batch=limit)), teacher, student)
    learner = parts.make_learner(given, teacher, student)
    found = []
    for step in (lambda: source.round(0, True), lambda: learner.step(Batch(torch.rand(64, *shape)))):
        step()
        before = reset_peak(CPU)
        step()
        found.append(peak_memory(CPU) - before)
    return found


@pytest.mark.slow
@pytest.mark.skipif(reset_peak(CPU) is None, reason="the peak of memory can be reset on Linux alone")
def test_a_step_takes_the_memory_of_its_parts():
    """In a process of its own, whose allocator keeps nothing of others, and without the garbage collector, so that what
    is freed depends on nothing else."""
    code = (
        "import conftest, gc, test_micro_batch as t; gc.disable(); print(t.peaks_of_a_step(0) + t.peaks_of_a_step(4))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True)
    of_synthesis, of_student, *in_parts = json.loads(done.stdout.splitlines()[-1])
    assert in_parts[0] < 0.5 * of_synthesis and in_parts[1] < 0.5 * of_student, done.stdout


def test_images_of_224_pixels_take_a_small_part_at_a_time(passes):
    """The generator grows with them: five upsamplings from 7x7."""
    shape = (3, 224, 224)
    given = parts.options(
        synthesis_batch_size=5,
        bn=1.0,
        oh=1.0,
        adv=1.0,
        triplet=1.0,
        striplet=1.0,
        g_steps=1,
        nz=8,
        ngf=4,
        micro_batch=2,
    )
    teacher, student = parts.network(shape=shape), parts.network(nets.small, shape)
    source = parts.make_source(given, _limited(teacher), _limited(student), CropFlip(28, True))
    assert source.generator.base == (8, 7, 7)
    terms = source.round(0, with_student=True)
    terms |= parts.make_learner(given, teacher, student, CropFlip(28, True)).step(source.batch(5))
    assert source.pool.images.shape[1:] == shape and all(term.isfinite() for term in terms.values())
    assert terms.keys() == {"bn", "oh", "adv", "triplet", "kd", "striplet"} and max(passes) == 2


def _limited(network):
    network.micro_batch = 2
    return network


# Whole programs.


def test_the_recipe_for_224_pixels_runs_with_small_networks_and_batches(passes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(nets.tiny(1000).state_dict(), "teacher.pth")
    networks = ("--teacher", nets.name("tiny"), "--teacher_weights", "teacher.pth", "--student", nets.name("small"))
    sizes = "--micro_batch 2 --batch_size 3 --synthesis_batch_size 3 --pool_size 6 --ngf 4 --nz 8 --threads 1"
    steps = "--eval none --epochs 1 --ep_steps 2 --kd_steps 2 --g_steps 2"
    recipe = ROOT / "configs/imagenet/rgal_resnet50_resnet18.yaml"
    call(datafree_kd, "--config", recipe, *networks, *sizes.split(), *steps.split())
    [row] = rows(next(tmp_path.glob("runs/imagenet_rgal_*/seed0")))
    assert row["images"] == 3 and row["student/kd"] >= 0 and row["synthesis/bn"] > 0
    assert 2 in passes and max(passes) == 2


def test_no_pass_of_any_program_has_more_images_and_a_run_resumes_bit_for_bit(distil, passes, monkeypatch):
    """Although the views whose outputs are not cached are others then, which are computed in parts, too."""
    words = ("--micro_batch", 9, "--epochs", 4, "--ep_steps", 3)
    straight = distil(*words, tag="straight")
    assert max(passes) == 9
    text = (straight / "log.txt").read_text()
    assert "Steps of 32 images in 4 parts and of 16 images in 2 parts, of at most 9 images at once." in text
    with monkeypatch.context() as patch, stopped(kill):
        at_call(patch, Learner, "step", 8, kill)
        distil(*words, tag="interrupted")
    assert_same_run(straight, distil(*words, "--resume", "auto", tag="interrupted"))


def test_a_generator_of_class_embeddings_computes_parts_too(distil, passes):
    words = ("--micro_batch", 9, "--epochs", 1, "--ep_steps", 3, "--warmup", 0, "--generator_life", 1)
    distil(*words, method="nayer")
    assert max(passes) == 9


@pytest.mark.slow
def test_the_other_programs_compute_parts_too(quantised, passes, tmp_path):
    """But ranges are observed on whole batches, as are extremes."""
    quantised("--micro_batch", 7)
    assert 16 in passes and {n for n in passes if n > 7} == {16}
    del passes[:]
    scratch("--model", nets.name("tiny"), "--epochs", 1, "--batch_size", 64, "--micro_batch", 30)
    assert max(passes) == 30 and passes.count(22) > 20  # 64 images are 22, 21 and 21
    del passes[:]
    words = (
        "--dataset digits --init_cls 4 --increment 6 --epochs 1 --ep_steps 4 --kd_steps 2 --g_steps 2 --nz 8 --ngf 4"
    )
    sizes = "--batch_size 12 --replay_batch_size 8 --synthesis_batch_size 16 --micro_batch 6"
    call(datafree_incremental, "--model", nets.name("tiny"), "--method", "abd", *words.split(), *sizes.split())
    assert max(passes) == 6


def test_the_forecast_of_memory_and_work_follows_it(distil, capsys):
    """What is tried are two parts at least; a part is computed twice where it has gradients."""

    def forecast(*words):
        distil("--batch_size", 64, "--synthesis_batch_size", 64, "--epochs", 1, "--view_cache", 0, *words, "--dry_run")
        printed = capsys.readouterr().out
        found = re.findall(r"^(synthesis|student) +\S+ m?s +\S+ [MG]B +(\S+) ([MG]) +64 +(\d+)$", printed, re.MULTILINE)
        return {name: (float(flop) * {"M": 1, "G": 1e3}[unit], int(tried)) for name, flop, unit, tried in found}

    whole, in_parts = forecast(), forecast("--micro_batch", 8)
    assert {tried for _, tried in whole.values()} == {16} and {tried for _, tried in in_parts.values()} == {32}
    assert 1.2 < in_parts["synthesis"][0] / whole["synthesis"][0] < 1.7
    assert 1.0 < in_parts["student"][0] / whole["student"][0] < 1.4


def test_compiled_networks_are_refused_and_a_limit_that_no_step_reaches_is_called_out(distil, refused, capsys):
    line = refused(lambda: distil("--micro_batch", 8, "--compile", "default"), code=2)
    assert "--micro_batch 8 does not go with --compile default" in line and "remove one of them" in line
    assert describe_parts(0, "a network", 9) == [] and describe_parts(9, "a network", 9, 4)[0].startswith(
        "[Alarm] --micro_batch 9 makes no diff"
    )


def test_what_does_not_fit_is_told_to_be_computed_in_parts(distil, refused, monkeypatch):
    monkeypatch.setattr(InversionSynthesis, "synthesize", lambda self: torch.empty(10**15))
    told = refused(distil, before_run=False)
    assert "during synthesis; lower --synthesis_batch_size, or give a --micro_batch, by which" in told
    told = refused(distil, "--micro_batch", 8, before_run=False)
    assert "during synthesis; lower --micro_batch 8 or --synthesis_batch_size, or use smaller networks" in told


# Several processes.


class Scaled(nn.Module):
    """A factor, and dropout behind it: by a sum of its outputs, the factor times its gradient is that sum."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return F.dropout(self.factor * x)


def check_dropout():
    """Each process draws the same numbers again for its share of a part."""
    seed_everything(0, False)
    scaled = Scaled()
    with shares.averaged_gradients():
        y = in_parts(partial(shares.divided, scaled), torch.rand(9, 50), 4, scaled)
        y.sum().backward()
    shares.average_gradients([torch.optim.SGD([scaled.factor], 1.0)], y.sum().detach())
    torch.testing.assert_close(scaled.factor.grad * 3, y.sum().detach())


def test_two_processes_compute_the_parts_of_one(monkeypatch):
    """Shares of 5 and 4 rows of parts; BatchNorm normalises by the whole part, dropout is each process's own."""
    make = parts.make_source
    monkeypatch.setattr(parts, "make_source", lambda *a, **k: _limit(make(*a, **k), 4))

    def work():
        check_dropout()
        many = dict(micro_batch=4)
        assert_same_apart(round_of(InversionSynthesis, **EVERY_IMAGE_TERM, **many))
        assert_same_apart(round_of(InversionSynthesis, bn=1.0, cr=0.5, triplet=1.0, triplet_unit="gradient", **many))
        assert_same_apart(round_of(GenerativeSynthesis, bn=1.0, adv=1.0, class_embedding=True, **many))
        assert_same_apart(step_of(limited(distilling(**EVERY_TERM, pair_sample=True), 5), images(7)))
        assert_same_apart(step_of(limited(quantising, 4), images(9), warm_up=True))
        assert_same_apart(step_of(limited(replaying(passes="apart", striplet_feature="features"), 5), images(5)))

    assert together(connected(work)) == [0, 0]
