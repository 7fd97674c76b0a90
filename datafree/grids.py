"""Image grids: which images of a batch to show, and the picture of them."""

import math
import unicodedata
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.utils import make_grid

GAP, CAPTION = 2, 15  # pixels around an image of a grid, and below one with a caption
CELL, MARGIN = 44, 16  # pixels of a cell of a matrix, and of a line of text beside it


def draw_grid(images: Tensor, labels: Sequence[str] | None = None, columns: int = 8) -> Image.Image:
    """PIL image of ``images`` (N,C,H,W in [0,1]), each enlarged by a whole factor to at least 64 pixels.

    Of more than three channels the first three are drawn, in red, green and blue; of two, their mean, in grey.
    ``labels``: a string per image, or per row of the grid, written below it (below its first image).
    """
    images = _visible(images.detach().float().cpu().nan_to_num(0).clamp(0, 1))
    images = interpolate(images, scale_factor=max(1, math.ceil(64 / min(images.shape[-2:]))), mode="nearest")
    (count, _, height, width), labels, columns = images.shape, labels or [], min(columns, len(images))
    step = 1 if len(labels) == count else columns
    if labels and len(labels) != math.ceil(count / step):
        raise ValueError(f"{len(labels)} labels for {count} images in rows of {columns}")
    font = ImageFont.load_default()
    widest = max(map(font.getlength, labels), default=0)
    right = GAP + max(0, math.ceil(widest / step) - width)
    tiles = pad(images, (GAP, right, GAP, CAPTION if labels else GAP), value=1)
    grid = make_grid(tiles, nrow=columns, padding=0)
    picture = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    for i, label in enumerate(labels):
        row, column = divmod(i * step, columns)
        corner = column * tiles.shape[-1] + GAP, row * tiles.shape[-2] + GAP + height
        ImageDraw.Draw(picture).text(corner, label, fill="black", font=font)
    return picture


def draw_matrix(rows: Sequence[Sequence[float]], row_name: str, column_name: str) -> Image.Image:
    """PIL image of a lower triangle of percentages, a cell each, the darker the higher; counted from 1."""
    size, font = len(rows), ImageFont.load_default()
    picture = Image.new("RGB", (CELL * (size + 1) + MARGIN, CELL * size + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((CELL + MARGIN, 2), column_name, fill="black", font=font)
    for number in range(size):
        pen.text((CELL * (number + 1) + MARGIN, MARGIN), str(number + 1), fill="black", font=font)
        pen.text(
            (2, 2 * MARGIN + CELL * number), f"{row_name if number == 0 else ''} {number + 1}", fill="black", font=font
        )
    for r, row in enumerate(rows):
        for c, value in enumerate(row):
            left, top = CELL * (c + 1) + MARGIN, 2 * MARGIN + CELL * r
            shade = round(255 - 2 * value)
            pen.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=(shade, shade, 255))
            pen.text((left + 4, top + CELL // 3), f"{value:.1f}", fill="white" if value > 60 else "black", font=font)
    return picture


def _visible(images: Tensor) -> Tensor:
    """Images of any number of channels as images of one or three."""
    return images.mean(1, keepdim=True) if images.shape[1] == 2 else images[:, :3]


def grid_rows(
    images: Tensor, targets: Tensor | None, names: Sequence[str] = (), columns: int = 8, rows: int = 10
) -> tuple[Tensor, list[str] | None, int]:
    """Images, captions and columns of a grid with one row for each of the first ``rows`` classes in ``targets``.

    names: of the classes; empty if they are unknown.
    """
    if targets is None:
        return images[: columns * rows], None, columns
    shown = targets.unique()[:rows]
    members = [(targets == target).nonzero().flatten() for target in shown]
    columns = min(columns, *(len(m) for m in members)) if len(members) > 1 else columns
    chosen = torch.cat([m[:columns] for m in members])
    captions = [f"{target}: {_drawable(names[target])}" if names else f"class {target}" for target in shown.tolist()]
    return images[chosen], captions, columns


def _drawable(name: str) -> str:
    """The name without accents, and without what else is not ASCII, for which the font has no letters."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
