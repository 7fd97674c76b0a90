"""Phase 1: what moves and what must not, which passes are made, what reaches the pool."""

from dataclasses import replace

import nets
import pytest
import torch

from datafree import config, criterions, relation
from datafree.augment import CropFlip
from datafree.datasets.cards import DatasetCard
from datafree.errors import InputError
from datafree.hooks import BatchNormTap, Features
from datafree.models.generator import Generator
from datafree.network import Network
from datafree.pool import ImagePool
from datafree.synthesis.base import BaseSynthesis, checked
from datafree.synthesis.contrast import InstanceContrast
from datafree.synthesis.inversion import InversionSynthesis, PixelSynthesis
from datafree.synthesis.objective import SynthesisObjective
from datafree.synthesis.sources import NoiseSource
from datafree.synthesis.stream import StreamSynthesis

SHAPE, CLASSES, BATCH = (3, 16, 16), 4, 8
EVERY = dict(bn=1.0, oh=1.0, adv=1.0, act=0.1, balance=1.0, cr=0.5, tv=1e-3, l2=1e-3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network(factory=nets.tiny, shape=SHAPE, classes=CLASSES):
    channels = shape[0]
    return Network(factory(classes, channels), shape, (0.4,) * channels, (0.2,) * channels)


def settings(**values):
    return config.Synthesis(**{"synthesis_batch_size": BATCH, "nz": 8, "ngf": 4, "lr_g": 0.05, **values})


def triplets(**values):
    return replace(config.Relation(triplet=1.0, start_layer=0, sampling="uniform"), **values)


def make(options=None, relations=None, teacher=None, student=None, shape=SHAPE, g_steps=3, **more):
    """An InversionSynthesis of small parts, its teacher and its student in training mode."""
    options = options or settings(**EVERY)
    teacher = (teacher or network(shape=shape)).freeze()
    student = student or network(nets.small, shape).train()
    objective = SynthesisObjective(options, relations or triplets(), teacher, student)
    generator = Generator(options.nz, options.ngf, shape)
    pool = ImagePool(64, shape, CLASSES, torch.device("cpu"))
    return InversionSynthesis(objective, generator, CropFlip(1, True), pool, options, g_steps, **more)


def parts(source):
    return source.objective.teacher, source.objective.student


def snapshot(*modules):
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def equal(before, after):
    return len(before) == len(after) and all(map(torch.equal, before, after))


def count_calls(patch, owner, name):
    calls, original = [], getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: calls.append(a) or original(*a, **k))
    return calls


# What moves.


def test_teacher_and_student_stay_as_they_are_while_the_generator_learns():
    source = make()
    teacher, student = parts(source)
    student(torch.rand(4, *SHAPE)).sum().backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    before, generator = snapshot(teacher, student), snapshot(source.generator)
    source.synthesize()
    assert equal(before, snapshot(teacher, student))
    assert equal(gradients, [p.grad for p in student.parameters()])
    assert not equal(generator, snapshot(source.generator))
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


def test_no_weight_gradient_is_computed_in_synthesis():
    """Neither network's weights are leaves of the graph that leads to the loss."""
    source, leaves = make(), set()
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

    class Walking:
        def __call__(self, *arguments):
            loss, terms = objective(*arguments)
            walk(loss.grad_fn)
            return loss, terms

        def __getattr__(self, name):
            return getattr(objective, name)

    source.objective = Walking()
    source.synthesize()
    assert {id(p) for p in source.generator.parameters()} <= leaves
    assert {id(p) for p in objective.contrast.head.parameters()} <= leaves
    assert not {id(p) for network in parts(source) for p in network.parameters()} & leaves


def test_the_student_is_restored_even_if_synthesis_fails():
    source = make()
    _, student = parts(source)
    student.model[0][0].weight.requires_grad_(False)
    source.augment = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        source.synthesize()
    wanted = [p.requires_grad for p in student.parameters()]
    assert student.training and not wanted[0] and all(wanted[1:])


def test_statistics_are_taken_of_the_teacher_in_synthesis_alone():
    source = make()
    teacher, student = parts(source)
    source.synthesize()
    tap = source.objective.bn_tap
    taken = list(tap.statistics)
    assert len(taken) == 2
    teacher.features(torch.rand(2, *SHAPE)), student.features(torch.rand(2, *SHAPE))
    assert len(tap.statistics) == len(taken) and all(a is b for a, b in zip(tap.statistics, taken))
    assert not any(layer._forward_pre_hooks or "forward" in layer.__dict__ for layer in tap.layers)


