"""torch.compile of the networks: the same numbers as without, and no recompilation after the first steps."""

import shutil

import nets
import parts
import pytest
import torch
from conftest import call
from resuming import at_call, stopped, terminate
from test_budget import within

import datafree_kd
from datafree import config
from datafree.augment import CropFlip
from datafree.engine import Engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
]
OPTIONS = parts.options(
    config.Synthesis(bn=1.0, oh=1.0, adv=1.0, nz=4, ngf=4, synthesis_batch_size=8, pool_size=32),
    config.Relation(triplet=1.0, striplet=1.0, sampling="uniform", striplet_sampling="uniform"),
    config.Distill(cd_loss=1.0),
    g_steps=2,
)


def phases(compiled):
    """A source and a learner of the same weights each time, whose networks are compiled or not."""
    torch.manual_seed(0)
    teacher, student, augment = parts.network(nets.tiny), parts.network(nets.small), CropFlip()
    if compiled:
        teacher.compiled("default"), student.compiled("default")
    teacher.freeze()
    source = parts.make_source(OPTIONS, teacher, student, augment)
    return source, parts.make_learner(OPTIONS, teacher, student, augment)


def round_of(source, learner):
    torch.manual_seed(1)
    terms = source.synthesize()
    for _ in range(2):
        terms = {**terms, **learner.step(source.sample(8))}
    return terms


@pytest.fixture
def counters():
    """Of torch.compile, from nothing on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def test_compiled_networks_give_the_same_numbers_and_are_compiled_once(counters):
    plain, compiled = phases(False), phases(True)
    torch.testing.assert_close(round_of(*compiled), round_of(*plain), rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 4  # each network in each phase, which nothing breaks up
    round_of(*compiled)
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    assert len(compiled[0].objective.bn_tap.statistics) == 2


def test_a_compiled_run(distil):
    folder = distil("--compile", "default", "--epochs", 1, "--kd_steps", 2, "--ep_steps", 2)
    assert (folder / "summary.json").exists()


def test_a_budget_is_planned_by_compiled_steps_and_the_run_compiles_nothing_more(
    counters, teacher, tmp_path, monkeypatch
):
    """Or the time to compile would be taken for that of the run's first steps, and its plan cut short."""
    monkeypatch.chdir(tmp_path)
    planned = []
    at_call(monkeypatch, Engine, "_synthesize", 1, lambda: planned.append(counters["stats"]["unique_graphs"]))
    at_call(monkeypatch, Engine, "_student_step", 20, terminate)
    given = ("--method", "rgal", "--teacher", nets.name("tiny"), "--teacher_weights", teacher)
    with stopped(terminate):
        call(datafree_kd, *given, *within("--budget", "1h", "--compile", "default", "--batch_size", 64))
    assert counters["stats"]["unique_graphs"] == planned[0] >= 4
