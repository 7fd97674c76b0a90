"""A network from its name: registered, user-defined, torchvision's or timm's."""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import nn

from datafree.errors import InputError, MissingError, OptionError
from datafree.plugins import FAILURES, beside, first_line, is_custom, load_custom

from . import MODELS

# These two return auxiliary logits in training mode unless told otherwise.
AUXILIARY_HEADS = ("googlenet", "inception_v3")
Factory = Callable[..., nn.Module]  # (num_classes, in_channels, pretrained=False) -> network


def build_model(name: str, num_classes: int, in_channels: int = 3, pretrained: bool = False) -> nn.Module:
    """The network called ``name``, randomly initialised; it maps images to logits (N, num_classes).

    ``name`` is a key of ``MODELS``, ``torchvision:NAME``, ``timm:NAME``, ``path/to/file.py:factory``,
    ``package.module:factory`` or a classification model of torchvision, looked up in this order. A factory is called
    with those of ``num_classes`` and ``in_channels`` (or ``in_chans``) that its signature names; if it takes
    ``**kwargs``, with ``num_classes`` in any case.

    pretrained: with the weights that the library or the factory brings, and its number of classes. A factory that has
    an argument ``pretrained`` gets True, one that has ``weights`` gets "DEFAULT", both without ``num_classes``.

    Raises OptionError for an unknown name, and InputError for a factory that cannot be imported or fails, or one whose
    weights differ from one call to the next.
    """
    factory = find_model(name)
    if not pretrained:
        return factory(num_classes, in_channels)
    if name in MODELS:
        raise InputError(f"{name} has no weights of its own; name a file of them")
    model, again = (factory(num_classes, in_channels, pretrained=True) for _ in range(2))
    _check_equal(model, again, name)
    return model


def find_model(name: str) -> Factory:
    """(num_classes, in_channels) -> the network called ``name``; raises OptionError for an unknown name."""
    if name in MODELS:
        return MODELS[name]
    library, _, short = name.partition(":")
    if library in LIBRARIES:
        make, names = LIBRARIES[library]
        known = names()
        if short.partition(".")[0] in known:  # timm's names may end in that of their weights, after a dot
            return partial(make, short)
        if "." not in library:  # what else timm.models has is called as any function of a package
            nearest = difflib.get_close_matches(short, known, n=3)
            hint = f": the nearest are {', '.join(nearest)}" * bool(nearest)
            raise OptionError(f"{library} has no model '{short}'{hint}")
    if is_custom(name):
        return partial(_from_factory, name)
    if name in _torchvision_names():
        return partial(_from_torchvision, name)
    nearest = difflib.get_close_matches(name, {*MODELS, *_torchvision_names()}, n=3)
    hint = f"the nearest are {', '.join(nearest)}" if nearest else f"known models are {', '.join(MODELS)}"
    raise OptionError(
        f"there is no model '{name}': {hint}; a user-defined one is named path/to/file.py:factory, timm's are timm:NAME"
    )


def check_model(name: str) -> None:
    """Raise OptionError or InputError for a name that is none of a model, before anything is computed."""
    find_model(name)
    if is_custom(name) and not is_from_library(name):
        load_custom(name)


def is_from_library(name: str) -> bool:
    """Whether ``name`` is that of a network of torchvision or timm, so that no code of the user's makes it."""
    return name.partition(":")[0] in ("torchvision", "timm")


def is_known(name: str) -> bool:
    """Whether ``name`` alone tells which network it is, here and elsewhere: no user-defined one, of whatever file."""
    return bool(name) and (not is_custom(name) or is_from_library(name))


def torchvisions_networks(name: str) -> list[str]:
    """torchvision's networks that the registered ``name`` is a version of, and other versions of them."""
    if name not in MODELS:
        return []
    former = {"mobilenetv2": "mobilenet_v2", "shufflenetv2": "shufflenet_v2_x1_0"}.get(name, name)
    versions = [f"{name}_torchvision"] if f"{name}_torchvision" in MODELS else []
    return versions + [f"torchvision:{n}" for n in (former, f"{former}_bn") if n in _torchvision_names()]