# What is computed.


@pytest.mark.parametrize(
    "weights, relations, passes",
    [
        (dict(bn=1.0, oh=1.0), dict(triplet=0.0), 0),
        (dict(bn=1.0, oh=1.0), dict(relation="off"), 0),
        (dict(bn=1.0, oh=1.0), dict(triplet_target="teacher"), 0),
        (dict(oh=1.0), dict(triplet_target="student"), 1),
        (dict(oh=1.0, adv=1.0), dict(triplet=0.0), 1),
        (dict(oh=1.0, adv=1.0), dict(triplet_target="student"), 1),
    ],
)
def test_the_student_runs_only_if_a_term_looks_at_it(weights, relations, passes, monkeypatch):
    source = make(settings(**weights), triplets(**relations), g_steps=1)
    calls = count_calls(monkeypatch, parts(source)[1], "features")
    forwards = count_calls(monkeypatch, parts(source)[1].model, "forward")
    source.synthesize()
    assert len(calls) == len(forwards) == passes
    calls.clear()
    source.with_student = False
    source.synthesize()
    assert not calls


@pytest.mark.parametrize("term", [*EVERY, "triplet"])
def test_a_weight_of_0_skips_its_term_alone(term):
    source = make(
        settings(**{**EVERY, term: 0.0}) if term != "triplet" else None,
        triplets(triplet=0.0) if term == "triplet" else None,
        g_steps=1,
    )
    assert set(source.synthesize()) == {*EVERY, "triplet"} - {term}
    assert (source.objective.contrast is None) == (term == "cr")


def test_the_teacher_runs_once_a_step_and_once_more_for_the_contrast(monkeypatch):
    for cr, passes in ((0.0, 3), (0.5, 7)):  # 3 steps; with cr 3 local views and the kept batch
        source = make(settings(bn=1.0, cr=cr))
        calls = count_calls(monkeypatch, parts(source)[0].model, "forward")
        source.synthesize()
        assert len(calls) == passes


def test_the_loss_is_the_weighted_sum_and_the_terms_are_the_criterions():
    source = make(relations=triplets(triplet=0.3), g_steps=1)
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
    weights = {**EVERY, "triplet": 0.3}
    torch.testing.assert_close(loss, sum(weights[name] * term for name, term in terms.items()))


@pytest.mark.parametrize("direction, sign", [("paper", relation.CONFUSE), ("release", relation.SEPARATE)])
@pytest.mark.parametrize("target", ["student", "teacher"])
@pytest.mark.parametrize("space", ["embedding", "logits"])
def test_the_triplets_look_at_what_was_chosen(direction, sign, target, space, monkeypatch):
    source = make(
        settings(),
        triplets(
            relation=direction, triplet_target=target, sampling_space=space, start_layer=1, end_layer=2, margin=0.3
        ),
    )
    objective, (teacher, student) = source.objective, parts(source)
    calls = count_calls(monkeypatch, relation, "relation_loss")
    views = torch.rand(BATCH, *SHAPE)
    with student.frozen():
        objective(views, views, torch.zeros(BATCH, dtype=torch.long))
        t, s = teacher.features(views), student.features(views)
    layers, labels, drawn, margin, sampling, given = calls[0]
    assert len(layers) == 1
    torch.testing.assert_close(layers[0], (s if target == "student" else t).stages[1])
    assert torch.equal(labels, t.logits.argmax(1))
    torch.testing.assert_close(drawn, t.embed if space == "embedding" else t.logits)
    assert not drawn.requires_grad and (margin, sampling, given) == (0.3, "uniform", sign)


@pytest.mark.parametrize(
    "start, end, expected", [(0, 4, [0, 1]), (1, 2, [1]), (2, 4, [1]), (-1, 4, [1]), (-2, -1, [0])]
)
def test_stages_are_chosen_and_the_last_one_where_there_are_too_few(start, end, expected):
    features = Features(None, "embedding", [0, 1])
    assert relation.triplet_layers(features, triplets(start_layer=start, end_layer=end)) == expected


def test_a_network_without_stages_is_scored_by_its_embedding():
    assert relation.triplet_layers(Features(None, "embedding", []), triplets()) == ["embedding"]


# What reaches the pool.


