"""Simulated quantization of any network: its weights and activations on an integer grid, with gradients.

The network's code is not changed. While it runs, a mode sees every call of a convolution or linear layer, and of an
activation function, wherever it is written, as a module or as a function: the weight is rounded before such a call and
the activation after it. The protocol is the section quantizer of the options (:class:`datafree.config.Quantizer`).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from datafree import distributed
from datafree.calls import LAYERS, Calls, find_sites, require_gradients
from datafree.config import QuantizeConfig, Quantizer
from datafree.errors import InputError, OptionError
from datafree.options import list_options
from datafree.outputs import raw_logits
from datafree.rounding import FLOAT, ActivationGrid, WeightGrid
from datafree.trial import is_close, trial_images, unchanged

if TYPE_CHECKING:
    from datafree.network import Network

GRIDS = "grids."  # prefix of the ranges among a quantised network's tensors


class QuantizedModel(nn.Module):
    """``model`` with its weights and activations on the grid of ``protocol``: same inputs, same outputs.

    It is run in evaluation mode, also while it is trained, so that its BatchNorm statistics stay as they are. Ranges of
    activations are observed inside :meth:`observing`; until then activations are not rounded.

    images: normalised, (N, C, H, W), for the pass that finds what is quantised. name: for messages.
    """

    def __init__(self, model: nn.Module, protocol: Quantizer, images: Tensor, name: str = "network"):
        super().__init__()
        protocol.validate()
        self.protocol, self.sites = protocol, find_sites(model, images, name)
        if protocol.a_bits != FLOAT and not self.sites.activations:
            raise InputError(
                f"the {name} calls no activation function before its last layer, so --a_bits {protocol.a_bits} has "
                "nothing to quantise; give --a_bits 32"
            )
        self.model = model
        layers, count = self.sites.layers, len(self.sites.activations)
        self.weights = [
            WeightGrid(self._bits("w_bits", i in (0, self.sites.last)), protocol, layer.axis, layer.channels)
            for i, layer in enumerate(layers)
        ]
        outer = self.sites.last_activation
        self.activations = [ActivationGrid(self._bits("a_bits", i == outer), protocol) for i in range(count)]
        self.grids = nn.ModuleDict(
            {"weights": nn.ModuleList(self.weights), "activations": nn.ModuleList(self.activations)}
        ).to(images.device)
        self._observing, self._to_fit = False, set[int]()
        self.train(False)
        if protocol.fold_bn:
            self._require_exact_folding(images, name)

    def _require_exact_folding(self, images: Tensor, name: str) -> None:
        """Raise InputError if the network gives other outputs with BatchNorm in its layers, without any rounding."""
        bits = [grid.bits for grid in self.weights]
        with unchanged(self.model), torch.no_grad():
            expected = raw_logits(self.model(images), self.model)
            for grid in self.weights:
                grid.bits = FLOAT
            found = raw_logits(self(images), self.model)
        for grid, own in zip(self.weights, bits):
            grid.bits = own
        if not is_close(expected, found):
            raise InputError(
                f"the {name} gives other outputs with BatchNorm folded into its layers; leave --fold_bn out"
            )

    def _bits(self, option: str, is_outer: bool) -> int:
        bits = getattr(self.protocol, option)
        outer = self.protocol.first_last_bits
        return bits if outer is None or bits == FLOAT or not is_outer else outer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls = _Quantized(self)
        with calls:
            output = self.model(*args, **kwargs)
        calls.require_all()
        return output

    def train(self, mode: bool = True) -> "QuantizedModel":
        """Evaluation mode, whatever is asked for."""
        super().train(False)
        return self

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Inside, passes observe the ranges anew: of weights in the first one, of activations in all.

        Each process observes whole batches, as extremes and errors of a share are not those of its batch.
        """
        for grid in self.activations:
            grid.forget()
        self._observing, self._to_fit = True, set(range(len(self.sites.layers)))
        try:
            with distributed.apart():
                yield
        finally:
            self._observing, self._to_fit = False, set()

    def round_weight(self, number: int, weight: Tensor) -> Tensor:
        """The weight of the ``number``-th layer on its grid."""
        if number in self._to_fit:
            self._to_fit.remove(number)
            self.weights[number].fit(weight)
        return self.weights[number](weight)

    def round_activation(self, number: int, x: Tensor) -> Tensor:
        """The ``number``-th activation on its grid."""
        if self._observing:
            self.activations[number].observe(x)
        return self.activations[number](x)

    @property
    def packed_bytes(self) -> int:
        """Size of its weights if each took its bits, with scale and zero point of each range, the others in float32."""
        bits = 0
        for layer, grid in zip(self.sites.layers, self.weights):
            is_other = grid.learned or (layer.norm and self.protocol.fold_bn)  # than in an earlier call
            if is_other or not layer.is_again:
                bits += layer.numbers * grid.bits + grid.scale.numel() * (32 + grid.bits) * (grid.bits < FLOAT)
        return bits // 8 + 4 * (self.sites.of - self.sites.numbers)

    def load_grids(self, state: dict[str, Tensor]) -> None:
        """Load the ranges of another such model, ``grids.…`` -> tensor. Raises InputError if they do not fit."""
        given, own = {key.removeprefix(GRIDS): value for key, value in state.items()}, self.grids.state_dict()
        try:
            for name in own.keys() & given.keys():  # torch 2.6 takes the first of several numbers for one
                if given[name].shape != own[name].shape:
                    raise RuntimeError(f"{name} has shape {tuple(given[name].shape)}, not {tuple(own[name].shape)}")
            self.grids.load_state_dict(given)
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"its ranges are those of another network or protocol ({reason})") from error
        if not all(grid.is_sound() for grid in (*self.weights, *self.activations)):
            raise InputError("its ranges have values that no grid has: the file is spoiled; write or copy it again")


