"""Phase 2: what the student learns from, and every registered model in both roles."""

import copy
import math
from dataclasses import replace

import nets
import pytest
import torch
from torch.nn import functional as F

from datafree import config, criterions, relation
from datafree.augment import CropFlip
from datafree.errors import InputError
from datafree.hooks import BatchNormTap
from datafree.learners.distill import DistillLearner
from datafree.learners.supervised import SupervisedLearner
from datafree.models import MODELS
from datafree.models.generator import Generator
from datafree.network import Network
from datafree.pool import ImagePool
from datafree.synthesis.inversion import InversionSynthesis
from datafree.synthesis.objective import SynthesisObjective
from datafree.view_cache import ViewCache

SHAPE, CLASSES = (3, 16, 16), 4
EVERY = dict(kd=1.0, cd_loss=0.5, gram_loss=0.25)
STAY = CropFlip(0, False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network(factory=nets.tiny, shape=SHAPE, classes=CLASSES, mean=0.4, std=0.2):
    channels = shape[0]
    return Network(factory(classes, channels), shape, (mean,) * channels, (std,) * channels)


def make(settings=None, triplets=None, teacher=None, student=None, total_steps=10, augment=STAY, **more):
    settings = settings or config.Distill(**EVERY)
    triplets = triplets or config.Relation(striplet=0.125, striplet_sampling="uniform")
    teacher = (teacher or network()).freeze()
    student = student or network(nets.small)
    return DistillLearner(student, teacher, augment, settings, triplets, total_steps, **more)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def count_calls(patch, owner, name):
    calls, original = [], getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: calls.append((a, k)) or original(*a, **k))
    return calls


# What moves.


def test_a_step_moves_the_student_and_its_projection_and_nothing_of_the_teacher():
    learner = make()
    before = snapshot(learner.teacher), snapshot(learner.network), snapshot(learner.projection)
    learner.step(torch.rand(8, *SHAPE), None)
    assert moved(before[0], learner.teacher) == set()
    assert moved(before[1], learner.network) == set(before[1])  # BatchNorm statistics and counters too
    assert moved(before[2], learner.projection) == set(before[2])
    assert all(p.grad is None for p in learner.teacher.parameters())
    assert learner.network.training and not any(module.training for module in learner.teacher.modules())


def test_the_student_phase_runs_no_statistic_hooks_and_leaves_the_generator(monkeypatch):
    teacher, student = network().freeze(), network(nets.small)
    options = config.Synthesis(bn=1.0, oh=1.0, nz=4, ngf=4, synthesis_batch_size=8)
    objective = SynthesisObjective(options, config.Relation(), teacher, student)
    pool = ImagePool(8, SHAPE, CLASSES, torch.device("cpu"))
    source = InversionSynthesis(objective, Generator(4, 4, SHAPE), STAY, pool, options, g_steps=1)
    source.synthesize()
    hooked = count_calls(monkeypatch, BatchNormTap, "_keep")
    before, held = snapshot(source.generator), pool.state_dict()
    learner = make(teacher=teacher, student=student)
    for _ in range(3):
        learner.step(*source.sample(8))
    assert not hooked and moved(before, source.generator) == set()
    assert torch.equal(held["images"], pool.state_dict()["images"])


def test_the_students_distance_may_be_l1_and_it_may_match_attention():
    learner = make(config.Distill(kd=0.5, kd_distance="l1", at_loss=2.0), config.Relation())
    views = torch.rand(8, *SHAPE)
    learner.network.train()
    loss, terms = learner.loss(views, None, None, 0.0)
    student, teacher = (net.features(views) for net in (learner.network, learner.teacher))
    torch.testing.assert_close(terms["kd"], (student.logits - teacher.logits).abs().mean())
    torch.testing.assert_close(terms["at_loss"], criterions.attention(student.stages, teacher.stages, [(0, 0), (1, 1)]))
    torch.testing.assert_close(loss, 0.5 * terms["kd"] + 2.0 * terms["at_loss"])


