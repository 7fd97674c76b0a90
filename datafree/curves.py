"""Curves of finished or running runs as one picture: python -m datafree.curves PICTURE.png FOLDER...

A panel each for accuracy, for what the paper claims of the images (a class spreads, classes come nearer to each
other, samples are found in the band), and for signs of a collapse; a line for every metrics.jsonl below the folders.
Needs matplotlib.
"""

import json
import os
import sys
from pathlib import Path

from datafree.errors import InputError, exit_on_input_error, usage
from datafree.logger import whole_lines

PANELS = {
    "acc1": "top-1 on the test set (%)",
    "images/distance_within_class": "mean distance within a class",
    "images/distance_to_other_class": "distance to the nearest of another class",
    "images/anchors_with_positive": "anchors with a partner of their class",
    "images/anchors_with_negative_in_band": "anchors with a sample in the band",
    "images/label_entropy": "entropy of the classes (1: all alike)",
    "images/near_duplicates": "share of near-duplicates",
    "images/student_agreement": "student agrees with the teacher",
    "images/target_agreement": "teacher agrees with the class asked for",
}
COLUMNS = 3
STYLES = ("-", "--", ":", "-.")  # by turns, once matplotlib's ten colours are used up


def read_curves(folders):
    """Path of each run, below the folder that all have in common -> its rows (dicts of numbers by epoch).

    Raises InputError where there are none.
    """
    runs = []
    for folder in map(Path, folders):
        found = sorted(path.parent.resolve() for path in folder.rglob("metrics.jsonl"))
        if not found:
            raise InputError(f"{folder} holds no run (no metrics.jsonl); give another")
        runs += found
    common = Path(os.path.commonpath([run.parent.parent for run in runs]))
    return {str(run.relative_to(common)): _rows(run / "metrics.jsonl") for run in runs}


def _rows(path):
    try:
        return [json.loads(line) for line in whole_lines(path)]
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}); remove it, or resume its run") from None


def draw(curves, picture):
    """Write the panels of ``curves`` (see :func:`read_curves`) that have a number to the file ``picture``."""
    if Path(picture).suffix != ".png":
        raise InputError(f"{picture} is to be the picture, a .png; the folders of runs come after it")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"drawing needs matplotlib: {sys.executable} -m pip install matplotlib") from None
    panels = [key for key in PANELS if any(key in row for rows in curves.values() for row in rows)]
    if not panels:
        raise InputError("these runs have no finished epoch with anything to draw; wait for one")
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
        if key.startswith(("images/anchors", "images/near")):  # shares that often stay at an end
            axes.set_ylim(-0.03, 1.03)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {picture} ({error}); name a .png in a folder that exists") from None


def main():
    usage(__doc__, at_least=2)
    draw(read_curves(sys.argv[2:]), sys.argv[1])
    print(f"Drawn: {sys.argv[1]}")


if __name__ == "__main__":
    exit_on_input_error(main)
