"""RGAL's relation losses: negative sampling and the triplet loss.

One triplet loss with a sign. Separating (the student) pulls a class together and pushes the
others away; confusing (synthesis) does the opposite, which spreads a class and mixes it with its
neighbours (Liang and Fu 2024). Everything is B x B with fixed shapes and has no host sync, and
every batch has a defined result: without any triplet it is zero.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from datafree.config import Relation
from datafree.features import Features, pooled
from datafree.runtime import autocast

SEPARATE, CONFUSE = 1, -1
RELEASED_STAGES = 4  # of the released code's largest networks
FOCAL_BAND = (0.5, 1.0)
DISTANCE_CUTOFF = (0.5, 1.4)
SPACES = {"embedding": "embed", "logits": "logits"}  # sampling_space -> field of the Features


def pairwise_distance(features: Tensor) -> Tensor:
    """Euclidean distances (B, B) in fp32 of L2-normalised rows; maps are average-pooled first."""
    rows = F.normalize(pooled(features).float(), dim=1)
    with autocast(rows.device, "none"):  # half precision would blur small distances
        squared = 2 - 2 * rows @ rows.T
    # The clamp stops the gradient of the root at coinciding rows, where it has none.
    return squared.clamp_min(1e-12).sqrt()


def log_inverse_density(distance: Tensor, dim: float | Tensor) -> Tensor:
    """log w(r) = (2 - d) ln r - (d - 3)/2 ln(1 - r^2/4), inverse density on the sphere (Wu et al. 2017).

    Of w(r) ~ r^(2 - d) the nearest candidate takes almost all where d is large: see :func:`sampling_dimension`.
    """
    tail = (1 - distance**2 / 4).clamp_min(1e-8)
    return (2 - dim) * distance.log() - (dim - 3) / 2 * tail.log()


def sampling_dimension(distance: Tensor, nominal: int, dim: str) -> float | Tensor:
    """The d of :func:`log_inverse_density`: ``nominal``, that of the space; ``intrinsic``, estimated; or a number.

    Features of d nominal dimensions lie near a manifold of far fewer, whose density is what has to be inverted.
    """
    if dim == "intrinsic":
        return intrinsic_dimension(distance)
    return nominal if dim == "nominal" else float(dim)


def intrinsic_dimension(distance: Tensor, neighbours: int = 10) -> Tensor:
    """Maximum likelihood estimate from the distances (B, B) of a batch to its nearest neighbours.

    Levina and Bickel 2004, with the inverses averaged as MacKay and Ghahramani 2005 correct it. 3, the dimension in
    which w(r) = 1 / r, for fewer than three rows.
    """
    k = min(neighbours, len(distance) - 1)
    if k < 2:
        return torch.full((), 3.0, device=distance.device)
    nearest = distance.topk(k + 1, largest=False).values[:, 1:]  # without the row itself
    return 1 / (nearest[:, -1:] / nearest[:, :-1]).log().mean().clamp_min(1e-6)


def negative_probabilities(
    distance: Tensor, labels: Tensor, dim: float | Tensor, sampling: str, cap: float | None = None
) -> Tensor:
    """Row-wise probabilities (B, B) of sampling each image as an anchor's negative, an image of another class.

    ``focal``: inverse density within 0.5 < r < 1.0 only. ``distance``: r clamped to 0.5, kept where
    r < 1.4. ``uniform``: uniformly. An anchor whose band is empty samples uniformly from the other classes;
    one without other classes gets an arbitrary row, which no triplet uses. cap: the largest weight, as a multiple of
    the median weight of the anchor's candidates (lambda in Wu et al. 2017 limits it, too).
    """
    other = labels[:, None] != labels[None, :]
    if sampling == "uniform":
        log_weight, band = torch.zeros_like(distance), other
    elif sampling == "focal":
        low, high = FOCAL_BAND
        band = other & (distance > low) & (distance < high)
        log_weight = log_inverse_density(distance.clamp(low, high), dim)
    else:
        low, high = DISTANCE_CUTOFF
        band = other & (distance < high)
        log_weight = log_inverse_density(distance.clamp(low, high), dim)
    # Masking before the softmax keeps its maximum inside the band, so nothing underflows at any dimension.
    log_weight = log_weight.masked_fill(~band, -math.inf)
    if cap is not None:
        log_weight = log_weight.minimum(_row_median(log_weight, band) + math.log(cap))
    weights = log_weight.softmax(1)
    even = other.float() / other.sum(1, keepdim=True).clamp_min(1)
    weights = torch.where(band.any(1, keepdim=True), weights, even)
    return torch.where(other.any(1, keepdim=True), weights, torch.ones_like(weights))


def _row_median(values: Tensor, mask: Tensor) -> Tensor:
    """(B, 1): the lower median of the masked values of each row, of which the others are -inf."""
    middle = values.shape[1] - 1 - mask.sum(1, keepdim=True).clamp_min(1) // 2
    return values.sort(1).values.gather(1, middle)


@torch.no_grad()
def sampling_probabilities(
    space: Tensor, labels: Tensor, sampling: str, dim: str = "nominal", cap: float | None = None
) -> Tensor:
    """:func:`negative_probabilities` (B, B) by the distances of the rows of ``space`` (B, d)."""
    distance = pairwise_distance(space)
    d = sampling_dimension(distance, pooled(space).shape[1], dim)
    return negative_probabilities(distance, labels, d, sampling, cap)


def effective_candidates(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean over anchors with a negative of exp(entropy): as many equally likely candidates have this entropy."""
    counted = (labels[:, None] != labels[None, :]).any(1)
    numbers = torch.special.entr(probabilities).sum(1).exp()
    return (numbers * counted).sum() / counted.sum().clamp_min(1)


