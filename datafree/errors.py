"""Errors that the user can correct: a message of one sentence and a non-zero exit code."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Invalid input to a program; the message names the culprit and the remedy."""

    exit_code = 1


class OptionError(InputError):
    """An unknown option, or an invalid value of one."""

    exit_code = 2


def usage(text: str, at_least: int) -> None:
    """Print ``text`` and exit if --help is given (code 0), or fewer than ``at_least`` arguments are (code 2)."""
    wants_help = bool({"-h", "--help"} & set(sys.argv))
    if wants_help or len(sys.argv) <= at_least:
        print(text.strip())
        sys.exit(0 if wants_help else 2)


@contextmanager
def out_of_memory_in(phase: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory in the block, on any device, into one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise InputError(f"out of memory during {phase}; lower {remedy}, or use smaller networks") from error


def exit_on_input_error(main: Callable[[], object]) -> None:
    """Run ``main()``; an :class:`InputError` becomes one line on stderr and its exit code, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; --resume auto continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
