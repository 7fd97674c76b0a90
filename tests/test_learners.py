"""Phase 2: what the student learns from, and every registered model in both roles."""

import copy
import math
import re
from dataclasses import fields

import nets
import pytest
import torch
from conftest import mostly_slow
from parts import CLASSES, SHAPE, changed, count_calls, make_learner, make_source, network, options, snapshot
from torch import nn
from torch.nn import functional as F

from datafree import config, criterions, relation
from datafree.augment import CropFlip
from datafree.batchnorm import BatchNormTap
from datafree.errors import InputError
from datafree.features import Features
from datafree.learners.base import Learner, cosine_to_zero, make_optimizer
from datafree.learners.distill import DistillLearner
from datafree.learners.supervised import SupervisedLearner
from datafree.models import MODELS
from datafree.pool import Batch, ImagePool
from datafree.terms import Term, fields_read, weighted_sum
from datafree.update import Update
from datafree.view_cache import ViewCache

EVERY = dict(kd=1.0, cd_loss=0.5, gram_loss=0.25, at_loss=2.0, striplet=0.125)
CROP = CropFlip(1, True)  # 18 views of an image


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(teacher=None, student=None, augment=None, total_steps=10, kind=DistillLearner, **values):
    """A learner with these options; its views are the images unless ``augment`` is given."""
    given = options(**{"striplet_sampling": "uniform", **values})
    return make_learner(given, teacher or network(), student or network(nets.small), augment, total_steps, kind)


def images_of(count=8):
    return Batch(torch.rand(count, *SHAPE))


def pool_of(count=12):
    pool = ImagePool(count, SHAPE, CLASSES, torch.device("cpu"))
    pool.add(torch.rand(count, *SHAPE), torch.arange(count) % CLASSES)
    return pool


def give_cache(learner):
    """Let the learner cache what it reads of its teacher for the 12 images of a pool."""
    learner.cache = ViewCache(learner.teacher, learner.cached_fields, 12 * CROP.count, megabytes=1)


# What is changed.


def test_a_step_changes_the_student_and_its_projection_and_nothing_of_the_teacher():
    learner = make(**EVERY)
    before = snapshot(learner.teacher), snapshot(learner.network), snapshot(learner.projection)
    learner.step(images_of())
    assert not changed(before[0], learner.teacher)
    assert changed(before[1], learner.network) == set(before[1])  # BatchNorm statistics and counters too
    assert changed(before[2], learner.projection) == set(before[2])
    assert all(p.grad is None for p in learner.teacher.parameters())
    assert learner.network.training and not any(module.training for module in learner.teacher.modules())


def test_the_student_phase_collects_no_statistics_and_leaves_the_generator(monkeypatch):
    teacher, student = network(), network(nets.small)
    given = options(bn=1.0, oh=1.0, nz=4, ngf=4, synthesis_batch_size=8, g_steps=1)
    source = make_source(given, teacher, student, CropFlip(0, False))
    source.synthesize()
    collected = count_calls(monkeypatch, BatchNormTap, "_keep")
    before, held = snapshot(source.generator), source.pool.state_dict()
    learner = make(teacher, student, **EVERY)
    for _ in range(3):
        learner.step(source.batch(8))
    assert not collected and not changed(before, source.generator)
    assert torch.equal(held["images"], source.pool.state_dict()["images"])


def test_the_students_distance_may_be_l1_and_it_may_match_attention():
    learner, batch = make(kd=0.5, kd_distance="l1", at_loss=2.0), images_of()
    learner.network.train()
    loss, terms = learner.loss(batch, 0.0)
    student, teacher = (net.features(batch.images) for net in (learner.network, learner.teacher))
    torch.testing.assert_close(terms["kd"], (student.logits - teacher.logits).abs().mean())
    torch.testing.assert_close(terms["at_loss"], criterions.attention(student.stages, teacher.stages, [(0, 0), (1, 1)]))
    torch.testing.assert_close(loss, 0.5 * terms["kd"] + 2.0 * terms["at_loss"])


# The cache of teacher outputs.


