"""A model as the methods see it: it takes images or views in [0, 1] and normalises them itself."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datafree import checkpoint, fitting
from datafree.datasets.cards import DatasetCard
from datafree.errors import InputError
from datafree.features import Features, FeatureTap
from datafree.models import MODELS
from datafree.models.factory import (
    AUXILIARY_HEADS,
    build_model,
    find_model,
    is_from_library,
    own_normalisation,
    torchvisions_networks,
)
from datafree.plugins import is_custom, short_name


def _stated(metadata: dict[str, Any], key: str, path: Path) -> Any:
    if not metadata.get(key):
        raise InputError(f"{path} does not state the {key} of its network; name the model and give a data card")
    return metadata[key]


def _stated_model(metadata: dict[str, Any], path: Path) -> str:
    """The registered model that a file of weights states; a user-defined one would run code that the file chooses."""
    model = _stated(metadata, "model", path)
    if not isinstance(model, str) or (is_custom(model) and not is_from_library(model)):
        raise InputError(f"{path} states the model {model!r}, which is not a registered one; name the model")
    return model


def _stated_card(metadata: dict[str, Any], path: Path) -> DatasetCard:
    """The card of the images that a file of weights is for."""
    shape, classes, mean, std = (_stated(metadata, key, path) for key in ("shape", "num_classes", "mean", "std"))
    if not all(isinstance(values, (list, tuple)) for values in (shape, mean, std)) or len(shape) != 3:
        raise InputError(f"{path} states shape {shape}, mean {mean}, std {std}; they must be lists, shape [C, H, W]")
    try:
        name, (channels, height, width) = str(metadata.get("dataset") or path.stem), shape
        return DatasetCard(name, channels, height, width, classes, tuple(mean), tuple(std))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


LARGE = 96  # pixels from which a registered network, whose stem is for 32, does many times the usual work


def _option(role: str, name: str) -> str:
    """The option that gives ``name`` (mean, std, weights_key) of the network called ``role``."""
    if role == "student" and name in ("mean", "std"):
        return "the data card"
    return f"--{role}_{name}" if role in ("teacher", "student") else f"--{name}"


def _large_images(model: str, card: DatasetCard) -> list[str]:
    """A sentence if ``model`` is a registered network for small images and those of ``card`` are large."""
    if model not in MODELS or min(card.height, card.width) < LARGE:
        return []
    others = torchvisions_networks(model)[-1:]
    return [
        f"it is made for images of about 32 pixels and does {card.height * card.width / 1024:.0f} times that work at "
        f"{card.height}x{card.width}" + "".join(f"; {other} is for large images" for other in others)
    ]


def _with_hint(error: InputError, model: str, weights: dict[str, Tensor], classes: int) -> InputError:
    """``error``, with the name of torchvision's network if the weights are of that one and not of ours."""
    for other in torchvisions_networks(model):
        with torch.device("meta"):
            twin = build_model(other, classes)
        own = twin.state_dict()
        whole, _ = fitting.find_fits(weights, twin, own)
        if any(not fitting.changes_the_network(fit, own) for fit in whole):
            return InputError(f"{error} They are those of {other}, which is another network than {model}")
    return error


def _checked(role: str, key: str, values: Any, card: DatasetCard) -> tuple[float, ...]:
    """``values`` of a mean or std, which must be one number per channel."""
    low = 1e-6 if key == "std" else 0
    numbers = isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values)
    if not numbers or len(values) != card.channels or not all(low <= v <= 1 for v in values):
        raise InputError(
            f"the {role}'s {key} is {values}, not one number in [0, 1] for each of the {card.channels} channels of "
            f"{card.name}; correct {_option(role, key)}, or the file of its weights, if that states it"
        )
    return tuple(values)


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)


