"""Phase 1: what is changed and what must not be, which forward passes are run, what enters the pool."""

from dataclasses import fields
from math import prod

import nets
import pytest
import torch
from parts import CLASSES, SHAPE, changed, count_calls, make_card, make_source, network, options, snapshot
from torch import nn

from datafree import config, criterions, relation, runtime
from datafree.augment import CropFlip, random_resized_crop
from datafree.batchnorm import BatchNormTap
from datafree.datasets.cards import DatasetCard
from datafree.errors import InputError, OptionError
from datafree.features import Features
from datafree.models.generator import Generator
from datafree.plugins import load_object
from datafree.pool import Batch, ImagePool
from datafree.synthesis import SOURCES, SourcesWithout, Traits, traits_of
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.contrast import InstanceContrast, instance
from datafree.synthesis.controls import NoiseSource
from datafree.synthesis.generative import GenerativeSynthesis
from datafree.synthesis.inversion import InversionSynthesis, PixelSynthesis
from datafree.synthesis.objective import SynthesisObjective
from datafree.terms import Term

BATCH = 8
SMALL = dict(synthesis_batch_size=BATCH, nz=8, ngf=4, lr_g=0.05, g_steps=3, start_layer=0, sampling="uniform")
EVERY = dict(bn=1.0, oh=1.0, adv=1.0, act=0.1, balance=1.0, cr=0.5, tv=1e-3, l2=1e-3, triplet=1.0)
# Term -> the function that computes it.
FUNCTIONS = {
    "bn": (criterions, "bn_distance"),
    "oh": (criterions, "one_hot"),
    "adv": (criterions, "adversarial"),
    "act": (criterions, "activation"),
    "balance": (criterions, "balance"),
    "cr": (criterions, "info_nce"),
    "tv": (criterions, "total_variation"),
    "l2": (criterions, "l2_norm"),
    "triplet": (relation, "relation_loss"),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(kind=InversionSynthesis, teacher=None, student=None, shape=SHAPE, **values):
    """A source of small parts with these options; its student is in training mode."""
    teacher = teacher or network(shape=shape)
    student = student or network(nets.small, shape).train()
    return make_source(options(**{**SMALL, **values}), teacher, student, kind=kind)


def parts(source):
    return source.objective.teacher, source.objective.student


class Replaced:
    """``objective``, except that ``call`` is what is called."""

    def __init__(self, objective, call):
        self.objective, self.call = objective, call

    def __call__(self, *arguments):
        return self.call(*arguments)

    def __getattr__(self, name):
        return getattr(self.objective, name)


# What is changed.


def test_teacher_and_student_stay_as_they_are_while_the_generator_learns():
    source = make(**EVERY)
    teacher, student = parts(source)
    student(torch.rand(4, *SHAPE)).sum().backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    before, generator = snapshot(teacher, student), snapshot(source.generator)
    source.synthesize()
    assert not changed(before, teacher, student)
    assert all(map(torch.equal, gradients, [p.grad for p in student.parameters()]))
    assert changed(generator, source.generator)
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def test_no_weight_gradient_is_computed_in_synthesis():
    """Neither network's weights are leaves of the graph that leads to the loss."""
    source, leaves = make(**EVERY), set()
    objective = source.objective

    def walk(node):
        pending, seen = [node], set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves.add(id(getattr(node, "variable", None)))
            pending += [parent for parent, _ in node.next_functions]

    def walking(*arguments):
        loss, terms = objective(*arguments)
        walk(loss.grad_fn)
        return loss, terms

    source.objective = Replaced(objective, walking)
    source.synthesize()
    assert {id(p) for p in source.generator.parameters()} <= leaves
    assert {id(p) for p in objective.contrast.head.parameters()} <= leaves
    assert not {id(p) for network in parts(source) for p in network.parameters()} & leaves


def test_the_student_is_restored_even_if_synthesis_fails():
    source = make(**EVERY)
    _, student = parts(source)
    student.model[0][0].weight.requires_grad_(False)
    source.augment = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        source.synthesize()
    flags = [p.requires_grad for p in student.parameters()]
    assert student.training and not flags[0] and all(flags[1:])


def test_statistics_are_collected_of_the_teacher_in_synthesis_alone():
    source = make(**EVERY)
    teacher, student = parts(source)
    source.synthesize()
    tap = source.objective.bn_tap
    collected = list(tap.statistics)
    assert len(collected) == 2
    teacher.features(torch.rand(2, *SHAPE)), student.features(torch.rand(2, *SHAPE))
    assert len(tap.statistics) == len(collected) and all(a is b for a, b in zip(tap.statistics, collected))
    assert not any(layer._forward_pre_hooks or "forward" in layer.__dict__ for layer in tap.layers)


# What is computed.


@pytest.mark.parametrize(
    "values, passes",
    [
        (dict(bn=1.0, oh=1.0), 0),
        (dict(bn=1.0, oh=1.0, triplet=1.0, relation="off"), 0),
        (dict(bn=1.0, oh=1.0, triplet=1.0, triplet_target="teacher"), 0),
        (dict(oh=1.0, triplet=1.0, triplet_target="student"), 1),
        (dict(oh=1.0, adv=1.0), 1),
        (dict(oh=1.0, adv=1.0, triplet=1.0, triplet_target="student"), 1),
    ],
)
def test_the_student_runs_only_if_a_term_uses_it(values, passes, monkeypatch):
    source = make(**{**values, "g_steps": 1})
    calls = count_calls(monkeypatch, parts(source)[1], "features")
    forwards = count_calls(monkeypatch, parts(source)[1].model, "forward")
    source.round(0, with_student=True)
    assert len(calls) == len(forwards) == passes
    calls.clear()
    source.round(0, with_student=False)
    assert not calls


@pytest.mark.parametrize("term", EVERY)
def test_a_weight_of_0_skips_its_term_alone(term, monkeypatch):
    source = make(**{**EVERY, term: 0.0, "g_steps": 1})
    calls = {name: count_calls(monkeypatch, *function) for name, function in FUNCTIONS.items()}
    assert set(source.synthesize()) == set(EVERY) - {term}
    assert {name for name in calls if not calls[name]} == {term}
    assert (source.objective.contrast is None) == (term == "cr")


def test_every_term_has_the_name_and_the_weight_of_its_option():
    given = options(**{name: 0.5 + index for index, name in enumerate(EVERY)})
    terms = SynthesisObjective(given.synthesis, given.relation, network().freeze(), network(nets.small)).terms
    weights = {f.name: getattr(part, f.name) for part in (given.synthesis, given.relation) for f in fields(part)}
    assert {term.name for term in terms} == set(EVERY) and len(terms) == len(EVERY)
    assert all(term.weight == weights[term.name] for term in terms)


def test_the_teacher_runs_once_a_step_and_once_more_for_the_contrast(monkeypatch):
    for cr, passes in ((0.0, 3), (0.5, 7)):  # 3 steps; with cr 3 local views and the kept batch
        source = make(bn=1.0, cr=cr, triplet=1.0)
        calls = count_calls(monkeypatch, parts(source)[0].model, "forward")
        source.synthesize()
        assert len(calls) == passes


def test_the_loss_is_the_weighted_sum_and_the_terms_are_the_criterions():
    weights = {**EVERY, "triplet": 0.3}
    source = make(**weights)
    objective, (teacher, student) = source.objective, parts(source)
    images, targets = torch.rand(BATCH, *SHAPE), torch.arange(BATCH) % CLASSES
    views = CropFlip(1, True)(images)
    with student.frozen():
        torch.manual_seed(1)
        loss, terms = objective(images, views, targets)
        t, s = teacher.features(views), student.features(views)
        with BatchNormTap(teacher) as tap:
            teacher(views)
    expected = {
        "bn": criterions.bn_distance(tap.statistics, "norm"),
        "oh": criterions.one_hot(t.logits, targets),
        "adv": criterions.adversarial(s.logits, t.logits),
        "act": criterions.activation(t.embed),
        "balance": criterions.balance(t.logits),
        "tv": criterions.total_variation(images),
        "l2": criterions.l2_norm(images),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(loss, sum(weights[name] * term for name, term in terms.items()))


@pytest.mark.parametrize("direction, sign", [("paper", relation.CONFUSE), ("release", relation.SEPARATE)])
@pytest.mark.parametrize("target", ["student", "teacher"])
@pytest.mark.parametrize("space", ["embedding", "logits"])
def test_the_triplets_use_the_chosen_features(direction, sign, target, space, monkeypatch):
    chosen = dict(relation=direction, triplet_target=target, sampling_space=space, start_layer=1, end_layer=2)
    source = make(triplet=1.0, margin=0.3, **chosen)
    objective, (teacher, student) = source.objective, parts(source)
    calls = count_calls(monkeypatch, relation, "relation_loss")
    views = torch.rand(BATCH, *SHAPE)
    with student.frozen():
        objective(views, views, torch.zeros(BATCH, dtype=torch.long))
        t, s = teacher.features(views), student.features(views)
    ((layers, labels, negatives_from, margin, sampling, given), _) = calls[0]
    assert len(layers) == 1
    torch.testing.assert_close(layers[0], (s if target == "student" else t).pooled[1])
    assert torch.equal(labels, t.logits.argmax(1))
    torch.testing.assert_close(negatives_from, t.embed if space == "embedding" else t.logits)
    assert not negatives_from.requires_grad and (margin, sampling, given) == (0.3, "uniform", sign)


@pytest.mark.parametrize(
    "start, end, expected", [(0, 4, [0, 1]), (1, 2, [1]), (2, 4, [1]), (-1, 4, [1]), (-2, -1, [0])]
)
def test_stages_are_chosen_and_the_last_one_if_there_are_too_few(start, end, expected):
    features = Features(None, "embedding", pooled=[0, 1])
    assert relation.triplet_layers(features, config.Relation(start_layer=start, end_layer=end)) == expected


def test_of_a_network_without_stages_the_triplets_use_the_embedding():
    assert relation.triplet_layers(Features(None, "embedding", []), config.Relation()) == ["embedding"]


# What enters the pool.


def scripted(losses, **values):
    """A source whose steps have these losses -> the source, and a list of the images of each step."""
    source = make(oh=1.0, g_steps=len(losses), **values)
    seen = []

    def script(images, views, targets, with_student):
        seen.append(images.detach().clone())
        value = losses[len(seen) - 1]
        return images.sum() * 0.01 - images.sum().detach() * 0.01 + value, {"scripted": torch.tensor(value)}

    source.objective = Replaced(source.objective, script)
    return source, seen


@pytest.mark.parametrize(
    "losses, keep, index",
    [
        ([3.0, 1.0, 2.0], "best", 1),
        ([3.0, 1.0, 2.0], "last", 2),
        ([1.0, 2.0, 3.0], "best", 0),
        ([1.0, float("nan"), -5.0, float("nan")], "best", 2),
        ([2.0, 2.0], "best", 0),
    ],
)
def test_the_kept_batch_is_that_of_the_lowest_loss_or_the_last(losses, keep, index):
    source, seen = scripted(losses, keep=keep)
    assert source.synthesize()["scripted"] == losses[index]
    kept, _ = source.pool.newest(BATCH)
    assert torch.equal(kept, seen[index].mul(255).round() / 255)
    assert all((kept - other).abs().max() > 1 / 255 for i, other in enumerate(seen) if i != index)


def test_a_round_without_a_finite_loss_returns_a_term_that_is_not_finite():
    source, _ = scripted([float("nan"), float("inf")])
    assert source.synthesize()["scripted"] == float("inf")


def test_the_pool_gets_every_round_with_its_classes_in_order():
    source = make(oh=1.0)
    for number in (1, 2, 3):
        source.synthesize()
        images, targets = source.latest()
        assert source.images_made == len(source.pool) == number * BATCH
        assert images.shape == (BATCH, *SHAPE) and torch.equal(targets, targets.sort().values)
        assert torch.equal(source.pool.targets[(number - 1) * BATCH : number * BATCH], targets)


def test_the_latest_images_are_known_after_a_restart():
    source = make(**EVERY)
    source.synthesize()
    other = make(**EVERY)
    other.load_state_dict(source.state_dict())
    assert all(map(torch.equal, source.latest(), other.latest()))


def test_the_saved_pool_is_no_larger_than_its_contents(tmp_path):
    pool = ImagePool(10_000, (1, 8, 8), 2, torch.device("cpu"))
    pool.add(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    torch.save(pool.state_dict(), tmp_path / "pool.pth")
    assert (tmp_path / "pool.pth").stat().st_size < 10_000


# The generator from round to round.


def test_a_random_initialisation_resets_generator_and_optimiser_in_every_round(monkeypatch):
    source = make(**EVERY)
    resets, first = count_calls(monkeypatch, source.generator, "reset"), source.optimizer
    source.synthesize()
    assert len(resets) == 1 and source.optimizer is not first


def test_reptile_moves_its_initialisation_by_its_rate_and_keeps_the_optimiser(monkeypatch):
    source = make(oh=1.0, generator_init="reptile", meta_rate=0.25)
    resets, optimizer = count_calls(monkeypatch, source.generator, "reset"), source.optimizer
    start = [p.detach().clone() for p in source.generator.parameters()]
    ends = []
    original = source._end_round
    monkeypatch.setattr(
        source,
        "_end_round",
        lambda: (ends.extend(p.detach().clone() for p in source.generator.parameters()), original()),
    )
    source.synthesize()
    for before, end, now in zip(start, ends, source.generator.parameters()):
        torch.testing.assert_close(now.detach(), before + 0.25 * (end - before))
    assert not resets and source.optimizer is optimizer and optimizer.state


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_maml_moves_its_initialisation_by_the_gradients_of_all_steps(rate):
    """The same round written out: three steps of Adam from the start, their gradients summed, one step of Adam."""
    source = make(oh=1.0, generator_init="maml", meta_rate=rate)
    source.augment = lambda images: images
    teacher, generator = parts(source)[0], Generator(8, 4, SHAPE)
    generator.load_state_dict(source.generator.state_dict())
    start = [p.detach().clone() for p in generator.parameters()]
    meta = torch.optim.Adam([p.detach().clone() for p in start], rate * 0.05 * 3, (0.5, 0.999))
    for number in range(2):
        torch.manual_seed(number)
        source.synthesize()
        torch.manual_seed(number)
        targets = torch.randint(CLASSES, (BATCH,)).sort().values
        z = torch.randn(BATCH, 8, requires_grad=True)
        for p, value in zip(generator.parameters(), meta.param_groups[0]["params"]):
            p.data.copy_(value)
        inner = torch.optim.Adam([*generator.parameters(), z], 0.05, (0.5, 0.999))
        total = [0] * len(start)
        for _ in range(3):
            inner.zero_grad()
            torch.nn.functional.cross_entropy(teacher(generator(z)), targets).backward()
            total = [t + p.grad for t, p in zip(total, generator.parameters())]
            inner.step()
        for p, gradient in zip(meta.param_groups[0]["params"], total):
            p.grad = gradient
        meta.step()
        for mine, theirs in zip(source.generator.parameters(), meta.param_groups[0]["params"]):
            torch.testing.assert_close(mine.detach(), theirs, rtol=1e-3, atol=1e-5)
    assert not all(map(torch.equal, start, [p.detach() for p in source.generator.parameters()]))


def test_the_first_layer_of_a_meta_learned_initialisation_is_reset_once():
    source = make(oh=1.0, generator_init="reptile", reset_epoch=2, lr_g=0.0)
    first, rest, before = [], [], snapshot(source.generator.layers[-1])
    for epoch in range(4):
        source.round(epoch, with_student=True)
        first.append(source.generator.project.weight.detach().clone())
        rest.append(changed(before, source.generator.layers[-1]))
    assert [torch.equal(a, b) for a, b in zip(first, first[1:])] == [True, False, True]
    assert not any(rest)


def latents_of(source):
    """A list to which all latents that the generator is given are added."""
    given = []
    source.generator.register_forward_pre_hook(lambda module, args: given.append(args[0].detach().clone()))
    return given


def test_latents_are_optimised_unless_their_rate_is_0():
    for rate in (0.0, 0.1):
        source = make(oh=1.0, lr_z=rate)
        latents = latents_of(source)
        source.synthesize()
        assert len(latents) == 3 and torch.equal(latents[0], latents[2]) == (rate == 0)


def test_class_noise_adds_a_mean_of_each_class_to_the_latents():
    source = make(oh=1.0, class_noise=50.0, lr_z=0.0, g_steps=1)
    latents = latents_of(source)
    source.synthesize()
    _, targets = source.latest()
    assert torch.cdist(latents[0], source.centres).argmin(1).equal(targets)
    torch.testing.assert_close(source.centres.norm(dim=1), torch.full((CLASSES,), 50.0))


def test_inversion_finds_images_that_the_teacher_predicts_as_their_target_classes():
    source = make(oh=1.0, lr_z=0.05, g_steps=150)
    source.synthesize()
    images, targets = source.latest()
    assert (parts(source)[0](images).argmax(1) == targets).float().mean() > 0.8


# Pixels, and a generator whose images are not kept.


def test_pixels_are_optimised_from_noise_and_stay_in_range():
    source = make(PixelSynthesis, oh=1.0, lr_g=0.2, g_steps=40)
    before, seen, step = snapshot(*parts(source)), [], source._step
    source._step = lambda *given: seen.append(step(*given)) or seen[-1]
    source.synthesize()
    images, targets = source.latest()
    assert not changed(before, *parts(source))
    assert (parts(source)[0](images).argmax(1) == targets).float().mean() > 0.8
    steps = torch.stack([images for images, *_ in seen])
    assert len(steps) == 40
    assert steps.min() >= -1e-6 and steps.max() <= 1 + 1e-6 and (steps[1] != steps[0]).any((1, 2, 3)).all()
    first = (steps[0] - 0.4) / 0.2  # noise in the teacher's units, clipped
    assert first.mean().abs() < 0.2 and 0.7 < first.std() < 1.1
    source.synthesize()
    assert len(source.pool) == 2 * BATCH and not torch.equal(images, source.latest()[0])


def test_one_generator_is_trained_throughout_and_no_image_is_kept():
    source = make(GenerativeSynthesis, oh=1.0, oh_target="predicted", balance=1.0)
    before, optimizer = snapshot(source.generator), source.optimizer
    networks = snapshot(*parts(source))
    assert set(source.synthesize()) == {"oh", "balance"}
    assert changed(before, source.generator) and not changed(networks, *parts(source))
    assert source.optimizer is optimizer and optimizer.state
    learned = snapshot(source.generator)
    images, targets, ids = source.sample(5)
    assert images.shape == (5, *SHAPE) and targets is None and ids is None and not images.requires_grad
    assert not torch.equal(images, source.sample(5).images) and source.images_made == 10
    source.latest()
    assert source.images_made == 10 and not changed(learned, source.generator)


def test_images_of_the_generator_get_worse_for_the_student():
    """DFAD: its generator raises the L1 distance that its student lowers."""
    torch.manual_seed(1)
    source = make(GenerativeSynthesis, adv=1.0, adv_distance="l1", adv_where="all", lr_g=0.01, g_steps=1)
    with parts(source)[1].frozen():
        gaps = [-source.synthesize()["adv"].item() for _ in range(60)]
    assert sum(gaps[-10:]) > 1.2 * sum(gaps[:10])


@pytest.mark.parametrize("kind", [InversionSynthesis, PixelSynthesis, GenerativeSynthesis])
def test_the_triplets_act_in_every_source(kind):
    assert "triplet" in make(kind, oh=1.0, triplet=1.0, relation="paper", g_steps=2).synthesize()


# Options of the terms.


@pytest.mark.parametrize("chosen", ["target", "predicted"])
def test_the_class_of_the_cross_entropy_is_the_target_or_the_teachers_prediction(chosen):
    source = make(oh=1.0, oh_target=chosen)
    views, targets = torch.rand(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.long)
    logits = parts(source)[0](views)
    classes = targets if chosen == "target" else logits.argmax(1)
    torch.testing.assert_close(
        source.objective(views, views, targets)[1]["oh"], torch.nn.functional.cross_entropy(logits, classes)
    )


def test_the_adversarial_term_follows_its_options():
    source = make(adv=1.0, adv_distance="js", adv_T=3.0, adv_where="all")
    views = torch.rand(BATCH, *SHAPE)
    with parts(source)[1].frozen():
        terms = source.objective(views, views, torch.zeros(BATCH, dtype=torch.long))[1]
        teacher, student = (network(views) for network in parts(source))
    torch.testing.assert_close(terms["adv"], -criterions.js_divergence(student, teacher, 3.0).mean())


def test_statistics_are_averaged_over_rounds():
    """Fast: momentum * (statistics when the last round ended) + (1 - momentum) * (current ones) are compared."""
    source = make(bn=1.0, bn_momentum=0.75)
    objective, statistics = source.objective, []
    for _ in range(3):
        views = torch.rand(BATCH, *SHAPE)
        term = objective(views, views, None)[1]["bn"]
        now = [layer[:2] for layer in objective.statistics]
        running = [layer[2:] for layer in objective.statistics]
        average = (
            now
            if not statistics
            else [tuple(0.75 * old + 0.25 * new for old, new in zip(*pair)) for pair in zip(statistics, now)]
        )
        expected = criterions.bn_distance([(*a, *r) for a, r in zip(average, running)], "norm")
        torch.testing.assert_close(term, expected)
        objective.end_round(views)
        statistics = average


# Contrast, precision, shapes.


def test_the_positive_and_the_negatives_of_the_contrast_are_detached():
    """As in CMI's code: only the local view of an image is moved, and the head by local views alone."""
    source = make(cr=1.0)
    source.synthesize()  # so that the bank is not empty
    contrast, teacher = source.objective.contrast, parts(source)[0]
    images, others = torch.rand(BATCH, *SHAPE), torch.rand(BATCH, *SHAPE)
    views = others.clone().requires_grad_()
    x = images.clone().requires_grad_()
    contrast.head.zero_grad()
    torch.manual_seed(3)
    contrast(x, teacher.features(views)).backward()
    assert views.grad is None or not views.grad.any()
    assert x.grad.any()
    found = [p.grad.clone() for p in contrast.head.parameters()]
    contrast.head.zero_grad()
    torch.manual_seed(3)  # the same local views and the same part of the bank, with anchors that are constants
    local = contrast.head(instance(teacher.features(random_resized_crop(images))))
    with torch.no_grad():
        drawn = torch.randint(contrast.added, (min(4096, contrast.added),))
        anchor = contrast.head(instance(teacher.features(others)))
        earlier = contrast.head(contrast.bank[drawn])
    criterions.info_nce(local, anchor, earlier, contrast.T).backward()
    torch.testing.assert_close(found, [p.grad for p in contrast.head.parameters()])


def test_contrast_remembers_the_kept_batches():
    source = make(cr=1.0)
    assert source.synthesize()["cr"] > 0
    contrast = source.objective.contrast
    assert contrast.added == BATCH
    assert contrast.bank[:BATCH].any(1).all() and not contrast.bank[BATCH:].any()
    assert source.synthesize()["cr"] > 0 and contrast.added == 2 * BATCH
    other = InstanceContrast(parts(source)[0], 0.2)
    other.load_state_dict(contrast.state_dict())
    assert other.added == 2 * BATCH and torch.equal(other.bank, contrast.bank)


def test_half_precision_on_the_cpu_keeps_images_and_terms_finite():
    source = make(**EVERY, precision="bf16")
    terms = source.synthesize()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert source.latest()[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 24, 40), (1, 17, 9)])
def test_other_shapes(shape):
    source = make(shape=shape, **{**EVERY, "g_steps": 1})
    assert all(term.isfinite() for term in source.synthesize().values())
    assert source.latest()[0].shape == (BATCH, *shape)


def test_a_teacher_without_batch_norm_is_refused_while_bn_has_a_weight():
    teacher = network(nets.plain)
    with pytest.raises(InputError, match="no BatchNorm .*--bn 0"):
        make(teacher=teacher, **EVERY)
    assert "bn" not in make(teacher=network(nets.plain), **{**EVERY, "bn": 0.0}).synthesize()


@pytest.mark.parametrize("values", [{}, {"adv": 1.0}, {"triplet": 1.0, "triplet_target": "student"}])
def test_a_loss_without_terms_is_refused(values):
    """All weights are 0, or all of those that are left during warm-up."""
    with pytest.raises(InputError, match="--oh"):
        make(**values).round(0, with_student=False)


def test_a_warm_up_without_terms_is_refused_before_the_run():
    make(adv=1.0)
    with pytest.raises(InputError, match="during --warmup.*--oh"):
        make(adv=1.0, warmup=1)


def test_a_batch_of_one_image():
    source = make(**EVERY, synthesis_batch_size=1)
    assert all(term.isfinite() for term in source.synthesize().values())


def test_noise_follows_the_data_card_and_is_new_in_every_batch():
    card = DatasetCard("x", 2, 32, 32, 3, (0.3, 0.6), (0.05, 0.1))
    source = NoiseSource(card=card, device=torch.device("cpu"))
    images, targets, _ = source.sample(64)
    assert targets is None and source.synthesize() == {}
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(card.mean), atol=0.01, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(card.std), atol=0.01, rtol=0)
    assert images.min() >= 0 and images.max() <= 1 and not torch.equal(images, source.sample(64).images)
    before = torch.get_rng_state()
    source.latest()
    assert source.images_made == 128 and torch.equal(torch.get_rng_state(), before)


