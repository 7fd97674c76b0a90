"""Plot finished or running runs over their epochs: python -m datafree.curves PICTURE.png FOLDER...

One panel each for the accuracy, for what the paper claims about the images (classes spread and move closer to each
other, anchors have samples in the focal band), and for signs of a collapse; one line for every metrics.jsonl below
the folders. Needs matplotlib.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datafree.errors import InputError, exit_on_input_error, usage
from datafree.results import read_rows

PANELS = {
    "acc1": "top-1 on the test set (%)",
    "images/distance_within_class": "mean distance within a class",
    "images/distance_to_other_class": "distance to the nearest other class",
    "images/anchors_with_positive": "anchors with a positive",
    "images/anchors_with_negative_in_band": "anchors with a negative in the focal band",
    "images/label_entropy": "entropy of predicted classes (1: uniform)",
    "images/near_duplicates": "fraction of near-duplicates",
    "images/student_agreement": "student agrees with the teacher",
    "images/target_agreement": "teacher agrees with the target class",
}
COLUMNS = 3
STYLES = ("-", "--", ":", "-.")  # the next one each time matplotlib's ten colours are used up


def read_curves(folders: Iterable[str | Path]) -> dict[str, list[dict[str, Any]]]:
    """Path of each run, relative to their common parent -> the rows of its metrics.jsonl, one dict per epoch.

    Raises InputError for a folder without runs and for a damaged file.
    """
    runs: list[Path] = []
    for folder in map(Path, folders):
        found = sorted(path.parent.resolve() for path in folder.rglob("metrics.jsonl"))
        if not found:
            raise InputError(f"{folder} holds no run (no metrics.jsonl); give another folder")
        runs += found
    common = Path(os.path.commonpath([run.parent.parent for run in runs]))
    return {str(run.relative_to(common)): read_rows(run / "metrics.jsonl", PANELS, required=["epoch"]) for run in runs}


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], picture: str | Path) -> None:
    """Plot ``curves`` (see :func:`read_curves`) into the file ``picture``, with a panel for each metric that they have.

    Raises InputError without matplotlib, for curves without any of the metrics, and if the file cannot be written.
    """
    if Path(picture).suffix != ".png":
        raise InputError(
            f"the first argument is {picture} but must be the picture to write, a .png; folders of runs come after it"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"plotting needs matplotlib; run {sys.executable} -m pip install matplotlib") from None
    panels = [key for key in PANELS if any(key in row for rows in curves.values() for row in rows)]
    if not panels:
        raise InputError("these runs have no finished epoch to plot; wait for one")
    lines = -(-len(panels) // COLUMNS)
    figure = Figure((4 * COLUMNS, 2.8 * lines + 0.3 * len(curves)), layout="constrained")
    for axes, key in zip(figure.subplots(lines, COLUMNS, squeeze=False).flat, panels):
        for number, (name, rows) in enumerate(curves.items()):
            points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
            axes.plot(
                *zip(*points) if points else ([], []),
                STYLES[number // 10 % len(STYLES)],
                label=name,
                marker="." if len(points) < 2 else None,
            )
        axes.set_title(PANELS[key], fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if key.startswith(("images/anchors", "images/near")):  # fractions that often stay at 0 or 1
            axes.set_ylim(-0.03, 1.03)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {picture} ({error}); give a .png in an existing folder") from None


def main() -> None:
    usage(__doc__, at_least=2)
    draw(read_curves(sys.argv[2:]), sys.argv[1])
    print(f"Wrote {sys.argv[1]}")


if __name__ == "__main__":
    exit_on_input_error(main)