def cached_and_plain(pair, space="embedding"):
    """Two learners of equal weights, one of which keeps the teacher's answers, and a pool."""
    settings = config.Distill(cd_loss=0.5, pair_sample=pair, lr=0.05)
    triplets = config.Relation(striplet=0.5, sampling_space=space)
    teacher, crop = network().freeze(), CropFlip(1, True)
    pool = ImagePool(12, SHAPE, CLASSES, torch.device("cpu"))
    pool.add(torch.rand(12, *SHAPE), torch.arange(12) % CLASSES)
    wanted = ["logits", "stages", "embed"][: 3 if space == "embedding" else 2]
    cache = ViewCache(teacher, wanted, 12 * crop.count, megabytes=1)
    plain = make(settings, triplets, teacher, augment=crop, total_steps=60)
    cached = make(settings, triplets, teacher, augment=crop, total_steps=60, cache=cache)
    cached.network.load_state_dict(plain.network.state_dict())
    cached.projection.load_state_dict(plain.projection.state_dict())
    return cached, plain, pool


@pytest.mark.parametrize("pair, space", [(True, "embedding"), (False, "logits")])
def test_the_kept_answers_of_the_teacher_change_nothing(pair, space, monkeypatch):
    cached, plain, pool = cached_and_plain(pair, space)
    for step in range(20):
        terms = []
        for learner in (cached, plain):
            torch.manual_seed(step)
            terms.append(learner.step(*pool.sample(8)))
        torch.testing.assert_close(terms[0], terms[1], rtol=1e-3, atol=1e-4)
    assert cached.numbers()["view_cache/hit_rate"] > 0.2 and cached.numbers() == plain.numbers() == {}
    torch.testing.assert_close(snapshot(cached.network), snapshot(plain.network), rtol=1e-2, atol=1e-4)


def test_images_without_numbers_are_shown_to_the_teacher_each_time():
    cached, _, pool = cached_and_plain(True)
    for _ in range(3):
        cached.step(*pool.newest(8))
    assert (cached.cache.keys == -1).all()


# What is computed.