def cached_and_plain(pair, space="embedding"):
    """Two learners of equal weights, one of which has a cache, and a pool."""
    values = dict(cd_loss=0.5, pair_sample=pair, lr=0.05, striplet=0.5, sampling_space=space)
    values["striplet_sampling"] = "distance"
    teacher, pool = network(), pool_of()
    plain = make(teacher, augment=CROP, total_steps=60, **values)
    cached = make(teacher, augment=CROP, total_steps=60, **values)
    give_cache(cached)
    cached.network.load_state_dict(plain.network.state_dict())
    cached.projection.load_state_dict(plain.projection.state_dict())
    return cached, plain, pool


@pytest.mark.parametrize("pair, space", [(True, "embedding"), (False, "logits")])
def test_cached_outputs_of_the_teacher_change_nothing(pair, space):
    cached, plain, pool = cached_and_plain(pair, space)
    assert set(cached.cached_fields) == {"logits", "pooled", *(["embed"] if space == "embedding" else [])}
    for step in range(20):
        terms = []
        for learner in (cached, plain):
            torch.manual_seed(step)
            terms.append(learner.step(pool.sample(8)))
        torch.testing.assert_close(terms[0], terms[1], rtol=1e-3, atol=1e-4)
    assert cached.metrics() == plain.metrics() == {} and plain.remarks() == []
    [remark] = cached.remarks()
    assert float(re.fullmatch(r"View cache: (.*) % of the views were cached.", remark)[1]) > 20 and not cached.remarks()
    torch.testing.assert_close(snapshot(cached.network), snapshot(plain.network), rtol=1e-2, atol=1e-4)


def test_the_teacher_runs_on_all_images_without_ids():
    cached, _, pool = cached_and_plain(True)
    for _ in range(3):
        cached.step(Batch(*pool.newest(8)))
    assert (cached.cache.keys == -1).all()


def extended(fields_of_teacher, cached):
    """A learner with a further term, which reads the teacher's embedding and declares these fields."""
    learner = make(augment=CROP)
    extra = Term("extra", 1.0, lambda teacher, student: teacher.embed.square().mean(), teacher=fields_of_teacher)
    learner.terms.append(extra)
    if cached:
        give_cache(learner)
    return learner


def test_a_term_that_reads_an_undeclared_field_is_refused_with_and_without_a_cache():
    pool, messages = pool_of(), set()
    for cached in (False, True):
        with pytest.raises(InputError, match="reads 'embed' .*does not declare .*add 'embed'") as refusal:
            extended((), cached).step(pool.sample(8))
        messages.add(str(refusal.value))
    assert len(messages) == 1


def test_a_term_that_declares_its_fields_is_computed_with_and_without_a_cache():
    pool, found = pool_of(), []
    for cached in (False, True):
        torch.manual_seed(0)
        learner = extended(("embed",), cached)
        assert set(learner.cached_fields) == {"logits", "embed"}
        steps = []
        for number in range(4):
            torch.manual_seed(number)
            steps.append(learner.step(pool.sample(8)))
        found.append(steps)
    torch.testing.assert_close(found[0], found[1])
    assert set(found[0][0]) == {"kd", "extra"}


@pytest.mark.parametrize("values", [dict(mixup=0.5), dict(gram_loss=1.0), dict(at_loss=1.0)])
def test_a_cache_has_no_use_for_blended_views_and_whole_maps(values):
    assert make(**values).cached_fields == ()


# What is computed.


def test_a_weighted_sum_by_hand():
    teacher = Features(logits=torch.tensor([[1.0, 2.0]]))
    student = Features(logits=torch.tensor([[3.0, 5.0]]), embed=torch.tensor([[7.0]]))
    terms = [
        Term("a", 0.5, lambda t, s, scale: scale * (s.logits - t.logits).sum(), ("logits",), ("logits",)),
        Term("b", 3.0, lambda t, s, scale: s.embed.sum() - scale, student=("embed",)),
    ]
    loss, values = weighted_sum(terms, teacher, student, 10.0)
    # a: 10 (2 + 3) = 50; b: 7 - 10 = -3
    assert {name: value.item() for name, value in values.items()} == {"a": 50.0, "b": -3.0}
    assert loss.item() == 0.5 * 50 - 3 * 3
    assert fields_read(terms, "teacher") == ("logits",) and fields_read(terms, "student") == ("logits", "embed")


