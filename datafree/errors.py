"""Errors: a message of one line and a non-zero exit code, and how values from outside are shown in it."""

import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import Repr
from typing import Any

from datafree import signals
from datafree.screen import occupy_closed_streams, silence
from datafree.signals import answer, handled, leave

LONGEST_VALUE, LONGEST_MESSAGE = 80, 900  # characters
SHOW_TRACEBACK = "RGAL_TRACEBACK"  # of an error that this program did not foresee: variable of the environment


class InputError(Exception):
    """Invalid input to a program; the message names the culprit and the remedy."""

    exit_code = 1


class MissingError(InputError):
    """Weights or images that are not there, or not yet: a dry run goes on without them."""


class OptionError(InputError):
    """An unknown option, or an invalid value of one."""

    exit_code = 2


def printable(text: str) -> str:
    """``text`` on one line, without characters that could move a terminal's cursor: these as escape sequences."""
    line = re.sub(r"\s*[\r\n]\s*", " ", text.strip())
    return line if line.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in line)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def cut(text: str, most: int) -> str:
    """``text`` without its middle if it has more than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 4 :]}"


def one_line(text: str) -> str:
    """A message as it may be printed: printable, on one line, and not too long."""
    return cut(printable(cut(text, LONGEST_MESSAGE)), LONGEST_MESSAGE)


def short(name: str) -> str:
    """A name from outside as a message shows it: cut, and printable."""
    return printable(cut(name, LONGEST_VALUE))


def shown(value: Any) -> str:
    """A value from outside as a message shows it: as Python writes it, cut, and printable."""
    limited = Repr()  # does not follow what is nested, which aliases may make endless
    limited.maxlevel, limited.maxlist, limited.maxtuple, limited.maxstring = 3, 12, 12, LONGEST_VALUE
    try:
        return cut(printable(limited.repr(value)), LONGEST_VALUE)
    except Exception:  # such as a whole number of thousands of digits
        return f"a {type(value).__name__} that cannot be shown"


def batch_or_parts(batch: str, micro_batch: int) -> str:
    """What to lower where a step does not fit, for :func:`out_of_memory_in`. batch: the option of its size."""
    if micro_batch > 1:
        return f"--micro_batch {micro_batch} or {batch}"
    return f"{batch}" + ", or give a --micro_batch, by which it is computed in parts" * (micro_batch == 0)


@contextmanager
def out_of_memory_in(phase: str, remedy: str) -> Iterator[None]:
    """Turn running out of memory in the block, on any device, into one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"out of memory during {phase}; lower {remedy}, or use smaller networks") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, or torch on any device, was refused memory."""
    refused = "out of memory|can't allocate memory|STATUS_ALLOC_FAILED"
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(re.search(refused, str(error)))


@contextmanager
def traceback_in(log: Path) -> Iterator[None]:
    """Turn an exception that nothing else caught into an InputError, and append its traceback to the file ``log``."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        with suppress(OSError), open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
        raise InputError(_unforeseen(error, f"its traceback is in {log}")) from error


def exit_on_input_error(main: Callable[[], object]) -> None:
    """Run ``main()``; an :class:`InputError` becomes one line on stderr and its exit code.

    So does every other exception, with exit code 1, in a line that says how to see its traceback. A signal that asks to
    end (see ``signals``) becomes a line and 128 + its number; Ctrl-C is one. Output that could not be written is code
    1, or 141 without a line if its reader has gone.
    """
    occupy_closed_streams()
    with suppress(AttributeError, OSError, ValueError):  # what replaces it in a notebook takes any text
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signals.advice = ""
    code: Any = None
    try:
        with handled(leave):
            main()
    except InputError as error:
        with suppress(OSError):
            print(f"error: {one_line(str(error))}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        answer(f"interrupted{signals.advice}")
        code = 130
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        # An OSError may be that of print, which is found again when stdout is flushed, unless all of it was tried.
        if isinstance(error, OSError):
            code = _flush_output(141 if isinstance(error, BrokenPipeError) and _is_unread() else None)
        if code is None:
            code = _end_unforeseen(error)
    code = _flush_output(code)
    if code is not None:
        sys.exit(code)


def _end_unforeseen(error: Exception) -> int:
    """Say in a line what nothing else caught -> exit code; raise it if its traceback is wanted."""
    if os.environ.get(SHOW_TRACEBACK):
        raise error
    way = f"{SHOW_TRACEBACK}=1 in the environment shows its traceback"
    with suppress(OSError):
        print(f"error: {_unforeseen(error, way)}", file=sys.stderr)
    return 1


def _unforeseen(error: Exception, way: str) -> str:
    """One line about an error that nothing else caught, and the way to its traceback."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    if is_out_of_memory(error):
        what = "out of memory; use smaller networks, batches or images, or end other programs"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        what = f"{short(str(error.filename))}: {error.strerror}"
    else:
        what = "unexpected " + cut(printable(f"{type(error).__name__}: {error}"), LONGEST_MESSAGE // 2)
    return one_line(f"{what} (line {where.lineno} of {where.filename}); {way}")


def _is_unread() -> bool:
    """Whether stdout is a pipe whose reader has gone."""
    with suppress(OSError, ValueError, AttributeError):
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in pipe.poll(0))
    return False


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
