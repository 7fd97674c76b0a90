"""Data-free knowledge transfer: see the README for how the files lie, and docs/library.md for its use in a program."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torch import nn

    from datafree.datasets.cards import DatasetCard
    from datafree.network import Network
    from datafree.programs.distill import Distilled


def load(path: str | Path, model: "str | nn.Module" = "") -> "Network":
    """The trained network in a file of weights or a run's folder, in evaluation mode.

    It takes images (N, C, H, W) in [0, 1], which it normalises itself, and returns logits (N, classes). model: its
    name, or an object of it, if the file does not state it, or states a user-defined one. Raises InputError for a file
    that is none.
    """
    from datafree.network import Network

    return Network.from_file(path, model).eval()


def distill(
    teacher: "nn.Module | str",
    student: "nn.Module | str",
    card: "Mapping[str, Any] | DatasetCard | str | Path",
    method: str = "rgal",
    **options: Any,
) -> "Distilled":
    """Distil ``teacher`` into a copy of ``student`` without the teacher's data -> (student, numbers, folder).

    teacher: with its weights; it takes normalised images and returns logits, or it is what :func:`load` returns.
    student: with the weights that it starts from. Both stay as they are. A name in place of either means what it means
    on the command line. card: shape, number of classes, mean and std of the images, as a dict with the keys of
    :class:`datafree.datasets.cards.DatasetCard`, as such a card, as the path of its YAML file, or the name of a data
    set. With a dict or a card no image is read, unless ``eval="test"`` is given. method, options: those of the command
    line, by the same names: ``epochs=10, teacher_mean=(0.5,), log_tag="first", resume="auto"``.

    The run is that of the program, in a folder of its own below ``save_dir``. The global random states are the same
    afterwards. Raises InputError, a sentence, for whatever cannot be done, and KeyboardInterrupt when it is
    interrupted, after everything is saved.
    """
    from datafree.programs.distill import distil_objects

    return distil_objects(teacher, student, card, method, options)