def test_the_loss_is_the_weighted_sum_and_the_terms_are_the_criterions():
    learner, batch = make(**EVERY), images_of()
    learner.network.train()
    torch.manual_seed(1)
    loss, terms = learner.loss(batch, 0.0)
    student, teacher = learner.network.features(batch.images), learner.teacher.features(batch.images)
    torch.manual_seed(1)
    learner.augment(batch.images)  # takes as many random numbers as the step did
    labels = teacher.logits.argmax(1)
    expected = {
        "kd": criterions.distillation(student.logits, teacher.logits, 20.0),
        "cd_loss": learner.projection.channel(student.pooled, [stage.mean((2, 3)) for stage in teacher.stages]),
        "gram_loss": learner.projection.gram(student.stages, teacher.stages),
        "at_loss": criterions.attention(student.stages, teacher.stages, [(0, 0), (1, 1)]),
        "striplet": relation.relation_loss([student.embed], labels, teacher.embed, 0.2, "uniform", relation.SEPARATE),
    }
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(loss, sum(EVERY[name] * value for name, value in expected.items()))


def test_the_kd_term_equals_kullback_leiblers_definition():
    learner, batch = make(T=4.0), images_of()
    loss, terms = learner.loss(batch, 0.0)
    assert set(terms) == {"kd"} and learner.projection is None
    p = (learner.teacher(batch.images) / 4).softmax(1)
    q = (learner.network(batch.images) / 4).softmax(1)
    torch.testing.assert_close(loss, 16 * (p * (p / q).log()).sum(1).mean())


FUNCTIONS = {
    "kd": (criterions, "distillation"),
    "cd_loss": (criterions.StageProjection, "channel"),
    "gram_loss": (criterions.StageProjection, "gram"),
    "at_loss": (criterions, "attention"),
    "striplet": (relation, "relation_loss"),
}


@pytest.mark.parametrize("term", EVERY)
def test_a_weight_of_0_skips_its_term_alone(term, monkeypatch):
    calls = {name: count_calls(monkeypatch, *function) for name, function in FUNCTIONS.items()}
    assert set(make(**{**EVERY, term: 0.0}).step(images_of())) == set(EVERY) - {term}
    assert {name for name in calls if not calls[name]} == {term}


def test_every_term_has_the_name_and_the_weight_of_its_option():
    learner = make(**EVERY)
    weights = {f.name: getattr(part, f.name) for part in (learner.settings, learner.triplets) for f in fields(part)}
    assert {term.name: term.weight for term in learner.terms} == EVERY
    assert all(term.weight == weights[term.name] for term in learner.terms)


def test_custom_steps_is_unused_without_the_terms_that_it_ends():
    learner = make(**EVERY, custom_steps=0.5)
    (condition,) = config.Distill.__dataclass_fields__["custom_steps"].metadata["unused_when"]
    assert {term.name for term in learner.terms if term.until < 1} == set(condition)
    assert all(values == (0,) for values in condition.values())


def test_a_loss_without_terms_is_refused():
    for values in (dict(kd=0.0), dict(kd=0.0, cd_loss=1.0, custom_steps=0.5)):
        with pytest.raises(InputError, match="--kd"):
            make(**values)
    make(kd=0.0, cd_loss=1.0).step(images_of(4))


def test_the_custom_terms_act_in_their_fraction_of_the_run():
    learner = make(**EVERY, custom_steps=0.5)
    assert set(learner.step(images_of(), progress=0.49)) == set(EVERY)
    assert set(learner.step(images_of(), progress=0.5)) == {"kd"}


def test_pairs_show_every_image_under_two_augmentations(monkeypatch):
    learner = make(pair_sample=True, augment=CropFlip(2, True))
    calls = count_calls(monkeypatch, learner.network, "features")
    learner.step(images_of())
    ((views,), _) = calls[0]
    assert views.shape == (16, *SHAPE) and not torch.equal(views[:8], views[8:])


