"""What every program needs before its training: device, data card, splits, networks."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from datafree import checkpoint, distributed
from datafree.augment import CropFlip
from datafree.batchnorm import is_batch_independent
from datafree.cli import to_yaml
from datafree.config import Data
from datafree.datasets.loading import load_split, resolve_card
from datafree.datasets.splits import Split
from datafree.errors import InputError, out_of_memory_in, printable
from datafree.evaluators import OF_BROKEN_WEIGHTS, evaluate, scores_line
from datafree.models.factory import check_model
from datafree.network import Network
from datafree.plan import check_order, describe_normalisation, describe_notes
from datafree.plugins import digest, short_name
from datafree.runtime import autocast, choose_device, require_compiler, same_rng, seed_everything, set_threads

PIXELS_AT_ONCE = 500 * 128 * 128  # of an evaluation: 500 images at most, and fewer large ones
OWN = "own"  # in place of a file: the weights that the model's factory brings


class Session:
    """The surroundings of one run: device, data card, augmentation, test split.

    Mistakes are found in the order of what it costs to find them: names of models and files of weights, then the card,
    the networks, and at last the images.

    config: of any program, with the sections run and data. derive_card: whether the training images may be opened to
    derive the card of an unknown data set. write: whether files may be written: a derived card, a download.
    digests: option -> hash of the contents of the file that it names; the result depends on these and not on the name.
    notes: what should be known of the data that were loaded, and of their classes, as sentences for the log.
    """

    def __init__(self, config: Any, derive_card: bool = False, write: bool = True):
        self.config, self.run, self.data, self.write = config, config.run, config.data, write
        self.device = choose_device(self.run.device)
        distributed.start(self.run, self.device, to_yaml(config))
        autocast(self.device, self.run.precision)  # refuses a precision that the device lacks
        if self.run.compile != "off":
            require_compiler(self.device)
        if self.run.resume not in ("none", "auto") and not os.path.isfile(self.run.resume):
            raise InputError(f"--resume {self.run.resume}: there is no such file; give a checkpoint's path, or auto")
        for model, weights in config.networks():
            check_model(model)
            if weights not in ("", OWN):
                checkpoint.require_file(checkpoint.weights_file(weights))
        set_threads(self.run.threads)
        seed_everything(self.run.seed, self.run.deterministic)
        with distributed.in_turn():
            self.card = resolve_card(
                self.data.dataset, self.data.data_root, self.data.card, derive_card, write, self.data.image_size
            )
        self.digests = {"card": digest(repr(replace(self.card, loader="")).encode())}
        flip = self.card.flip if self.data.flip == "card" else self.data.flip == "on"
        self.augment = CropFlip(self.data.crop_padding, flip)
        self.notes: list[str] = []
        if distributed.count() > 1:
            self.notes.append(
                f"{distributed.count()} processes: each computes its share of every batch, whose size is that of all."
            )
        if self.data.card and self.data.dataset not in (Data.dataset, self.card.name):
            self.notes.append(
                f"The data set is {self.card.name}, as {self.data.card} names it, not {self.data.dataset}."
            )

    @cached_property
    def test(self) -> Split | None:
        """The test split, which is read when it is first asked for; None with --eval none."""
        return self.split("test") if self.data.eval == "test" else None

    def split(self, name: str, classes: Sequence[int] | None = None) -> Split:
        """The ``train`` or ``test`` split of the data set, on the device; if ``classes`` are given, of these alone.

        Labels are then positions among these classes. The random states are the same afterwards, whatever a
        user-defined loader draws.
        """
        download, workers = self.data.download and self.write, self.run.workers
        with same_rng():
            split = load_split(self.card, self.data.data_root, name, download, self.device, workers, classes)
        self.notes += split.notes
        return split

    def network(
        self,
        role: str,
        model: str,
        weights: str | Path = "",
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        num_classes: int = 0,
        key: str = "",
        stages: Sequence[str] = (),
    ) -> Network:
        """Build ``model``, load ``weights``, if given, and try it -> :class:`Network` on the device.

        weights: a file, the folder of a run, or OWN, for those that the model's factory brings. Without ``mean`` and
        ``std``, those stored with the weights are used, or else the model's own, or else the card's. num_classes:
        instead of the card's, as for a teacher of the old classes alone. key: of the weights in their file. stages:
        names of the modules that give its stages.
        """
        options: dict[str, Any] = {"num_classes": num_classes, "mean": mean, "std": std, "role": role, "stages": stages}
        with out_of_memory_in(f"the trial of the {role}", "--image_size"):
            if weights and weights != OWN:
                network = Network.from_file(weights, model, self.card, key=key, **options)
            else:
                network = Network.build(model, self.card, pretrained=weights == OWN, **options)
        if weights:
            tensors = (entry for entry in network.model.state_dict().values() if torch.is_tensor(entry))
            # As bytes, because NumPy has no bfloat16.
            contents = (tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors)
            self.digests["weights" if role == "model" else f"{role}_weights"] = digest(*contents)
        classes = num_classes or self.card.num_classes
        if network.num_classes != classes:
            raise InputError(
                f"the {role} {model} has {network.num_classes} classes"
                + " (one output)" * (network.tap.num_classes == 1)
                + f" but {self.card.name} has {classes}; build it with the right head, or name the right data set"
            )
        self.notes += check_order(network, self.card)
        if distributed.count() > 1 and not network.trial.repeatable and is_batch_independent(network.model):
            self.notes.append(
                f"[Alarm] The outputs of the {network.name} for an image are not the same in any batch, and of several "
                "processes each has another batch; with one the numbers would be others."
            )
        network.to(self.device)
        network.try_run(self.run.precision, training=role != "teacher" and not self.run.evaluate_only)
        return network if self.run.compile == "off" else network.compiled(self.run.compile)

    def load_teacher(self) -> Network:
        """The teacher with its weights, frozen."""
        options = self.config.teacher
        weights: str | Path = options.teacher_weights
        if not weights:
            weights = published_weights(self.card.name, options.teacher)
            if not os.path.exists(weights):
                raise InputError(
                    f"there is no file {weights}; train it by: python train_scratch.py --dataset {self.card.name} "
                    f"--model {options.teacher}; or give --teacher_weights, {OWN} if the model brings its weights"
                )
        mean, std, key = options.teacher_mean, options.teacher_std, options.teacher_weights_key
        stages = [name.strip() for name in options.teacher_stages.split(",") if name.strip()]
        network = self.network("teacher", options.teacher, weights, mean, std, key=key, stages=stages)
        network.freeze().require_moderate_values()
        return network

    @property
    def evaluation_batch(self) -> int:
        """Images of a batch of an evaluation."""
        return max(1, min(500, PIXELS_AT_ONCE // (self.card.height * self.card.width)))

    @torch.no_grad()
    def score(
        self, network: Network, remedy: str = OF_BROKEN_WEIGHTS, test: Split | None = None
    ) -> dict[str, float] | None:
        """acc1, acc5 (%) and loss on ``test``, or else the test split; None without one.

        remedy: for logits that are not finite. The random states are the same afterwards, so that a run trains the same
        weights with and without a test set.
        """
        test = test or self.test
        if test is None:
            return None
        network.eval()
        with same_rng(), out_of_memory_in("evaluation", "--image_size"):
            return evaluate(network, test, self.evaluation_batch, network.name, remedy)

    def evaluate_only(self, network: Network, test: Split | None = None) -> None:
        """Print the accuracy of ``network`` on ``test``, or else on the test split."""
        scores = self.score(network, test=test) or {}
        print("\n".join(map(printable, [*self.notes, *describe_notes(network), describe_normalisation(network)])))
        print(f"[Eval] {network.name} on {self.card.name}: {scores_line(scores)}")


def published_weights(dataset: str, model: str) -> Path:
    """Where train_scratch.py puts a teacher's weights and the other programs look for them."""
    return Path("checkpoints/pretrained") / f"{dataset}_{short_name(model)}.pth"
