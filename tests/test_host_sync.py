"""No step waits for the host: what would stop a GPU is told by the operators that a step calls, on any device.

All but the view cache, which is off on a GPU unless asked for: it has to know how many views are new.
"""

import nets
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from datafree import config
from datafree.augment import CropFlip
from datafree.engine import Means
from datafree.learners.distill import DistillLearner
from datafree.models.generator import Generator
from datafree.network import Network
from datafree.pool import ImagePool
from datafree.synthesis.inversion import InversionSynthesis
from datafree.synthesis.objective import SynthesisObjective
from datafree.view_cache import ViewCache

SHAPE, CLASSES, CPU = (3, 16, 16), 4, torch.device("cpu")
ALL = dict(bn=1.0, oh=1.0, adv=1.0, act=1.0, balance=1.0, cr=1.0, tv=1.0, l2=1.0)
# A value is fetched, or a size depends on values.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "equal")


class Waits(TorchDispatchMode):
    """Collects the operators by which the host waits for values."""

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


def both_phases(synthesis, relation, distill, cached=False):
    """A source with one round in its pool, and a learner."""
    teacher, student = (Network(make(CLASSES, 3), SHAPE, (0.4,) * 3, (0.2,) * 3) for make in (nets.tiny, nets.small))
    settings = config.Synthesis(**synthesis, nz=4, ngf=4, synthesis_batch_size=8)
    objective = SynthesisObjective(settings, relation, teacher.freeze(), student)
    source = InversionSynthesis(
        objective, Generator(4, 4, SHAPE), CropFlip(), ImagePool(40, SHAPE, CLASSES, CPU), settings, 3, balanced=True
    )
    source.synthesize()
    cache = ViewCache(teacher, ("logits", "embed", "stages"), 40 * 162, 10) if cached else None
    return source, DistillLearner(student, teacher, CropFlip(), config.Distill(**distill), relation, 100, cache=cache)


@pytest.fixture(autouse=True)
def no_optimiser(monkeypatch):
    """Their counters of steps are numbers of the host, also on a GPU."""
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        monkeypatch.setattr(optimizer, "step", lambda self: None)


def test_the_watch_sees_a_wait():
    for act in (lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: x[x > 0], torch.nonzero, float):
        with Waits() as waits:
            act(torch.ones(1))
        assert waits.found


@pytest.mark.parametrize("sampling", ["focal", "distance", "uniform"])
@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("init", ["random", "reptile", "maml"])
def test_neither_phase_waits_for_the_host(sampling, keep, init):
    torch.manual_seed(0)
    relation = config.Relation(triplet=1.0, striplet=1.0, sampling=sampling, striplet_sampling=sampling)
    source, learner = both_phases(
        {**ALL, "keep": keep, "generator_init": init, "meta_rate": 0.5, "class_noise": 1.0},
        relation,
        dict(cd_loss=1.0, gram_loss=1.0, pair_sample=True, mixup=0.5),
    )
    means = Means()
    with Waits() as waits:
        means.add("synthesis", source.synthesize())
        for _ in range(2):
            means.add("student", learner.step(*source.sample(8)))
    assert waits.found == []


def test_the_view_cache_waits_once_a_step():
    relation = config.Relation(triplet=1.0, striplet=1.0)
    source, learner = both_phases(ALL, relation, dict(cd_loss=1.0), cached=True)
    with Waits() as waits:
        learner.step(*source.sample(8))
    assert waits.found == ["nonzero"]
