"""Signals that ask a program to end: answered at once by a line, and obeyed within a step. No torch is imported."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from datafree import launch

# Ctrl-C; a scheduler; its warnings before that (Slurm, Grid Engine, a limit of CPU time); a terminal that is closed.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")
ENDING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
Handler = Callable[[int, FrameType | None], None]
_is_ending = False  # by an error, whose line a signal must not cut off
advice = ""  # what follows the line of a signal that ended the program


class Stopped(BaseException):
    """Ends a round of synthesis that a signal stops; no Exception, so that no source catches it."""


class StopSignal:
    """A context in which a signal of ENDING sets ``received`` to its name (None before) and prints a line, so that the
    loop can finish its step, save and stop; a further SIGINT raises KeyboardInterrupt."""

    def __enter__(self) -> "StopSignal":
        self.received: str | None = None
        self._handled = handled(self._receive)
        self._handled.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handled.__exit__(*exception)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        answer(f"{self.received}: the run stops after this step and is saved; Ctrl-C now ends it without saving")


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Let ``handler`` receive the signals of ENDING in the block; nohup's order to ignore SIGHUP is kept."""
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        ignored = [n for n in ENDING if n != signal.SIGINT and signal.getsignal(n) is signal.SIG_IGN]
        previous = {n: signal.signal(n, handler) for n in ENDING if n not in ignored}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)  # None: a handler that was not set from Python


def let_error_end() -> None:
    """From now on :func:`leave` does nothing: torchrun sends SIGTERM as soon as a process is gone, when the others are
    about to say so and to end."""
    global _is_ending
    _is_ending = True


def let_resume() -> None:
    """From now on the program is one that trains, and says how a run goes on when a signal has ended it."""
    global advice
    advice = "; --resume auto continues a run from its last checkpoint"


def leave(number: int, frame: FrameType | None = None) -> None:
    """The handler outside the loop, where there is nothing to save: a line, and exit code 128 + the signal's number.

    At once, because an exception that comes while packages are imported may be caught or changed there.
    """
    if _is_ending:
        return
    answer(f"{signal.Signals(number).name}: stopped{advice}")
    os._exit(128 + number)


def answer(line: str) -> None:
    """Write a line to stderr by the system's call alone, as a handler may have interrupted any other.

    Of several processes, which all get the signals that torchrun gets, the first one does.
    """
    if launch.rank() == 0:
        with suppress(OSError):
            os.write(2, f"\n{line}\n".encode())