# What a source is.


@pytest.mark.parametrize("name", SOURCES)
def test_the_class_of_a_source_has_the_traits_of_the_table(name):
    cls = load_object(SOURCES[name].path)
    assert issubclass(cls, BaseSynthesis) and cls.traits == SOURCES[name].traits == traits_of(name)


@pytest.mark.parametrize(
    "trait, without",
    [
        ("synthesises", {"noise", "real", "folder"}),
        ("keeps_pool", {"generator", "noise", "real"}),
        ("has_generator", {"pixels", "noise", "real", "folder"}),
        ("has_rounds", {"generator", "noise", "real", "folder"}),
        ("has_noisy_layer", {"inversion", "pixels", "generator", "noise", "real", "folder"}),
    ],
)
def test_sources_without_a_trait(trait, without):
    assert {name for name in SOURCES if name in SourcesWithout(trait)} == without


def test_a_user_defined_source_has_the_traits_of_its_class(tmp_path):
    (tmp_path / "own.py").write_text(
        "from datafree.synthesis import Traits\n"
        "from datafree.synthesis.base import BaseSynthesis\n"
        "class Streams(BaseSynthesis):\n"
        "    traits = Traits(keeps_pool=False)\n"
        "class Silent(BaseSynthesis):\n"
        "    pass\n"
        "class NoSource:\n"
        "    pass\n"
    )
    streams, silent, no_source = (f"{tmp_path / 'own.py'}:{name}" for name in ("Streams", "Silent", "NoSource"))
    assert streams in SourcesWithout("keeps_pool") and streams not in SourcesWithout("has_rounds")
    assert silent not in SourcesWithout("keeps_pool") and traits_of(silent) == traits_of(no_source) == Traits()


