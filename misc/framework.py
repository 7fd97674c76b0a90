"""Draws misc/framework.png, a diagram of the two phases of RGAL: python misc/framework.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch  # noqa: E402

INK, PALE, FROZEN, TRAINED = "#222222", "#f5f5f2", "#dbe6f3", "#fbe3c4"
CLASSES = (("#2b6cb0", "o"), ("#c2571a", "^"))
SPREAD = ((-0.95, 0.3), (0.85, 0.5), (-0.1, -1))  # points of a class relative to its centre, in a sketch


def main():
    figure, axes = plt.subplots(figsize=(10, 6.8))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 100), ylim=(0, 68))
    axes.axis("off")
    synthesis(axes)
    student(axes)
    legend(axes)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=200)


def synthesis(axes):
    """Upper half: images are synthesised under losses of the frozen networks."""
    panel(axes, 34, 33, "Phase 1: image synthesis")
    box(axes, (2.5, 46), (8, 7), "latent z", TRAINED)
    box(axes, (14, 46), (12, 7), "generator", TRAINED)
    box(axes, (29.5, 46), (9.5, 7), "images")
    box(axes, (42.5, 46), (10, 7), "augment")
    box(axes, (56, 52.5), (11, 6), "teacher", FROZEN)
    box(axes, (56, 40.5), (11, 6), "student", FROZEN)
    terms(
        axes,
        (57.3, "BN statistics"),
        (54.1, "one-hot: the target class"),
        (49.4, "adversarial: the student differs\nfrom the teacher"),
    )
    sketch(axes, (71, 36), "relation: confuse", pull=False)
    for start, end in (
        ((10.5, 49.5), (14, 49.5)),
        ((26, 49.5), (29.5, 49.5)),
        ((39, 49.5), (42.5, 49.5)),
        ((52.5, 50.5), (56, 54.5)),
        ((52.5, 48.5), (56, 44.5)),
        ((67, 55.7), (70, 55.7)),
        ((67, 53.3), (70, 50.3)),
        ((67, 45.3), (70, 48.4)),
        ((67, 42), (70.6, 40.5)),
    ):
        arrow(axes, start, end)
    arrow(axes, (71, 61), (20, 53.3), dashed=True, bend="angle,angleA=180,angleB=90,rad=6")
    axes.text(45, 61.3, "gradient", ha="center", va="bottom", size=9.5, color=INK, style="italic")


def student(axes):
    """Lower half: the student is trained on the pool."""
    panel(axes, 5, 26, "Phase 2: student training")
    box(axes, (28, 12.5), (12.5, 7), "image pool")
    box(axes, (44, 12.5), (8.5, 7), "augment\ntwice")
    box(axes, (56, 19), (11, 6), "teacher", FROZEN)
    box(axes, (56, 7), (11, 6), "student", TRAINED)
    terms(axes, (23.2, "KL of the outputs"), (20, "channels of the stages"))
    sketch(axes, (71, 7), "relation: separate", pull=True)
    for start, end in (
        ((40.5, 16), (44, 16)),
        ((52.5, 17), (56, 21)),
        ((52.5, 15), (56, 11)),
        ((67, 22), (70, 22)),
        ((67, 11.8), (70, 19.4)),
        ((67, 9.5), (70.6, 10.5)),
        ((34.25, 46), (34.25, 19.8)),
    ):
        arrow(axes, start, end)
    axes.text(33.3, 39.5, "the best batch\nof the round", ha="right", va="center", size=9.5, color=INK, style="italic")


def legend(axes):
    for x, colour, text in ((4, FROZEN, "frozen"), (15, TRAINED, "trained")):
        box(axes, (x, 1), (3, 2.4), "", colour)
        axes.text(x + 4, 2.2, text, va="center", size=9.5, color=INK)
    for x, (colour, marker), text in ((28, CLASSES[0], "features of one class"), (49, CLASSES[1], "of another class")):
        axes.plot(x, 2.2, marker, color=colour, ms=7)
        axes.text(x + 1.8, 2.2, text, va="center", size=9.5, color=INK)
    arrow(axes, (67, 2.2), (71, 2.2), colour=INK, width=1.6)
    axes.text(72, 2.2, "direction in which the loss moves them", va="center", size=9.5, color=INK)


def panel(axes, bottom, height, title):
    axes.add_patch(
        FancyBboxPatch((0.8, bottom), 98.4, height, boxstyle="round,pad=0,rounding_size=1", fc=PALE, ec="#c8c8c0", lw=1)
    )
    axes.text(2, bottom + height - 1, title, va="top", size=11, weight="bold", color=INK)


def box(axes, corner, size, text, colour="white"):
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.8", fc=colour, ec=INK, lw=1.2))
    axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", size=11, color=INK)


def terms(axes, *lines):
    for y, text in lines:
        axes.text(70.8, y, text, va="center", size=10.5, color=INK)


def arrow(axes, start, end, colour=INK, width=1.3, dashed=False, bend="arc3"):
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            lw=width,
            color=colour,
            linestyle="--" if dashed else "-",
            shrinkA=0,
            shrinkB=0,
            connectionstyle=bend,
        )
    )


def sketch(axes, corner, title, pull):
    """Two classes in feature space: the loss contracts each class and separates the two, or the opposite."""
    x, y = corner
    axes.text(x, y + 8.6, title, va="center", size=10.5, weight="bold", color=INK)
    for (colour, marker), centre, away in ((CLASSES[0], x + 5.6, -1), (CLASSES[1], x + 20.6, 1)):
        axes.add_patch(Ellipse((centre, y + 3), 11.2, 8, fc="white", ec=colour, lw=0.8, ls=":"))
        for dx, dy in SPREAD:
            radius, length = (2.9, -1.9) if pull else (1.9, 2)
            point = (centre + radius * dx, y + 3 + radius * dy)
            axes.plot(*point, marker, color=colour, ms=6, zorder=3)
            arrow(axes, point, (point[0] + length * dx, point[1] + length * dy), colour, 1.5)
        near, far = x + 13.1 + away * 0.4, x + 13.1 + away * 3.2
        arrow(axes, (near if pull else far, y + 3), (far if pull else near, y + 3), colour, 2.6)


if __name__ == "__main__":
    main()
