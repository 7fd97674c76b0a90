"""Several processes give the numbers of one: in each part against the whole batch, and in whole programs."""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import nets
import parts
import pytest
import torch
from conftest import ROOT, call, rows, scratch, tiny_run
from PIL import Image
from resuming import at_call, checkpoint_of, same
from test_incremental import OLD, SEEN, given, real_split
from together import assert_same_apart, connected, together
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

import datafree_incremental
import datafree_kd
from datafree import config, distributed, shares
from datafree.augment import CropFlip
from datafree.batchnorm import BatchNormTap
from datafree.datasets.splits import LazySplit
from datafree.errors import InputError, OptionError, exit_on_input_error
from datafree.learners.base import Learner
from datafree.learners.incremental import ReplayedTask
from datafree.learners.quantize import QuantizeLearner
from datafree.network import Network
from datafree.pool import Batch
from datafree.quantizer import quantise
from datafree.runtime import choose_device, seed_everything
from datafree.synthesis.generative import GenerativeSynthesis
from datafree.synthesis.inversion import InversionSynthesis, PixelSynthesis
from datafree.synthesis.noisy_layer import NoisyLayerSynthesis

SHAPE, CLASSES = parts.SHAPE, parts.CLASSES
EVERY_IMAGE_TERM = dict(bn=1.0, oh=1.0, adv=1.0, act=0.1, balance=1.0, cr=0.5, tv=1e-3, l2=1e-3, triplet=1.0)
EVERY_TERM = dict(kd=1.0, cd_loss=0.5, gram_loss=0.25, at_loss=2.0, striplet=0.5)


# The collectives and the statistics, against the whole batch.


def gathered_rows():
    """Gradients of a function of the rows that are gathered from shares, and of one behind them."""
    x, w = torch.randn(7, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    optimizer = torch.optim.SGD([x, w], 1.0)
    with shares.averaged_gradients():
        y = shares.divided(lambda share: share**2 * w, x)
        loss = (y @ y.T * w.sum()).sin().sum()
    loss.backward()
    loss = shares.average_gradients([optimizer], loss.detach())
    assert len(x[shares.own_rows(7)]) == (7 if distributed.count() == 1 else 4 - distributed.rank())
    return y.detach(), loss, x.grad, w.grad


def batch_norm(norm, shape):
    """Output, gradients and running statistics of a BatchNorm in training mode."""

    def work():
        layer = norm().train()
        with torch.no_grad():
            for tensor in layer.parameters():
                tensor.uniform_(0.5, 1.5)
        x, target = (torch.randn(shape) * 3 + 5).requires_grad_(), torch.randn(shape)
        with shares.averaged_gradients():
            output = shares.divided(layer, x)
            loss = F.mse_loss(output.sin(), target)
        loss.backward()
        optimizer = torch.optim.SGD([x, *layer.parameters()], 1.0)
        shares.average_gradients([optimizer], loss.detach())
        return output.detach(), x.grad, [p.grad for p in layer.parameters()], list(layer.buffers())

    return work


def tapped_statistics():
    """The statistics of a teacher's BatchNorm layers, and the gradient of a function of them."""
    teacher, views = parts.network().freeze(), torch.rand(7, *SHAPE, requires_grad=True)
    with shares.averaged_gradients():
        with BatchNormTap(teacher) as tap:
            teacher.features(views)
        statistics = shares.whole_statistics(tap.statistics, 7)
        loss = sum((layer.mean * layer.variance).sin().sum() for layer in statistics)
    loss.backward()
    shares.average_gradients([torch.optim.SGD([views], 1.0)], loss.detach())
    return [layer[:2] for layer in statistics], views.grad


@torch.no_grad()
def check_random_numbers():
    """A network draws the numbers of its process; the common stream goes on as if it had drawn none."""
    seed_everything(0, False)
    state = torch.get_rng_state()
    first, second = (shares.divided(F.dropout, torch.ones(4, 99)) for _ in range(2))
    assert not torch.equal(first[:2], first[2:]) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first, other) for other in distributed.gathered(first))


def check_passes_that_are_not_divided():
    """Without an update to average the gradients, in a batch of fewer rows than processes, and apart."""
    sizes = []
    see = lambda share: sizes.append(len(share)) or share  # noqa: E731
    x = torch.zeros(4, 1)
    shares.divided(see, x)
    with torch.no_grad():
        shares.divided(see, x[:1])
        with distributed.apart():
            shares.divided(see, x)
        shares.divided(see, x)
    assert sizes == [4, 1, 4, 2]


