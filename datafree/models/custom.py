"""A network from what a person types: a registered name, a factory of one's own, or torchvision's name."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import torchvision
from torch import nn

from datafree.errors import InputError, OptionError

from . import MODELS

# These two return further logits in training mode unless told otherwise.
AUXILIARY_HEADS = ("googlenet", "inception_v3")


def build_model(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The network called ``name``, with random weights; it answers images with logits (N, num_classes).

    ``name`` is a key of ``MODELS``, ``path/to/file.py:factory``, ``package.module:factory`` or a
    classification model of torchvision, looked for in this order. A factory is called with those of
    ``num_classes`` and ``in_channels`` that its signature names; if it has ``**kwargs``, with ``num_classes``
    in any case.

    Raises OptionError for an unknown name, and InputError for a factory that cannot be had or used.
    """
    if name in MODELS:
        return MODELS[name](num_classes, in_channels)
    if ":" in name:
        return _from_factory(name, num_classes, in_channels)
    if name in _torchvision_names():
        return _from_torchvision(name, num_classes, in_channels)
    nearest = difflib.get_close_matches(name, {*MODELS, *_torchvision_names()}, n=3)
    hint = f"the nearest are {', '.join(nearest)}" if nearest else f"there are {', '.join(MODELS)}"
    raise OptionError(f"there is no model '{name}': {hint}; one of your own is named path/to/file.py:factory")


def _torchvision_names():
    return torchvision.models.list_models(module=torchvision.models)


def _from_torchvision(name, num_classes, in_channels):
    if in_channels != 3:
        raise InputError(
            f"torchvision's {name} takes images of 3 channels, not {in_channels}: "
            "name a model of your own as path/to/file.py:factory"
        )
    options = {"aux_logits": False, "init_weights": True} if name in AUXILIARY_HEADS else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def _from_factory(name, num_classes, in_channels):
    factory = load_object(name)
    try:
        model = factory(**_arguments(factory, num_classes, in_channels))
    except Exception as error:
        raise InputError(
            f"'{name}' failed when called with those of num_classes={num_classes} and "
            f"in_channels={in_channels} that it takes: {_brief(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"'{name}' returned a {type(model).__name__}: it has to return a torch.nn.Module")
    return model


def load_object(name):
    """The function or class called ``path/to/file.py:name`` or ``package.module:name``; else an InputError."""
    source, _, attribute = name.rpartition(":")
    found = getattr(_import(source), attribute, None)
    if not callable(found):
        raise InputError(
            f"'{source}' has no function or class '{attribute}': check the part of '{name}' after the colon"
        )
    return found


def _arguments(factory, num_classes, in_channels):
    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments = {}
    if "num_classes" in parameters or open_ended:
        arguments["num_classes"] = num_classes
    if "in_channels" in parameters:
        arguments["in_channels"] = in_channels
    return arguments


def _import(source):
    """The module in a ``.py`` file, or of a package."""
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise InputError(f"there is no file '{source}': check the path before the colon")
    try:
        return _import_file(Path(source).resolve()) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise InputError(f"'{source}' cannot be imported: {_brief(error)}") from error


def _import_file(path):
    # The full path as the module's name: a file called random.py must not replace Python's own random.
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _brief(error):
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"
