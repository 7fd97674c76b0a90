"""How this process was started: alone, or by torchrun as one of several that make one run. No torch is imported."""

import os


def processes() -> int:
    """How many processes make the run, on all machines."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this one among them, from 0; the first one writes and speaks for all."""
    return _number("RANK", 0) if processes() > 1 else 0


def local_processes() -> int:
    """How many of them are on this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1)) if processes() > 1 else 1


def local_rank() -> int:
    """The number of this one among those on this machine, from 0."""
    return _number("LOCAL_RANK", rank()) if processes() > 1 else 0


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else default