def test_a_source_keeps_the_parts_it_is_constructed_of():
    source = make(oh=1.0)
    assert source.teacher is parts(source)[0] and source.student is parts(source)[1]
    assert source.card.shape == SHAPE and source.config.synthesis is source.settings
    assert source.augment.count == CropFlip(1, True).count and source.device == torch.device("cpu")


# User-defined sources.


def user_defined(sample=None, synthesize=None):
    """A user-defined source with these methods."""
    methods = {"sample": sample, "synthesize": synthesize}
    kind = type("Own", (BaseSynthesis,), {name: staticmethod(method) for name, method in methods.items() if method})
    return kind(card=make_card())


@pytest.mark.parametrize(
    "batch, message",
    [
        (torch.rand(4, *SHAPE), r"Own.sample\(4\) returned a Tensor; .*\(images, targets\) or a Batch"),
        ((torch.rand(4, *SHAPE),), r"returned a tuple; .*\(images, targets\) or a Batch"),
        (([0.5], None), r"returned a tuple; .*\(images, targets\) or a Batch"),
        ((torch.rand(3, *SHAPE), None), r"images \(3, .*of shape \(4, 3, 16, 16\)"),
        ((torch.zeros(4, *SHAPE, dtype=torch.uint8), None), "torch.uint8"),
        ((torch.rand(4, *SHAPE), torch.arange(3)), r"classes \(3,\); .*shape \(4,\), or None"),
        ((torch.rand(4, *SHAPE), [0, 1, 2, 3]), "classes"),
        ((torch.rand(4, *SHAPE, device="meta"), None), "on meta"),
        ((torch.rand(4, *SHAPE) + 1, None), r"images from 1.* to .*in \[0, 1\]"),
    ],
)
def test_a_batch_of_a_user_defined_source_that_does_not_fit_is_refused(batch, message):
    with pytest.raises(InputError, match=message):
        user_defined(sample=lambda n: batch).batch(4)