def scripted(losses, **options):
    """A synthesis whose steps have these losses -> the source, and the images that each step saw."""
    source = make(settings(oh=1.0, **options), triplets(relation="off"), g_steps=len(losses))
    seen, original = [], source.objective

    class Scripted:
        def __call__(self, images, views, targets, with_student):
            seen.append(images.detach().clone())
            return images.sum() * 0.01 - images.sum().detach() * 0.01 + losses[len(seen) - 1], {
                "scripted": torch.tensor(losses[len(seen) - 1])
            }

        def __getattr__(self, name):
            return getattr(original, name)

    source.objective = Scripted()
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


def test_a_round_without_a_finite_loss_tells_of_it():
    source, _ = scripted([float("nan"), float("inf")])
    assert source.synthesize()["scripted"] == float("inf")


def test_the_pool_gets_every_round_with_its_classes_in_order():
    source = make(settings(oh=1.0), triplets(relation="off"))
    for number in (1, 2, 3):
        source.synthesize()
        images, targets = source.latest()
        assert source.images_made == len(source.pool) == number * BATCH
        assert images.shape == (BATCH, *SHAPE) and torch.equal(targets, targets.sort().values)
        assert torch.equal(source.pool.targets[(number - 1) * BATCH : number * BATCH], targets)


def test_the_latest_images_are_known_after_a_restart():
    source = make()
    source.synthesize()
    other = make()
    other.load_state_dict(source.state_dict())
    assert all(map(torch.equal, source.latest(), other.latest()))


