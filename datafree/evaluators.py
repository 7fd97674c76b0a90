"""Accuracy of a network on a split of a data set."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datafree.datasets.splits import Split
from datafree.errors import InputError

OF_BROKEN_WEIGHTS = "check its weights and its input mean and std"
TOP = 5  # the classes among which acc5 wants the right one
SHOWN = {"acc1": "Acc@1", "acc5": "Acc@5", "loss": "Loss", "agreement": "Agreement"}  # score -> its name in the log


@torch.no_grad()
def evaluate(
    network: Callable[[Tensor], Tensor],
    split: Split,
    batch_size: int = 500,
    name: str = "network",
    remedy: str = OF_BROKEN_WEIGHTS,
    tick: Callable[[], Any] = lambda: None,
) -> dict[str, float]:
    """``acc1`` and ``acc5`` (%) and ``loss`` (mean cross entropy) of ``network`` on ``split``.

    Without acc5 if there are at most five classes, of which it would always be 100 %.

    network: images (N, C, H, W) in [0, 1] -> logits (N, classes); the caller sets its train or eval mode. name: what
    error messages call it. remedy: what they say of logits that are not finite. tick: called before each batch; it may
    end the evaluation by an exception. Sums stay on the device and are read once. Raises InputError for another number
    of classes and for logits that are not finite.
    """
    sums: Tensor | int = 0
    for images, labels in split.batches(batch_size):
        tick()
        logits = network(images).float()
        if logits.shape != (len(labels), split.num_classes):
            raise InputError(
                f"the {name} gave logits of shape {tuple(logits.shape)} for {len(labels)} "
                f"images of {split.num_classes} classes; check its class count"
            )
        sums = sums + _sums(logits, labels)
    top1, top5, loss, broken = sums.tolist()  # type: ignore[union-attr]
    if broken:
        raise InputError(f"the {name} gave non-finite logits for {broken:.0f} of {len(split)} images; {remedy}")
    accuracy = {"acc1": 100 * top1 / len(split)}
    if split.num_classes > TOP:
        accuracy["acc5"] = 100 * top5 / len(split)
    return {**accuracy, "loss": loss / len(split)}


def scores_line(scores: dict[str, float]) -> str:
    """The result of :func:`evaluate` as one line of the log."""
    return " ".join(f"{shown}={scores[name]:.4f}" for name, shown in SHOWN.items() if name in scores)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch, float64 (4,): top-1 hits, top-5 hits, cross entropy, images with non-finite logits."""
    predictions = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    hits = predictions == labels.unsqueeze(1)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    broken = ~logits.isfinite().all(dim=1)
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, broken.sum()]).double()