@pytest.mark.parametrize("feature, shape", [("global", (8, 12)), ("logits", (8, CLASSES)), ("features", (8, 12))])
@pytest.mark.parametrize("space", ["embedding", "logits"])
def test_the_triplets_use_the_chosen_features(feature, shape, space, monkeypatch):
    chosen = dict(striplet_feature=feature, sampling_space=space, start_layer=1, end_layer=2)
    learner = make(striplet=1.0, **chosen, striplet_sampling="distance")
    calls = count_calls(monkeypatch, relation, "relation_loss")
    batch = images_of()
    with torch.no_grad():
        student = learner.network.train().features(batch.images)
    learner.step(batch)
    ((layers, labels, negatives_from, margin, sampling, direction), _) = calls[0]
    teacher = learner.teacher.features(batch.images)
    used = {"global": student.embed, "logits": student.logits, "features": student.pooled[1]}[feature]
    assert used.shape == shape and [torch.allclose(layer, used, atol=1e-5) for layer in layers] == [True]
    assert torch.equal(labels, teacher.logits.argmax(1))
    expected = teacher.embed if space == "embedding" else student.logits
    torch.testing.assert_close(negatives_from, expected, rtol=1e-4, atol=1e-5)
    assert not negatives_from.requires_grad
    assert (margin, sampling, direction) == (0.2, "distance", relation.SEPARATE)


def test_each_network_normalises_by_its_own_mean_and_deviation():
    teacher, images = network(mean=0.1, std=0.9), torch.rand(4, *SHAPE)
    student = network(mean=0.7, std=0.3)
    student.model.load_state_dict(teacher.model.state_dict())
    torch.testing.assert_close(teacher(images), teacher.model((images - 0.1) / 0.9))
    torch.testing.assert_close(student(images), student.model((images - 0.7) / 0.3))


# The optimiser.


@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_an_update_steps_all_optimisers_after_the_gradients_are_known(precision):
    net = network()
    first, second = (nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0))
    optimizers = [torch.optim.SGD([first], 0.5), torch.optim.SGD([second], 0.1)]
    first.grad = torch.full((3,), 100.0)  # of an earlier step
    seen = []

    def compute():
        return (first * second).sum(), "the second result"

    def before_step():
        seen.append([tensor.detach().clone() for tensor in (first, second, first.grad, second.grad)])

    loss, result = Update(net, precision)(compute, optimizers, before_step)
    assert loss.item() == 6.0 and not loss.requires_grad and result == "the second result"
    (now,) = seen
    # d(first * second) = second and first; the parameters are still the old ones.
    assert [tensor[0].item() for tensor in now] == [1.0, 2.0, 2.0, 1.0]
    torch.testing.assert_close(first.detach(), torch.full((3,), 1.0 - 0.5 * 2.0))
    torch.testing.assert_close(second.detach(), torch.full((3,), 2.0 - 0.1 * 1.0))


class InEvaluationMode(DistillLearner):
    """Trains the weights with the BatchNorm statistics as they are."""

    def prepare(self):
        self.network.eval()


def test_a_learner_may_train_in_another_mode():
    learner = make(kind=InEvaluationMode)
    before = snapshot(learner.network)
    learner.step(images_of())
    weights = {f"0.{name}" for name, _ in learner.network.named_parameters()}
    assert not learner.network.training and changed(before, learner.network) == weights


def test_sgd_with_momentum_and_decay_by_hand():
    """Two steps of supervised training against the formula, with the cosine of the learning rate."""
    optim = config.Optim(lr=0.1, momentum=0.9, weight_decay=0.01)
    net = network()
    learner = SupervisedLearner(net, CropFlip(0, False), optim, total_steps=4)
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
        assert set(learner.step(Batch(images, labels))) == {"ce"}
        torch.testing.assert_close(weight.detach(), expected)