def test_the_saved_pool_is_no_larger_than_what_it_holds(tmp_path):
    pool = ImagePool(10_000, (1, 8, 8), 2, torch.device("cpu"))
    pool.add(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    torch.save(pool.state_dict(), tmp_path / "pool.pth")
    assert (tmp_path / "pool.pth").stat().st_size < 10_000


# The generator from round to round.


def test_random_start_makes_a_new_generator_and_a_new_optimiser_every_round(monkeypatch):
    source = make()
    resets, first = count_calls(monkeypatch, source.generator, "reset"), source.optimizer
    source.synthesize()
    assert len(resets) == 1 and source.optimizer is not first


def test_learned_start_moves_by_its_rate_and_keeps_the_optimiser(monkeypatch):
    source = make(settings(oh=1.0, generator_init="reptile", meta_rate=0.25), triplets(relation="off"))
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
def test_maml_moves_its_start_by_the_gradients_of_all_steps(rate, monkeypatch):
    """The same round written out: three steps of Adam from the start, their gradients summed, one step of Adam."""
    source = make(settings(oh=1.0, generator_init="maml", meta_rate=rate), triplets(relation="off"))
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
    assert not equal(start, [p.detach() for p in source.generator.parameters()])


def test_the_learned_starts_first_layer_is_drawn_anew_once():
    source = make(settings(oh=1.0, generator_init="reptile", reset_epoch=2, lr_g=0.0), triplets(relation="off"))
    first, rest = [], []
    for source.epoch in range(4):
        source.synthesize()
        first.append(source.generator.project.weight.detach().clone())
        rest.append(snapshot(source.generator.layers[-1]))
    assert [torch.equal(a, b) for a, b in zip(first, first[1:])] == [True, False, True]
    assert all(equal(rest[0], later) for later in rest)


def noise_of(source):
    """The list to which every noise that the generator is given will be added."""
    given = []
    source.generator.register_forward_pre_hook(lambda module, args: given.append(args[0].detach().clone()))
    return given


def test_noise_is_learned_unless_its_rate_is_0():
    for rate in (0.0, 0.1):
        source = make(settings(oh=1.0, lr_z=rate), triplets(relation="off"))
        copies = noise_of(source)
        source.synthesize()
        assert len(copies) == 3 and torch.equal(copies[0], copies[2]) == (rate == 0)


def test_class_noise_gives_every_class_its_centre():
    source = make(settings(oh=1.0, class_noise=50.0, lr_z=0.0), triplets(relation="off"), g_steps=1)
    noise = noise_of(source)
    source.synthesize()
    _, targets = source.latest()
    assert torch.cdist(noise[0], source.centres).argmin(1).equal(targets)
    torch.testing.assert_close(source.centres.norm(dim=1), torch.full((CLASSES,), 50.0))


def test_inversion_finds_images_that_the_teacher_gives_the_classes_asked_for():
    source = make(settings(oh=1.0, lr_z=0.05), triplets(relation="off"), g_steps=150)
    source.synthesize()
    images, targets = source.latest()
    assert (parts(source)[0](images).argmax(1) == targets).float().mean() > 0.8


# Pixels, and a generator whose images are not kept.


def streams(options, relations=None, g_steps=3, **more):
    """A StreamSynthesis of the parts of ``make``."""
    other = make(options, relations or triplets(relation="off"))
    return StreamSynthesis(other.objective, other.generator, CropFlip(1, True), options, g_steps, **more)


def test_pixels_are_trained_from_noise_and_stay_in_range():
    other = make(settings(oh=1.0, lr_g=0.2), triplets(relation="off"))
    source = PixelSynthesis(other.objective, CropFlip(1, True), other.pool, other.settings, 40)
    before, seen = snapshot(*parts(source)), []
    update = source._update
    source._update = lambda *a: seen.append(update(*a)) or seen[-1]
    source.synthesize()
    images, targets = source.latest()
    assert equal(before, snapshot(*parts(source)))
    assert (parts(source)[0](images).argmax(1) == targets).float().mean() > 0.8
    steps = torch.stack([images for images, *_ in seen])
    assert steps.min() >= -1e-6 and steps.max() <= 1 + 1e-6 and (steps[1] != steps[0]).any((1, 2, 3)).all()
    first = (steps[0] - 0.4) / 0.2  # noise in the teacher's units, cut
    assert first.mean().abs() < 0.2 and 0.7 < first.std() < 1.1
    source.synthesize()
    assert len(source.pool) == 2 * BATCH and not torch.equal(images, source.latest()[0])


def test_a_stream_carries_on_with_one_generator_and_keeps_no_image():
    source = streams(settings(oh=1.0, oh_target="answered", balance=1.0))
    before, optimizer = snapshot(source.generator), source.optimizer
    networks = snapshot(*parts(source))
    assert set(source.synthesize()) == {"oh", "balance"}
    assert not equal(before, snapshot(source.generator)) and equal(networks, snapshot(*parts(source)))
    assert source.optimizer is optimizer and optimizer.state
    learned = snapshot(source.generator)
    images, targets = source.sample(5)
    assert images.shape == (5, *SHAPE) and targets is None and not images.requires_grad
    assert not torch.equal(images, source.sample(5)[0]) and source.images_made == 10
    source.latest()
    assert source.images_made == 10 and equal(learned, snapshot(source.generator))


def test_a_stream_gets_worse_for_the_student():
    """DFAD: its generator raises the L1 distance that its student lowers."""
    torch.manual_seed(1)
    source = streams(settings(adv=1.0, adv_distance="l1", adv_where="all", lr_g=0.01), g_steps=1)
    with parts(source)[1].frozen():
        gaps = [-source.synthesize()["adv"].item() for _ in range(60)]
    assert sum(gaps[-10:]) > 1.2 * sum(gaps[:10])


@pytest.mark.parametrize("kind", ["pixels", "stream"])
def test_the_triplets_act_in_every_source(kind):
    options = settings(oh=1.0)
    if kind == "stream":
        source = streams(options, triplets(relation="paper"))
    else:
        other = make(options)
        source = PixelSynthesis(other.objective, CropFlip(1, True), other.pool, options, 2)
    assert "triplet" in source.synthesize()


# Options of the terms.


def test_the_class_of_the_cross_entropy_is_the_one_asked_for_or_the_teachers_own():
    for asked in ("asked", "answered"):
        source = make(settings(oh=1.0, oh_target=asked), triplets(relation="off"))
        views, targets = torch.rand(BATCH, *SHAPE), torch.zeros(BATCH, dtype=torch.long)
        logits = parts(source)[0](views)
        classes = targets if asked == "asked" else logits.argmax(1)
        torch.testing.assert_close(
            source.objective(views, views, targets)[1]["oh"], torch.nn.functional.cross_entropy(logits, classes)
        )


def test_the_adversary_is_as_the_options_say():
    source = make(settings(adv=1.0, adv_distance="js", adv_T=3.0, adv_where="all"), triplets(relation="off"))
    views = torch.rand(BATCH, *SHAPE)
    with parts(source)[1].frozen():
        terms = source.objective(views, views, torch.zeros(BATCH, dtype=torch.long))[1]
        teacher, student = (network(views) for network in parts(source))
    torch.testing.assert_close(terms["adv"], -criterions.js_divergence(student, teacher, 3.0).mean())


def test_statistics_are_averaged_over_rounds():
    """Fast: what is compared is momentum * (statistics when the last round ended) + (1 - momentum) * those of now."""
    source = make(settings(bn=1.0, bn_momentum=0.75), triplets(relation="off"))
    objective, statistics = source.objective, []
    for _ in range(3):
        views = torch.rand(BATCH, *SHAPE)
        term = objective(views, views, None)[1]["bn"]
        now = [layer[:2] for layer in objective.bn_tap.statistics]
        running = [layer[2:] for layer in objective.bn_tap.statistics]
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


def test_contrast_remembers_the_kept_batches():
    source = make(settings(cr=1.0), triplets(relation="off"))
    assert source.synthesize()["cr"] > 0
    contrast = source.objective.contrast
    assert contrast.added == BATCH
    assert contrast.bank[:BATCH].any(1).all() and not contrast.bank[BATCH:].any()
    assert source.synthesize()["cr"] > 0 and contrast.added == 2 * BATCH
    other = InstanceContrast(parts(source)[0], 0.2)
    other.load_state_dict(contrast.state_dict())
    assert other.added == 2 * BATCH and torch.equal(other.bank, contrast.bank)


def test_half_precision_on_the_cpu_keeps_images_and_terms_finite():
    source = make(precision="bf16")
    terms = source.synthesize()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert source.latest()[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (3, 24, 40), (1, 17, 9)])
