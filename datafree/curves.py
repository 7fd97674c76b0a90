"""Plot finished or running runs: python -m datafree.curves PICTURE.png FOLDER... [--over minutes] [--of NAME]

One panel each for the accuracy, for what the paper claims about the images (classes spread and move closer to each
other, anchors have samples in the focal band), and for signs of a collapse; one line for every metrics.jsonl below
the folders. Needs matplotlib.

--over    epochs, or minutes of synthesis and student training.
--of      the one metric of metrics.jsonl to plot, such as acc1.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datafree.arguments import read_arguments, usage
from datafree.errors import InputError, OptionError, exit_on_input_error, short
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
SPENT = ("seconds/synthesis", "seconds/student")
AXES = {
    "epochs": ("epoch", lambda row: row["epoch"] + 1),
    "minutes": ("minutes of synthesis and student training", lambda row: sum(row.get(key) or 0 for key in SPENT) / 60),
}
COLUMNS, ONE_PANEL = 3, (8.0, 4.5)
Curves = Mapping[str, Sequence[Mapping[str, Any]]]  # name of a run -> its rows
STYLES = ("-", "--", ":", "-.")  # the next one each time matplotlib's ten colours are used up


def read_curves(folders: Iterable[str | Path], of: Iterable[str] = PANELS) -> dict[str, list[dict[str, Any]]]:
    """Path of each run, relative to their common parent -> the rows of its metrics.jsonl, one dict per epoch.

    of: the metrics that must be numbers.

    Raises InputError for a folder without runs and for a damaged file.
    """
    runs: list[Path] = []
    for folder in map(Path, folders):
        found = sorted(path.parent.resolve() for path in folder.rglob("metrics.jsonl"))
        if not found:
            raise InputError(f"{folder} holds no run (no metrics.jsonl); give another folder")
        runs += found
    common = Path(os.path.commonpath([run.parent.parent for run in runs]))
    keys = [*of, *SPENT]
    return {str(run.relative_to(common)): read_rows(run / "metrics.jsonl", keys, required=["epoch"]) for run in runs}


def draw(curves: Curves, picture: str | Path, of: Sequence[str] = tuple(PANELS), over: str = "epochs") -> None:
    """Plot ``curves`` (see :func:`read_curves`) into the file ``picture``, with a panel for each metric that they have.

    of: the metrics. over: a key of ``AXES``. Raises InputError without matplotlib, for curves without any of the
    metrics or without times, and if the file cannot be written.
    """
    if Path(picture).suffix != ".png":
        raise InputError(
            f"the first argument is {picture} but must be the picture to write, a .png; folders of runs come after it"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"plotting needs matplotlib; run {sys.executable} -m pip install matplotlib") from None
    panels = _panels(curves, of, over)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    width, height = (4 * columns, 2.8 * lines) if len(panels) > 1 else ONE_PANEL
    figure = Figure((width, height + 0.3 * len(curves)), layout="constrained")
    for axes, key in zip(figure.subplots(lines, columns, squeeze=False).flat, panels):
        _plot(axes, curves, key, over)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {picture} ({error}); give a .png in an existing folder") from None


def _panels(curves: Curves, of: Sequence[str], over: str) -> list[str]:
    """The metrics ``of`` which the curves have any."""
    rows = [row for run in curves.values() for row in run]
    if not rows:
        raise InputError("these runs have no finished epoch to plot; wait for one")
    if over == "minutes" and not all(any(key in row for key in SPENT) for row in rows):
        raise InputError("--over minutes: not all of these runs state their seconds; leave it out, or these runs")
    panels = [key for key in of if any(key in row for row in rows)]
    if not panels:
        metrics = "any of the metrics plotted" if len(of) > 1 else f"the metric {short(of[0])}"
        raise InputError(f"none of these runs has {metrics}; metrics.jsonl has the names of all")
    return panels


def _plot(axes: Any, curves: Curves, key: str, over: str) -> None:
    """One metric of all runs, over epochs or minutes."""
    label, place = AXES[over]
    for number, (name, rows) in enumerate(curves.items()):
        points = [(place(row), row[key]) for row in rows if row.get(key) is not None]
        axes.plot(
            *zip(*points) if points else ([], []),
            STYLES[number // 10 % len(STYLES)],
            label=name,
            marker="." if len(points) < 2 else None,
        )
    axes.set_title(PANELS.get(key, key), fontsize=10)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if key.startswith(("images/anchors", "images/near")):  # fractions that often stay at 0 or 1
        axes.set_ylim(-0.03, 1.03)


def main() -> None:
    usage(__doc__, at_least=2)
    words = read_arguments(sys.argv[1:], ("--over", "--of"))
    [over], of = words.get("--over", ["epochs"]), words.get("--of", list(PANELS))
    if over not in AXES:
        raise OptionError(f"--over cannot be {short(over)}; it takes {', '.join(AXES)}")
    picture, *folders = words[""]
    if not folders:
        raise OptionError("give a picture to write, then folders of runs; --help shows how")
    draw(read_curves(folders, of), picture, of, over)
    print(f"Wrote {picture}")


if __name__ == "__main__":
    exit_on_input_error(main)
