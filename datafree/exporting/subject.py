"""What is exported: the network of a run or of a file of weights, and the card of its images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datafree import checkpoint
from datafree.class_order import seen_classes, stated_order
from datafree.config import Trained
from datafree.datasets.cards import DatasetCard
from datafree.datasets.loading import resolve_card
from datafree.errors import InputError
from datafree.network import Network, stated_card
from datafree.plan import check_order


@dataclass
class Subject:
    """A trained network.

    network: frozen, on the CPU; of class-incremental learning, with outputs for the classes that it has seen alone.
    card: of its images. order: the card's class of each output. file: of its weights. notes: sentences for the plan.
    """

    network: Network
    card: DatasetCard
    order: tuple[int, ...]
    file: Path
    notes: list[str]


def load_subject(options: Trained, data_root: str) -> Subject:
    """The network that the options name, which :func:`datafree.exporting.metadata.described` can describe.

    Raises InputError for weights that cannot be used, and for a card that is not that of the network.
    """
    given = resolve_card(options.dataset, data_root, options.card) if options.dataset or options.card else None
    file = checkpoint.weights_file(options.weights)
    network = Network.from_file(file, options.model, given, mean=options.mean, std=options.std, key=options.weights_key)
    stated = network.metadata
    card = given or with_classes(stated_card(stated, file), stated.get("classes"))
    if network.num_classes != card.num_classes:
        raise InputError(
            f"the {network.name} has {network.num_classes} classes but {card.name} has {card.num_classes}; name the "
            "right data set by --dataset or --card"
        )
    order = stated_order(network, card.num_classes) or tuple(range(card.num_classes))
    seen = seen_classes(network, card.num_classes)
    notes = check_order(network, card.classes)
    if seen < card.num_classes:
        notes.append(f"It has learned {seen} of {card.num_classes} classes; the files have outputs for these alone.")
    added: dict[str, Any] = {"dataset": card.name, "num_classes": card.num_classes}
    added |= {"classes": list(card.classes)} if card.classes else {}
    added |= {"model": options.model} if options.model else {}
    network.metadata = {**stated, **added}
    return Subject(network.restricted_to(range(seen)).freeze(), card, order[:seen], file, notes)


def with_classes(card: DatasetCard, names: Any) -> DatasetCard:
    """``card`` with the names of the classes that a file of weights states, if it states one for each."""
    if not isinstance(names, (list, tuple)) or len(names) != card.num_classes:
        return card
    return replace(card, classes=tuple(map(str, names)))
