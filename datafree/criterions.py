"""Every loss term except the triplet losses, as a function of tensors. All give an unweighted scalar in fp32."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datafree.batchnorm import LayerStatistics
from datafree.errors import InputError
from datafree.features import FeatureTap, pooled
from datafree.runtime import autocast


def kl_divergence(logits: Tensor, target_logits: Tensor, T: float = 1.0) -> Tensor:
    """KL(softmax(target / T) || softmax(logits / T)) per sample, (N, C) twice -> (N,)."""
    log_p = F.log_softmax(target_logits.float() / T, dim=1)
    log_q = F.log_softmax(logits.float() / T, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def distillation(student_logits: Tensor, teacher_logits: Tensor, T: float) -> Tensor:
    """Batch mean of the KL divergence at temperature T, times T^2 (Hinton et al. 2015)."""
    return kl_divergence(student_logits, teacher_logits, T).mean() * T**2


def js_divergence(logits: Tensor, target_logits: Tensor, T: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence of the softmaxes at temperature T per sample, (N, C) twice -> (N,), in [0, ln 2]."""
    log_p, log_q = (F.log_softmax(x.float() / T, dim=1) for x in (target_logits, logits))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1)


def l1_distance(logits: Tensor, target_logits: Tensor, T: float = 1.0) -> Tensor:
    """Mean absolute difference of the logits per sample, (N, C) twice -> (N,); T has no effect (DFAD)."""
    return (target_logits.float() - logits.float()).abs().mean(1)


DISTANCES = {"kl": kl_divergence, "js": js_divergence, "l1": l1_distance}


def adversarial(
    student_logits: Tensor, teacher_logits: Tensor, distance: str = "kl", T: float = 1.0, where: str = "agree"
) -> Tensor:
    """L_adv: minus a distance of the logits.

    distance: ``kl`` (RGAL, CMI, ZSKT), ``js`` (ADI), ``l1`` (DFAD). where: ``agree``, only images for which
    teacher and student predict the same class, others count as 0 (RGAL, CMI), or ``all``.
    """
    apart = DISTANCES[distance](student_logits, teacher_logits, T)
    if where == "agree":
        apart = apart * (teacher_logits.argmax(1) == student_logits.argmax(1))
    return -apart.mean()


def bn_distance(statistics: Sequence[LayerStatistics], reduction: str) -> Tensor:
    """L_bn: distance of the batch statistics to the running ones, summed or averaged over layers.

    reduction: ``norm`` sums ||var - running|| + ||mean - running|| over layers (DeepInversion, CMI,
    RGAL); ``mse`` averages the mean squares over layers (GDFQ); ``gaussian`` averages, over channels
    and layers, the KL divergence of the batch's Gaussian from the running one (ABD).
    """
    layers = []
    for mean, var, running_mean, running_var in statistics:
        if reduction == "norm":
            layers.append(torch.linalg.vector_norm(var - running_var) + torch.linalg.vector_norm(mean - running_mean))
        elif reduction == "mse":
            layers.append(F.mse_loss(mean, running_mean) + F.mse_loss(var, running_var))
        else:
            var, running_var = var + 1e-8, running_var + 1e-8
            ratio = var / running_var
            layers.append(0.5 * (ratio - ratio.log() - 1 + (mean - running_mean) ** 2 / running_var).mean())
    total = torch.stack(layers).sum()
    return total if reduction == "norm" else total / len(layers)


def one_hot(teacher_logits: Tensor, targets: Tensor, T: float = 1.0) -> Tensor:
    """L_oh: cross-entropy of the teacher, at temperature T, with the target classes."""
    return F.cross_entropy(teacher_logits.float() / T, targets)


def activation(embed: Tensor) -> Tensor:
    """L_act: minus the mean absolute embedding (DAFL)."""
    return -embed.float().abs().mean()


def balance(teacher_logits: Tensor) -> Tensor:
    """L_bal: negative entropy of the batch's mean softmax; lowest when all classes occur equally (DAFL)."""
    mean = teacher_logits.float().softmax(1).mean(0)
    return (mean * mean.clamp_min(1e-12).log()).sum()


def total_variation(images: Tensor) -> Tensor:
    """L_tv: sum over 4 directions of the norm of neighbour differences (DeepInversion)."""
    right = images[:, :, :, 1:] - images[:, :, :, :-1]
    down = images[:, :, 1:, :] - images[:, :, :-1, :]
    diagonal = images[:, :, 1:, 1:] - images[:, :, :-1, :-1]
    other = images[:, :, 1:, :-1] - images[:, :, :-1, 1:]
    return sum(torch.linalg.vector_norm(d.float()) for d in (right, down, diagonal, other))


def l2_norm(images: Tensor) -> Tensor:
    """L_l2: the L2 norm of the batch (DeepInversion)."""
    return torch.linalg.vector_norm(images.float())