def check_a_gradient_of_ones_own():
    """A user-defined source with a backward pass of its own has the gradients of one process."""

    def work():
        teacher, x = parts.network().freeze(), torch.rand(6, *SHAPE, requires_grad=True)
        teacher.features(x).logits.square().sum().backward()
        return x.grad

    assert_same_apart(work, rtol=0, atol=0)


def check_files_are_decoded_once(folder):
    for number in range(5):
        Image.new("RGB", (20, 20), (50 * number, 0, 0)).save(folder / f"{os.getpid()}-{number}.png")
    paths = sorted(map(str, folder.glob(f"{os.getpid()}-*.png")))
    split = LazySplit(paths, torch.arange(5), (3, 16, 16), 5, workers=0)
    assert_same_apart(lambda: [*split.batches(3)], rtol=0, atol=0)


def test_collectives_and_statistics_are_those_of_the_whole_batch(tmp_path):
    def work():
        assert_same_apart(gathered_rows)
        assert_same_apart(batch_norm(lambda: nn.BatchNorm2d(3), (7, 3, 4, 5)), atol=1e-5)
        assert_same_apart(batch_norm(lambda: nn.BatchNorm1d(3, momentum=None, affine=False), (8, 3)), atol=1e-5)
        channels_last = nn.BatchNorm2d(4, track_running_stats=False).to(memory_format=torch.channels_last)
        assert_same_apart(batch_norm(lambda: channels_last, (5, 4, 2, 3)), atol=1e-5)
        assert_same_apart(tapped_statistics)
        check_a_gradient_of_ones_own()
        check_passes_that_are_not_divided()
        check_files_are_decoded_once(tmp_path)
        check_random_numbers()

    assert together(connected(work)) == [0, 0]


# A step of each part, against the whole batch.


def round_of(kind, **values):
    """The terms of a round, the gradients of what it optimises, and images of the source."""
    small = dict(synthesis_batch_size=9, nz=8, ngf=4, lr_g=0.05, g_steps=1, start_layer=0, sampling="uniform")

    def work():
        source = parts.make_source(parts.options(**small, **values), kind=kind, augment=CropFlip(1, True))
        terms, objective = source.round(0, with_student=True), source.objective
        trained = [source.pixels] if kind is PixelSynthesis else [*source.generator.parameters()]
        trained += [*objective.contrast.head.parameters()] if objective.contrast else []
        trained += [*source.norm.parameters()] if kind is NoisyLayerSynthesis else []
        return terms, source.round_loss, [p.grad for p in trained], source.batch(5).images

    return work