class Network(nn.Module):
    """``model`` with its own normalisation and a tap on its features.

    Each network has the mean and standard deviation that it was trained with, so that a
    teacher and a student with different ones see the same views.

    shape: (C, H, W) of the images. mean, std: per channel, in [0, 1] units. metadata: what the file of its
    weights states (acc1, epoch, dataset, ...), if there is one. notes: sentences on what was guessed, converted or left
    out when it was built, without their subject.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "network",
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.shape, self.name, self.metadata = tuple(shape), name, metadata or {}
        self.notes: list[str] = []
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.tap = FeatureTap(model, self.shape)
        self.compile_mode: str | None = None
        self._classes: slice | None = None

    @classmethod
    def build(
        cls,
        model: str,
        card: DatasetCard,
        *,
        num_classes: int = 0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        role: str = "network",
        pretrained: bool = False,
    ) -> "Network":
        """The network called ``model``, randomly initialised, for the images of ``card``.

        num_classes, mean, std: instead of the card's. role: what messages call it. pretrained: with the weights that
        its factory brings, and the mean and std that these state.
        """
        module = build_model(model, num_classes or card.num_classes, card.channels, pretrained)
        network = cls._made(module, model, card, {"mean": mean, "std": std}, role, pretrained)
        if pretrained:
            network.notes.append("its weights are those that the model brings")
        return network

    @classmethod
    def _made(
        cls,
        module: nn.Module,
        model: str,
        card: DatasetCard,
        given: dict[str, Sequence[float]],
        role: str,
        use_own: bool,
    ) -> "Network":
        """The network of ``module``; use_own: its own mean and std, if it states them, come before the card's."""
        own = {key: v for key, v in own_normalisation(module).items() if use_own and len(v) == card.channels}
        used = {key: _checked(role, key, given[key] or own.get(key) or getattr(card, key), card) for key in given}
        network = cls(module, card.shape, used["mean"], used["std"], f"{role} {short_name(model)}")
        network.notes += _large_images(model, card)
        for key, values in own.items():
            other, whose = (used[key], "used here") if given[key] else (getattr(card, key), "of the data card")
            if values != tuple(other):
                taken = "" if given[key] else f", is used; {_option(role, key)} gives another"
                network.notes.append(
                    f"its own {key}, {_numbers(values)}, differs from that {whose}, {_numbers(other)}{taken}"
                )
        return network

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        model: str = "",
        card: DatasetCard | None = None,
        *,
        num_classes: int = 0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        role: str = "network",
        key: str = "",
    ) -> "Network":
        """The network whose weights are in the file ``path``, or in the folder of a run.

        Files that this program writes state their model, shape, number of classes, mean and standard deviation, so that
        nothing else is needed, except the ``model`` if it is user-defined. Arguments take the place of what the file
        states; with a ``card`` so do its shape and its number of classes. Where the file states no mean and std, those
        that the model itself states are used, or else the card's. key: of the weights in the file, see
        :func:`datafree.checkpoint.read_weights`. Raises InputError for what is neither given nor stated, and for
        weights that do not fit the model.
        """
        if model:
            find_model(model)  # an unknown name is reported before a missing file
        notes: list[str] = []
        path, option = checkpoint.weights_file(path), _option(role, "weights_key")
        weights, metadata = checkpoint.read_weights(path, key, notes, option)
        model, card = model or _stated_model(metadata, path), card or _stated_card(metadata, path)
        given = {"mean": mean or metadata.get("mean", ()), "std": std or metadata.get("std", ())}
        module = build_model(model, num_classes or card.num_classes, card.channels)
        network, modules = cls._made(module, model, card, given, role, use_own=True), list(module.modules())
        try:
            notes += checkpoint.load_weights(network.model, weights, path, option)
        except InputError as error:
            raise _with_hint(error, model, weights, num_classes or card.num_classes) from error
        if modules != list(module.modules()):  # a module was replaced by one of an earlier version, without hooks
            network = cls._made(module, model, card, given, role, use_own=True)
        if model.rpartition(":")[2] in AUXILIARY_HEADS and not mean:
            notes.append(
                "if its weights come from torchvision's, which expect mean 0.5 and std 0.5 (transform_input), "
                f"give these by {_option(role, 'mean')} and {_option(role, 'std')}"
            )
        network.metadata, network.notes = metadata, notes + network.notes
        return network

    @property
    def num_classes(self) -> int:
        classes = range(self.tap.num_classes)
        return len(classes if self._classes is None else classes[self._classes])

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalise(self, views: Tensor) -> Tensor:
        return ((views - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, views: Tensor) -> Tensor:
        """Views (N, C, H, W) in [0, 1] -> logits (N, classes)."""
        return self._restricted(self.model(self.normalise(views)))

    def features(self, views: Tensor) -> Features:
        """Views (N, C, H, W) in [0, 1] -> :class:`datafree.features.Features`."""
        features = self.tap(self.normalise(views))
        if self._classes is None:
            return features
        return Features(self._restricted(features.logits), features.embed, features.stages)

    def _restricted(self, logits: Tensor) -> Tensor:
        return logits if self._classes is None else logits[:, self._classes]

    def restricted_to(self, classes: range) -> "Network":
        """This network, with the same parameters, whose logits are those of ``classes`` alone.

        So a student of old and new classes can be compared with a teacher of the old ones.
        """
        if classes.step != 1 or not 0 <= classes.start < classes.stop <= self.num_classes:
            raise InputError(f"the {self.name} has {self.num_classes} classes, which do not include {classes}")
        other, first = copy.copy(self), self._classes.start if self._classes else 0
        other._classes = slice(first + classes.start, first + classes.stop)
        return other._recompiled()

    def copy(self) -> "Network":
        """An independent network with equal weights, hooks and modes."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Network":
        other = self.__class__.__new__(self.__class__)
        memo[id(self)] = other
        state = {key: value for key, value in self.__dict__.items() if key not in ("features", "_compiled_call_impl")}
        other.__dict__.update(copy.deepcopy(state, memo))
        return other._recompiled()

    def _recompiled(self) -> "Network":
        """The copy of a compiled network, compiled for itself."""
        self.__dict__.pop("features", None)
        self._compiled_call_impl = None
        return self if self.compile_mode is None else self.compiled(self.compile_mode)

    def compiled(self, mode: str) -> "Network":
        """Run by torch.compile from now on: ``default`` fuses, ``reduce-overhead`` replays CUDA graphs too."""
        torch._dynamo.config.cache_size_limit = 32  # both roles, modes and phases of all networks share one code
        self.compile_mode = mode
        self.compile(mode=mode)
        self.features = torch.compile(self.features, mode=mode)  # type: ignore[method-assign]
        return self

    def freeze(self) -> "Network":
        """Permanently in evaluation mode, without weight gradients: as a teacher is."""
        self.eval().requires_grad_(False)
        return self

    @contextmanager
    def frozen(self) -> Iterator["Network"]:
        """Evaluation mode and no weight gradients inside the block; as before afterwards."""
        modes = {module: module.training for module in self.modules()}
        wanted = [parameter.requires_grad for parameter in self.parameters()]
        self.eval().requires_grad_(False)
        try:
            yield self
        finally:
            for module, training in modes.items():
                module.training = training
            for parameter, flag in zip(self.parameters(), wanted):
                parameter.requires_grad_(flag)
