"""A model as the methods see it: it takes images or views in [0, 1] and normalises them itself."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datafree import checkpoint, fitting, quantizer, shares
from datafree.datasets.cards import DatasetCard
from datafree.determinism import nondeterministic_operations, require_deterministic
from datafree.errors import InputError, shown
from datafree.features import Features, FeatureTap
from datafree.micro_batch import in_parts
from datafree.models import MODELS
from datafree.models.factory import (
    AUXILIARY_HEADS,
    build_model,
    find_model,
    is_known,
    own_normalisation,
    torchvisions_networks,
)
from datafree.outputs import raw_logits, recognise
from datafree.plugins import short_name
from datafree.runtime import autocast, load_rng_state, rng_state
from datafree.trial import (
    HALF,
    detach_results,
    device_of,
    independent_copy,
    input_dtype,
    layout,
    materialise,
    run,
    tensors_of,
    trial_images,
    try_backward,
    try_evaluation,
    unchanged,
)


def _stated(metadata: dict[str, Any], key: str, path: Path) -> Any:
    if not metadata.get(key):
        raise InputError(f"{path} does not state the {key} of its network; name the model and give a data card")
    return metadata[key]


def _stated_model(metadata: dict[str, Any], path: Path) -> str:
    """The registered model that a file of weights states; a user-defined one would run code that the file chooses."""
    model = _stated(metadata, "model", path)
    if not isinstance(model, str) or not is_known(model):
        raise InputError(f"{path} states the model {shown(model)}, which is not a registered one; name the model")
    return model


def stated_card(metadata: dict[str, Any], path: Path) -> DatasetCard:
    """The card of the images that a file of weights is for."""
    shape, classes, mean, std = (_stated(metadata, key, path) for key in ("shape", "num_classes", "mean", "std"))
    if not all(isinstance(values, (list, tuple)) for values in (shape, mean, std)) or len(shape) != 3:
        raise InputError(
            f"{path} states shape {shown(shape)}, mean {shown(mean)}, std {shown(std)}; they must be lists, "
            "shape [C, H, W]"
        )
    try:
        name, (channels, height, width) = str(metadata.get("dataset") or path.stem), shape
        return DatasetCard(name, channels, height, width, classes, tuple(mean), tuple(std))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


LARGEST_VALUE = 1e6  # beyond what trained networks give: losses of such values overflow, or their gradients do
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
    """``values`` of a mean or std, which must be what a card for such images accepts."""
    try:
        changed: dict[str, Any] = {key: tuple(values)}
        return getattr(replace(card, **changed), key)
    except (InputError, TypeError):
        raise InputError(
            f"the {role}'s {key} is {shown(values)}, not one number in [0, 1] for each of the {card.channels} channels "
            f"of {card.name}; correct {_option(role, key)}, or the file of its weights, if that states it"
        ) from None


def model_name(model: str | nn.Module) -> str:
    """The name of a model; that of an object, which no name can build, has the form of a user-defined one.

    Of a :class:`Network` it is the one that the file of its weights states, if it is not user-defined.
    """
    if isinstance(model, str):
        return model
    stated = model.metadata.get("model", "") if isinstance(model, Network) else ""
    kind = type(model.model if isinstance(model, Network) else model)
    return stated if isinstance(stated, str) and is_known(stated) else f"object:{kind.__name__}"


def shown_numbers(values: Sequence[float]) -> str:
    """A mean or std, as an option takes it."""
    return ",".join(f"{value:.4g}" for value in values)


def _other_normalisation(
    role: str,
    own: dict[str, Any],
    given: dict[str, Sequence[float]],
    used: dict[str, tuple[float, ...]],
    card: DatasetCard,
) -> list[str]:
    """Sentences where the mean or std that the model states differs from what is given, or else from the card's."""
    notes = []
    for key, values in own.items():
        other, whose = (used[key], "used here") if given[key] else (getattr(card, key), "of the data card")
        if values != tuple(other):
            taken = "" if given[key] else f", is used; {_option(role, key)} gives another"
            notes.append(
                f"its own {key}, {shown_numbers(values)}, differs from that {whose}, {shown_numbers(other)}{taken}"
            )
    return notes


