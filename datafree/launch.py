"""How a program is started: its command, and alone or by torchrun as several processes. No torch is imported."""

import os
from pathlib import Path

FILES = {
    "kd": "datafree_kd.py",
    "quantize": "datafree_quantize.py",
    "incremental": "datafree_incremental.py",
    "train": "train_scratch.py",
}


def command(program: str) -> str:
    """How the program of that name is called: by its file in a checkout, or by the name that it is installed under."""
    is_checkout = (Path(__file__).parents[1] / FILES[program]).is_file()
    return f"python {FILES[program]}" if is_checkout else f"datafree-{program}"


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
