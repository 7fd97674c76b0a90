"""No step waits for the host: the operators that a step calls show what would stall a GPU, on any device.

Except with the view cache, which is off on a GPU by default: it has to know how many views are new.
"""

import nets
import parts
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from datafree import config
from datafree.augment import CropFlip
from datafree.datasets.splits import TensorSplit
from datafree.engine import Means
from datafree.learners.incremental import ReplayedTask, TranslatedTask
from datafree.muon import Muon
from datafree.pool import Batch
from datafree.synthesis.inversion import InversionSynthesis
from datafree.synthesis.noisy_layer import NoisyLayerSynthesis
from datafree.view_cache import ViewCache

ALL = dict(bn=1.0, oh=1.0, adv=1.0, act=1.0, balance=1.0, cr=1.0, tv=1.0, l2=1.0)
# The host fetches a value, or a size depends on values.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "equal")


class Waits(TorchDispatchMode):
    """Collects the operators that make the host wait for values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            torch.is_tensor(index) and index.dtype == torch.bool for index in args[1]
        )
        self.found += [name] * (name in WAITING or by_mask)
        return operator(*args, **(kwargs or {}))


def both_phases(synthesis, relation, distill, cached=False, kind=InversionSynthesis):
    """A source with one round in its pool, and a learner."""
    synthesis = config.Synthesis(**synthesis, nz=4, ngf=4, synthesis_batch_size=8, pool_size=40, balanced_sampling=True)
    options = parts.options(synthesis, relation, config.Distill(**distill), g_steps=3)
    teacher, student = parts.network(nets.tiny).freeze(), parts.network(nets.small)
    source = parts.make_source(options, teacher, student, CropFlip(), kind)
    learner = parts.make_learner(options, teacher, student, CropFlip())
    source.round(0, with_student=True)
    source.batch(8)  # the range of the first batch is checked, which waits
    if cached:
        learner.cache = ViewCache(teacher, learner.cached_fields, 40 * 162, 10)
    return source, learner


@pytest.fixture(autouse=True)
def no_optimiser(monkeypatch):
    """Its step counters are numbers on the host, even on a GPU."""
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        monkeypatch.setattr(optimizer, "step", lambda self: None)


def test_a_wait_is_detected():
    for act in (lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: x[x > 0], torch.nonzero, float):
        with Waits() as waits:
            act(torch.ones(1))
        assert waits.found


def test_triplets_in_units_of_the_gradient_do_not_wait_for_the_host():
    source, _ = both_phases(ALL, config.Relation(triplet=0.3, triplet_unit="gradient"), {})
    with Waits() as waits:
        source.round(0, with_student=True)
    assert not waits.found


def test_muon_does_not_wait_for_the_host():
    net = nets.tiny(4)
    optimizer = Muon(net, 0.1)
    for _ in range(2):
        net(torch.randn(4, 3, 16, 16)).sum().backward()
        with Waits() as waits:
            optimizer.step()
        assert not waits.found


@pytest.mark.parametrize("sampling", ["focal", "distance", "uniform"])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("init", ["random", "reptile", "maml"])
def test_neither_phase_waits_for_the_host(sampling, keep, init):
    torch.manual_seed(0)
    relation = config.Relation(
        triplet=1.0, striplet=1.0, sampling=sampling, striplet_sampling=sampling, sampling_cap=3.0
    )
    source, learner = both_phases(
        {**ALL, "keep": keep, "generator_init": init, "meta_rate": 0.5, "class_noise": 1.0},
        relation,
        dict(cd_loss=1.0, gram_loss=1.0, pair_sample=True, mixup=0.5),
    )
    means = Means()
    with Waits() as waits:
        means.add("synthesis", source.round(1, with_student=True))
        for _ in range(2):
            means.add("student", learner.step(source.batch(8)))
    assert waits.found == []


def test_a_noisy_layer_and_a_new_generator_do_not_wait_for_the_host():
    source, _ = both_phases({**ALL, "generator_life": 1}, config.Relation(), {}, kind=NoisyLayerSynthesis)
    with Waits() as waits:
        source.round(1, with_student=True)
        source.batch(8)
    assert waits.found == []


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_a_step_of_incremental_learning_does_not_wait_for_the_host(progress):
    torch.manual_seed(0)
    given = config.IncrementalConfig()
    given.incremental = config.Incremental(
        **dict(batch_size=6, replay_batch_size=4, classes_per_batch=2, head_share=0.5, passes="apart"),
        **dict(hce=1, fkd=1, hkd=1, rkd=1, kd=1),
    )
    given.relation = config.IncrementalRelation(striplet=1)
    teacher = parts.network(nets.tiny, classes=8).freeze().restricted_to(range(3))
    student = parts.network(nets.tiny, classes=8).restricted_to(range(6))
    real = TensorSplit(torch.zeros(40, *parts.SHAPE, dtype=torch.uint8), 3 + torch.arange(40) % 3, 6)
    learner = ReplayedTask(student, teacher, CropFlip(), given, 10, real)
    translated = TranslatedTask(student, torch.rand(6, 16), 3, given, 10)
    real.sample(1)  # draws the seed of the order
    with Waits() as waits:
        learner.step(Batch(torch.rand(8, *parts.SHAPE)), progress)
        translated.step(Batch(*real.sample(6)), progress)
    assert waits.found == []


def test_the_view_cache_waits_once_a_step():
    relation = config.Relation(triplet=1.0, striplet=1.0)
    source, learner = both_phases(ALL, relation, dict(cd_loss=1.0), cached=True)
    with Waits() as waits:
        learner.step(source.batch(8))
    assert waits.found == ["nonzero"]
