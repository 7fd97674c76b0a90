"""Errors that the user can correct: a message of one sentence and a non-zero exit code."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from datafree.screen import occupy_closed_streams, silence
from datafree.signals import answer, handled, leave


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
    """Run ``main()``; an :class:`InputError` becomes one line on stderr and its exit code.

    A signal that asks to end (see ``signals``) becomes a line and 128 + its number; Ctrl-C is one. Output that could
    not be written is code 1, or 141 without a line if its reader has gone.
    """
    occupy_closed_streams()
    code: Any = None
    try:
        with handled(leave):
            main()
    except InputError as error:
        with suppress(OSError):
            print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        answer("interrupted; --resume auto continues from the last checkpoint")
        code = 130
    except SystemExit as stop:
        code = stop.code
    except OSError:  # of print, or else it is none that this function knows of
        if (code := _flush_output(None)) is None:
            raise
    code = _flush_output(code)
    if code is not None:
        sys.exit(code)


def _flush_output(code: Any) -> Any:
    """Write what stdout holds back -> the exit code, which was ``code``; at its own end Python would lose a failure."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        silence("stdout")
        return code or 141
    except (OSError, ValueError) as error:
        silence("stdout")
        answer(f"error: could not write the output ({getattr(error, 'strerror', None) or error})")
        return code or 1
    return code