@pytest.mark.parametrize("more", [(None,), (torch.arange(4),), (torch.arange(4), torch.arange(4))])
def test_a_batch_of_a_user_defined_source_may_have_classes_and_ids(more):
    images = torch.rand(4, *SHAPE)
    assert user_defined(sample=lambda n: (images, *more)).batch(4) == Batch(images, *more)


def test_the_range_of_a_user_defined_sources_images_is_checked_on_the_first_batch_only():
    levels = iter([1.5, 0.5, 1.5])
    source = user_defined(sample=lambda n: (torch.full((n, *SHAPE), next(levels)), None))
    with pytest.raises(InputError, match=r"images from 1.5 to 1.5; they must be in \[0, 1\]"):
        source.batch(2)
    assert source.batch(2).images.max() == 0.5 and source.batch(2).images.max() == 1.5


@pytest.mark.parametrize("terms", [torch.rand(2), {"loss": 3.0}, {"loss": torch.rand(2)}])
def test_synthesis_of_a_user_defined_source_that_does_not_return_terms_is_refused(terms):
    with pytest.raises(InputError, match=r"Own.synthesize\(\) returned .*name -> scalar tensor"):
        user_defined(synthesize=lambda: terms).round(0, with_student=True)


def test_synthesis_of_a_user_defined_source_may_return_nothing():
    source = user_defined(synthesize=lambda: None)
    assert source.round(7, with_student=False) == {} and (source.epoch, source.with_student) == (7, False)
    assert user_defined().round(0, with_student=True) == {}


