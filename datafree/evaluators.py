"""Accuracy of a network on a split of a data set."""

import torch
import torch.nn.functional as F

from datafree.errors import InputError


@torch.no_grad()
def evaluate(network, split, batch_size=500, name="network"):
    """``acc1`` and ``acc5`` (%) and ``loss`` (mean cross entropy) of ``network`` over ``split``.

    ``network(images)`` takes images in [0, 1] and returns logits (N, classes); its train or eval mode is the
    caller's. With fewer than five classes acc5 counts them all. Everything is summed on the device and read
    once. Raises InputError, with ``name``, for another number of classes and for logits that are not finite.
    """
    sums = 0
    for images, labels in split.batches(batch_size):
        logits = network(images).float()
        if logits.shape != (len(labels), split.num_classes):
            raise InputError(
                f"the {name} gave logits of shape {tuple(logits.shape)} for {len(labels)} "
                f"images of {split.num_classes} classes; check its class count"
            )
        sums = sums + _sums(logits, labels)
    top1, top5, loss, broken = sums.tolist()
    if broken:
        raise InputError(
            f"the {name} gave non-finite logits for {broken:.0f} of {len(split)} images; "
            "check its weights and its input mean and std"
        )
    return {"acc1": 100 * top1 / len(split), "acc5": 100 * top5 / len(split), "loss": loss / len(split)}


def scores_line(scores: dict[str, float]) -> str:
    """Test scores as the log shows them."""
    return f"Acc@1={scores['acc1']:.4f} Acc@5={scores['acc5']:.4f} Loss={scores['loss']:.4f}"


def _sums(logits, labels):
    """Images right at the first and among five answers, summed loss, images with non-finite logits."""
    answers = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = answers == labels.unsqueeze(1)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    broken = ~logits.isfinite().all(dim=1)
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, broken.sum()]).double()
