"""Image grids: which images are shown, and the picture of them."""

import numpy as np
import pytest
import torch

from datafree.grids import CAPTION, draw_grid, grid_rows


def test_a_grid_holds_the_images_enlarged():
    images = torch.randint(0, 256, (5, 3, 20, 32)) / 255
    picture = np.asarray(draw_grid(images, columns=3))
    height, width, gap = 80, 128, 2  # four times: the first whole factor that makes 20 pixels at least 64
    assert picture.shape == (2 * (height + 2 * gap), 3 * (width + 2 * gap), 3)
    for i, image in enumerate(images):
        top, left = i // 3 * (height + 2 * gap) + gap, i % 3 * (width + 2 * gap) + gap
        tile = picture[top : top + height : 4, left : left + width : 4]
        assert np.array_equal(tile, (image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (3, 3, 224, 300), (9, 1, 8, 8), (2, 3, 64, 64)])
def test_grids_of_any_shape(shape):
    picture = draw_grid(torch.rand(shape).requires_grad_(), ["a"] * shape[0])
    scale = {28: 3, 224: 1, 8: 8, 64: 1}[shape[2]]
    columns = min(8, shape[0])
    assert picture.size[0] == columns * (shape[3] * scale + 4)


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
def test_images_of_any_number_of_channels_are_drawn(channels):
    images = torch.rand(2, channels, 64, 64)
    drawn = np.asarray(draw_grid(images))[2:66, 2:66]
    expected = images[0].mean(0).expand(3, 64, 64) if channels == 2 else images[0, :3]
    assert np.array_equal(drawn, (expected * 255).round().byte().permute(1, 2, 0).numpy())


def test_captions_stay_clear_of_the_images():
    images = torch.zeros(4, 3, 64, 64)
    per_image, per_row = ["cat", "a long name of a class", "dog", "frog"], ["one", "two, with a long label"]
    for labels in (per_image, per_row):
        picture = np.asarray(draw_grid(images, labels, columns=2).convert("L"))
        black_rows = (picture[:, 2:66] == 0).all(1)
        assert black_rows.sum() == 2 * 64  # nothing is drawn over them, nothing of them is lost
        band = picture[66 : 66 + CAPTION]
        assert band.min() < 100 and (band[:, -1] == 255).all() and (band[-1] == 255).all()
    with pytest.raises(ValueError, match="3 labels for 4 images in rows of 2"):
        draw_grid(images, ["a", "b", "c"], columns=2)


def test_values_outside_the_range_are_clipped():
    values = torch.tensor([-1.0, 2.0, float("nan"), 0.5])
    picture = np.asarray(draw_grid(values.view(4, 1, 1, 1).expand(4, 3, 64, 64)))
    assert [picture[30, 30 + 68 * i, 0] for i in range(4)] == [0, 255, 0, 128]


@pytest.mark.parametrize(
    "targets, captions, columns",
    [
        ([0, 0, 0, 1, 1, 2, 2, 2], ["class 0", "class 1", "class 2"], 2),
        ([3] * 8, ["class 3"], 8),
        (list(range(8)), [f"class {i}" for i in range(8)], 1),
        (None, None, 8),
    ],
)
def test_a_grid_reads_by_class(targets, captions, columns):
    targets = targets and torch.tensor(targets)
    images = torch.rand(8, 1, 8, 8) if targets is None else targets.view(-1, 1, 1, 1).expand(-1, 1, 8, 8) / 10
    shown, names, width = grid_rows(images, targets)
    assert names == captions and width == columns
    if targets is not None:
        named = grid_rows(images, targets, ["tabby cat", "crème brûlée", "Ж"] + ["x"] * 5)[1]
        expected = ["0: tabby cat", "1: creme brulee", "2: "]  # the font has no other letters than these
        assert named == [expected[k] if k < 3 else f"{k}: x" for k in targets.unique().tolist()]
        assert (shown[:, 0, 0, 0].view(-1, width) * 10).round().tolist() == [
            [float(name.split()[1])] * width for name in captions
        ]
