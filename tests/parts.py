"""The parts of a run for tests of one of them: small networks, options, a card, a source, a learner."""

from dataclasses import fields, replace

import nets

from datafree import config
from datafree.augment import CropFlip
from datafree.datasets.cards import DatasetCard
from datafree.learners.distill import DistillLearner
from datafree.network import Network
from datafree.synthesis.inversion import InversionSynthesis

SHAPE, CLASSES = (3, 16, 16), 4


def network(factory=nets.tiny, shape=SHAPE, classes=CLASSES, mean=0.4, std=0.2):
    """An untrained Network."""
    channels = shape[0]
    return Network(factory(classes, channels), shape, (mean,) * channels, (std,) * channels)


def options(synthesis=None, relation=None, distill=None, **values):
    """A DistillConfig of these sections; values: further options by name, of any section.

    relation may be the option of that name, too.
    """
    if isinstance(relation, str):
        values["relation"], relation = relation, None
    given = config.DistillConfig(
        synthesis=synthesis or config.Synthesis(),
        relation=relation or config.Relation(),
        distill=distill or config.Distill(),
    )
    for name in config.sections(config.DistillConfig):
        section = getattr(given, name)
        chosen = {field.name: values.pop(field.name) for field in fields(section) if field.name in values}
        setattr(given, name, replace(section, **chosen))
    assert not values, f"no such options: {values}"
    return given


def make_card(shape=SHAPE, classes=CLASSES):
    """A data card for images of ``shape``."""
    return DatasetCard("test", *shape, classes, (0.5,) * shape[0], (0.25,) * shape[0])


def make_source(given, teacher=None, student=None, augment=None, kind=InversionSynthesis):
    """A source of class ``kind`` with the options ``given``, on the teacher's device; its teacher is frozen."""
    teacher = (teacher or network()).freeze()
    student = student or network(nets.small, teacher.shape, teacher.num_classes)
    card = make_card(teacher.shape, teacher.num_classes)
    return kind(teacher, student, augment or CropFlip(1, True), card, given, teacher.device)


def make_learner(given, teacher=None, student=None, augment=None, total_steps=100, kind=DistillLearner):
    """A learner of class ``kind`` with the options ``given``; its teacher is frozen."""
    teacher = (teacher or network()).freeze()
    student = student or network(nets.small, teacher.shape, teacher.num_classes)
    return kind(student, teacher, augment or CropFlip(0, False), given, total_steps)


def snapshot(*modules):
    """Copies of all tensors in the state of the modules, by name; number of the module first."""
    return {
        f"{number}.{name}": tensor.clone()
        for number, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }


def changed(before, *modules):
    """Names of the tensors that differ from a :func:`snapshot` of the same modules."""
    now = snapshot(*modules)
    assert now.keys() == before.keys()
    return {name for name, tensor in now.items() if not tensor.equal(before[name])}


def count_calls(patch, owner, name):
    """A list to which the arguments (args, kwargs) of every later call of ``owner.name`` are added."""
    calls, original = [], getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **more: calls.append((args, more)) or original(*args, **more))
    return calls


def hooks_of(model):
    """How many hooks the modules of ``model`` have."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