def step_of(make, batch, progress=0.0, warm_up=False):
    """The terms of a student step, and gradients and buffers of what it trains."""

    def work():
        learner = make()
        if warm_up:
            learner.end_warmup_epoch(batch)
        terms = learner.step(batch(), progress)
        trained = [p.grad for group in learner.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return terms, trained, list(learner.network.model.buffers())

    return work


def images(count):
    return lambda: Batch(torch.rand(count, *SHAPE), torch.arange(count) % CLASSES)


def distilling(**values):
    return lambda: parts.make_learner(parts.options(striplet_sampling="uniform", start_layer=0, **values))


def quantising():
    teacher = parts.network().freeze()
    options = config.QuantizeConfig(
        quantizer=config.Quantizer(ranges="learned", calibration=2),
        finetune=config.Finetune(batch_size=9, feature=1.0),
        relation=config.Relation(striplet=0.5, striplet_sampling="uniform"),
    )
    return QuantizeLearner(quantise(teacher, options.quantizer), teacher, CropFlip(0, False), options, 10)


def replaying(**values):
    def make():
        teacher, student = (parts.network(classes=8) for _ in range(2))
        old, seen = teacher.freeze().restricted_to(range(OLD)), student.restricted_to(range(SEEN))
        options = given(hce=1, hkd=1, rkd=1, fkd=1, kd=1, striplet=1, striplet_sampling="uniform", **values)
        return ReplayedTask(seen, old, CropFlip(0, False), options, 10, real_split())

    return make


def check_steps():
    assert_same_apart(round_of(InversionSynthesis, **EVERY_IMAGE_TERM))
    assert_same_apart(round_of(InversionSynthesis, bn=1.0, triplet=1.0, triplet_target="teacher", relation="release"))
    assert_same_apart(round_of(InversionSynthesis, bn=1.0, adv=1.0, cr=1.0, triplet=0.3, triplet_unit="gradient"))
    assert_same_apart(round_of(GenerativeSynthesis, bn=1.0, adv=1.0, triplet=0.3, triplet_unit="gradient"))
    assert_same_apart(round_of(PixelSynthesis, **EVERY_IMAGE_TERM))
    assert_same_apart(round_of(NoisyLayerSynthesis, bn=1.0, oh=1.0, adv=1.0, triplet=1.0))
    assert_same_apart(round_of(GenerativeSynthesis, bn=1.0, adv=1.0, class_embedding=True))
    assert_same_apart(step_of(distilling(**EVERY_TERM, pair_sample=True), images(7)))
    assert_same_apart(step_of(distilling(kd=1.0, striplet=1.0, striplet_feature="features", mixup=0.5), images(7)))
    assert_same_apart(step_of(quantising, images(9), warm_up=True))
    assert_same_apart(step_of(replaying(passes="apart", striplet_feature="features", classes_per_batch=1), images(5)))
    assert_same_apart(step_of(replaying(head_share=0.5), images(4), progress=0.9))


def test_a_step_of_every_source_and_learner_has_the_gradients_of_the_whole_batch():
    assert together(connected(check_steps)) == [0, 0]


# Whole programs.


@pytest.fixture
def kd(distil):
    """datafree_kd.py on a tiny budget, by as many processes -> exit codes, and the run's folder, called ``tag``."""

    def run(count, *words, tag, **more):
        if count == 1:
            return [0], distil(*words, tag=tag, **more)
        codes = together(lambda: distil(*words, tag=tag, **more), count)
        return codes, next(Path("runs").glob(f"*/{tag}"), None)

    return run


def assert_same_losses(one, other, tolerance=1e-4):
    """Losses and accuracies of two runs agree in each epoch."""
    first, second = rows(one), rows(other)
    assert len(first) == len(second) > 0
    for before, after in zip(first, second):
        assert before.keys() == after.keys()
        names = [name for name in before if name.startswith(("synthesis/", "student/")) or name in ("loss", "acc1")]
        assert {name: after[name] for name in names} == pytest.approx(
            {name: before[name] for name in names}, rel=tolerance, abs=tolerance
        )


def test_two_processes_give_the_losses_of_one_and_resume_exactly(kd, monkeypatch, capfd):
    """RGAL with triplets, and batches that have no two equal shares; a signal that one of them gets stops both."""
    words = ("--batch_size", 15, "--synthesis_batch_size", 15, "--lr_g", 0.003, "--lr", 0.02)
    _, one = kd(1, *words, "--epochs", 2, tag="one")
    codes, two = kd(2, *words, "--epochs", 2, tag="two")
    assert codes == [0, 0]
    assert_same_losses(one, two)
    assert len(list(two.rglob("*"))) == len(list(one.rglob("*")))  # one process writes

    def stop():  # one of the two, in a step of the second epoch
        if distributed.rank():
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.Adam, "step", 15, stop)
        codes, stopped = kd(2, *words, "--epochs", 2, tag="stopped")
    assert codes == [143, 143] and len(rows(stopped)) == 1
    capfd.readouterr()
    codes, stopped = kd(2, *words, "--epochs", 2, "--resume", "auto", tag="stopped")
    said = capfd.readouterr().out
    assert codes == [0, 0] and said.count("Resumed from last.pth") == 1 and "It was written by" not in said
    assert rows(stopped) == rows(two) and same(checkpoint_of(stopped), checkpoint_of(two))
    kd(1, *words, "--epochs", 3, "--resume", two / "checkpoints" / "last.pth", tag="alone")
    assert "It was written by 2 processes and is continued by 1: the numbers are the same" in capfd.readouterr().out


def test_two_processes_whose_networks_draw_random_numbers_resume_exactly(kd, monkeypatch):
    words = ("--student", nets.name("dropping"), "--epochs", 2)
    codes, straight = kd(2, *words, tag="straight")
    assert codes == [0, 0]
    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.Adam, "step", 15, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert kd(2, *words, tag="stopped")[0] == [143, 143]
    codes, stopped = kd(2, *words, "--resume", "auto", tag="stopped")
    assert codes == [0, 0] and rows(stopped) == rows(straight)
    assert same(checkpoint_of(stopped), checkpoint_of(straight))
    first, second = checkpoint_of(straight)["processes"]
    assert same(first["torch"], second["torch"]) and not same(first["own"], second["own"])


