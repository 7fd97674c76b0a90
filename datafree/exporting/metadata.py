"""What an exported file states beside its network: the card of its images, where it comes from, how it is called."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from datafree import quantizer
from datafree.exporting.tracing import INPUTS
from datafree.network import Network
from datafree.plugins import is_custom
from datafree.runtime import environment

TRAINING = ("epoch", "acc1", "commit", "options")  # what a file of weights states of the training
ORDER = ("class_order", "seen")  # of class-incremental learning


def described(network: Network, takes: str = "floats") -> dict[str, Any]:
    """What a user of the file must know of ``network``, and where the file comes from; no path of this machine."""
    stated, provenance = network.metadata, environment(torch.device("cpu"))
    found = {
        "network": network.name,
        "model": without_folder(stated.get("model", "")),
        "dataset": stated.get("dataset", ""),
        "classes": classes_of(network),
        "num_classes": network.num_classes,
        "shape": network.shape,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "input": INPUTS[takes],
        "output": "logits: float32 (N, classes)",
        "training": training_of(network),
    }
    kept = {key: value for key, value in found.items() if value not in ("", (), [], {})}
    return kept | {"provenance": {key: provenance[key] for key in ("version", "commit", "dirty", "torch", "time")}}


def facts(network: Network) -> dict[str, Any]:
    """What a file of weights states, so that :meth:`datafree.network.Network.from_file` builds ``network`` from it."""
    stated = network.metadata
    return {
        "model": without_folder(stated.get("model", "")),
        "dataset": stated.get("dataset", network.name),
        "num_classes": stated.get("num_classes", network.num_classes),
        "classes": stated.get("classes", []),
        "shape": list(network.shape),
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        **{key: stated[key] for key in ORDER if key in stated},
        **training_of(network),
        **quantizer.stated(network.model),
        "provenance": described(network)["provenance"],
    }


def training_of(network: Network) -> dict[str, Any]:
    """What is known of the training of ``network``: epoch, accuracy, commit, options."""
    known = {key: network.metadata[key] for key in TRAINING if key in network.metadata}
    if isinstance(options := known.get("options"), dict):
        known["options"] = {name: without_folder(value) for name, value in options.items()}
    return known


def classes_of(network: Network) -> list[str]:
    """The names of the classes in the order of the outputs; none if they are unknown."""
    names, order = network.metadata.get("classes", ()), network.metadata.get("class_order", ())
    if not isinstance(names, (list, tuple)) or not isinstance(order, (list, tuple)) or not names:
        return []
    in_order = [str(names[k]) for k in order] if sorted(order) == list(range(len(names))) else list(map(str, names))
    return in_order[: network.num_classes]


def without_folder(value: Any) -> Any:
    """A value without the folder of the file that it names: net.py:small for /path/to/net.py:small."""
    if not isinstance(value, str) or not is_custom(value):
        return value
    file, _, name = value.rpartition(":")
    return f"{Path(file).name}:{name}"


def as_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The values as texts: what is none becomes JSON."""
    return {key: value if isinstance(value, str) else as_json(value) for key, value in metadata.items()}


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