def test_a_further_term_may_read_batch_norm_statistics_without_the_weight_of_bn():
    source = make(oh=1.0)
    objective, views = source.objective, torch.rand(BATCH, *SHAPE)
    objective.terms.append(Term("more", 1.0, lambda teacher, *_: teacher.batch_norm[0].mean.sum(), ("batch_norm",)))
    with BatchNormTap(source.teacher) as tap:
        source.teacher(views)
    terms = objective(views, views, torch.zeros(BATCH, dtype=torch.long), with_student=False)[1]
    torch.testing.assert_close(terms["more"], tap.statistics[0].mean.sum())


def test_traits_of_another_type_are_one_sentence(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    traits = 3\n")
    with pytest.raises(InputError, match="the traits of .*Mine are 3; they must be"):
        traits_of(f"{tmp_path / 'mine.py'}:Mine")


# The triplets' weight in units of the gradient


def gradient_of(objective, images, targets):
    """The gradient of the loss by the images, and the terms; of a batch that is always the same."""
    torch.manual_seed(3)
    images = images.clone().requires_grad_()
    loss, terms = objective(images, images * 1.0, targets)
    loss.backward()
    return images.grad, loss.detach(), terms


@pytest.mark.parametrize("target", ["student", "teacher"])
def test_in_units_of_the_gradient_the_triplets_have_a_share_of_the_norm_of_the_others(target):
    """Against the gradients of an objective without triplets and of one that has nothing else."""
    torch.manual_seed(0)
    teacher, student = network().freeze(), network(nets.small).freeze()
    images, targets = torch.rand(12, *SHAPE), torch.arange(12) % CLASSES

    def objective(**values):
        given = options(triplet_target=target, sampling="uniform", start_layer=0, **values)
        return SynthesisObjective(given.synthesis, given.relation, teacher, student)

    others, rest, _ = gradient_of(objective(bn=1.0, oh=0.5, adv=1.0), images, targets)
    spread, _, _ = gradient_of(objective(triplet=1.0), images, targets)
    both = objective(bn=1.0, oh=0.5, adv=1.0, triplet=0.3, triplet_unit="gradient")
    gradient, loss, terms = gradient_of(both, images, targets)
    assert spread.any()
    weight = 0.3 * others.norm() / spread.norm()
    torch.testing.assert_close(terms["triplet_weight"], weight)
    torch.testing.assert_close(gradient, others + weight * spread)
    torch.testing.assert_close(loss, rest)
    assert set(terms) == {"bn", "oh", "adv", "triplet", "triplet_weight"}


@pytest.mark.parametrize("precision, tolerance", [("none", 1e-5), ("bf16", 0.02)])
def test_the_gradient_is_that_of_the_loss_with_the_weight_that_is_told(precision, tolerance):
    """With respect to the weights of a generator, in the precision of a run."""
    torch.manual_seed(0)
    teacher, student = network().freeze(), network(nets.small).freeze()
    generator = nn.Sequential(nn.Linear(8, prod(SHAPE)), nn.Sigmoid(), nn.Unflatten(1, SHAPE))
    latents, noise = torch.randn(12, 8), torch.rand(12, *SHAPE)  # in which the teacher sees several classes
    weights, targets = list(generator.parameters()), torch.arange(12) % CLASSES

    def gradient(**values):
        given = options(bn=1.0, oh=0.5, adv=1.0, sampling="uniform", start_layer=0, **values)
        objective = SynthesisObjective(given.synthesis, given.relation, teacher, student)
        torch.manual_seed(3)
        with runtime.autocast(latents.device, precision):
            images = 0.9 * noise + 0.1 * generator(latents)
            loss, terms = objective(images, images * 1.0, targets)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]), terms

    found, terms = gradient(triplet=0.5, triplet_unit="gradient")
    expected, _ = gradient(triplet=terms["triplet_weight"].item())
    assert terms["triplet_weight"] > 0 and (found - expected).norm() < tolerance * expected.norm()


