"""RGAL's triplets against loops and formulas in float64 numpy."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import DistanceWeightedMiner, distance_weighted_miner
from pytorch_metric_learning.reducers import MeanReducer
from scipy.stats import beta, chisquare
from torch.nn import functional as F

from datafree import relation
from datafree.relation import CONFUSE, SEPARATE

DIRECTIONS = pytest.mark.parametrize("direction", [SEPARATE, CONFUSE], ids=["separate", "confuse"])
SAMPLINGS = pytest.mark.parametrize("sampling", ["focal", "distance", "uniform"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def loss_oracle(features, labels, negatives, margin, direction):
    """The formulas of the paper, one triplet after the other."""
    f = np.asarray(features, np.float64)
    f = f / np.linalg.norm(f, axis=1, keepdims=True)
    losses = []
    for a in range(len(f)):
        for p in range(len(f)):
            if p == a or labels[p] != labels[a] or all(label == labels[a] for label in labels):
                continue
            positive = np.linalg.norm(f[a] - f[p])
            negative = np.linalg.norm(f[a] - f[negatives[a][p]])
            if direction == SEPARATE:
                losses.append(max(0.0, positive - negative + margin))
            else:
                losses.append(max(0.0, negative - positive + margin))
    return np.mean(losses) if losses else 0.0


def probability_oracle(distance, labels, dim, sampling):
    """Inverse density over a row's kept candidates; uniform over the other classes if none is kept."""
    rows = []
    for a, r in enumerate(distance.double().numpy()):
        other = (labels != labels[a]).numpy()
        low, high = {"focal": (0.5, 1.0), "distance": (0.0, 1.4), "uniform": (0.0, np.inf)}[sampling]
        kept = other & (r > low) & (r < high)
        if sampling == "distance":
            r = np.maximum(r, 0.5)
        with np.errstate(all="ignore"):
            log_w = (2 - dim) * np.log(r) - (dim - 3) / 2 * np.log(1 - r**2 / 4)
        if sampling == "uniform" or not kept.any():
            w = other.astype(float)
        else:
            w = np.where(kept, np.exp(np.where(kept, log_w, -np.inf) - log_w[kept].max()), 0.0)
        rows.append(w / w.sum())
    return np.stack(rows)


def batch(size=14, dim=6, classes=3):
    labels = torch.arange(size) % classes
    negatives = torch.tensor(
        [
            [np.random.default_rng(7 * a + p).choice(np.flatnonzero(labels != labels[a])) for p in range(size)]
            for a in range(size)
        ]
    )
    return torch.randn(size, dim), labels, negatives


# ---------------------------------------------------------------- the loss


@DIRECTIONS
@pytest.mark.parametrize("margin", [0.0, 0.2, 5.0])
def test_loss_equals_the_loop_over_triplets(direction, margin):
    features, labels, negatives = batch()
    loss = relation.triplet_loss(features, labels, negatives, margin, direction)
    assert loss.item() == pytest.approx(loss_oracle(features, labels, negatives, margin, direction), abs=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 10, 100, 200, 1000])
@DIRECTIONS
def test_loss_equals_that_of_pytorch_metric_learning(direction, dim):
    """Its triplets are (anchor, positive, negative); confusing is separating with the last two exchanged."""
    features, labels, negatives = batch(dim=dim)
    anchors, positives = relation.triplet_mask(labels).nonzero().T
    drawn = negatives[anchors, positives]
    triplets = (anchors, positives, drawn) if direction == SEPARATE else (anchors, drawn, positives)
    theirs = TripletMarginLoss(0.2, distance=LpDistance(), reducer=MeanReducer())(features, labels, triplets)
    ours = relation.triplet_loss(features, labels, negatives, 0.2, direction)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


@DIRECTIONS
def test_maps_are_pooled_first(direction):
    _, labels, negatives = batch()
    maps = torch.randn(14, 6, 3, 5)
    loss = relation.triplet_loss(maps, labels, negatives, 0.2, direction)
    oracle = loss_oracle(maps.numpy().mean((2, 3)), labels, negatives, 0.2, direction)
    assert loss.item() == pytest.approx(oracle, abs=1e-6)