def draw_negatives(
    space: Tensor, labels: Tensor, sampling: str, dim: str = "nominal", cap: float | None = None
) -> Tensor:
    """For every anchor a and positive p, the index (B, B) of a sampled negative, of another class than a.

    space: (B, d), whose distances weight the sampling. labels: (B,). dim, cap: of the weights.
    """
    return draw(sampling_probabilities(space, labels, sampling, dim, cap), len(labels))


def draw(probabilities: Tensor, count: int) -> Tensor:
    """``count`` indices (B, count) for every row of ``probabilities`` (B, N), with replacement.

    By inversion of the cumulative sum in integers: exact, so that nothing of probability 0 is drawn, and
    reproducible on a GPU, where the sum of floats inside torch.multinomial is not.
    """
    heights = (probabilities.double() * 2**40).long().cumsum(1)
    points = torch.rand(len(heights), count, dtype=torch.float64, device=heights.device) * heights[:, -1:]
    return torch.searchsorted(heights, points.long(), right=True)


def triplet_loss(features: Tensor, labels: Tensor, negatives: Tensor, margin: float, direction: int) -> Tensor:
    """Mean over triplets of max(0, direction * (||f_a - f_p|| - ||f_a - f_q||) + margin).

    Triplets are all ordered pairs (a, p) of one label, with q = negatives[a, p]. features: (B, d) or
    (B, d, H, W), pooled and L2-normalised here. direction: SEPARATE or CONFUSE.
    """
    distance = pairwise_distance(features)
    gap = distance - distance.gather(1, negatives)
    valid = triplet_mask(labels)
    hinge = F.relu(direction * gap + margin).masked_fill(~valid, 0.0)
    return hinge.sum() / valid.sum().clamp_min(1)


def triplet_mask(labels: Tensor) -> Tensor:
    """(B, B) bool: a and p differ, share a label, and a has a sample of another label."""
    same = labels[:, None] == labels[None, :]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device) & ~same.all(1, keepdim=True)


def relation_loss(
    layers: Sequence[Tensor],
    labels: Tensor,
    space: Tensor,
    margin: float,
    sampling: str,
    direction: int,
    *,
    dim: str = "nominal",
    cap: float | None = None,
) -> Tensor:
    """The triplet loss summed over ``layers``, with the same sampled negatives for all of them.

    sampling: focal, distance or uniform. dim, cap: of its weights.
    """
    negatives = draw_negatives(space, labels, sampling, dim, cap)
    losses = [triplet_loss(layer, labels, negatives, margin, direction) for layer in layers]
    return sum(losses)  # type: ignore[return-value]


def triplet_layers(features: Features, triplets: Relation) -> list[Tensor]:
    """The chosen stages of a network's Features, pooled, or the embedding if it has no stages."""
    return [features.pooled[i] for i in triplet_stages(len(features.pooled), triplets)] or [features.embed]


def triplet_stages(count: int, triplets: Relation) -> range:
    """Indices of the stages start_layer:end_layer out of ``count``; of the last one if these are none.

    They are counted among the last four, because the networks of the released code have at most four: 2:4 are the last
    two of four and of five. Negative ones are counted from the end.
    """
    stages, first = range(count), max(0, count - RELEASED_STAGES)
    start, end = (i + first if i >= 0 else i for i in (triplets.start_layer, triplets.end_layer))
    return stages[start:end] or stages[-1:]
