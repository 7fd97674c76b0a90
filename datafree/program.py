"""The skeleton of a program: read the options, then plan and run its trainings."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

from datafree import cli, launch
from datafree.config import CONFIGS
from datafree.errors import exit_on_input_error
from datafree.options import Invocation
from datafree.screen import silence

__all__ = ["Runner", "exit_on_input_error", "read", "run"]

if TYPE_CHECKING:
    from datafree.session import Session
    from datafree.training import Training

Trainings = Callable[["Session"], "Iterator[Training]"]


class Runner(Protocol):
    """What a program is given to, as :func:`run`: it does something with what the program consists of."""

    def __call__(
        self,
        config_class: type,
        trainings: Trainings,
        *,
        description: str,
        method_files: Mapping[str, Any] | None = None,
        examples: str = "",
        derive_card: bool = False,
    ) -> None: ...


def read(
    config_class: type, *, description: str, method_files: Mapping[str, Any] | None = None, examples: str = ""
) -> tuple[Any, Invocation]:
    """The command line as a valid ``config_class`` and what else it asks for; --print_config prints it and exits."""
    others = [other for other in CONFIGS if other is not config_class]
    config, call = cli.parse(
        config_class,
        sys.argv[1:],
        description=description,
        method_files=method_files,
        other_configs=others,
        examples=examples,
    )
    if call.print_config:
        print(cli.to_yaml(config), end="")
        sys.exit()
    config.validate()
    return config, call


def run(
    config_class: type,
    trainings: Trainings,
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


def _run(config_class: type, trainings: Trainings, derive_card: bool, **options: Any) -> None:
    config, call = read(config_class, **options)
    # These import torch, which takes seconds; --help and mistakes in the form of options are answered before.
    from datafree.session import Session

    session = Session(config, derive_card=derive_card, write=not call.dry_run)
    with closing(trainings(session)) as in_turn:  # type: ignore[type-var]  # a generator, which may hold a folder
        if call.dry_run:
            from datafree import cost, distributed

            if not launch.rank():  # by time: each process would take other decisions
                with distributed.apart():
                    cost.preview(session, in_turn)
            return
        from datafree.training import run_training

        for training in in_turn:
            run_training(session, training)
