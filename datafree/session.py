"""What every program needs before its training: device, data card, splits, networks."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datafree import checkpoint, distributed
from datafree.augment import CropFlip
from datafree.batchnorm import is_batch_independent
from datafree.class_order import put_in_card_order
from datafree.cli import to_yaml
from datafree.config import Data
from datafree.datasets.cards import DatasetCard, names_of
from datafree.datasets.loading import load_split, resolve_card, stand_in
from datafree.datasets.splits import Split
from datafree.datasets.torchvision_files import TORCHVISION
from datafree.errors import InputError, MissingError, out_of_memory_in, printable
from datafree.evaluators import OF_BROKEN_WEIGHTS, evaluate, scores_line
from datafree.launch import command
from datafree.models.factory import check_model, is_known
from datafree.network import Network, model_name
from datafree.plan import check_order, describe_normalisation, describe_notes
from datafree.plugins import CODE, code_digest, digest, short_name
from datafree.runtime import (
    autocast,
    bf16_slowdown,
    choose_device,
    require_compiler,
    require_default_state,
    same_rng,
    seed_everything,
    set_threads,
)

PIXELS_AT_ONCE = 500 * 128 * 128  # of an evaluation: 500 images at most, and fewer large ones
OWN = "own"  # in place of a file: the weights that the model's factory brings


class Session:
    """The surroundings of one run: device, data card, augmentation, test split.

    Mistakes are found in the order of what it costs to find them: names of models and files of weights, then the card,
    the networks, and at last the images.

    config: of any program, with the sections run and data. derive_card: whether the training images may be opened to
    derive the card of an unknown data set. write: whether files may be written: a derived card, a download. given:
    networks as objects, by role; the options of their model and weights are then not read, but for the name. card: in
    place of the one that the options name.
    digests: option -> hash of the contents of the file that it names; the result depends on these and not on the name.
    notes: what should be known of the data that were loaded, and of their classes, as sentences for the log.
    missing, to_download: weights and images that a plan is made without: with the error that a run would end with, or
    as sentences on what it would download.
    """

    def __init__(
        self,
        config: Any,
        derive_card: bool = False,
        write: bool = True,
        given: Mapping[str, nn.Module] | None = None,
        card: DatasetCard | None = None,
    ):
        self.config, self.run, self.data, self.write = config, config.run, config.data, write
        self.given = given or {}
        self.device = choose_device(self.run.device)
        distributed.start(self.run, self.device, to_yaml(config))
        autocast(self.device, self.run.precision)  # refuses a precision that the device lacks
        if self.run.compile != "off":
            require_compiler(self.device)
        if self.run.resume not in ("none", "auto") and not os.path.isfile(self.run.resume):
            raise InputError(f"--resume {self.run.resume}: there is no such file; give a checkpoint's path, or auto")
        self._networks: list[Network] = []
        self.missing: list[MissingError] = []
        self.to_download: list[str] = []
        objects = set(map(model_name, self.given.values()))
        for model, weights in config.networks():
            if model not in objects:
                check_model(model)
            self._if_there(weights)
        require_default_state()
        set_threads(self.run.threads)
        seed_everything(self.run.seed, self.run.deterministic)
        size = self.data.image_size
        with distributed.in_turn():
            self.card = (
                card.resized(size)
                if card
                else resolve_card(self.data.dataset, self.data.data_root, self.data.card, derive_card, write, size)
            )
        self.digests = {"card": digest(repr(replace(self.card, loader="")).encode())}
        flip = self.card.flip if self.data.flip == "card" else self.data.flip == "on"
        self.augment = CropFlip(self.data.crop_padding, flip)
        self.notes = list(self._remarks())

    def _remarks(self) -> Iterator[str]:
        """What is to be known of the options on this machine."""
        if self.run.precision == "bf16" and self.device.type == "cpu" and (slowdown := bf16_slowdown()) >= 2:
            yield (
                f"[Alarm] --precision bf16 is slow on this CPU: a convolution takes {slowdown:.0f} times as long as in "
                "fp32; leave the option out, unless the result must be that of bf16."
            )
        if distributed.count() > 1:
            yield f"{distributed.count()} processes: each computes its share of every batch, whose size is that of all."
        if self.data.card and self.data.dataset not in (Data.dataset, self.card.name):
            yield f"The data set is {self.card.name}, as {self.data.card} names it, not {self.data.dataset}."

    @cached_property
    def test(self) -> Split | None:
        """The test split, which is read when it is first asked for; None with --eval none."""
        if self.data.eval != "test":
            return None
        split = self.split("test")
        if not self.card.classes:  # which stands above the names of the folders
            self.notes += [n for net in self._networks for n in check_order(net, split.folders, "order of the folders")]
        return split

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes: the data card's, or those of the test images' folders, or numbers."""
        return names_of(self.card, self.test.folders if self.test else ())

    def split(self, name: str, classes: Sequence[int] | None = None) -> Split:
        """The ``train`` or ``test`` split of the data set, on the device; if ``classes`` are given, of these alone.

        Labels are then positions among these classes. The random states are the same afterwards, whatever a
        user-defined loader draws.
        """
        download, workers = self.data.download and self.write, self.run.workers
        split: Split | None = None
        with same_rng(), self._planning(downloads=f"{name} images" if self.data.download else ""):
            split = load_split(self.card, self.data.data_root, name, download, self.device, workers, classes)
        if split is None:
            split = stand_in(self.card, name, self.device, classes)
        self.notes += split.notes
        return split

    @contextmanager
    def _planning(self, downloads: str = "") -> Iterator[None]:
        """In a dry run, what the block misses is noted, and the plan goes on without it.

        downloads: what that is, if a run downloads it for those data sets for which that is possible.
        """
        try:
            yield
        except MissingError as error:
            if self.write or self.run.evaluate_only:
                raise
            if downloads and self.card.name in TORCHVISION and not self.card.loader:
                self.to_download.append(f"The {downloads} of {self.card.name} are not here; the run downloads them.")
            elif str(error) not in map(str, self.missing):
                self.missing.append(error)

    def _if_there(self, weights: str | Path) -> str | Path:
        """The file ``weights``; nothing if a plan is made without it."""
        if weights in ("", OWN):
            return weights
        with self._planning():
            checkpoint.require_file(checkpoint.weights_file(weights))
            return weights
        return ""

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
        as_arrived: bool = False,
    ) -> Network:
        """Build ``model``, load ``weights``, if given, and try it -> :class:`Network` on the device.

        weights: a file, the folder of a run, or OWN, for those that the model's factory, or an object, brings. Without
        ``mean`` and ``std``, those stored with the weights are used, or else the model's own, or else the card's.
        num_classes: instead of the card's, as for a teacher of the old classes alone. key: of the weights in their
        file. stages: names of the modules that give its stages. as_arrived: whether the outputs of a network of
        class-incremental learning stay in the order in which its classes arrived, in place of the card's.
        """
        if role not in self.given and not is_known(model):
            self.digests[role + CODE] = code_digest(model)
        options: dict[str, Any] = {"num_classes": num_classes, "mean": mean, "std": std, "role": role, "stages": stages}
        with out_of_memory_in(f"the trial of the {role}", "--image_size"):
            network = self._loaded(role, model, self._if_there(weights), key, options)
        require_default_state()  # which the file of a network may change
        classes = num_classes or self.card.num_classes
        if network.num_classes != classes:
            raise InputError(
                f"the {role} {model} has {network.num_classes} classes"
                + " (one output)" * (network.tap.num_classes == 1)
                + f" but {self.card.name} has {classes}; build it with the right head, or name the right data set"
            )
        if not as_arrived:
            put_in_card_order(network, classes)
        self.notes += check_order(network, self.card.classes)
        self._networks.append(network)
        if distributed.count() > 1 and not network.trial.repeatable and is_batch_independent(network.model):
            self.notes.append(
                f"[Alarm] The outputs of the {network.name} for an image are not the same in any batch, and of several "
                "processes each has another batch; with one the numbers would be others."
            )
        network.micro_batch = self.run.micro_batch
        network.to(self.device)
        network.try_run(self.run.precision, training=role != "teacher" and not self.run.evaluate_only)
        return network if self.run.compile == "off" else network.compiled(self.run.compile)

    def _loaded(self, role: str, model: str, weights: str | Path, key: str, options: dict[str, Any]) -> Network:
        """The network with these weights, of which a digest is kept; in a dry run without those that are not there."""
        if weights and weights != OWN:
            network = Network.from_file(weights, model, self.card, key=key, **options)
        else:
            brought, built = weights == OWN and role not in self.given, list[Network]()
            with self._planning():
                built.append(Network.build(self.given.get(role, model), self.card, pretrained=brought, **options))
            if not built:  # those that it would bring could not be had
                weights, built = "", [Network.build(model, self.card, **options)]
            network = built[0]
        if weights:
            tensors = (entry for entry in network.model.state_dict().values() if torch.is_tensor(entry))
            # As bytes, because NumPy has no bfloat16; an object may be on a GPU.
            contents = (tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors)
            self.digests["weights" if role == "model" else f"{role}_weights"] = digest(*contents)
        return network

    def load_teacher(self) -> Network:
        """The teacher with its weights, frozen."""
        options = self.config.teacher
        weights: str | Path = OWN if "teacher" in self.given else options.teacher_weights
        if not weights:
            weights = published_weights(self.card.name, options.teacher)
            with self._planning():
                if not os.path.exists(weights):
                    raise MissingError(
                        f"there is no file {weights}; train it by: {command('train')} --dataset {self.card.name} "
                        f"--model {options.teacher}; or give --teacher_weights, {OWN} if the model brings its weights"
                    )
            weights = weights if os.path.exists(weights) else ""
        mean, std, key = options.teacher_mean, options.teacher_std, options.teacher_weights_key
        stages = [name.strip() for name in options.teacher_stages.split(",") if name.strip()]
        network = self.network("teacher", options.teacher, weights, mean, std, key=key, stages=stages)
        network.freeze()
        if not self.missing:  # random weights may give anything
            network.require_moderate_values()
        return network

    @property
    def evaluation_batch(self) -> int:
        """Images of a batch of an evaluation."""
        return max(1, min(500, PIXELS_AT_ONCE // (self.card.height * self.card.width)))

    @torch.no_grad()
    def score(
        self,
        network: Network,
        remedy: str = OF_BROKEN_WEIGHTS,
        test: Split | None = None,
        tick: Callable[[], Any] = lambda: None,
    ) -> dict[str, float] | None:
        """acc1, acc5 (%) and loss on ``test``, or else the test split; None without one.

        remedy, tick: as of :func:`datafree.evaluators.evaluate`. The random states are the same afterwards, so that a
        run trains the same weights with and without a test set.
        """
        test = test or self.test
        if test is None:
            return None
        network.eval()
        with same_rng(), out_of_memory_in("evaluation", "--image_size"):
            return evaluate(network, test, self.evaluation_batch, network.name, remedy, tick)

    def evaluate_only(self, network: Network, test: Split | None = None) -> None:
        """Print the accuracy of ``network`` on ``test``, or else on the test split."""
        scores = self.score(network, test=test) or {}
        print("\n".join(map(printable, [*self.notes, *describe_notes(network), describe_normalisation(network)])))
        print(f"[Eval] {network.name} on {self.card.name}: {scores_line(scores)}")


def published_weights(dataset: str, model: str) -> Path:
    """Where train_scratch.py puts a teacher's weights and the other programs look for them."""
    return Path("checkpoints/pretrained") / f"{dataset}_{short_name(model)}.pth"
