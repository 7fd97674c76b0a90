"""What the synthetic images look like to teacher and student, once an epoch, and when to worry."""

import math
from typing import Any

import torch
from torch import Tensor

from datafree.config import Relation
from datafree.network import Network
from datafree.relation import FOCAL_BAND, SPACES, effective_candidates, pairwise_distance, sampling_probabilities
from datafree.synthesis.base import BaseSynthesis

PLAIN = Relation()
NEAR_DUPLICATE = 0.02  # root mean square difference of two images in [0, 1]


class Watch:
    """Called once per epoch -> (metrics of the source's latest images, warnings)."""

    def __init__(
        self, source: BaseSynthesis, teacher: Network, student: Network, triplets: Relation, adversarial: bool = True
    ):
        self.source, self.teacher, self.student, self.adversarial = source, teacher, student, adversarial
        self.triplets = triplets if triplets.triplet or triplets.striplet else Relation()
        self.first: dict[str, float] | None = None

    def __call__(self) -> tuple[dict[str, float], list[str]]:
        now = describe(*self.source.latest(), self.teacher, self.student, self.triplets)
        self.first = self.first or now
        return now, alarms(now, self.first, self.adversarial) if self.source.traits.synthesises else []

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the run's first epoch, with which the later ones are compared."""
        return {"first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the first epoch of the run that ``state`` is of."""
        first = state["first"]
        if first is not None and not all(isinstance(value, float | int) for value in first.values()):
            raise ValueError("the metrics of its first epoch are no numbers")
        if first is not None and "pixel_distance" not in first:  # with which later ones are compared
            raise ValueError("the metrics of its first epoch are incomplete")
        self.first = first


@torch.no_grad()
def describe(
    images: Tensor, targets: Tensor | None, teacher: Network, student: Network, triplets: Relation = PLAIN
) -> dict[str, float]:
    """Metrics of a batch of images (N, C, H, W) in [0, 1]; all but classes_hit are fractions or distances.

    targets: target classes (N,), or None. triplets: how synthesis samples negatives.
    Distances are between L2-normalised teacher embeddings.
    """
    with student.frozen():
        features, student_labels = teacher.features(images, with_maps=False), student(images).argmax(1)
    labels, count = features.logits.argmax(1), len(images)
    share = torch.bincount(labels, minlength=teacher.num_classes) / count
    entropy = torch.special.entr(share).sum()
    highest = math.log(min(teacher.num_classes, count))
    metrics = {
        "label_entropy": entropy / highest if highest else torch.ones(()),  # one image cannot spread
        "classes_hit": (share > 0).sum(),
        "teacher_confidence": features.logits.float().softmax(1).amax(1).mean(),
        "student_agreement": (labels == student_labels).float().mean(),
        **_relations(features.embed, getattr(features, SPACES[triplets.sampling_space]), labels, triplets),
        **_pixels(images),
    }
    if targets is not None:
        metrics["target_agreement"] = (labels == targets).float().mean()
    return {name: value.item() for name, value in metrics.items()}


def _relations(embed: Tensor, space: Tensor, labels: Tensor, triplets: Relation) -> dict[str, Tensor]:
    """Spread of the classes, fractions of anchors with a positive and with a negative in the focal band, candidates."""
    other = labels[:, None] != labels[None, :]
    same = ~other & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    distance, sampled = pairwise_distance(embed), pairwise_distance(space)
    in_band = other & (sampled > FOCAL_BAND[0]) & (sampled < FOCAL_BAND[1])
    nearest = distance.masked_fill(~other, math.inf).amin(1)
    found = nearest.isfinite()
    return {
        "distance_within_class": (distance * same).sum() / same.sum().clamp_min(1),
        "distance_to_other_class": torch.where(found, nearest, 0.0).sum() / found.sum().clamp_min(1),
        "anchors_with_positive": same.any(1).float().mean(),
        "anchors_with_negative_in_band": in_band.any(1).float().mean(),
        "effective_candidates": effective_candidates(
            sampling_probabilities(space, labels, triplets.sampling, triplets.sampling_dim, triplets.sampling_cap),
            labels,
        ),
    }


def _pixels(images: Tensor) -> dict[str, Tensor]:
    """How different the images are: mean and nearest root mean square distance of their pixels."""
    flat = images.float().flatten(1)
    rms = torch.cdist(flat, flat) / math.sqrt(flat.shape[1])
    apart = rms + torch.eye(len(flat), device=flat.device) * 1e9
    return {
        "pixel_distance": rms.sum() / max(len(flat) * (len(flat) - 1), 1),
        "near_duplicates": (apart.amin(1) < NEAR_DUPLICATE).float().mean(),
    }


def alarms(now: dict[str, float], first: dict[str, float], adversarial: bool = True) -> list[str]:
    """Warnings about metrics of :func:`describe` that indicate a collapse: observation, cause, remedy.

    A remedy is named if it was seen to help (docs/reports.md). first: the metrics of the run's first epoch.
    adversarial: whether --adv has a weight, which may be too high.
    """
    found = []
    lower, has_targets = "lower --lr_g" + " or --adv" * adversarial, "target_agreement" in now
    if now["label_entropy"] < 0.5:
        remedy = f"{lower}, or raise --oh or --g_steps" if has_targets else "raise --balance"
        found.append(
            f"the teacher sees few classes in the images (label entropy {now['label_entropy']:.2f} of 1): "
            f"generator collapse is likely; {remedy}"
        )
    agreement = now.get("target_agreement", 1.0)
    if agreement < 0.3 and agreement <= first.get("target_agreement", 1.0):
        found.append(
            f"the teacher agrees with only {agreement:.0%} of the target classes: "
            f"synthesis is too short or other terms dominate; {lower}, or raise --oh or --g_steps"
        )
    if now["pixel_distance"] < 0.5 * first["pixel_distance"]:
        found.append(
            "the images are half as diverse as in the first epoch (pixel distance "
            f"{now['pixel_distance']:.3f} after {first['pixel_distance']:.3f}): mode collapse; {lower}"
        )
    if now["near_duplicates"] > 0.2:
        found.append(
            f"{now['near_duplicates']:.0%} of the images are near-duplicates: the generator ignores its latents; "
            "lower --lr_g, or raise --oh"
        )
    chance = 1 / now["classes_hit"]
    if now["student_agreement"] < min(1.5 * chance, chance + 0.05) and now["classes_hit"] > 1:
        cause = "it is not learning or --adv is too strong; check --lr and --adv"
        found.append(
            f"the student agrees with the teacher on {now['student_agreement']:.0%} of the new images, about chance: "
            + (cause if adversarial else "it is not learning; check --lr")
        )
    return found
