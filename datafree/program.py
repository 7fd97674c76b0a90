"""The skeleton of a program: read the options, then plan and run its trainings."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from datafree import cli, launch
from datafree.config import CONFIGS
from datafree.errors import exit_on_input_error
from datafree.screen import silence

__all__ = ["exit_on_input_error", "run"]

if TYPE_CHECKING:
    from datafree.session import Session
    from datafree.training import Training


def run(
    config_class: type,
    trainings: "Callable[[Session], Iterator[Training]]",
    *,
    description: str,
    method_files: Mapping[str, Any] | None = None,
    examples: str = "",
    derive_card: bool = False,
) -> None:
    """Read the command line into a ``config_class``, then run what ``trainings`` yields, in turn.

    Of several processes, which torchrun starts, all do so.

    trainings: session -> the trainings of the program; between two of them it may use the result of the first.
    derive_card: whether the training images may be opened to derive the data card.
    """
    options = {"description": description, "method_files": method_files, "examples": examples}
    if launch.processes() == 1:
        _run(config_class, trainings, derive_card, **options)
        return
    if launch.rank():
        silence("stdout")  # the first process speaks for all
    from datafree import distributed

    with distributed.one_run():
        _run(config_class, trainings, derive_card, **options)


def _run(
    config_class: type, trainings: "Callable[[Session], Iterator[Training]]", derive_card: bool, **options: Any
) -> None:
    others = [other for other in CONFIGS if other is not config_class]
    config, call = cli.parse(config_class, sys.argv[1:], other_configs=others, **options)
    if call.print_config:
        print(cli.to_yaml(config), end="")
        return
    config.validate()
    # These import torch, which takes seconds; --help and mistakes in the form of options are answered before.
    from datafree.session import Session
    from datafree.training import run_training

    session = Session(config, derive_card=derive_card, write=not call.dry_run)
    with closing(trainings(session)) as in_turn:  # type: ignore[type-var]  # a generator, which may hold a folder
        for training in in_turn:
            run_training(session, training, dry_run=call.dry_run)
