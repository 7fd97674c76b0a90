"""Outputs in another order than the data card's classes, as class-incremental learning leaves them: what the file of a
network's weights states of that, and the same network with its outputs in the card's order."""

import torch
from torch import nn

from datafree.errors import InputError, shown
from datafree.network import Network

STATED = {"class_order", "seen", "task"}  # what such a file states beside what all files of these programs do


def stated_order(network: Network, classes: int) -> tuple[int, ...] | None:
    """The order of the classes that the file of the network's weights states; None if it states none.

    Raises InputError if it is no order of ``classes`` classes; so does :func:`seen_classes` for an impossible number.
    """
    stated = network.metadata.get("class_order")
    whole = isinstance(stated, (list, tuple)) and all(type(number) is int for number in stated)
    if stated and not (whole and sorted(stated) == list(range(classes))):
        raise InputError(
            f"the file of the {network.name}'s weights states the order of classes {shown(stated)}, which is none of "
            f"{classes} classes; give other weights"
        )
    return tuple(stated) if stated else None


def seen_classes(network: Network, classes: int) -> int:
    """The number of classes that the file of the network's weights says it has learned; all if it says nothing."""
    seen = network.metadata.get("seen", classes)
    if type(seen) is not int or not 0 < seen <= classes:
        raise InputError(
            f"the file of the {network.name}'s weights states that it knows {shown(seen)} of {classes} classes; give "
            "other weights"
        )
    return seen


def put_in_card_order(network: Network, classes: int) -> None:
    """Permute the head of a network of class-incremental learning, whose outputs are in the order of arrival.

    Does nothing to any other, whose file may use the same words for something else. Raises InputError for one that has
    not learned all ``classes``, and for one without a layer as its head.
    """
    if not STATED < network.metadata.keys():
        return
    order, seen = stated_order(network, classes), seen_classes(network, classes)
    if seen < classes:
        raise InputError(
            f"the {network.name} has learned {seen} of the {classes} classes, as the file of its weights states; give "
            "those of the last task of its run"
        )
    network.metadata = {key: value for key, value in network.metadata.items() if key not in STATED}
    if order is None or order == tuple(range(classes)):
        return
    head = network.tap.head
    if not isinstance(head, (nn.Linear, nn.Conv2d)) or len(head.weight) != classes:
        raise InputError(
            f"the outputs of the {network.name} are in the order in which its classes arrived, {shown(list(order))}, "
            "and it has no layer as its head whose outputs could be put in the order of the data card; list `classes` "
            "in that order in the card"
        )
    places = torch.tensor(order, device=head.weight.device).argsort()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter[places])
    network.notes.append(
        f"its outputs, which were in the order in which its classes arrived ({', '.join(map(str, order))}), were put "
        "in the order of the data card"
    )