def test_in_units_of_the_gradient_the_contrast_learns_as_ever():
    teacher, student = network().freeze(), network(nets.small).freeze()
    images, targets = torch.rand(12, *SHAPE), torch.arange(12) % CLASSES
    gradients = []
    for unit in ("loss", "gradient"):
        torch.manual_seed(0)
        given = options(bn=1.0, cr=1.0, triplet=0.3, triplet_unit=unit, sampling="uniform")
        objective = SynthesisObjective(given.synthesis, given.relation, teacher, student)
        gradient_of(objective, images, targets)
        gradients.append([p.grad for p in objective.contrast.head.parameters()])
    torch.testing.assert_close(*gradients)


def test_triplets_that_no_image_has_weigh_nothing():
    """One class has no negatives."""
    teacher = network(classes=1).freeze()
    given = options(bn=1.0, triplet=0.3, triplet_unit="gradient", triplet_target="teacher")
    objective = SynthesisObjective(given.synthesis, given.relation, teacher, teacher)
    gradient, _, terms = gradient_of(objective, torch.rand(6, *SHAPE), torch.zeros(6, dtype=torch.long))
    assert terms["triplet_weight"] == 0 and gradient.isfinite().all() and gradient.any()


def test_triplets_alone_have_no_unit_of_the_gradient(distil, refused):
    words = ("--bn", 0, "--oh", 0, "--adv", 0, "--triplet_unit", "gradient")
    assert "of which none has a weight" in refused(distil, *words)
    words = ("--triplet_unit", "gradient", "--compile", "default")
    assert "does not go with --compile default" in refused(distil, *words, code=2)
    with pytest.raises(OptionError, match="does not go with --precision fp16"):
        make_source(options(bn=1.0, triplet=1.0, triplet_unit="gradient", precision="fp16"))
    make_source(options(bn=1.0, triplet=1.0, triplet_unit="gradient", relation="off", compile="default"))
