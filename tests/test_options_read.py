"""Every option of a program is read by its code: one that nothing reads would be accepted and do nothing."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import nets
import pytest
from conftest import ROOT, call, scratch

import datafree_incremental
from datafree import cli, config, options, plan
from datafree.config import DistillConfig, IncrementalConfig, QuantizeConfig, ScratchConfig, option, sections
from datafree.options import list_options
from datafree.programs import distill, train

# Code that handles all options alike, or states them in words, so that its reading of one makes no difference.
NO_READERS = {Path(module.__file__).resolve() for module in (cli, config, options, plan)}


def is_reader(file):
    """Whether code in this file reads an option to act by its value."""
    path = Path(file)
    return ROOT / "datafree" in path.parents and path not in NO_READERS


@contextmanager
def recorded(config_class):
    """Yield the set of (section, option) that are read inside the block."""
    found, readers = set(), {}

    def getattribute_of(section, names):
        def getattribute(self, name):
            if name in names:
                file = sys._getframe(1).f_code.co_filename
                if readers.setdefault(file, is_reader(file)):
                    found.add((section, name))
            return object.__getattribute__(self, name)

        return getattribute

    with pytest.MonkeyPatch.context() as patch:
        for section, cls in {"": config_class, **sections(config_class)}.items():
            names = frozenset(f.name for f in fields(cls) if "help" in f.metadata)
            patch.setattr(cls, "__getattribute__", getattribute_of(section, names))
        yield found


def unread(config_class, run):
    """The options of ``config_class`` that nothing reads during ``run()``, as section.option."""
    with recorded(config_class) as found:
        run()
    declared = {(o.section, o.name) for o in list_options(config_class) if o.section != "call"}
    assert found <= declared
    return {f"{section}.{name}".lstrip(".") for section, name in declared - found}


@pytest.fixture
def distillations(distil, teacher):
    """Tiny runs of datafree_kd.py, some of which need what others do not."""

    def run():
        short = ("--epochs", 1, "--ep_steps", 2, "--kd_steps", 1, "--eval", "none")

        def one(tag, *words):
            distil(*short, *words, tag=tag)

        distil("--epochs", 2)
        one("terms", "--act", 1, "--balance", 1, "--cr", 1, "--tv", 1, "--l2", 1, "--bn_momentum", 0.5)
        one("pool", "--pool_size", 16, "--balanced_sampling", "--view_cache", 1, "--lr_z", 0.01)
        one("maps", "--mixup", 0.5, "--gram_loss", 1, "--at_loss", 1, "--optimizer", "muon")
        one("stages", "--striplet_feature", "features", "--triplet_target", "teacher")
        one("reptile", "--generator_init", "reptile", "--meta_rate", 0.5, "--reset_epoch", 1, "--class_noise", 1)
        one("maml", "--generator_init", "maml", "--synthesis_rounds", 1, "--teacher_mean", 0.5, "--teacher_std", 0.5)
        for method in ("dfq", "deepinv", "nayer", "noise"):
            one(method, "--method", method)
        distil("--student_weights", teacher, "--student", nets.name("tiny"), "--evaluate_only")

    return run


def trainings():
    """Tiny runs of train_scratch.py, one of which needs what the other does not."""
    words = ("--model", nets.name("tiny"), "--epochs", 2)
    scratch(*words, "--batch_size", 512, "--optimizer", "muon")
    scratch(*words, "--batch_size", 512, "--weights", "checkpoints/pretrained/digits_nets-tiny.pth", "--evaluate_only")


def test_every_option_of_datafree_quantize_is_read(quantised):
    def run():
        short = ("--epochs", 1, "--warmup", 1, "--ep_steps", 2, "--kd_steps", 1)

        def one(tag, *words, method="rgal"):
            quantised(*short, *words, method=method, tag=tag)

        quantised()
        one("terms", "--act", 1, "--balance", 1, "--cr", 1, "--tv", 1, "--l2", 1, "--bn_momentum", 0.5, "--adv", 1)
        one("stages", "--striplet_feature", "features", "--triplet_target", "teacher", "--feature", 1)
        one("ranges", "--ranges", "learned", "--first_last_bits", 8, "--w_per", "tensor", "--fold_bn", "--w_symmetric")
        one("pool", "--view_cache", 1, "--pool_size", 16, "--balanced_sampling", method="pixels")
        rounds = ("--source", "inversion", "--class_embedding", "false", "--nz", 8, "--ngf", 4, "--lr_z", 0.01)
        one("reptile", *rounds, "--generator_init", "reptile", "--reset_epoch", 1, "--class_noise", 1, method="pixels")
        one("noisy", "--source", "noisy_layer", *rounds[2:], method="pixels")
        one("noise", "--teacher_mean", 0.5, "--teacher_std", 0.5, method="noise")
        quantised("--student_weights", "runs/digits_rgal_nets-tiny_w3a3/run", "--evaluate_only", tag="file")

    assert unread(QuantizeConfig, run) == set()


def increments():
    """Tiny runs of datafree_incremental.py, some of which need what others do not."""
    short = (
        *("--threads", 1, "--dataset", "digits", "--crop_padding", 1, "--model", nets.name("tiny"), "--init_cls", 5),
        *("--increment", 5, "--epochs", 2, "--ep_steps", 2, "--kd_steps", 1, "--batch_size", 16),
    )
    replay = ("--replay_batch_size", 8, "--g_steps", 1, "--synthesis_batch_size", 16, "--ngf", 4, "--nz", 8)

    def one(method, tag, *words):
        call(datafree_incremental, "--method", method, "--log_tag", tag, *short, *words)

    one("rgal", "terms", *replay, *"--act 1 --adv 1 --cr 1 --l2 1 --bn_momentum 0.5 --base_epochs 1".split())
    one("rdfcil", "maps", *replay, "--kd", 1, "--striplet", 1, "--striplet_feature", "features", "--class_order", order)
    inverted = "--source inversion --pool_size 16 --balanced_sampling --lr_z 0.01 --meta_rate 0.5 --reset_epoch 1"
    one("abd", "pool", *replay, *inverted.split(), "--generator_init", "maml", "--classes_per_batch", 2)
    one("abd", "noisy", *replay, "--source", "noisy_layer", "--optimizer", "muon")
    one("lwf", "lwf", "--weights", "runs/digits_rgal_nets-tiny/terms/task_00")
    one("fetril", "fetril", "--weights", "runs/digits_rgal_nets-tiny/terms/task_00", "--evaluate_only")


order = "0,1,2,3,4,5,6,7,8,9"


def test_every_option_of_datafree_incremental_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert unread(IncrementalConfig, increments) == set()


def test_every_option_of_datafree_kd_is_read(distillations):
    assert unread(DistillConfig, distillations) == set()


def test_every_option_of_train_scratch_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert unread(ScratchConfig, trainings) == set()


# The tests of these tests: options are added to a section and to the config itself.


@dataclass
class SurplusDistill(config.Distill):
    __doc__ = config.Distill.__doc__

    surplus: float = option(0.5, "Nothing reads it.")


@dataclass
class SurplusDistillConfig(DistillConfig):
    distill: SurplusDistill = field(default_factory=SurplusDistill)


@dataclass
class SurplusScratchConfig(ScratchConfig):
    extra: str = option("", "Nothing reads it, either.")


def test_an_option_of_distillation_that_nothing_reads_is_found(distillations, monkeypatch):
    monkeypatch.setattr(distill, "PROGRAM", replace(distill.PROGRAM, config_class=SurplusDistillConfig))
    assert unread(SurplusDistillConfig, distillations) == {"distill.surplus"}


def test_an_option_of_training_that_nothing_reads_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "PROGRAM", replace(train.PROGRAM, config_class=SurplusScratchConfig))
    assert unread(SurplusScratchConfig, trainings) == {"extra"}