def test_other_shapes(shape):
    source = make(shape=shape, g_steps=1)
    assert all(term.isfinite() for term in source.synthesize().values())
    assert source.latest()[0].shape == (BATCH, *shape)


def test_a_teacher_without_batch_norm_is_refused_while_bn_has_a_weight():
    teacher = network(nets.plain)
    with pytest.raises(InputError, match="no BatchNorm .*--bn 0"):
        make(teacher=teacher)
    assert "bn" not in make(settings(**{**EVERY, "bn": 0.0}), teacher=network(nets.plain)).synthesize()


@pytest.mark.parametrize("weights", [{}, {"adv": 1.0}])
def test_a_loss_of_no_terms_is_refused(weights):
    """All weights 0, or none that is left while the student warms up."""
    with pytest.raises(InputError, match="--oh"):
        source = make(settings(**weights), triplets(relation="off"))
        source.with_student = False
        source.synthesize()


def test_a_batch_of_one_image():
    source = make(settings(**EVERY, synthesis_batch_size=1))
    assert all(term.isfinite() for term in source.synthesize().values())


def test_noise_follows_the_data_card_and_is_new_at_every_draw():
    card = DatasetCard("x", 2, 32, 32, 3, (0.3, 0.6), (0.05, 0.1))
    source = NoiseSource(card, torch.device("cpu"))
    images, targets = source.sample(64)
    assert targets is None and source.synthesize() == {}
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(card.mean), atol=0.01, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(card.std), atol=0.01, rtol=0)
    assert images.min() >= 0 and images.max() <= 1 and not torch.equal(images, source.sample(64)[0])
    before = torch.get_rng_state()
    source.latest()
    assert source.images_made == 128 and torch.equal(torch.get_rng_state(), before)


# Sources of one's own.


@pytest.mark.parametrize(
    "batch, told",
    [
        ((torch.rand(3, *SHAPE), None), r"images \(3, .*of shape \(4, 3, 16, 16\)"),
        ((torch.zeros(4, *SHAPE, dtype=torch.uint8), None), "torch.uint8"),
        ((torch.rand(4, *SHAPE), torch.arange(3)), r"classes \(3,\); .*shape \(4,\), or None"),
        ((torch.rand(4, *SHAPE), [0, 1, 2, 3]), "classes"),
        ((torch.rand(4, *SHAPE, device="meta"), None), "on meta"),
    ],
)
def test_a_batch_of_ones_own_source_that_does_not_fit_is_told(batch, told):
    class Own(BaseSynthesis):
        def sample(self, n):
            return batch

    with pytest.raises(InputError, match=told):
        checked(Own(), SHAPE, torch.device("cpu")).sample(4)


def test_synthesis_of_ones_own_that_returns_a_tensor_is_told():
    class Own(BaseSynthesis):
        def synthesize(self):
            return torch.rand(2)

        def sample(self, n):
            return torch.rand(n, *SHAPE), None

    with pytest.raises(InputError, match="name -> scalar tensor"):
        checked(Own(), SHAPE, torch.device("cpu")).synthesize()