def own_normalisation(model: nn.Module) -> dict[str, tuple[float, ...]]:
    """The mean and std, per channel in [0, 1] units, that ``model.pretrained_cfg`` states, as timm's networks do."""
    stated = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    found = {
        key: stated.get(key) if isinstance(stated, dict) else getattr(stated, key, None) for key in ("mean", "std")
    }
    return {key: tuple(values) for key, values in found.items() if isinstance(values, (list, tuple))}


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise InputError("models called timm:NAME need the package timm: pip install timm") from error
    return timm


def _timm_names() -> list[str]:
    return _timm().list_models()


def _from_torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool = False) -> nn.Module:
    if in_channels != 3:
        raise InputError(
            f"torchvision's {name} takes images of 3 channels, not {in_channels}; "
            "name a user-defined model as path/to/file.py:factory"
        )
    options: dict[str, Any] = {"aux_logits": False} if name in AUXILIARY_HEADS else {}
    if not pretrained:
        options |= {"init_weights": True} if options else {}
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    try:
        weights = torchvision.models.get_model_weights(name).DEFAULT
        model = torchvision.models.get_model(name, weights=weights, **options)
    except Exception as error:  # a download may fail in many ways
        raise MissingError(
            f"torchvision's weights of {name} cannot be had: {first_line(error)}; download them on a machine "
            "with internet access and give the file by --teacher_weights"
        ) from error
    transform = weights.transforms()
    # As timm's networks state theirs.
    model.pretrained_cfg = {"mean": tuple(transform.mean), "std": tuple(transform.std)}
    return model


def _from_timm(name: str, num_classes: int, in_channels: int, pretrained: bool = False) -> nn.Module:
    # timm would replace a pretrained head by a random one if it were given another number of classes.
    classes = {} if pretrained else {"num_classes": num_classes}
    try:
        return _timm().create_model(name, pretrained=pretrained, in_chans=in_channels, **classes)
    except Exception as error:
        raise InputError(f"timm cannot build {name} for {in_channels} channels: {first_line(error)}") from error


def _from_factory(name: str, num_classes: int, in_channels: int, pretrained: bool = False) -> nn.Module:
    factory = load_custom(name)
    try:
        with beside(name):
            model = factory(**_arguments(factory, num_classes, in_channels, pretrained))
    except FAILURES as error:
        raise InputError(
            f"'{name}' failed when called with those of num_classes={num_classes} and "
            f"in_channels={in_channels} that it takes: {first_line(error)}; other arguments need defaults, or name "
            "a function that calls it with them"
        ) from error
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"'{name}' returned a TorchScript module, which has no hooks; let it return the torch.nn.Module that was "
            "scripted, with its state_dict"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"'{name}' returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _check_equal(model: nn.Module, again: nn.Module, name: str) -> None:
    """Raise InputError if two calls of a factory gave different weights: some were not loaded, but random."""
    first, second = model.state_dict(), again.state_dict()
    tensors = {n: t for n, t in first.items() if torch.is_tensor(t) and not nn.parameter.is_lazy(t)}
    random = [n for n, t in tensors.items() if n not in second or not torch.equal(t, second[n])]
    if random:
        raise InputError(
            f"{name} does not bring all its weights: {len(random)} of {len(first)} tensors differ from one call to the "
            f"next ({', '.join(random[:3])}), so they are random; name a file of weights"
        )


def _arguments(factory: Callable[..., Any], num_classes: int, in_channels: int, pretrained: bool) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments: dict[str, Any] = {}
    brings = {"pretrained": True, "weights": "DEFAULT"}
    switch = next((key for key in brings if pretrained and key in parameters), None)
    if switch:
        arguments[switch] = brings[switch]
    needs_classes = "num_classes" in parameters and parameters["num_classes"].default is inspect.Parameter.empty
    if needs_classes or (not switch and ("num_classes" in parameters or open_ended)):
        arguments["num_classes"] = num_classes
    for key in ("in_channels", "in_chans"):
        if key in parameters:
            arguments[key] = in_channels
    return arguments


# library -> (factory of its networks, their names). Modules that the libraries keep them in are known, too.
LIBRARIES: dict[str, tuple[Callable[..., nn.Module], Callable[[], list[str]]]] = {
    "torchvision": (_from_torchvision, _torchvision_names),
    "torchvision.models": (_from_torchvision, _torchvision_names),
    "timm": (_from_timm, _timm_names),
    "timm.models": (_from_timm, _timm_names),
}
