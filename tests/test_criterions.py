"""Every loss term against a few lines of an oracle, and that gradient steps decrease it."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as distribution_kl
from torch.nn import functional as F

from datafree import criterions
from datafree.batchnorm import ChannelStatistics
from datafree.determinism import nondeterministic_operations
from datafree.errors import InputError
from datafree.features import Features, FeatureTap, pooled
from datafree.models import MODELS
from datafree.synthesis import contrast
from datafree.synthesis.contrast import InstanceContrast


class Stages:
    """What a tap states of its network's stages."""

    def __init__(self, channels, sizes):
        self.stage_channels, self.stage_sizes = channels, sizes


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# ---------------------------------------------------------------- on logits


@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
def test_distillation_equals_torchs_kl_div(T):
    student, teacher = torch.randn(9, 7) * 5, torch.randn(9, 7) * 5
    oracle = F.kl_div(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1), reduction="none").sum(1)
    torch.testing.assert_close(criterions.kl_divergence(student, teacher, T), oracle)
    oracle = oracle.mean().item() * T * T
    assert criterions.distillation(student, teacher, T).item() == pytest.approx(oracle, rel=1e-5)


def test_distillation_is_finite_and_fp32_for_extreme_half_precision_logits():
    student = torch.tensor([[3e4, -3e4, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = criterions.distillation(student, -student.detach(), 1.0)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()


def test_adversarial_counts_only_images_for_which_both_predict_the_same_class():
    teacher = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    student = torch.tensor([[1.0, 0, 0], [0, 0, 3.0], [0, 0, 4.0], [0, 2.0, 0]], requires_grad=True)
    loss = criterions.adversarial(student, teacher)
    p, q = softmax(teacher.double().numpy()), softmax(student.detach().double().numpy())
    kl = (p * np.log(p / q)).sum(1)
    assert loss.item() == pytest.approx(-(kl[0] + kl[2]) / 4, rel=1e-5)
    loss.backward()
    assert (student.grad[[1, 3]] == 0).all() and (student.grad[[0, 2]] != 0).any(1).all()
    assert criterions.adversarial(-teacher, teacher) == 0


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_js_divergence_equals_the_mean_of_two_kl_divergences_from_the_middle(T):
    student, teacher = torch.randn(9, 7) * 5, torch.randn(9, 7) * 5
    q, p = (softmax(x.double().numpy() / T) for x in (student, teacher))
    m = (p + q) / 2
    oracle = ((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1)) / 2
    np.testing.assert_allclose(criterions.js_divergence(student, teacher, T).numpy(), oracle, rtol=1e-4, atol=1e-6)
    assert criterions.js_divergence(100 * torch.eye(2), 100 * torch.eye(2).flip(0))[0].item() == pytest.approx(
        math.log(2)
    )  # its bound


def test_l1_distance_is_the_mean_absolute_difference():
    student, teacher = torch.randn(9, 7), torch.randn(9, 7)
    torch.testing.assert_close(
        criterions.l1_distance(student, teacher), F.l1_loss(student, teacher, reduction="none").mean(1)
    )


@pytest.mark.parametrize("distance, function", criterions.DISTANCES.items())
@pytest.mark.parametrize("where", ["agree", "all"])
def test_adversarial_has_any_distance_and_may_use_all_images(distance, function, where):
    student, teacher = torch.randn(9, 3) * 4, torch.randn(9, 3) * 4
    counted = [1.0 if where == "all" or s.argmax() == t.argmax() else 0.0 for s, t in zip(student, teacher)]
    assert where == "all" or 0 < sum(counted) < 9
    expected = -(function(student, teacher, 2.0) * torch.tensor(counted)).mean()
    torch.testing.assert_close(criterions.adversarial(student, teacher, distance, 2.0, where), expected)


def test_one_hot_equals_minus_the_log_of_the_softmax():
    logits, targets = torch.randn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    oracle = -np.log(softmax(logits.double().numpy())[np.arange(6), targets.numpy()]).mean()
    assert criterions.one_hot(logits, targets).item() == pytest.approx(oracle, rel=1e-5)
    cooler = -(logits / 5).softmax(1).log()[range(len(targets)), targets].mean().item()
    assert criterions.one_hot(logits, targets, T=5.0).item() == pytest.approx(cooler, rel=1e-5)


def test_balance_is_the_negative_entropy_of_the_mean_prediction():
    logits = torch.randn(6, 4) * 3
    mean = softmax(logits.double().numpy()).mean(0)
    assert criterions.balance(logits).item() == pytest.approx((mean * np.log(mean)).sum(), rel=1e-5)
    every_class_once, one_class = 100 * torch.eye(4), 100 * torch.eye(4)[[2, 2, 2]]
    assert criterions.balance(every_class_once).item() == pytest.approx(-math.log(4))
    assert criterions.balance(one_class).item() == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- on statistics and images


def statistics(layers=3):
    """(mean, variance, running mean, running variance) of layers of different widths."""
    return [(torch.randn(c), torch.rand(c) + 0.1, torch.randn(c), torch.rand(c) + 0.1) for c in range(4, 4 + layers)]


def test_bn_distance_norm_sums_euclidean_distances():
    layers = statistics()
    oracle = sum(
        np.sqrt(((v - rv).numpy() ** 2).sum()) + np.sqrt(((m - rm).numpy() ** 2).sum()) for m, v, rm, rv in layers
    )
    assert criterions.bn_distance(layers, "norm").item() == pytest.approx(oracle, rel=1e-5)


def test_bn_distance_mse_averages_mean_squares():
    layers = statistics()
    oracle = np.mean([((v - rv).numpy() ** 2).mean() + ((m - rm).numpy() ** 2).mean() for m, v, rm, rv in layers])
    assert criterions.bn_distance(layers, "mse").item() == pytest.approx(oracle, rel=1e-5)


def test_bn_distance_gaussian_averages_kl_divergences():
    layers = statistics()
    oracle = np.mean([distribution_kl(Normal(m, v.sqrt()), Normal(rm, rv.sqrt())).mean() for m, v, rm, rv in layers])
    assert criterions.bn_distance(layers, "gaussian").item() == pytest.approx(oracle, rel=1e-4)


@pytest.mark.parametrize("reduction", ["norm", "mse", "gaussian"])
@pytest.mark.parametrize("variance", [0.0, 1.0])
def test_bn_distance_has_a_finite_gradient_where_it_is_zero_or_dead(reduction, variance):
    mean, var = torch.zeros(5, requires_grad=True), torch.full((5,), variance, requires_grad=True)
    loss = criterions.bn_distance([(mean, var, torch.zeros(5), torch.full((5,), variance))], reduction)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert mean.grad.isfinite().all() and var.grad.isfinite().all()


def test_activation_is_minus_the_mean_magnitude():
    embed = torch.randn(5, 8)
    assert criterions.activation(embed).item() == pytest.approx(-np.abs(embed.numpy()).mean(), rel=1e-6)


def test_total_variation_and_norm_equal_numpy():
    images = torch.rand(2, 3, 5, 7)
    x = images.double().numpy()
    pairs = [
        (x[..., 1:], x[..., :-1]),
        (x[..., 1:, :], x[..., :-1, :]),
        (x[..., 1:, 1:], x[..., :-1, :-1]),
        (x[..., 1:, :-1], x[..., :-1, 1:]),
    ]
    oracle = sum(np.sqrt(((a - b) ** 2).sum()) for a, b in pairs)
    assert criterions.total_variation(images).item() == pytest.approx(oracle, rel=1e-5)
    assert criterions.l2_norm(images).item() == pytest.approx(np.sqrt((x**2).sum()), rel=1e-5)


def test_total_variation_of_a_flat_image_has_a_finite_gradient():
    images = torch.full((2, 1, 4, 4), 0.5, requires_grad=True)
    criterions.total_variation(images).backward()
    assert (images.grad == 0).all()


def test_terms_of_half_precision_inputs_are_fp32():
    rows, maps = torch.randn(4, 5).bfloat16(), torch.rand(4, 3, 6, 6).bfloat16()
    terms = [
        criterions.adversarial(rows, rows),
        criterions.one_hot(rows, torch.tensor([0, 1, 2, 3])),
        criterions.activation(rows),
        criterions.balance(rows),
        criterions.total_variation(maps),
        criterions.l2_norm(maps),
        criterions.info_nce(rows, rows, rows, 0.2),
    ]
    assert all(term.dtype == torch.float32 and term.shape == () for term in terms)


# ---------------------------------------------------------------- stages


def stages(channels, sizes, requires_grad=False):
    return [torch.randn(3, c, *size, requires_grad=requires_grad) for c, size in zip(channels, sizes)]


SIZES = [(8, 8), (4, 6), (2, 3)]


def test_channel_term_equals_the_explicit_convolution():
    projection = criterions.StageProjection(Stages([4, 5, 6], SIZES), Stages([7, 8, 9], SIZES))
    student, teacher = stages([4, 5, 6], SIZES), stages([7, 8, 9], SIZES)
    oracle = 0.0
    for linear, s, t in zip(projection.project, student, teacher):
        conv = nn.Conv2d(linear.in_features, linear.out_features, 1)
        conv.weight.data, conv.bias.data = linear.weight.data[:, :, None, None], linear.bias.data
        oracle += F.mse_loss(F.adaptive_avg_pool2d(conv(s), 1), F.adaptive_avg_pool2d(t, 1)).item()
    assert projection.channel(student, list(map(pooled, teacher))).item() == pytest.approx(oracle, rel=1e-5)


def test_gram_weights_equal_the_explicit_gram_matrix():
    stage = torch.randn(3, 6, 4, 5)
    for image, weights in zip(stage.double().numpy(), criterions.gram_weights(stage).numpy()):
        flat = image.reshape(6, -1)
        rows = (flat @ flat.T).sum(1)
        oracle = 1 - (rows - rows.min()) / (rows.max() - rows.min()) + 1e-3
        np.testing.assert_allclose(weights, oracle, atol=1e-5)


def test_gram_weights_of_a_flat_stage_are_finite():
    assert criterions.gram_weights(torch.ones(2, 4, 3, 3)).isfinite().all()
    assert criterions.gram_weights(torch.zeros(2, 1, 3, 3)).isfinite().all()


def test_gram_term_equals_its_definition():
    projection = criterions.StageProjection(Stages([4, 5], SIZES[:2]), Stages([7, 8], SIZES[:2]))
    student, teacher = stages([4, 5], SIZES), stages([7, 8], SIZES)
    oracle = 0.0
    for linear, s, t in zip(projection.project, student, teacher):
        mapped = torch.einsum("oc,nchw->nohw", linear.weight, s) + linear.bias[:, None, None]
        weights = criterions.gram_weights(t)[:, :, None, None]
        oracle += (weights * (mapped - t) ** 2).mean().item()
    assert projection.gram(student, teacher).item() == pytest.approx(oracle, rel=1e-5)


def test_attention_term_equals_numpy():
    student, teacher = [torch.randn(3, 4, 6, 6)], [torch.randn(3, 5, 6, 6)]
    maps = [(x[0].double().numpy() ** 2).mean(1).reshape(3, 36) for x in (student, teacher)]
    a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
    assert criterions.attention(student, teacher, [(0, 0)]).item() == pytest.approx(((a - b) ** 2).mean(), rel=1e-5)
    assert criterions.attention([teacher[0] * -3], teacher, [(0, 0)]).item() == pytest.approx(0, abs=1e-12)
    assert criterions.attention([torch.randn(3, 2, 12, 9)], teacher, [(0, 0)]).isfinite()  # of another size
    assert criterions.attention([torch.zeros(3, 2, 6, 6)], teacher, [(0, 0)]).isfinite()


@pytest.mark.parametrize("old, new", [((12, 9), (6, 6)), ((4, 4), (7, 5)), ((8, 6), (1, 3)), ((5, 5), (5, 5))], ids=str)
def test_stages_are_resized_by_adaptive_pooling_whose_gradient_is_repeatable(old, new):
    maps = torch.randn(3, 4, *old, requires_grad=True)
    found, oracle = criterions.resized(maps, new), F.adaptive_avg_pool2d(maps, new)
    torch.testing.assert_close(found, oracle)
    weights = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad((y * weights).sum(), maps)[0] for y in (found, oracle)))
    assert not nondeterministic_operations(found)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(criterions.resized(maps, new), found)


@pytest.mark.parametrize(
    "student, teacher, pairs",
    [
        ([(8, 8), (4, 4), (2, 2)], [(8, 8), (4, 4), (2, 2)], [(0, 0), (1, 1), (2, 2)]),
        ([(16, 16), (8, 8), (4, 4)], [(32, 32), (16, 16), (8, 8), (4, 4)], [(0, 1), (1, 2), (2, 3)]),
        ([(8, 8), (4, 4), (1, 1)], [(8, 8), (2, 2), (1, 1)], [(0, 0), (2, 2)]),
        ([(14, 14), (7, 7)], [(16, 16), (8, 8), (4, 4)], [(0, 1), (1, 2)]),
        ([(14, 14), (7, 7), (4, 4)], [(5, 5)], [(2, 0)]),
        ([(4, 6)], [(6, 4)], [(0, 0)]),
    ],
    ids=str,
)
def test_stages_are_paired_by_size_else_from_the_end(student, teacher, pairs):
    assert criterions.pair_stages(student, teacher, ["at_loss"]) == pairs


@pytest.mark.parametrize("term", ["channel", "gram"])
@pytest.mark.parametrize("student_sizes", [[(8, 8), (4, 6)], [(9, 9), (5, 5), (3, 3), (1, 1)]], ids=["equal", "other"])
def test_stages_of_other_number_and_size_can_be_compared(term, student_sizes):
    widths = [4, 5, 6, 7][: len(student_sizes)]
    projection = criterions.StageProjection(Stages(widths, student_sizes), Stages([7, 8, 9], SIZES))
    student, teacher = stages(widths, student_sizes, requires_grad=True), stages([7, 8, 9], SIZES)
    loss = getattr(projection, term)(student, [pooled(t) for t in teacher] if term == "channel" else teacher)
    loss.backward()
    assert loss.shape == () and loss.isfinite()
    assert sum(s.grad is not None for s in student) == len(projection.pairs)
    assert all(p.grad.norm() > 0 for p in projection.parameters())


@pytest.mark.parametrize("teacher, student", [("vgg11", "resnet18"), ("resnet18", "vgg8"), ("wrn16_2", "mobilenetv2")])
def test_networks_with_different_stages_can_be_compared(teacher, student):
    teacher, student = (FeatureTap(MODELS[name](5), (3, 32, 32)) for name in (teacher, student))
    projection = criterions.StageProjection(student, teacher)
    views = torch.randn(2, 3, 32, 32)
    s, t = student(views), teacher(views)
    assert len(projection.pairs) >= 3
    assert projection.channel(s.stages, t.pooled).isfinite() and projection.gram(s.stages, t.stages).isfinite()


@pytest.mark.parametrize("without", ["student", "teacher"])
def test_a_network_without_stages_is_refused(without):
    empty, full = Stages([], []), Stages([4, 5, 6], SIZES)
    networks = (empty, full) if without == "student" else (full, empty)
    with pytest.raises(InputError, match=f"the {without} has no stages of feature maps to compare; set --gram_loss 0$"):
        criterions.StageProjection(*networks, ["gram_loss"])


# ---------------------------------------------------------------- contrast


def test_info_nce_equals_numpy():
    local, anchor, bank = torch.randn(5, 6), torch.randn(5, 6), torch.randn(11, 6)
    u, v, w = (x.double().numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (local, anchor, bank))
    logits = u @ np.concatenate([v, w]).T / 0.2
    oracle = -np.log(softmax(logits)[np.arange(5), np.arange(5)]).mean()
    assert criterions.info_nce(local, anchor, bank, 0.2).item() == pytest.approx(oracle, rel=1e-5)


class PixelTeacher:
    """One stage of 2 channels, the image's first two; the embedding is the image itself."""

    tap = Stages([2], [(4, 4)])
    tap.embed_dim = 48

    def features(self, images, with_maps=True):
        return Features(images.mean((2, 3)), images.flatten(1), [images[:, :2]])


@pytest.fixture
def small_bank(monkeypatch):
    monkeypatch.setattr(contrast, "BANK_SIZE", 10)
    monkeypatch.setattr(contrast, "NEGATIVES", 7)
    return InstanceContrast(PixelTeacher(), T=0.5)


def test_contrast_is_within_the_batch_before_the_first_round(small_bank, monkeypatch):
    monkeypatch.setattr(contrast, "random_resized_crop", lambda images: images.flip(3))
    images, views = torch.rand(4, 3, 4, 4, requires_grad=True), torch.rand(4, 3, 4, 4, requires_grad=True)
    loss = small_bank(images, PixelTeacher().features(views))
    similarity = (
        F.cosine_similarity(
            *(
                small_bank.head(contrast.instance(PixelTeacher().features(x)))[place]
                for x, place in ((images.flip(3), np.s_[:, None]), (views, np.s_[None, :]))
            ),
            dim=2,
        )
        / 0.5
    )
    assert loss.item() == pytest.approx(-similarity.log_softmax(1).diagonal().mean().item(), rel=1e-5)
    loss.backward()
    assert images.grad.abs().max() > 0 and views.grad is None
    assert all(p.grad.abs().max() > 0 for p in small_bank.head.parameters())


def test_contrast_is_info_nce_of_the_heads_output(small_bank, monkeypatch):
    monkeypatch.setattr(contrast, "random_resized_crop", lambda images: images.flip(3))
    small_bank.remember(
        torch.rand(1, 3, 4, 4).expand(3, -1, -1, -1)
    )  # equal rows: it does not matter which are sampled
    images = torch.rand(4, 3, 4, 4)

    def mapped(images):
        return small_bank.head(torch.cat([images[:, :2].mean((2, 3)), images.flatten(1)], 1))

    bank = small_bank.head(small_bank.bank[[0] * 3])
    oracle = criterions.info_nce(mapped(images.flip(3)), mapped(images), bank, 0.5)
    found = small_bank(images, PixelTeacher().features(images))
    assert found.item() == pytest.approx(oracle.item(), rel=1e-5)


def test_bank_is_a_ring_that_is_saved(small_bank):
    images = torch.rand(16, 3, 4, 4)
    rows = contrast.instance(PixelTeacher().features(images))
    for part in images.split(4):
        small_bank.remember(part)
    # 16 rows in a ring of 10: rows 10 to 15 have replaced rows 0 to 5.
    assert torch.equal(small_bank.bank, torch.cat([rows[10:], rows[6:10]]))
    other = InstanceContrast(PixelTeacher(), T=0.5)
    other.load_state_dict(small_bank.state_dict())
    assert torch.equal(other.bank, small_bank.bank) and other.added == 16


def test_contrast_samples_only_remembered_instances(small_bank):
    small_bank.remember(torch.rand(3, 3, 4, 4))
    small_bank.bank[3:] = torch.nan
    images = torch.rand(4, 3, 4, 4)
    assert all(small_bank(images, PixelTeacher().features(images)).isfinite() for _ in range(20))


def test_contrast_owns_no_weights_of_the_teacher():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.tap = network, FeatureTap(network, (3, 4, 4))

        def features(self, images, with_maps=True):
            return self.tap(images)

    owned = {name for name, _ in InstanceContrast(Teacher(), 0.2).named_parameters()}
    assert owned == {f"head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


# ---------------------------------------------------------------- descent


def descents():
    """name -> (what is optimised, its loss)."""
    torch.manual_seed(1)
    logits, targets, maps = torch.randn(16, 5), torch.arange(16) % 5, torch.rand(4, 3, 6, 6)
    running = torch.full((3,), 0.2), torch.full((3,), 2.0)
    projection = criterions.StageProjection(Stages([4, 5, 6], SIZES), Stages([7, 8, 9], SIZES))
    student, teacher = stages([4, 5, 6], SIZES), stages([7, 8, 9], SIZES)
    rows_of_teacher = list(map(pooled, teacher))
    rows, anchor, bank = torch.randn(8, 6), torch.randn(8, 6), torch.randn(20, 6)
    cases = {
        "distillation": ([torch.randn(16, 5)], lambda x: criterions.distillation(x, logits, 4.0)),
        "adversarial": ([logits + 0.1 * torch.randn(16, 5)], lambda x: criterions.adversarial(x, logits)),
        "adversarial_js": (
            [logits + 0.1 * torch.randn(16, 5)],
            lambda x: criterions.adversarial(x, logits, "js", 3.0, "all"),
        ),
        "adversarial_l1": (
            [logits + 0.1 * torch.randn(16, 5)],
            lambda x: criterions.adversarial(x, logits, "l1", 1.0, "all"),
        ),
        "l1_distance": ([torch.randn(16, 5)], lambda x: criterions.l1_distance(x, logits).mean()),
        "attention": (student, lambda *x: criterions.attention(x, teacher, [(i, i) for i in range(3)])),
        "one_hot": ([logits], lambda x: criterions.one_hot(x, targets)),
        "activation": ([logits], criterions.activation),
        "balance": ([logits], criterions.balance),
        "total_variation": ([maps], criterions.total_variation),
        "l2_norm": ([maps], criterions.l2_norm),
        "channel": (student, lambda *x: projection.channel(x, rows_of_teacher)),
        "gram": (student, lambda *x: projection.gram(x, teacher)),
        "projection": (list(projection.parameters()), lambda *x: projection.channel(student, rows_of_teacher)),
        "info_nce": ([rows], lambda x: criterions.info_nce(x, anchor, bank, 0.2)),
    }
    for reduction in ("norm", "mse", "gaussian"):
        cases[f"bn_{reduction}"] = (
            [maps],
            lambda x, reduction=reduction: criterions.bn_distance([(*ChannelStatistics.apply(x), *running)], reduction),
        )
    return cases


@pytest.mark.parametrize("name", descents())
def test_every_term_decreases_under_gradient_steps(name):
    start, loss = descents()[name]
    optimised = [x.detach().clone().requires_grad_() for x in start] if name != "projection" else start
    optimizer, values = torch.optim.Adam(optimised, 0.02), []
    for _ in range(20):
        value = loss(*optimised)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.01 * abs(values[0])


def test_projections_stay_in_full_precision_when_the_forward_passes_do_not():
    torch.manual_seed(0)
    student, teacher = ([torch.randn(4, c, 5, 5)] for c in (3, 6))
    taps = [Stages([c], [(5, 5)]) for c in (3, 6)]
    projection = criterions.StageProjection(*taps)
    rows = list(map(pooled, teacher))
    plain = projection.channel(student, rows), projection.gram(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = projection.channel(student, rows), projection.gram(student, teacher)
    assert plain == halved
