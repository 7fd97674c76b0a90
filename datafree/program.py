"""The skeleton of a program: read the options, then plan and run its trainings."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datafree import cli, launch, signals
from datafree.config import CONFIGS
from datafree.errors import exit_on_input_error
from datafree.options import Invocation
from datafree.screen import silence

__all__ = ["Program", "exit_on_input_error", "run"]

if TYPE_CHECKING:
    from datafree.session import Session
    from datafree.training import Training


@dataclass(frozen=True)
class Program:
    """What a program consists of.

    config_class: of its options. trainings: session -> the trainings of the program; between two of them it may use
    the result of the first. method_files: what --method may name. description, examples: for --help. derive_card:
    whether the training images may be opened to derive the data card.
    """

    config_class: type
    trainings: "Callable[[Session], Iterator[Training]]"
    description: str
    method_files: Mapping[str, Any] | None = None
    examples: str = ""
    derive_card: bool = False

    def parse(self, words: Sequence[str]) -> tuple[Any, Invocation]:
        """The words of a command line as a ``config_class`` and what else they ask for."""
        return cli.parse(
            self.config_class,
            words,
            description=self.description,
            method_files=self.method_files,
            other_configs=[other for other in CONFIGS if other is not self.config_class],
            examples=self.examples,
        )

    def read(self) -> tuple[Any, Invocation]:
        """The command line, valid, as of :meth:`parse`; --print_config prints it and exits."""
        config, call = self.parse(sys.argv[1:])
        if call.print_config:
            print(cli.to_yaml(config), end="")
            sys.exit()
        config.validate()
        return config, call


def run(program: Program) -> None:
    """Read the command line, then run what the program's ``trainings`` yields, in turn.

    Of several processes, which torchrun starts, all do so.
    """
    signals.let_resume()
    if launch.processes() == 1:
        _run(program)
        return
    if launch.rank():
        silence("stdout")  # the first process speaks for all
    from datafree import distributed

    with distributed.one_run():
        _run(program)


def _run(program: Program) -> None:
    config, call = program.read()
    # These import torch, which takes seconds; --help and mistakes in the form of options are answered before.
    from datafree import cost
    from datafree.session import Session

    session = Session(config, derive_card=program.derive_card, write=not call.dry_run)
    with closing(program.trainings(session)) as in_turn:  # type: ignore[type-var]  # a generator, which may hold a folder
        if call.dry_run:
            from datafree import distributed

            if not launch.rank():  # by time: each process would take other decisions
                with distributed.apart():
                    cost.preview(session, in_turn)
            return
        from datafree.training import run_training

        for training in in_turn:
            run_training(session, training, cost.lay_plan)
