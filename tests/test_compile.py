"""torch.compile of the networks: the same numbers, and no more compiling after the first steps."""

import shutil

import nets
import pytest
import torch

from datafree import config
from datafree.augment import CropFlip
from datafree.learners.distill import DistillLearner
from datafree.models.generator import Generator
from datafree.network import Network
from datafree.pool import ImagePool
from datafree.synthesis.inversion import InversionSynthesis
from datafree.synthesis.objective import SynthesisObjective

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
SHAPE, CLASSES = (3, 16, 16), 4
RELATION = config.Relation(triplet=1.0, striplet=1.0, sampling="uniform", striplet_sampling="uniform")


def phases(compiled):
    torch.manual_seed(0)
    teacher, student = (Network(make(CLASSES, 3), SHAPE, (0.4,) * 3, (0.2,) * 3) for make in (nets.tiny, nets.small))
    if compiled:
        teacher.compiled("default"), student.compiled("default")
    options = config.Synthesis(bn=1.0, oh=1.0, adv=1.0, nz=4, ngf=4, synthesis_batch_size=8)
    objective = SynthesisObjective(options, RELATION, teacher.freeze(), student)
    source = InversionSynthesis(
        objective, Generator(4, 4, SHAPE), CropFlip(), ImagePool(32, SHAPE, CLASSES, torch.device("cpu")), options, 2
    )
    return source, DistillLearner(student, teacher, CropFlip(), config.Distill(cd_loss=1.0), RELATION, 100)


def round_of(source, learner):
    torch.manual_seed(1)
    terms = source.synthesize()
    for _ in range(2):
        terms = {**terms, **learner.step(*source.sample(8))}
    return terms


def test_compiled_networks_give_the_same_numbers_and_are_compiled_once():
    plain, compiled = phases(False), phases(True)
    torch.testing.assert_close(round_of(*compiled), round_of(*plain), rtol=1e-3, atol=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 4  # each network in each phase
    round_of(*compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert len(compiled[0].objective.bn_tap.statistics) == 2


def test_a_compiled_run(distil):
    folder = distil("--compile", "default", "--epochs", 1, "--kd_steps", 2, "--ep_steps", 2)
    assert (folder / "summary.json").exists()