def failing_processes(capfd, work):
    """The exit codes of two processes, and the lines on stderr."""
    capfd.readouterr()
    return together(lambda: exit_on_input_error(work)), capfd.readouterr().err.strip().splitlines()


def test_an_error_is_one_line_whoever_has_it(distil, capfd, monkeypatch):
    """A mistake of all; other options; what one of them cannot do; one that is killed."""
    codes, lines = failing_processes(capfd, lambda: distil("--epcohs", 3))
    told = [re.sub(r"process \d of 2: ", "", line) for line in lines]  # by the one that came first
    assert codes == [2, 2] and told == ["error: unknown option --epcohs; did you mean --epochs?"]
    codes, lines = failing_processes(capfd, lambda: distil("--compile", "default"))
    assert codes == [2, 2] and len(lines) == 1 and "--compile default does not go with several processes" in lines[0]
    codes, lines = failing_processes(capfd, lambda: distil("--seed", os.environ["RANK"]))
    assert codes == [1, 1] and len(lines) == 1 and "process 1 was started with other options" in lines[0]

    def of_rank_1(act):
        monkeypatch.setattr(Learner, "prepare", lambda self: act() if distributed.rank() else None)
        return lambda: distil()

    def refuse():
        raise InputError("no such luck")

    codes, lines = failing_processes(capfd, of_rank_1(refuse))
    assert codes == [1, 1] and lines == ["error: process 1 of 2: no such luck"]
    codes, lines = failing_processes(capfd, of_rank_1(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert codes == [1, -signal.SIGKILL] and len(lines) == 1 and "lost the connection to another process" in lines[0]


@pytest.mark.parametrize(
    "variables, sentence",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
    ],
)
def test_a_start_without_torchrun_is_one_sentence(variables, sentence, distil, refused, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sentence in refused(distil)


def test_a_network_that_computes_batch_norm_again_is_refused():
    """Of one process it may be trained."""

    class Recomputed(nets.Trunk):
        def maps(self, x):
            return recomputed(super().maps, x, use_reentrant=False)

    def work():
        network = Network(Recomputed(), SHAPE, (0.5,) * 3, (0.2,) * 3)
        with distributed.apart():
            network.try_run(training=True)
        with pytest.raises(InputError, match="computes BatchNorm again in the backward pass"):
            network.try_run(training=True)

    assert together(connected(work)) == [0, 0]


def test_each_process_has_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(OptionError, match="--device cuda:0 is one GPU for 4 processes; give --device cuda"):
        choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 of this machine has no GPU, torch finds 2"):
        choose_device("auto")


# Slow ones.

GENTLE = ("--lr_g", 0.003, "--lr", 0.02, "--epochs", 2)  # rates at which rounding does not grow beyond the tolerance


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cmi", "deepinv", "fast", "nayer", "dafl", "rgal_reptile", "real", "folder"])
def test_two_processes_give_the_losses_of_one_for_every_kind_of_method(method, kd):
    words = GENTLE if method not in ("real", "folder") else GENTLE[2:]
    words += ("--reset_epoch", 1) if method == "fast" else ()
    _, one = kd(1, *words, tag="one", method=method)
    codes, two = kd(2, *words, tag="two", method=method)
    assert codes == [0, 0]
    assert_same_losses(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rgal", "pixels"])
def test_two_processes_quantise_as_one(method, quantised):
    one = quantised(tag="one", method=method)
    assert together(lambda: quantised(tag="two", method=method)) == [0, 0]
    assert_same_losses(one, next(Path("runs").glob("*/two")))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rdfcil", "abd", "fetril"])
def test_two_processes_learn_tasks_as_one_and_finish_what_they_began(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        *("--method", method, "--threads", 1, "--dataset", "digits", "--model", nets.name("tiny"), "--init_cls", 4),
        *("--increment", 3, "--epochs", 2, "--ep_steps", 4, "--kd_steps", 2, "--batch_size", 15),
    )
    if method != "fetril":
        words += ("--replay_batch_size", 9, "--g_steps", 2, "--synthesis_batch_size", 16, "--ngf", 4, "--nz", 8)
        words += ("--striplet", 1, "--striplet_feature", "features")

    def learn(tag, *more):
        call(datafree_incremental, *words, "--log_tag", tag, *more)

    learn("one")
    with monkeypatch.context() as patch:
        at_call(patch, torch.optim.SGD, "step", 13, lambda: os.kill(os.getpid(), signal.SIGTERM))  # in the second task
        assert together(lambda: learn("two")) == [143, 143]
    assert together(lambda: learn("two", "--resume", "auto")) == [0, 0]
    [one], [two] = (list(Path("runs").glob(f"*/{tag}")) for tag in ("one", "two"))
    assert [row["acc1"] for row in rows(two)] == pytest.approx([row["acc1"] for row in rows(one)], abs=3)
    for task in sorted(one.glob("task_*")):
        assert_same_losses(task, two / task.name)


@pytest.mark.slow
def test_teacher_and_student_of_two_processes_are_as_good_as_of_one(tmp_path, monkeypatch, capfd):
    """On the digits, the teacher within one point and RGAL's student, as in the quickstart, within three."""
    monkeypatch.chdir(tmp_path)
    student = ("--config", ROOT / "configs" / "digits" / "rgal_resnet20_resnet8.yaml", "--teacher", "resnet8")
    accuracies = []
    for program, words in (
        (scratch, ("--model", "resnet8", "--epochs", 6)),
        (distilling_by, (*student, "--epochs", 4)),
    ):
        program(*words, "--log_tag", "one")
        assert together(partial(program, *words, "--log_tag", "two")) == [0, 0]
        name = "scratch" if program is scratch else "rgal"
        accuracies += [[rows(next(Path("runs").glob(f"*_{name}_*/{tag}")))[-1]["acc1"] for tag in ("one", "two")]]
    (teacher, other_teacher), (one, two) = accuracies
    assert other_teacher == pytest.approx(teacher, abs=1) and two == pytest.approx(one, abs=3) and one > 90, accuracies
    capfd.readouterr()
    weights = "checkpoints/pretrained/digits_resnet8.pth"
    assert together(partial(scratch, "--model", "resnet8", "--weights", weights, "--evaluate_only")) == [0, 0]
    assert capfd.readouterr().out.count("[Eval]") == 1


def distilling_by(*words):
    call(datafree_kd, *words)


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped(kd, capfd):
    kd(2, "--epochs", 2, tag="run")
    codes, folder = kd(4, "--epochs", 3, "--resume", "auto", tag="run")
    assert codes == [0] * 4 and len(rows(folder)) == 3
    assert "It was written by 2 processes and is continued by 4" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_give_the_losses_of_one(distil, teacher, tmp_path):
    one = distil(*GENTLE, "--device", "cuda", tag="one")
    words = ("--method", "rgal", "--teacher", nets.name("tiny"), "--teacher_weights", teacher, *GENTLE)
    done = torchrun(ROOT / "datafree_kd.py", *tiny_run(*words), *words, "--device", "cuda", "--log_tag", "two")
    assert done.returncode == 0, done.stderr
    assert_same_losses(one, next(tmp_path.glob("runs/*/two")), tolerance=1e-2)  # TF32 has ten bits


def torchrun(*words, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)


@pytest.mark.slow
def test_torchrun_starts_a_run_again_of_which_a_process_was_killed(teacher, tmp_path):
    """It ends as the run of which none was killed; without a restart it ends with a line."""
    words = ("--method", "rgal", "--teacher", nets.name("tiny"), "--teacher_weights", teacher, "--resume", "auto")

    def run(tag, *options, student="Deadly", program=(ROOT / "datafree_kd.py",)):
        student = ("--student", nets.name(student), "--log_tag", tag)
        done = torchrun(*options, *program, *tiny_run(*words), *words, *student, cwd=tmp_path)
        return done, next(tmp_path.glob(f"runs/*/{tag}"))

    done, straight = run("straight", student="small", program=("-m", "datafree", "kd"))  # as one who installed it
    assert done.returncode == 0, done.stderr
    done, ended = run("ended")
    assert done.returncode == 1 and "error: lost the connection to another process of the run" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr and 0 < len(rows(ended)) < 4
    (tmp_path / "killed").unlink()
    done, again = run("again", "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert "Resumed from last.pth: epoch" in done.stdout
    assert rows(again) == rows(straight)