def test_the_loss_is_the_weighted_sum_and_the_terms_are_the_criterions():
    learner, images = make(), torch.rand(8, *SHAPE)
    learner.network.train()
    torch.manual_seed(1)
    loss, terms = learner.loss(images, None, None, 0.0)
    student, teacher = learner.network.features(images), learner.teacher.features(images)
    torch.manual_seed(1)
    STAY(images)  # draws as much as the step did
    labels = teacher.logits.argmax(1)
    expected = {
        "kd": criterions.distillation(student.logits, teacher.logits, 20.0),
        "cd_loss": learner.projection.channel(student.stages, teacher.stages),
        "gram_loss": learner.projection.gram(student.stages, teacher.stages),
        "striplet": relation.relation_loss([student.embed], labels, teacher.embed, 0.2, "uniform", relation.SEPARATE),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    weights = {**EVERY, "striplet": 0.125}
    torch.testing.assert_close(loss, sum(weights[name] * value for name, value in expected.items()))


def test_the_kd_term_equals_kullback_leiblers_definition():
    learner, images = make(config.Distill(T=4.0), config.Relation()), torch.rand(8, *SHAPE)
    loss, terms = learner.loss(images, None, None, 0.0)
    assert set(terms) == {"kd"} and learner.projection is None
    p = (learner.teacher(images) / 4).softmax(1)
    q = (learner.network(images) / 4).softmax(1)
    torch.testing.assert_close(loss, 16 * (p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize("term", ["kd", "cd_loss", "gram_loss", "striplet"])
def test_a_weight_of_0_skips_its_term_alone(term, monkeypatch):
    settings = config.Distill(**{**EVERY, **({term: 0.0} if term != "striplet" else {})})
    learner = make(settings, config.Relation(striplet=float(term != "striplet")))
    skipped = count_calls(monkeypatch, learner, f"_{term}")
    assert set(learner.step(torch.rand(8, *SHAPE), None)) == {*EVERY, "striplet"} - {term}
    assert not skipped


def test_a_loss_of_no_terms_is_refused():
    for settings in (config.Distill(kd=0.0), config.Distill(kd=0.0, cd_loss=1.0, custom_steps=0.5)):
        with pytest.raises(InputError, match="--kd"):
            make(settings, config.Relation())
    make(config.Distill(kd=0.0, cd_loss=1.0), config.Relation()).step(torch.rand(4, *SHAPE), None)


def test_the_custom_terms_act_in_their_share_of_the_run():
    learner = make(config.Distill(**EVERY, custom_steps=0.5))
    assert set(learner.step(torch.rand(8, *SHAPE), None, progress=0.49)) == {*EVERY, "striplet"}
    assert set(learner.step(torch.rand(8, *SHAPE), None, progress=0.5)) == {"kd"}


def test_pairs_show_every_image_under_two_augmentations(monkeypatch):
    learner = make(config.Distill(pair_sample=True), config.Relation(), augment=CropFlip(2, True))
    seen = count_calls(monkeypatch, learner.network, "features")
    learner.step(torch.rand(8, *SHAPE), None)
    views = seen[0][0][0]
    assert views.shape == (16, *SHAPE) and not torch.equal(views[:8], views[8:])


@pytest.mark.parametrize("feature, shape", [("global", (8, 12)), ("logits", (8, CLASSES)), ("features", (8, 12, 4, 4))])
@pytest.mark.parametrize("space", ["embedding", "logits"])
def test_the_triplets_look_at_what_was_chosen(feature, shape, space, monkeypatch):
    triplets = config.Relation(
        striplet=1.0,
        striplet_feature=feature,
        sampling_space=space,
        start_layer=1,
        end_layer=2,
        striplet_sampling="distance",
    )
    learner = make(config.Distill(), triplets)
    calls = count_calls(monkeypatch, relation, "relation_loss")
    images = torch.rand(8, *SHAPE)
    with torch.no_grad():
        student = learner.network.train().features(images)
    learner.step(images, torch.zeros(8))
    layers, labels, drawn, margin, sampling, direction = calls[0][0]
    teacher = learner.teacher.features(images)
    looked_at = {"global": student.embed, "logits": student.logits, "features": student.stages[1]}[feature]
    assert looked_at.shape == shape and [torch.allclose(layer, looked_at, atol=1e-5) for layer in layers] == [True]
    assert torch.equal(labels, teacher.logits.argmax(1))
    expected = teacher.embed if space == "embedding" else student.logits
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)
    assert not drawn.requires_grad
    assert (margin, sampling, direction) == (0.2, "distance", relation.SEPARATE)


def test_each_network_normalises_by_its_own_mean_and_deviation():
    teacher, images = network(mean=0.1, std=0.9), torch.rand(4, *SHAPE)
    student = network(mean=0.7, std=0.3)
    student.model.load_state_dict(teacher.model.state_dict())
    torch.testing.assert_close(teacher(images), teacher.model((images - 0.1) / 0.9))
    torch.testing.assert_close(student(images), student.model((images - 0.7) / 0.3))


# The optimiser.


def test_sgd_with_momentum_and_decay_by_hand():
    """Two steps of supervised training against the formula, with the rate's cosine."""
    settings = config.Training(lr=0.1, momentum=0.9, weight_decay=0.01)
    net = network()
    learner = SupervisedLearner(net, STAY, settings, total_steps=4)
    images, labels = torch.rand(8, *SHAPE), torch.arange(8) % CLASSES
    weight = net.model[-1].weight
    expected, speed = weight.detach().clone(), 0.0
    twin = network()
    for step in range(2):
        twin.load_state_dict(net.state_dict())
        twin.train()
        F.cross_entropy(twin(images), labels).backward()
        speed = 0.9 * speed + twin.model[-1].weight.grad + 0.01 * expected
        assert learner.lr == pytest.approx(0.1 * (1 + math.cos(math.pi * step / 4)) / 2)
        expected = expected - learner.lr * speed
        twin.zero_grad()
        assert set(learner.step(images, labels)) == {"ce"}
        torch.testing.assert_close(weight.detach(), expected)


def test_the_rate_falls_along_a_cosine_to_0():
    learner = make(total_steps=4)
    rates = []
    for _ in range(5):
        rates.append(learner.lr)
        learner.step(torch.rand(4, *SHAPE), None)
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)])


