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


def log_inverse_density(distance: Tensor, dim: int) -> Tensor:
    """log w(r) = (2 - d) ln r - (d - 3)/2 ln(1 - r^2/4), inverse density on the sphere (Wu et al. 2017)."""
    tail = (1 - distance**2 / 4).clamp_min(1e-8)
    return (2 - dim) * distance.log() - (dim - 3) / 2 * tail.log()


def negative_probabilities(distance: Tensor, labels: Tensor, dim: int, sampling: str) -> Tensor:
    """Row-wise probabilities (B, B) of sampling each image as an anchor's negative, an image of another class.

    ``focal``: inverse density within 0.5 < r < 1.0 only. ``distance``: r clamped to 0.5, kept where
    r < 1.4. ``uniform``: uniformly. An anchor whose band is empty samples uniformly from the other classes;
    one without other classes gets an arbitrary row, which no triplet uses.
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
    weights = log_weight.masked_fill(~band, -math.inf).softmax(1)
    even = other.float() / other.sum(1, keepdim=True).clamp_min(1)
    weights = torch.where(band.any(1, keepdim=True), weights, even)
    return torch.where(other.any(1, keepdim=True), weights, torch.ones_like(weights))


@torch.no_grad()
def draw_negatives(space: Tensor, labels: Tensor, sampling: str) -> Tensor:
    """For every anchor a and positive p, the index (B, B) of a sampled negative, of another class than a.

    space: (B, d), whose distances weight the sampling. labels: (B,).
    """
    distance = pairwise_distance(space)
    probabilities = negative_probabilities(distance, labels, pooled(space).shape[1], sampling)
    return draw(probabilities, len(labels))


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
    layers: Sequence[Tensor], labels: Tensor, space: Tensor, margin: float, sampling: str, direction: int
) -> Tensor:
    """The triplet loss summed over ``layers``, with the same sampled negatives for all of them."""
    negatives = draw_negatives(space, labels, sampling)
    losses = [triplet_loss(layer, labels, negatives, margin, direction) for layer in layers]
    return sum(losses)  # type: ignore[return-value]


def triplet_layers(features: Features, triplets: Relation) -> list[Tensor]:
    """The chosen stages of a network's Features, or the embedding if it has no stages."""
    return [features.stages[i] for i in triplet_stages(len(features.stages), triplets)] or [features.embed]


def triplet_stages(count: int, triplets: Relation) -> range:
    """Indices of the stages start_layer:end_layer out of ``count``; of the last one if these are none.

    They are counted among the last four, because the networks of the released code have at most four: 2:4 are the last
    two of four and of five. Negative ones are counted from the end.
    """
    stages, first = range(count), max(0, count - RELEASED_STAGES)
    start, end = (i + first if i >= 0 else i for i in (triplets.start_layer, triplets.end_layer))
    return stages[start:end] or stages[-1:]
