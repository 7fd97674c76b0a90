"""Image grids: which images are shown, and the picture of them."""

import numpy as np
import pytest
import torch
from torch import nn

from datafree.datasets.splits import TensorSplit
from datafree.grids import CAPTION, GAP, Gallery, choose, draw_grid
from datafree.network import Network


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
    picture = draw_grid(torch.rand(shape).requires_grad_(), captions=["a"] * shape[0])
    scale = {28: 3, 224: 1, 8: 8, 64: 1}[shape[2]]
    columns = min(8, shape[0])
    assert picture.size[0] == columns * (shape[3] * scale + 4)


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
def test_images_of_any_number_of_channels_are_drawn(channels):
    images = torch.rand(2, channels, 64, 64)
    drawn = np.asarray(draw_grid(images))[2:66, 2:66]
    expected = images[0].mean(0).expand(3, 64, 64) if channels == 2 else images[0, :3]
    assert np.array_equal(drawn, (expected * 255).round().byte().permute(1, 2, 0).numpy())


def test_texts_stay_clear_of_the_images():
    images = torch.zeros(4, 3, 64, 64)
    headings, captions = ["one", "two, of a class with a long name"], ["97%", "55% a long name of a class", "0%", "1%"]
    picture = np.asarray(draw_grid(images, 2, headings, captions).convert("L"))
    left, step = picture.shape[1] - 2 * (64 + 2 * GAP), 64 + GAP + CAPTION
    assert 60 < left <= 120 + 3 * GAP and picture.shape[0] == 2 * step
    black = picture == 0
    for row in range(2):
        top = row * step + GAP
        assert black[top : top + 64, left + GAP : left + GAP + 64].all()  # nothing is drawn over an image
        assert picture[top : top + 64, :left].min() < 100  # the heading
        for column in range(2):
            edge = left + column * (64 + 2 * GAP)
            below = picture[top + 64 : (row + 1) * step, edge : edge + 64 + 2 * GAP]
            assert below.min() < 100 and (below[:, -GAP:] == 255).all() and (below[-1] == 255).all()
    assert (picture[:, left : left + GAP] == 255).all()
    for wrong in ({"headings": ["a"]}, {"captions": ["a", "b"]}):
        with pytest.raises(ValueError, match="texts for"):
            draw_grid(images, 2, **wrong)


def test_values_outside_the_range_are_clipped():
    values = torch.tensor([-1.0, 2.0, float("nan"), 0.5])
    picture = np.asarray(draw_grid(values.view(4, 1, 1, 1).expand(4, 3, 64, 64)))
    assert [picture[30, 30 + 68 * i, 0] for i in range(4)] == [0, 255, 0, 128]


@pytest.mark.parametrize(
    "targets, places",
    [
        ([0, 0, 5, 0, 1, 1], [[0, 1, 3], [4, 5, -1], [2, -1, -1]]),
        ([3] * 9, [list(range(8))]),
        ([1, 0] * 2, [[1, 3], [0, 2]]),
        (None, [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, -1, -1, -1, -1, -1, -1]]),
    ],
)
def test_a_grid_reads_by_class(targets, places):
    found = choose(10 if targets is None else len(targets), targets and torch.tensor(targets))
    assert found.tolist() == places
    assert choose(40, torch.arange(40)).shape == (10, 1)


@pytest.fixture
def texts(monkeypatch):
    """What draw_grid is given: the images, the headings, the captions."""
    given = []
    monkeypatch.setattr("datafree.grids.draw_grid", lambda images, *texts: given.append((images, *texts)))
    return given


def test_the_narrow_picture_has_the_first_columns(texts):
    images = torch.arange(18).view(18, 1, 1, 1) / 20
    Gallery(["a", "b"], judge([[3], [0]])).draw(images, torch.tensor([0] * 12 + [1] * 6))
    whole, narrow = texts
    assert whole[1] == 8 and narrow[1] == 4 and whole[2] == narrow[2] == ["a", "b"]
    assert (narrow[0][:, 0, 0, 0] * 20).round().tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert narrow[3] == [*whole[3][:4], *whole[3][8:12]]


def judge(rows):
    """A network of grey images of one row, whose logits are ``rows`` times the image."""
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return Network(nn.Sequential(nn.Flatten(), layer), (1, 1, len(rows[0])), (0.0,), (1.0,)).freeze()


IMAGES = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0.5, 0.5]]).view(4, 1, 1, 2)


def test_below_an_image_is_how_sure_the_judge_is_and_its_class_if_that_is_another(texts):
    Gallery(["cat", "crème brûlée"], judge([[3, 0], [0, 3]])).draw(IMAGES, torch.tensor([0, 0, 1, 1]))
    Gallery(["cat", "dog"], judge([[3, 0], [0, 3]])).draw(IMAGES[:3], torch.tensor([0, 0, 1]))
    (_, columns, headings, captions), _, (images, *_, short), _ = texts
    assert (images[3] == 1).all() and not (images[:3] == 1).all() and short[3] == ""  # one image of the second class
    assert columns == 2 and headings == ["cat", "creme brulee"]
    sure = int(100 / (1 + np.exp(-3)))
    assert captions == [f"{sure}%", f"{sure}% creme brulee", f"{sure}% cat", "50% cat"]


def test_without_targets_or_judge_there_is_less_to_say(texts):
    Gallery([], judge([[3, 0], [0, 3]])).draw(IMAGES, None)
    Gallery(["7", "Ж"]).draw(IMAGES, torch.tensor([0, 0, 1, 1]))
    assert texts[0][2:] == ([], ["95%", "95%", "95%", "50%"])
    assert texts[2][2:] == texts[3][2:] == (["class 7", "class 1"], [])  # the font has no other letters than ours


def test_the_test_images_are_those_of_the_classes_that_the_judge_knows(texts):
    pixels = torch.arange(12, dtype=torch.uint8).view(6, 1, 1, 2)
    test = TensorSplit(pixels, torch.tensor([2, 1, 0, 1, 0, 2]), 3)
    assert Gallery([]).draw_test() is None
    Gallery(["a", "b", "c"], judge([[3, 0], [0, 3]]), test).draw_test()
    Gallery(["a", "b", "c"], None, test).draw_test()
    (known, *_, headings, captions), _, (every, _, all_headings, no_captions), _ = texts
    assert (known * 255).round()[:, 0, 0, 0].tolist() == [4, 8, 2, 6] and headings == ["a", "b"] and len(captions) == 4
    assert len(every) == 6 and all_headings == ["a", "b", "c"] and no_captions == []


def test_drawing_leaves_the_random_state_as_it_was():
    class Random(nn.Module):
        num_classes = 2

        def forward(self, images):
            return torch.rand(len(images), 2)

    before = torch.get_rng_state()
    Gallery(["a", "b"], Random()).draw(IMAGES, None)
    assert torch.equal(torch.get_rng_state(), before)
