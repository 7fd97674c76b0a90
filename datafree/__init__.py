"""Data-free knowledge transfer: see the README for how the files lie, and docs/library.md for its use in a program."""

from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from datafree.network import Network


def load(path: str | Path, model: str = "") -> "Network":
    """The trained network in a file of weights or a run's folder, in evaluation mode.

    It takes images (N, C, H, W) in [0, 1], which it normalises itself, and returns logits (N, classes). model: its
    name, if the file does not state it, or states a user-defined one. Raises InputError for a file that is none.
    """
    from datafree.network import Network

    return Network.from_file(path, model).eval()