class StageProjection(nn.Module):
    """Learned 1x1 convolutions from the student's stages to the widths of the teacher's.

    Stages of the same spatial size are paired; if no sizes agree, from the last stage backwards. So
    networks with different numbers of stages can be combined.

    terms: the options whose losses use it, for the InputError of a network without stages.
    """

    def __init__(self, student: FeatureTap, teacher: FeatureTap, terms: Sequence[str] = ("cd_loss", "gram_loss")):
        super().__init__()
        self.pairs = pair_stages(student.stage_sizes, teacher.stage_sizes, terms)
        self.project = nn.ModuleList(
            nn.Linear(student.stage_channels[s], teacher.stage_channels[t]) for s, t in self.pairs
        )

    def channel(self, student_pooled: Sequence[Tensor], teacher_pooled: Sequence[Tensor]) -> Tensor:
        """L_cd: sum over stages of mse(GAP(conv1x1(S)), GAP(T)); averaging commutes with the projection."""
        with autocast(teacher_pooled[-1].device, "none"):
            terms = [
                F.mse_loss(project(pooled(student_pooled[s]).float()), teacher_pooled[t].float())
                for project, (s, t) in zip(self.project, self.pairs)
            ]
        return sum(terms)  # type: ignore[return-value]

    def gram(self, student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor]) -> Tensor:
        """L_gram: per-pixel mse, each channel weighted by how little it correlates with the others.

        weight_c = 1 - minmax_c(sum over columns of T's channel Gram matrix) + 1e-3, per image.
        """
        with autocast(teacher_stages[-1].device, "none"):
            terms = [
                self._gram(project, student_stages[s].float(), teacher_stages[t].float())
                for project, (s, t) in zip(self.project, self.pairs)
            ]
        return sum(terms)  # type: ignore[return-value]

    @staticmethod
    def _gram(project: Any, stage: Tensor, target: Tensor) -> Tensor:
        mapped = F.conv2d(stage, project.weight[:, :, None, None], project.bias)
        mapped = resized(mapped, target.shape[2:])
        return (gram_weights(target)[:, :, None, None] * (mapped - target) ** 2).mean()


def attention(
    student_stages: Sequence[Tensor], teacher_stages: Sequence[Tensor], pairs: Sequence[tuple[int, int]]
) -> Tensor:
    """L_at: mse of the normalised attention maps, summed over stages (Zagoruyko and Komodakis 2017, as in ZSKT).

    An attention map is a stage's mean square over channels, (N, C, H, W) -> (N, H W), of norm 1.
    """
    terms = [
        F.mse_loss(
            _attention_map(student_stages[s], teacher_stages[t].shape[2:]),
            _attention_map(teacher_stages[t], teacher_stages[t].shape[2:]),
        )
        for s, t in pairs
    ]
    return sum(terms)  # type: ignore[return-value]


def _attention_map(stage: Tensor, size: torch.Size) -> Tensor:
    squares = stage.float().square().mean(1, keepdim=True)
    return F.normalize(resized(squares, size).flatten(1))


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Adaptive average pooling of maps (N, C, H, W) in fp32 to ``size``; its own backward pass differs from run to run
    on a GPU, that of two matrix products does not."""
    if maps.shape[2:] == tuple(size):
        return maps
    rows, columns = (_averages(old, new, maps.device) for old, new in zip(maps.shape[2:], size))
    with autocast(maps.device, "none"):
        return rows @ maps @ columns.T


def _averages(old: int, new: int, device: torch.device) -> Tensor:
    """(new, old): row i averages the places from i old / new to (i + 1) old / new, those cut there included."""
    i, place = torch.arange(new, device=device)[:, None], torch.arange(old, device=device)
    inside = (place >= i * old // new) & (place < -(-(i + 1) * old // new))
    return inside / inside.sum(1, keepdim=True)


def pair_stages(
    student_sizes: Sequence[Sequence[int]], teacher_sizes: Sequence[Sequence[int]], terms: Sequence[str]
) -> list[tuple[int, int]]:
    """Index pairs (student stage, teacher stage): those of equal size, else from the last one backwards.

    terms: the options whose losses compare them, for the InputError of a network without stages.
    """
    for role, sizes in (("student", student_sizes), ("teacher", teacher_sizes)):
        if not sizes:
            remedy = " and ".join(f"--{term} 0" for term in terms)
            raise InputError(f"the {role} has no stages of feature maps to compare; set {remedy}")
    equal = [(s, teacher_sizes.index(size)) for s, size in enumerate(student_sizes) if size in teacher_sizes]
    count = min(len(student_sizes), len(teacher_sizes))
    return equal or [(len(student_sizes) - i, len(teacher_sizes) - i) for i in range(count, 0, -1)]


def gram_weights(stage: Tensor) -> Tensor:
    """Channel weights (N, C) in [1e-3, 1 + 1e-3] of a stage (N, C, H, W), from its Gram matrix's row sums."""
    flat = stage.flatten(2)
    # The row sums of flat @ flat^T, without the C x C matrix.
    rows = (flat * flat.sum(1, keepdim=True)).sum(2)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return 1 - (rows - low) / (high - low).clamp_min(1e-12) + 1e-3


def info_nce(local: Tensor, anchor: Tensor, bank: Tensor, T: float) -> Tensor:
    """L_cr: every local view must match its own global view among those of the batch and earlier instances (CMI).

    local, anchor: (N, D); bank: (K, D). All L2-normalised here. T: temperature.
    """
    local, anchor, bank = (F.normalize(x.float(), dim=1) for x in (local, anchor, bank))
    with autocast(local.device, "none"):
        similarity = local @ torch.cat([anchor, bank]).T / T
    return F.cross_entropy(similarity, torch.arange(len(local), device=local.device))


def angle_distance(embed: Tensor, target_embed: Tensor) -> Tensor:
    """L_rkd: mean absolute difference of the cosines of all angles among three rows, (N, D) and (N, E).

    The angle at row j between the directions to rows i and k (Park et al. 2019, with L1 as in R-DFCIL).
    """
    with autocast(embed.device, "none"):
        return (_cosines(embed.float()) - _cosines(target_embed.float())).abs().mean()


def _cosines(rows: Tensor) -> Tensor:
    """(N, N, N): at [j, i, k] the cosine of the angle at row j between rows i and k; 0 where i or k is j."""
    directions = F.normalize(rows[None] - rows[:, None], dim=2)
    return directions @ directions.transpose(1, 2)