class Network(nn.Module):
    """``model`` with its own normalisation and a tap on its features.

    Each network has the mean and standard deviation that it was trained with, so that a
    teacher and a student with different ones see the same views.

    The model is taken as it is: a trial finds out which inputs it takes and what it returns (:mod:`datafree.trial`),
    and :meth:`try_run` repeats that as the run will use it. ``trial.notes`` are sentences about it for the plan.

    shape: (C, H, W) of the images. mean, std: per channel, in [0, 1] units. metadata: what the file of its
    weights states (acc1, epoch, dataset, ...), if there is one. notes: sentences on what was guessed, converted or left
    out when it was built, without their subject. stages: names of the modules whose outputs are its stages; found by
    themselves if there are none. micro_batch: views at most that are computed at once (:mod:`datafree.micro_batch`); 0
    sets no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "network",
        metadata: dict[str, Any] | None = None,
        stages: Sequence[str] = (),
    ):
        super().__init__()
        self.model = model
        self.shape, self.name, self.metadata = tuple(shape), name, metadata or {}
        self.notes: list[str] = []
        place = device_of(model)
        self.register_buffer("mean", torch.tensor(mean, device=place).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device=place).view(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        materialise(model, self.shape)
        images = (trial_images(self.shape, 3, self.device) - self.mean) / self.std
        self.trial = try_evaluation(model, images)
        if self.trial.normalises and not (self.mean.eq(0).all() and self.std.eq(1).all()):
            self.trial.notes.append(
                "[Alarm] it shifts or scales the images itself, after they are normalised here; if it takes values "
                "from 0 to 1, give mean 0 and std 1 (--teacher_mean 0 --teacher_std 1, --mean 0 --std 1)"
            )
        self.outputs = {False: self.trial.output, True: self.trial.output}  # by whether it is in training mode
        self.tap = FeatureTap(model, self.shape, stages, self.trial.dtype, self.trial.output)
        self.compile_mode: str | None = None
        self.micro_batch = 0
        self._classes: slice | None = None

    @classmethod
    def build(
        cls,
        model: str | nn.Module,
        card: DatasetCard,
        *,
        num_classes: int = 0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        role: str = "network",
        pretrained: bool = False,
        stages: Sequence[str] = (),
        weights: Callable[[nn.Module], Any] | None = None,
    ) -> "Network":
        """The network called ``model``, randomly initialised, or a copy of that object, for the images of ``card``.

        num_classes, mean, std: instead of the card's. role: what messages call it. pretrained: with the weights that
        its factory brings, and the mean and std that these state, as an object may. stages: see the class. weights:
        loads weights into the model, before it is tried.
        """
        is_object, seed, random = isinstance(model, nn.Module), torch.initial_seed(), rng_state()
        if isinstance(model, nn.Module):
            module = independent_copy(model.model if isinstance(model, Network) else model, role)
        else:
            module = build_model(model, num_classes or card.num_classes, card.channels, pretrained)
        seeds = torch.initial_seed() != seed  # or what the run draws would not depend on its seed
        if seeds:
            load_rng_state(random)
        if any(tensor.is_meta for tensor in tensors_of(module)):
            raise InputError(
                f"the {role} {type(module).__name__} has weights without values, on the device meta; build it on a CPU"
            )
        if weights:
            materialise(module, card.shape)
            weights(module)
        own = own_normalisation(module) if pretrained or weights or is_object else {}
        own = {key: v for key, v in own.items() if len(v) == card.channels}
        given = {"mean": mean, "std": std}
        if isinstance(model, Network):
            given = {key: given[key] or getattr(model, key).flatten().tolist() for key in given}
        used = {key: _checked(role, key, given[key] or own.get(key) or getattr(card, key), card) for key in given}
        name = model_name(model)
        network = cls(module, card.shape, used["mean"], used["std"], f"{role} {short_name(name)}", stages=stages)
        network.notes = [*_large_images(name, card), *_other_normalisation(role, own, given, used, card)]
        if seeds:
            network.notes.append(
                "[Alarm] its factory sets torch's seed, so that its first weights are the same in each run, whatever "
                "--seed is; remove torch.manual_seed from it"
            )
        if pretrained:
            network.notes.append("its weights are those that the model brings")
        if isinstance(model, Network):
            network.metadata, network._classes = dict(model.metadata), model._classes
        return network

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        model: str | nn.Module = "",
        card: DatasetCard | None = None,
        *,
        num_classes: int = 0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        role: str = "network",
        key: str = "",
        stages: Sequence[str] = (),
    ) -> "Network":
        """The network whose weights are in the file ``path``, or in the folder of a run.

        Files that this program writes state their model, shape, number of classes, mean and standard deviation, so that
        nothing else is needed, except a user-defined ``model``: its name, or an object of it. Arguments take the place
        of what the file states; with a ``card`` so do its shape and its number of classes. Where the file states no
        mean and std, those that the model itself states are used, or else the card's. key: of the weights in the file,
        see :func:`datafree.checkpoint.read_weights`. Raises InputError for what is neither given nor stated, and for
        weights that do not fit the model.
        """
        if isinstance(model, str) and model:
            find_model(model)  # an unknown name is reported before a missing file
        notes: list[str] = []
        path, option = checkpoint.weights_file(path), _option(role, "weights_key")
        weights, metadata = checkpoint.read_weights(path, key, notes, option)
        protocol = quantizer.of_file(metadata, path)
        grids: dict[str, Tensor] = {}
        if protocol:
            weights, grids = quantizer.split(weights)
        model = _stated_model(metadata, path) if model == "" else model
        card = card or stated_card(metadata, path)
        given: dict[str, Any] = {"mean": mean or metadata.get("mean", ()), "std": std or metadata.get("std", ())}

        def load(module: nn.Module) -> None:
            notes.extend(checkpoint.load_weights(module, weights, path, option))

        try:
            network = cls.build(model, card, num_classes=num_classes, role=role, stages=stages, weights=load, **given)
        except InputError as error:
            raise _with_hint(error, model_name(model), weights, num_classes or card.num_classes) from error
        if model_name(model).rpartition(":")[2] in AUXILIARY_HEADS and not mean:
            notes.append(
                "if its weights come from torchvision's, which expect mean 0.5 and std 0.5 (transform_input), "
                f"give these by {_option(role, 'mean')} and {_option(role, 'std')}"
            )
        network.metadata, network.notes = metadata, notes + network.notes
        return quantizer.restored(network, protocol, grids, role) if protocol else network

    @property
    def num_classes(self) -> int:
        classes = range(self.outputs[False].classes(self.tap.num_classes))
        return len(classes if self._classes is None else classes[self._classes])

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def normalise(self, views: Tensor) -> Tensor:
        normalised = ((views - self.mean) / self.std).to(self.trial.dtype)
        return normalised.contiguous(memory_format=layout(self.trial.channels_last))

    def forward(self, views: Tensor) -> Tensor:
        """Views (N, C, H, W) in [0, 1] -> logits (N, classes)."""
        return in_parts(partial(shares.divided, self._forward), views, self.micro_batch, self)

    def features(self, views: Tensor, with_maps: bool = True) -> Features:
        """Views (N, C, H, W) in [0, 1] -> :class:`datafree.features.Features`.

        with_maps: whether its field ``stages`` is needed, which takes memory where the views are computed in parts.
        """
        return in_parts(partial(shares.divided, self._features), views, self.micro_batch, self, with_maps)

    @contextmanager
    def whole_batches(self) -> Iterator[None]:
        """Inside, no batch is computed in parts."""
        before, self.micro_batch = self.micro_batch, 0
        try:
            yield
        finally:
            self.micro_batch = before

    def _forward(self, views: Tensor) -> Tensor:
        return self._logits(raw_logits(self.model(self.normalise(views)), self.model))

    def _features(self, views: Tensor) -> Features:
        features = self.tap(self.normalise(views))
        stages, embed = features.stages, features.embed
        if self.trial.dtype != torch.float32:
            stages, embed = [stage.float() for stage in stages], embed.float()
        return Features(self._logits(features.logits), embed, stages)

    def classify(self, embed: Tensor) -> Tensor:
        """Embeddings (N, D) -> logits (N, classes), by the head. Raises InputError if that is not one linear layer."""
        head = self.tap.head
        if not isinstance(head, nn.Linear) or head.out_features != self.tap.num_classes:
            raise InputError(
                f"the {self.name} has no linear layer as its head, which would be trained or applied alone here; use "
                "another network, or a method that needs none, such as lwf"
            )
        return self._logits(head(embed.to(head.weight.dtype)))

    def _logits(self, raw: Tensor) -> Tensor:
        """What the model returned as logits of the chosen classes."""
        logits = self.outputs[self.training].logits(raw)
        if self.trial.dtype != torch.float32:
            logits = logits.float()
        return logits if self._classes is None else logits[:, self._classes]

    def try_run(self, precision: str = "none", training: bool = False) -> None:
        """Run it once as the run will, on the device and in the run's ``precision``; raise InputError if it fails.

        training: whether it is also trained. Weights, buffers, modes and random states stay as they are.
        """
        if training:
            self.require_full_precision()
        self._try_mode(precision, training=False)
        if not training:
            return
        try:
            self._try_mode(precision, training=True)
        except InputError:
            if not self.trial.channels_last:
                raise
            self.trial.channels_last = False
            self.model.to(memory_format=torch.contiguous_format)
            self._try_mode(precision, training=True)
            self.trial.notes.append("it runs in the plain memory layout, because in channels_last its training fails")

    def require_full_precision(self) -> None:
        """Raise InputError for a network that cannot be trained because its weights are in half precision."""
        if input_dtype(self.model) in HALF:
            raise InputError(
                f"the {self.name} has weights in {str(input_dtype(self.model))[6:]}, whose rounding loses the small "
                "steps of training; build it in float32 (.float())"
            )

    def _try_mode(self, precision: str, training: bool) -> None:
        with unchanged(self), torch.enable_grad():
            self.train(training)
            torch.manual_seed(0)
            with autocast(self.device, precision):
                raw = run(self.model, self.normalise(trial_images(self.shape, 4, self.device)), self._try_forward)
            if training:
                self.outputs[True] = recognise(raw, None, self.model)
                if self.outputs[True] != self.outputs[False]:
                    self.trial.notes.append(f"in training mode {self.outputs[True].sentence or 'it returns logits'}")
                if not raw.requires_grad:
                    raise InputError(
                        f"the {self.name} has no weights to train: its output is computed without a gradient"
                    )
                require_deterministic(nondeterministic_operations(raw), f"the {self.name}", self.device)
                try_backward(self.model, raw)

    def _try_forward(self, images: Tensor) -> Tensor:
        raw = self.tap(images).logits
        if raw.shape != (len(images), self.tap.num_classes):
            raise InputError(
                f"the network {type(self.model).__name__} returns {tuple(raw.shape)} for {len(images)} images"
                + " in training mode" * self.training
                + f", and {self.tap.num_classes} outputs for each image in the trial"
            )
        return raw

    @torch.no_grad()
    def require_moderate_values(self) -> None:
        """Raise InputError for outputs or stages that are not finite or far too large, as those of spoiled weights.

        Losses of such values would first spoil the student, which would then be blamed.
        """
        with unchanged(self):
            features = self.features(trial_images(self.shape, 4, self.device))
        parts = [features.logits, features.embed, *features.stages]
        largest = torch.stack([part.float().abs().max() for part in parts]).max().item()
        if not largest <= LARGEST_VALUE:  # NaN included
            values = f"values of up to {largest:.1e}" if math.isfinite(largest) else "values that are not finite"
            raise InputError(
                f"the {self.name} gives {values} for ordinary images, as no trained network does; check its weights, "
                "and its mean and std"
            )

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
        detach_results(self, memo)
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
        if isinstance(self.model, quantizer.QuantizedModel):
            raise InputError(
                f"the {self.name} is quantised, which compiled code would not be, because its calls are not seen; give "
                "--compile off"
            )
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