class _Quantized(Calls):
    """Rounds the weight before, and the activation after, each call of one pass of ``model``."""

    def __init__(self, model: QuantizedModel):
        super().__init__()
        self.model, self.layers, self.activations = model, 0, 0
        self.folded: list[Tensor] = []  # outputs of layers that have their BatchNorm in them

    def layer(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        number, self.layers = self.layers, self.layers + 1
        given, axis = {**dict(zip(("input", "weight", "bias"), args)), **kwargs}, LAYERS[func]
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        sites = self.model.sites.layers
        if number >= len(sites):
            raise self._changed(f"more than {len(sites)} layers")
        if (axis, weight.shape[axis]) != (sites[number].axis, sites[number].channels):
            raise self._changed(
                f"as layer {self.layers} one of {weight.shape[axis]} channels, where '{sites[number].name}' had "
                f"{sites[number].channels}"
            )
        norm = self._norm(number)
        if norm:
            weight, bias = _folded(weight, bias, norm, axis)
        output = func(x, self.model.round_weight(number, weight), bias, *args[3:], **given)
        if norm:
            self.folded.append(output)
        return output

    def _norm(self, number: int) -> Any:
        """The BatchNorm to fold into a layer, or None."""
        name = self.model.sites.layers[number].norm
        return self.model.model.get_submodule(name) if name and self.model.protocol.fold_bn else None

    def norm(self, args: Any, kwargs: Any) -> Tensor:
        x = args[0] if args else kwargs["input"]
        others = [output for output in self.folded if output is not x]
        if len(others) == len(self.folded):
            return super().norm(args, kwargs)
        self.folded = others  # what normalises the same tensor again is another BatchNorm
        return x

    def activation(self, function: Callable[[Tensor], Tensor], x: Tensor, in_place: bool) -> Tensor:
        number, self.activations = self.activations, self.activations + 1
        if number not in self.model.sites.read_again:
            return self._rounded(number, function(x))
        # Of a copy, because functions save what they are given for their gradient.
        return x.copy_(self._rounded(number, function(x.clone())))

    def _rounded(self, number: int, x: Tensor) -> Tensor:
        return self.model.round_activation(number, x) if number < len(self.model.sites.activations) else x

    def require_all(self) -> None:
        """Raise InputError if the pass made other calls than the one that found them."""
        layers, activations = len(self.model.sites.layers), len(self.model.sites.activations)
        if self.layers < layers or self.activations < activations:
            raise self._changed(
                f"{self.layers} layers and {self.activations} activation functions, instead of {layers} and "
                f"{activations}"
            )

    def _changed(self, called: str) -> InputError:
        return InputError(
            f"the network {type(self.model.model).__name__} called {called}, unlike in its trial; make it call the "
            "same ones in each pass, whatever the number and the values of the images"
        )


def _folded(weight: Tensor, bias: Tensor | None, norm: Any, axis: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the BatchNorm that follows it in them."""
    slope = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        slope = slope * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    bias = shift * slope if norm.bias is None else shift * slope + norm.bias
    return weight * slope.view([-1 if i == axis else 1 for i in range(weight.dim())]), bias


def quantise(network: "Network", protocol: Quantizer, name: str = "student") -> "Network":
    """An independent copy of ``network`` on the grid of ``protocol``, to be trained; ``name`` is its role."""
    if isinstance(network.model, QuantizedModel):
        raise InputError(f"the {network.name} is quantised already; give its weights in float")
    other = network.copy()
    other.name = f"{name} {network.name.partition(' ')[2]} ({protocol.short})"
    require_gradients(other)
    images = network.normalise(trial_images(network.shape, 2, network.device))
    other.model = other.tap.model = QuantizedModel(other.model, protocol, images, network.name)
    return other


# Files: the weights as they are in float, the ranges, and the protocol.


def stated(model: nn.Module) -> dict[str, Any]:
    """What a file of the weights of ``model`` has to state beside them: the protocol, if it is quantised."""
    return {"quantization": json.dumps(asdict(model.protocol))} if isinstance(model, QuantizedModel) else {}


def of_file(metadata: dict[str, Any], path: Any) -> Quantizer | None:
    """The protocol that the file ``path`` states; None if its network is in float. Raises InputError."""
    if "quantization" not in metadata:
        return None
    try:
        protocol = Quantizer(**json.loads(metadata["quantization"]))
        for opt in list_options(QuantizeConfig):
            if opt.section == "quantizer" and not opt.accepts(value := getattr(protocol, opt.name)):
                raise OptionError(f"{opt.name} cannot be {value!r}; it takes {opt.allowed}")
        protocol.validate()
    except Exception as error:  # of whatever stands there
        raise InputError(f"{path} states a quantization that this version does not know ({error})") from error
    return protocol


def split(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a :class:`QuantizedModel` as those of the model in it, by its own names, and its ranges."""
    ranges = {name: tensor for name, tensor in weights.items() if name.startswith(GRIDS)}
    return {name.removeprefix("model."): weights[name] for name in weights if name not in ranges}, ranges


def restored(network: "Network", protocol: Quantizer, grids: dict[str, Tensor], name: str) -> "Network":
    """``network``, with its weights, as it was quantised: on the grids of a file."""
    quantised = quantise(network, protocol, name)
    assert isinstance(quantised.model, QuantizedModel)
    quantised.model.load_grids(grids)
    quantised.notes.append(f"it is quantised, {protocol.sentence}")
    return quantised
