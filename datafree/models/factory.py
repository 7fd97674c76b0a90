"""A network from its name: registered, user-defined, or torchvision's."""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torchvision
from torch import nn

from datafree.errors import InputError, OptionError
from datafree.plugins import first_line, is_custom, load_object

from . import MODELS

# These two return auxiliary logits in training mode unless told otherwise.
AUXILIARY_HEADS = ("googlenet", "inception_v3")


def build_model(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The network called ``name``, randomly initialised; it maps images to logits (N, num_classes).

    ``name`` is a key of ``MODELS``, ``path/to/file.py:factory``, ``package.module:factory`` or a
    classification model of torchvision, looked up in this order. A factory is called with those of
    ``num_classes`` and ``in_channels`` that its signature names; if it takes ``**kwargs``, with ``num_classes``
    in any case.

    Raises OptionError for an unknown name, and InputError for a factory that cannot be imported or fails.
    """
    return find_model(name)(num_classes, in_channels)


def find_model(name: str) -> Callable[[int, int], nn.Module]:
    """(num_classes, in_channels) -> the network called ``name``; raises OptionError for an unknown name."""
    if name in MODELS:
        return MODELS[name]
    if is_custom(name):
        return partial(_from_factory, name)
    if name in _torchvision_names():
        return partial(_from_torchvision, name)
    nearest = difflib.get_close_matches(name, {*MODELS, *_torchvision_names()}, n=3)
    hint = f"the nearest are {', '.join(nearest)}" if nearest else f"known models are {', '.join(MODELS)}"
    raise OptionError(f"there is no model '{name}': {hint}; a user-defined one is named path/to/file.py:factory")


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _from_torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    if in_channels != 3:
        raise InputError(
            f"torchvision's {name} takes images of 3 channels, not {in_channels}; "
            "name a user-defined model as path/to/file.py:factory"
        )
    options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name in AUXILIARY_HEADS else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def _from_factory(name: str, num_classes: int, in_channels: int) -> nn.Module:
    factory = load_object(name)
    try:
        model = factory(**_arguments(factory, num_classes, in_channels))
    except Exception as error:
        raise InputError(
            f"'{name}' failed when called with those of num_classes={num_classes} and "
            f"in_channels={in_channels} that it takes: {first_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"'{name}' returned a {type(model).__name__}; it must return a torch.nn.Module")
    return model


def _arguments(factory: Callable[..., Any], num_classes: int, in_channels: int) -> dict[str, int]:
    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments = {}
    if "num_classes" in parameters or open_ended:
        arguments["num_classes"] = num_classes
    if "in_channels" in parameters:
        arguments["in_channels"] = in_channels
    return arguments
