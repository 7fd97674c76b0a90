"""Image grids: which images of a batch to show, and the picture of them."""

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.nn.utils.rnn import pad_sequence
from torchvision.utils import make_grid

from datafree.datasets.splits import Split
from datafree.network import Network
from datafree.runtime import same_rng

GAP, CAPTION, HEADING = 2, 16, 120  # pixels around an image of a grid, below one with a caption, and left of a row
FONT = 12  # height of the letters
CELL, MARGIN = 44, 16  # pixels of a cell of a matrix, and of a line of text beside it
COLUMNS, NARROW, ROWS = 8, 4, 10  # of a grid of images by class


class Pictures(NamedTuple):
    """A grid, and its first columns, which fit into a card of TensorBoard in their own size."""

    whole: Image.Image
    narrow: Image.Image


class Gallery:
    """Draws images, a row for each class, with the judge's opinion below each: how sure it is, and of which class if it
    is not that of the row.

    names: of the classes, in the order of the judge's outputs. judge: a network, in evaluation mode, or None. test: the
    test images, labelled by these outputs, or None.
    """

    def __init__(self, names: Sequence[str], judge: Network | None = None, test: Split | None = None):
        self.names, self.judge, self.test = list(map(_drawable, names)), judge, test

    def draw(self, images: Tensor, targets: Tensor | None) -> Pictures:
        """The picture of images (N, C, H, W) in [0, 1] of the classes ``targets`` (N,), or of none."""
        places = choose(len(images), targets)
        return self._draw(places, images[places.flatten()], None if targets is None else targets[places])

    def draw_test(self) -> Pictures | None:
        """The picture of test images, of the first classes that the judge knows; None without a test set."""
        if self.test is None:
            return None
        labels = self.test.labels
        known = (labels < self.judge.num_classes if self.judge else labels >= 0).nonzero().flatten()
        places = choose(len(known), labels[known])
        chosen = known[places]
        return self._draw(places, self.test.at(chosen.flatten()), labels[chosen])

    def _draw(self, places: Tensor, images: Tensor, targets: Tensor | None) -> Pictures:
        """The picture of a grid: its images (rows x columns, ...), and their classes, of the shape of ``places``."""
        headings = [] if targets is None else [self._name(k) for k in targets[:, 0].tolist()]
        opinions, columns = self._opinions(images, targets), places.shape[1]
        empty = (places < 0).flatten().tolist()
        images = images.clone()
        images[empty] = 1
        captions = ["" if gap else text for gap, text in zip(empty, opinions)]
        narrow = [i for i in range(len(images)) if i % columns < NARROW]
        fewer = [captions[i] for i in narrow] if captions else []
        return Pictures(
            draw_grid(images, columns, headings, captions),
            draw_grid(images[narrow], min(columns, NARROW), headings, fewer),
        )

    def _name(self, k: int) -> str:
        name = self.names[k] if k < len(self.names) else ""
        return f"class {name or k}" if not name or name.isdigit() else name

    @torch.no_grad()
    def _opinions(self, images: Tensor, targets: Tensor | None) -> list[str]:
        """Below each image: the highest of the judge's probabilities, and its class if that is not the target."""
        if self.judge is None:
            return []
        with same_rng():  # as in an evaluation: a network may draw at random
            sure, found = self.judge(images).float().softmax(1).max(1)
        right = found == (found if targets is None else targets.flatten().to(found.device))
        names = [f" {self.names[k] if k < len(self.names) else k}" for k in found.tolist()]
        # Rounded down, because 100 % would say that there is no doubt.
        return [f"{int(100 * p)}%" + name * (not hit) for p, name, hit in zip(sure.tolist(), names, right.tolist())]


def choose(count: int, targets: Tensor | None, columns: int = COLUMNS, rows: int = ROWS) -> Tensor:
    """Places of the images of a grid (rows, columns), -1 where there is none.

    A row for each of the first ``rows`` classes in ``targets`` (N,); without targets, the first of ``count`` images.
    """
    if targets is None:
        parts = list(torch.arange(min(count, columns * rows)).split(columns))
    else:
        parts = [(targets == target).nonzero().flatten()[:columns] for target in targets.unique()[:rows]]
    return pad_sequence(parts, batch_first=True, padding_value=-1)


def draw_grid(
    images: Tensor, columns: int = COLUMNS, headings: Sequence[str] = (), captions: Sequence[str] = ()
) -> Image.Image:
    """PIL image of ``images`` (N,C,H,W in [0,1]), each enlarged by a whole factor to at least 64 pixels.

    Of more than three channels the first three are drawn, in red, green and blue; of two, their mean, in grey.
    headings: a text left of each row. captions: a text below each image, which is cut to its width.
    """
    images = _visible(images.detach().float().cpu().nan_to_num(0).clamp(0, 1))
    images = interpolate(images, scale_factor=max(1, math.ceil(64 / min(images.shape[-2:]))), mode="nearest")
    (count, _, height, width), columns = images.shape, min(columns, len(images))
    for texts, number, what in ((headings, math.ceil(count / columns), "rows"), (captions, count, "images")):
        if texts and len(texts) != number:
            raise ValueError(f"{len(texts)} texts for {number} {what}")
    tiles = pad(images, (GAP, GAP, GAP, CAPTION if captions else GAP), value=1)
    grid = make_grid(tiles, nrow=columns, padding=0)
    font = ImageFont.load_default(FONT)
    headings = [_cut(text, HEADING, font) for text in headings]
    left = math.ceil(max(map(font.getlength, headings), default=-3 * GAP)) + 3 * GAP
    grid = pad(grid, (left, 0, 0, 0), value=1)
    picture = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    for row, text in enumerate(headings):
        pen.text((GAP, row * tiles.shape[-2] + GAP + (height - FONT) // 2), text, fill="black", font=font)
    for number, text in enumerate(captions):
        row, column = divmod(number, columns)
        corner = left + column * tiles.shape[-1] + GAP, row * tiles.shape[-2] + GAP + height
        pen.text(corner, _cut(text, width, font), fill="black", font=font)
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


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of the text as fits into ``width`` pixels."""
    while font.getlength(text) > width:
        text = text[:-1]
    return text


def _drawable(name: str) -> str:
    """The name without accents, and without what else is not ASCII, for which the font has no letters."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