def test_a_state_holds_all_that_the_next_step_needs():
    first, images = make(), torch.rand(8, *SHAPE)
    first.step(images, None)
    second = make()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.teacher.load_state_dict(first.teacher.state_dict())
    for learner in (first, second):
        torch.manual_seed(2)
        learner.step(images, None, progress=0.1)
    assert moved(snapshot(first.network), second.network) == set()
    assert moved(snapshot(first.projection), second.projection) == set()


def test_distillation_brings_the_student_to_the_teachers_answers():
    learner = make(config.Distill(lr=0.05, T=4.0), config.Relation(), total_steps=200)
    images = torch.rand(64, *SHAPE)
    losses = [learner.step(images, None)["kd"].item() for _ in range(200)]
    learner.network.eval()
    answers, wanted = learner.network(images), learner.teacher(images)
    assert criterions.distillation(answers, wanted, 4.0) < 0.1 * losses[0] and losses[-1] < 0.1 * losses[0]


def test_half_precision_on_the_cpu_keeps_terms_and_weights_in_fp32():
    learner = make(precision="bf16")
    terms = learner.step(torch.rand(8, *SHAPE), None)
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in learner.network.parameters())


# Pairs of networks.


def one_round(teacher, student, shape=(3, 32, 32), batch=4):
    """A synthesis step and a student step with every term on -> all terms."""
    weights = dict.fromkeys(("bn", "oh", "adv", "act", "balance", "cr", "tv", "l2"), 1.0)
    options = config.Synthesis(synthesis_batch_size=batch, nz=8, ngf=4, **weights)
    relations = config.Relation(triplet=1.0, striplet=1.0)
    teacher, student = network(teacher, shape).freeze(), network(student, shape)
    if not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.modules()):
        options = replace(options, bn=0.0)
    augment, pool = CropFlip(4, True), ImagePool(batch, shape, CLASSES, torch.device("cpu"))
    objective = SynthesisObjective(options, relations, teacher, student)
    source = InversionSynthesis(objective, Generator(8, 4, shape), augment, pool, options, g_steps=1)
    learner = DistillLearner(student, teacher, augment, config.Distill(**EVERY), relations, 10)
    terms = source.synthesize()
    terms |= learner.step(*source.sample(batch))
    assert set(terms) == {*weights, "triplet", *EVERY, "striplet"} - (set() if options.bn else {"bn"})
    assert all(term.isfinite() for term in terms.values()), terms
    assert all(p.isfinite().all() for p in student.parameters())
    return terms


@pytest.mark.parametrize("name", MODELS)
def test_every_registered_model_is_a_teacher_and_a_student(name):
    one_round(MODELS[name], nets.small)
    one_round(nets.small, MODELS[name])


def test_vgg11_teaches_resnet18():
    one_round(MODELS["vgg11"], MODELS["resnet18"])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 24, 40), (1, 13, 29)])
@pytest.mark.parametrize("pair", [("resnet8", "lenet5"), ("wrn16_1", "resnet8")])
def test_other_shapes(pair, shape):
    one_round(MODELS[pair[0]], MODELS[pair[1]], shape)


def test_networks_without_batch_norm_learn_and_teach():
    one_round(nets.plain, nets.small)
    one_round(nets.small, nets.plain)