def test_a_gradient_above_the_limit_is_scaled_down_to_it():
    """Of the student and of what is trained beside it together; without momentum a step is the gradient."""

    def step(most):
        torch.manual_seed(0)
        learner = make(kd=1.0, cd_loss=1.0, lr=1.0, momentum=0.0, weight_decay=0.0, clip_grad=most)
        trained = [p for part in (learner.network.model, *learner.modules.values()) for p in part.parameters()]
        before = [parameter.detach().clone() for parameter in trained]
        learner.step(Batch(torch.rand(8, *SHAPE)))
        return torch.cat([(old - new).detach().flatten() for old, new in zip(before, trained)])

    free = step(0.0)
    torch.testing.assert_close(step(2 * free.norm().item()), free)
    torch.testing.assert_close(step(0.25 * free.norm().item()), 0.25 * free, rtol=1e-3, atol=1e-5)


def test_the_learning_rate_falls_along_a_cosine_to_0():
    learner = make(total_steps=4)
    rates = []
    for _ in range(5):
        rates.append(learner.lr)
        learner.step(images_of(4))
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)])


def test_a_state_holds_all_that_the_next_step_needs():
    first, batch = make(**EVERY), images_of()
    first.step(batch)
    second = make(**EVERY)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.teacher.load_state_dict(first.teacher.state_dict())
    for learner in (first, second):
        torch.manual_seed(2)
        learner.step(batch, progress=0.1)
    assert not changed(snapshot(first.network, first.projection), second.network, second.projection)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_resumed_learner_follows_the_schedule_of_its_new_length(optimiser):
    """A resumed run may be longer than it was; a schedule that is not the cosine of the run continues as it is."""

    def learner_of(total_steps):
        net, optim = network(), config.Optim(lr=0.1)
        if optimiser == "sgd":
            made = make_optimizer([net], optim)
            return Learner(net, made, cosine_to_zero(made, total_steps))
        made = torch.optim.Adam(net.parameters(), optim.lr)
        return Learner(net, made, torch.optim.lr_scheduler.StepLR(made, 2, 0.5))

    short, long = learner_of(10), learner_of(40)
    for _ in range(5):
        short.optimizer.step()
        short.schedule.step()
    long.load_state_dict(short.state_dict())
    assert long.lr == pytest.approx(0.1 * (1 + math.cos(math.pi * 5 / 40)) / 2 if optimiser == "sgd" else 0.025)


def test_distillation_brings_the_student_to_the_teachers_outputs():
    learner = make(lr=0.05, T=4.0, total_steps=200)
    batch = images_of(64)
    losses = [learner.step(batch)["kd"].item() for _ in range(200)]
    learner.network.eval()
    outputs, targets = learner.network(batch.images), learner.teacher(batch.images)
    assert criterions.distillation(outputs, targets, 4.0) < 0.1 * losses[0] and losses[-1] < 0.1 * losses[0]


def test_half_precision_on_the_cpu_keeps_terms_and_weights_in_fp32():
    learner = make(**EVERY, precision="bf16")
    terms = learner.step(images_of())
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in learner.network.parameters())


# Pairs of networks.


def one_round(teacher, student, shape=(3, 32, 32), batch=4):
    """A synthesis step and a student step with every term on -> all terms."""
    weights = dict.fromkeys(("bn", "oh", "adv", "act", "balance", "cr", "tv", "l2", "triplet"), 1.0)
    teacher, student = network(teacher, shape), network(student, shape)
    if not any(isinstance(m, nn.BatchNorm2d) for m in teacher.modules()):
        weights["bn"] = 0.0
    small = dict(synthesis_batch_size=batch, nz=8, ngf=4, g_steps=1, epochs=1)
    given, augment = options(**weights, **EVERY, **small), CropFlip(4, True)
    source = make_source(given, teacher, student, augment)
    learner = make_learner(given, teacher, student, augment, total_steps=10)
    terms = source.round(0, with_student=True)
    terms |= learner.step(source.batch(batch))
    assert set(terms) == {*weights, *EVERY} - (set() if weights["bn"] else {"bn"})
    assert all(term.isfinite() for term in terms.values()), terms
    assert all(p.isfinite().all() for p in student.parameters())
    return terms


@pytest.mark.parametrize(
    "name", mostly_slow(MODELS, ["wrn16_1", "resnet8x4", "vgg8", "mobilenetv2", "shufflenetv2", "lenet5"])
)
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