@DIRECTIONS
def test_gradient_equals_finite_differences_of_the_loop(direction):
    features, labels, negatives = batch(size=7, dim=4)
    features.requires_grad_()
    relation.triplet_loss(features, labels, negatives, 0.2, direction).backward()
    base, step = features.detach().double().numpy(), 1e-6
    slopes = np.zeros_like(base)
    for index in np.ndindex(*base.shape):
        shift = np.zeros_like(base)
        shift[index] = step
        slopes[index] = (
            loss_oracle(base + shift, labels, negatives, 0.2, direction)
            - loss_oracle(base - shift, labels, negatives, 0.2, direction)
        ) / (2 * step)
    np.testing.assert_allclose(features.grad.numpy(), slopes, atol=1e-5)


def test_confuse_is_separate_with_the_sign_flipped():
    features, labels, negatives = batch()
    gradients, losses = [], []
    for direction in (SEPARATE, CONFUSE):
        x = features.clone().requires_grad_()
        # The largest gap is 2, so with this margin every hinge is active in both directions.
        loss = relation.triplet_loss(x, labels, negatives, 2.5, direction)
        loss.backward()
        gradients.append(x.grad)
        losses.append(loss.item())
    assert sum(losses) == pytest.approx(2 * 2.5, abs=1e-5)
    torch.testing.assert_close(gradients[0], -gradients[1])
    assert gradients[0].norm() > 0.01


@DIRECTIONS
def test_descent_moves_classes_the_way_the_name_says(direction):
    features, labels, _ = batch(size=24, dim=5)
    features.requires_grad_()
    same = (labels[:, None] == labels[None, :]) & ~torch.eye(24, dtype=torch.bool)
    other = labels[:, None] != labels[None, :]

    def gap():
        distance = relation.pairwise_distance(features.detach())
        return (distance[other].mean() - distance[same].mean()).item()

    optimizer, before, losses = torch.optim.SGD([features], 2.0), gap(), []
    for _ in range(20):
        loss = relation.relation_loss([features], labels, features.detach(), 0.2, "uniform", direction)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert direction * (gap() - before) > 0.05


def test_triplet_mask_equals_the_definition():
    labels = torch.tensor([0, 1, 0, 2, 2, 0])
    expected = [[a != p and labels[a] == labels[p] for p in range(6)] for a in range(6)]
    assert relation.triplet_mask(labels).tolist() == [[bool(x) for x in row] for row in expected]
    assert not relation.triplet_mask(torch.zeros(4)).any()


def test_layers_share_their_negatives_and_are_summed():
    features, labels, _ = batch()
    layers = [torch.randn(14, 9), torch.randn(14, 3, 4, 4), features]
    torch.manual_seed(3)
    total = relation.relation_loss(layers, labels, features, 0.2, "distance", SEPARATE)
    torch.manual_seed(3)
    negatives = relation.draw_negatives(features, labels, "distance")
    rows = [x.mean((2, 3)) if x.dim() == 4 else x for x in layers]
    oracle = sum(loss_oracle(x, labels, negatives, 0.2, SEPARATE) for x in rows)
    assert total.item() == pytest.approx(oracle, abs=1e-5)


# ---------------------------------------------------------------- distances


def test_distances_equal_numpy():
    features = torch.randn(20, 33)
    rows = features.double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    oracle = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    found = relation.pairwise_distance(features).numpy()
    off = ~np.eye(20, dtype=bool)
    np.testing.assert_allclose(found[off], oracle[off], rtol=1e-5)
    assert found.diagonal().max() < 1e-3


