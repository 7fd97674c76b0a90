"""What a run shows on the terminal: a copy of what log.txt holds, whose failures end nothing. No torch is imported."""

import os
import sys
from contextlib import suppress

from tqdm import tqdm


def show(line: str) -> None:
    """Print a line to stdout, above any progress bar; where that fails, the line is in the log alone."""
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except UnicodeEncodeError:  # of a terminal with few letters
        show(ascii(line)[1:-1])
    except (OSError, ValueError, AttributeError):  # closed, full, or absent
        silence("stdout")


def silence(name: str) -> None:
    """Send what ``name`` (stdout or stderr) would still get to nowhere, also what it holds back for the end."""
    null = open(os.devnull, "w", encoding="utf-8")
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(null.fileno(), getattr(sys, name).fileno())
    setattr(sys, name, null)


def occupy_closed_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed, or a file of the run might get its output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