@DIRECTIONS
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(14, 40), (14, 40, 3, 5)], ids=["rows", "maps"])
def test_half_precision_features_are_computed_in_fp32(shape, precision, direction):
    _, labels, negatives = batch()
    features = torch.randn(shape).to(precision).requires_grad_()
    loss = relation.triplet_loss(features, labels, negatives, 0.2, direction)
    loss.backward()
    assert loss.dtype == torch.float32 and features.grad.isfinite().all()
    rows = features.detach().float().view(14, 40, -1).mean(2)
    oracle = loss_oracle(rows, labels, negatives, 0.2, direction)
    assert loss.item() == pytest.approx(oracle, abs=1e-6)


def test_autocast_does_not_lower_the_precision_of_distances():
    features = torch.randn(20, 40)
    exact = relation.pairwise_distance(features)
    with torch.autocast("cpu", torch.bfloat16):
        found = relation.pairwise_distance(features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("dim", [2, 3, 10, 100, 200, 1000])
@SAMPLINGS
def test_probabilities_equal_the_formula(sampling, dim):
    size = 40
    upper = torch.rand(size, size).mul(1.9).add(0.05).triu(1)
    upper[0, 1:] = 1.7  # the band of this anchor is empty
    distance, labels = upper + upper.T, torch.randint(4, (size,))
    found = relation.negative_probabilities(distance, labels, dim, sampling)
    oracle = probability_oracle(distance, labels, dim, sampling)
    # In fp32 the exponent (d - 2) ln r carries an error of up to 1e-4 at d = 1000.
    np.testing.assert_allclose(found.numpy(), oracle, rtol=2e-3 if dim == 1000 else 3e-4, atol=1e-7)


@pytest.mark.parametrize("cap", [1.0, 3.0, 50.0])
@pytest.mark.parametrize("sampling", ["focal", "distance"])
def test_a_capped_weight_is_a_multiple_of_the_median_of_its_row(sampling, cap):
    distance, labels = torch.rand(30, 30).mul(0.6).add(0.45), torch.arange(30) % 3
    found = relation.negative_probabilities(distance, labels, 64, sampling, cap).double().numpy()
    for row in range(30):
        exact = probability_oracle(distance, labels, 64, sampling)[row]
        candidates = np.sort(exact[exact > 0])
        limited = np.minimum(exact, cap * candidates[(len(candidates) - 1) // 2])
        np.testing.assert_allclose(found[row], limited / limited.sum(), rtol=1e-3, atol=1e-7)


def test_a_cap_above_all_weights_changes_nothing_and_an_empty_band_is_still_uniform():
    distance, labels = torch.rand(20, 20).mul(0.4).add(0.55), torch.arange(20) % 2
    plain = relation.negative_probabilities(distance, labels, 3, "focal")
    torch.testing.assert_close(relation.negative_probabilities(distance, labels, 3, "focal", 100.0), plain)
    far = relation.negative_probabilities(torch.full((4, 4), 1.7), torch.tensor([0, 0, 1, 1]), 64, "focal", 2.0)
    assert far[0].tolist() == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize("dim", [2, 4, 8])
def test_the_intrinsic_dimension_is_that_of_a_sphere_in_a_larger_space(dim):
    """Points on a sphere of ``dim`` dimensions, embedded isometrically in 128."""
    points = F.normalize(torch.randn(512, dim + 1), dim=1) @ torch.linalg.qr(torch.randn(128, dim + 1))[0].T
    estimate = relation.intrinsic_dimension(relation.pairwise_distance(points)).item()
    assert estimate == pytest.approx(dim, rel=0.12)


@pytest.mark.parametrize("rows", [torch.rand(1, 5), torch.rand(2, 5), torch.ones(6, 5)])
def test_the_intrinsic_dimension_of_too_few_or_equal_rows_is_finite(rows):
    assert relation.intrinsic_dimension(relation.pairwise_distance(rows)).isfinite()
    labels = torch.arange(len(rows)) % 2
    assert relation.sampling_probabilities(rows, labels, "distance", "intrinsic").isfinite().all()


def test_the_dimension_is_nominal_estimated_or_given():
    space, labels = torch.randn(40, 3) @ torch.randn(3, 64), torch.arange(40) % 4
    distance = relation.pairwise_distance(space)
    for dim, d in (("nominal", 64), ("intrinsic", relation.intrinsic_dimension(distance)), ("5", 5.0)):
        expected = relation.negative_probabilities(distance, labels, d, "distance")
        assert torch.equal(relation.sampling_probabilities(space, labels, "distance", dim), expected)


def test_effective_candidates_count_equally_likely_ones():
    labels = torch.tensor([0, 1, 1, 1, 1])
    rows = torch.zeros(5, 5)
    rows[0, 1:] = 0.25  # four candidates
    rows[1:, 0] = 1.0  # one
    torch.testing.assert_close(relation.effective_candidates(rows, labels), torch.tensor((4 + 4 * 1) / 5))
    assert relation.effective_candidates(torch.ones(3, 3) / 3, torch.zeros(3)) == 0  # no anchor has a negative


def test_in_many_dimensions_the_nominal_density_leaves_hardly_a_choice():
    """What --sampling_dim and --sampling_cap are for: 12 dimensions of variation, 64 nominal ones."""
    torch.manual_seed(0)
    space, labels = torch.randn(256, 12) @ torch.randn(12, 64), torch.arange(256) % 10
    found = {
        (dim, cap): relation.effective_candidates(
            relation.sampling_probabilities(space, labels, "focal", dim, cap), labels
        )
        for dim, cap in (("nominal", None), ("intrinsic", None), ("nominal", 3.0))
    }
    assert found["nominal", None] < 2 and min(found["intrinsic", None], found["nominal", 3.0]) > 5


@pytest.mark.parametrize("dim", [2, 3, 10, 100])
def test_distance_weights_equal_those_of_pytorch_metric_learning(dim, monkeypatch):
    """Up to 100 dimensions: its weights are not kept in log space, and underflow beyond."""
    rows, labels = torch.randn(30, dim), torch.arange(30) % 3
    given = []
    monkeypatch.setattr(
        distance_weighted_miner.lmu,
        "get_random_triplet_indices",
        lambda *_, weights, **__: given.append(weights) or (torch.zeros(0).long(),) * 3,
    )
    DistanceWeightedMiner()(rows, labels)
    ours = relation.negative_probabilities(relation.pairwise_distance(rows), labels, dim, "distance")
    kept = given[0].isfinite().all(1)
    assert kept.sum() > 15
    torch.testing.assert_close(ours[kept], given[0][kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dim", [100, 1000])
def test_a_very_near_sample_does_not_make_focal_sampling_uniform(dim):
    r = torch.tensor([0.0, 0.02, 0.6, 0.9, 1.41, 1.99])
    distance, labels = r.expand(6, 6), torch.tensor([0, 1, 1, 1, 1, 1])
    row = relation.negative_probabilities(distance, labels, dim, "focal")[0]
    assert row[2] > 0.99 and row[[0, 1, 4, 5]].sum() == 0


@SAMPLINGS
def test_frequencies_of_sampled_negatives_equal_the_probabilities(sampling):
    space, labels = torch.randn(8, 4), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    counts = torch.zeros(8, 8)
    for _ in range(500):
        drawn = relation.draw_negatives(space, labels, sampling)
        counts.scatter_add_(1, drawn, torch.ones(8, 8))
    rows = space.double().numpy() / np.linalg.norm(space.double().numpy(), axis=1, keepdims=True)
    distance = torch.tensor(np.linalg.norm(rows[:, None] - rows[None], axis=2))
    oracle = probability_oracle(distance, labels, 4, sampling)
    # 4,000 samples of each row: 5 standard deviations are at most 0.04.
    np.testing.assert_allclose(counts.numpy() / 4000, oracle, atol=0.04)
    assert (counts.numpy()[oracle == 0] == 0).all()


DIMS = pytest.mark.parametrize("dim", [2, 3, 10, 100, 200, 1000])


@DIMS
def test_the_weights_invert_the_density_of_distances_on_the_sphere(dim):
    """So images of a class that is uniform on the sphere are sampled uniformly in distance."""
    r = torch.linspace(0.5, 1.4, 50, dtype=torch.float64)
    # The height (1 + cos) / 2 = 1 - r^2 / 4 of a random point has the distribution Beta((d - 1) / 2, (d - 1) / 2).
    density = torch.from_numpy(beta.logpdf(r**2 / 4, (dim - 1) / 2, (dim - 1) / 2)) + r.log()
    product = relation.log_inverse_density(r, dim) + density
    torch.testing.assert_close(product, product[:1].expand(50), atol=1e-6, rtol=1e-9)


@DIMS
@SAMPLINGS
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_sampled_negatives_pass_a_chi_square_test_and_stay_in_the_band(dim, sampling, precision):
    """An anchor and 300 samples of another class, spaced evenly in distance from it."""
    r = torch.linspace(0.3, 1.45, 300)
    rows = torch.zeros(301, dim)
    rows[0, 0] = 1
    rows[1:, 0], rows[1:, 1] = 1 - r**2 / 2, (1 - (1 - r**2 / 2) ** 2).sqrt()
    rows, labels = rows.to(precision), (torch.arange(301) > 0).long()
    distance = relation.pairwise_distance(rows)[:1]
    oracle = probability_oracle(distance, labels, dim, sampling)[0]
    drawn = torch.cat([relation.draw_negatives(rows, labels, sampling)[0] for _ in range(20)])
    low, high = {"focal": (0.5, 1.0), "distance": (0.0, 1.4), "uniform": (0.0, 2.0)}[sampling]
    assert ((distance[0, drawn] > low) & (distance[0, drawn] < high)).all()
    expected = oracle * len(drawn)
    counts = np.bincount(drawn.numpy(), minlength=301)
    assert (counts[oracle == 0] == 0).all()
    often = expected >= 5  # the approximation of the test does not hold for rarer ones
    assert counts[~often].sum() <= expected[~often].sum() + 5 * expected[~often].sum() ** 0.5
    if often.sum() > 1:
        observed, wanted = counts[often], expected[often]
        assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize("sampling, low, high", [("focal", 0.5, 1.0), ("distance", 0.0, 1.4)])
@pytest.mark.parametrize("dim", [3, 300])
def test_sampled_negatives_are_of_another_class_and_within_the_band(sampling, low, high, dim):
    labels = torch.randint(4, (96,))
    space = torch.randn(96, dim) * 0.6 + torch.randn(dim)  # a common part brings the rows near each other
    distance = relation.pairwise_distance(space)
    other = labels[:, None] != labels[None, :]
    filled = (other & (distance > low) & (distance < high)).any(1)
    assert filled.float().mean() > 0.9
    for _ in range(10):
        drawn = relation.draw_negatives(space, labels, sampling)
        assert (labels[drawn] != labels[:, None]).all()
        r = distance.gather(1, drawn)[filled]
        assert (r > low).all() and (r < high).all()


@pytest.mark.parametrize("sampling", ["focal", "distance"])
def test_an_empty_band_samples_uniformly_from_the_other_classes(sampling):
    space = torch.tensor([[1.0, 0.0]] * 3 + [[-1.0, 0.0]] * 4)  # every other class at r = 2
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    distance = relation.pairwise_distance(space)
    row = relation.negative_probabilities(distance, labels, 2, sampling)[0]
    torch.testing.assert_close(row, torch.tensor([0, 0, 0, 0.25, 0.25, 0.25, 0.25]))
    drawn = torch.stack([relation.draw_negatives(space, labels, sampling)[0] for _ in range(30)])
    assert drawn.unique().tolist() == [3, 4, 5, 6]


def test_dimension_of_the_space_is_that_of_the_pooled_rows():
    maps, labels = torch.randn(30, 50, 2, 2) + 1.0, torch.arange(30) % 3
    torch.manual_seed(1)
    from_maps = relation.draw_negatives(maps, labels, "distance")
    torch.manual_seed(1)
    assert torch.equal(from_maps, relation.draw_negatives(maps.mean((2, 3)), labels, "distance"))


# ---------------------------------------------------------------- degenerate batches

ROW = [1.0, 2.0, -1.0]
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


DEGENERATE = {
    "one class": (normal(6, 3), [1] * 6, 0.0),
    "all different": (normal(5, 3), [0, 1, 2, 3, 4], 0.0),
    "one image": (normal(1, 3), [0], 0.0),
    "one image each of two classes": (normal(2, 3), [0, 1], 0.0),
    "duplicates": (torch.tensor([ROW] * 6), [0, 0, 0, 1, 1, 2], 0.2),
    "duplicates without rounding": (torch.eye(3)[[0] * 6], [0, 0, 0, 1, 1, 2], 0.2),
    "near duplicates": (torch.tensor([ROW] * 6) + 1e-5 * normal(6, 3), [0, 0, 0, 1, 1, 2], None),
    "antipodal": (torch.tensor([ROW] * 3) * torch.tensor([[1.0], [-1.0], [1.0]]), [0, 1, 0], None),
    "antipodal positives": (torch.tensor([ROW] * 3) * torch.tensor([[1.0], [1.0], [-1.0]]), [0, 1, 0], None),
    "two classes, one alone": (normal(5, 3), [0, 0, 0, 0, 1], None),
    "one dimension": (normal(6, 1), [0, 0, 1, 1, 2, 2], None),
    "huge": (normal(6, 3) * 1e15, [0, 0, 1, 1, 2, 2], None),
    "tiny": (normal(6, 3) * 1e-6, [0, 0, 1, 1, 2, 2], None),
}


@DIRECTIONS
@SAMPLINGS
@pytest.mark.parametrize("case", DEGENERATE)
def test_every_batch_has_a_finite_loss_and_gradient(case, sampling, direction):
    features, labels, expected = DEGENERATE[case]
    features, labels = features.clone().requires_grad_(), torch.tensor(labels)
    loss = relation.relation_loss([features], labels, features.detach(), 0.2, sampling, direction)
    loss.backward()
    assert loss.isfinite() and 0 <= loss <= 2.2
    # The gradient of a distance of unit rows is at most 1, so that of the loss in a row of norm s is a few 1 / s.
    assert (features.grad.norm(dim=1) * features.detach().norm(dim=1)).max() < 4
    if expected is not None:
        assert loss.item() == pytest.approx(expected, abs=1e-3)
    if expected == 0:
        assert (features.grad == 0).all()


@DIRECTIONS
def test_a_row_of_zeros_keeps_loss_and_gradient_finite(direction):
    features = torch.randn(6, 3)
    features[2] = 0
    features.requires_grad_()
    labels = torch.arange(6) % 2
    loss = relation.relation_loss([features], labels, features.detach(), 0.2, "distance", direction)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()


def test_nan_is_not_hidden():
    features, labels, negatives = batch()
    features[3, 1] = torch.nan
    assert relation.triplet_loss(features, labels, negatives, 0.2, SEPARATE).isnan()
    relation.draw_negatives(features, labels, "distance")  # samples something: the loss shows the trouble


def test_negative_sampling_leaves_no_gradient_in_its_space():
    features, labels, _ = batch()
    space = torch.randn(14, 6, requires_grad=True)
    features.requires_grad_()
    relation.relation_loss([features], labels, space, 0.2, "distance", SEPARATE).backward()
    assert space.grad is None and features.grad is not None


def test_draws_follow_the_probabilities_and_never_one_of_0():
    torch.manual_seed(0)
    probabilities = torch.tensor([[0.0, 0.5, 0.2, 0.0, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    drawn = relation.draw(probabilities, 20000)
    counts = torch.stack([torch.bincount(row, minlength=6) for row in drawn])
    assert (counts[probabilities == 0] == 0).all()
    expected = probabilities * 20000
    assert ((counts - expected)[0, [1, 2, 4]].abs() < 4 * expected[0, [1, 2, 4]].sqrt()).all()
