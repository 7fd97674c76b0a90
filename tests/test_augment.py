"""Augmentation against numpy's pad, slice and flip, its gradients, and its distribution."""

import numpy as np
import pytest
import torch

from datafree.augment import CropFlip, random_resized_crop, shift_flip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def view_oracle(image, shift, flip, padding=4):
    """Pad with zeros, cut out the window, mirror it if ``flip``: (C, H, W) -> (C, H, W).

    Shifts are in coordinates of the image, so that a mirrored view shows the same window.
    """
    _, h, w = image.shape
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    dy, dx = shift
    window = padded[:, padding + dy : padding + dy + h, padding + dx : padding + dx + w]
    return window[:, :, ::-1] if flip else window


def all_views(reach=4):
    """Every shift (n, 2) with and without a mirror (n,)."""
    steps = torch.arange(-reach, reach + 1)
    shift = torch.cartesian_prod(steps, steps).repeat(2, 1)
    return shift, torch.arange(len(shift)) >= len(shift) // 2


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 9, 14), (2, 3, 5)], ids=str)
def test_every_shift_and_flip_equals_pad_slice_and_flip(shape):
    shift, flip = all_views()
    images = torch.rand(len(shift), *shape)
    views = shift_flip(images, shift, flip)
    oracle = [view_oracle(image.numpy(), s, f) for image, s, f in zip(images, shift.tolist(), flip.tolist())]
    np.testing.assert_array_equal(views.numpy(), np.stack(oracle))


def test_channels_last_images_give_the_same_views():
    shift, flip = all_views()
    images = torch.rand(len(shift), 3, 6, 7)
    views = shift_flip(images.to(memory_format=torch.channels_last), shift, flip)
    assert torch.equal(views, shift_flip(images, shift, flip))


def test_more_views_than_images_start_again_with_the_first_image():
    shift, flip = all_views(1)
    images = torch.rand(6, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    times = len(shift) // 6
    views, repeated = (shift_flip(x, shift, flip) for x in (images, images.repeat(times, 1, 1, 1)))
    assert torch.equal(views, repeated)
    weights = torch.rand_like(views)
    [gradient], [expected] = (torch.autograd.grad((x * weights).sum(), images) for x in (views, repeated))
    torch.testing.assert_close(gradient, expected)


def test_gradient_is_exact():
    shift = torch.tensor([[0, 0], [1, -2], [-1, 2], [4, 0], [0, -5], [-2, 1]])
    flip = torch.tensor([False, True] * 3)
    images = torch.rand(6, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift_flip(x, shift, flip), images)


def test_gradient_of_every_view_is_the_inverse_selection():
    shift, flip = all_views()
    images, weights = torch.rand(len(shift), 1, 9, 10, requires_grad=True), torch.rand(len(shift), 1, 9, 10)
    (shift_flip(images, shift, flip) * weights).sum().backward()
    for image, gradient, weight, s, f in zip(images, images.grad, weights, shift.tolist(), flip.tolist()):
        # A view of the numbered pixels shows where each of them went.
        places = np.arange(1, 91, dtype=float).reshape(1, 9, 10)
        went, oracle = view_oracle(places, s, f), np.zeros(91)
        oracle[went.astype(int).ravel()] = weight.numpy().ravel()
        np.testing.assert_array_equal(gradient.numpy().ravel(), oracle[1:].astype(np.float32))


def seen_views(crop, n, size=12):
    """(dy, dx, mirrored) of n views, read from images whose pixels are their coordinates."""
    rows = torch.arange(size).view(1, 1, size, 1).expand(n, 1, size, size)
    views = crop(torch.cat([rows, rows.transpose(2, 3)], 1).float())
    middle = size // 2
    flip = views[:, 1, middle, middle + 1] < views[:, 1, middle, middle]
    source = torch.where(flip, size - 1 - middle, middle)
    return views[:, 0, middle, middle] - middle, views[:, 1, middle, middle] - source, flip


def test_crops_and_flips_cover_all_views_uniformly():
    n = 20_000
    dy, dx, flip = seen_views(CropFlip(), n)
    counts = torch.bincount(((dy + 4) * 18 + (dx + 4) * 2 + flip).long(), minlength=162)
    assert len(counts) == 162
    # Chi-square with 161 degrees of freedom: mean 161, standard deviation 18.
    assert ((counts - n / 162) ** 2 / (n / 162)).sum() < 161 + 5 * 18


@pytest.mark.parametrize("padding, flips", [(0, False), (0, True), (2, False)])
def test_padding_and_flip_can_be_turned_off(padding, flips):
    dy, dx, flip = seen_views(CropFlip(padding, flips), 500)
    assert dy.unique().tolist() == dx.unique().tolist() == list(range(-padding, padding + 1))
    assert flip.any() == flips


def test_every_image_has_its_own_view_and_range_is_kept():
    views = CropFlip()(torch.rand(1, 3, 10, 10).expand(40, -1, -1, -1))
    assert len(torch.unique(views.flatten(1), dim=0)) > 20
    assert views.min() >= 0 and views.max() <= 1


# ---------------------------------------------------------------- resized crops


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (2, 1, 17, 30), (1, 3, 4, 4)], ids=str)
def test_resized_crop_keeps_shape_and_range_and_passes_gradients(shape):
    images = torch.rand(shape, requires_grad=True)
    views = random_resized_crop(images)
    assert views.shape == shape and views.min() >= 0 and views.max() <= 1
    views.sum().backward()
    assert images.grad.isfinite().all() and (images.grad >= -1e-6).all()
    # A view's pixel is a mean of pixels.
    assert images.grad.sum().item() == pytest.approx(images.numel(), rel=1e-4)


def test_the_whole_image_is_the_image():
    images = torch.rand(3, 2, 9, 14)
    torch.testing.assert_close(random_resized_crop(images, scale=(1.0, 1.0)), images, atol=1e-5, rtol=0)


def ramp_slopes(scale=(0.25, 1.0), n=4000, h=10, w=20):
    """Sides of each image's crop along rows and columns, and its centre, in units of the image."""
    y = ((torch.arange(h) + 0.5) / h).view(1, 1, h, 1).expand(n, 1, h, w)
    x = ((torch.arange(w) + 0.5) / w).view(1, 1, 1, w).expand(n, 1, h, w)
    views = random_resized_crop(torch.cat([y, x], 1), scale)
    before_y, after_y = views[:, 0, h // 2 - 1 : h // 2 + 1, w // 2].unbind(1)
    before_x, after_x = views[:, 1, h // 2, w // 2 - 1 : w // 2 + 1].unbind(1)
    middle = torch.stack([before_y + after_y, before_x + after_x], 1) / 2
    return (after_y - before_y) * h, (after_x - before_x) * w, middle


def test_crops_have_uniform_areas_keep_the_aspect_ratio_and_stay_inside():
    rows, columns, middle = ramp_slopes()
    torch.testing.assert_close(rows, columns, atol=1e-3, rtol=0)
    area = rows**2
    assert area.min() > 0.249 and area.max() < 1.001
    # Uniform between 0.25 and 1: mean 0.625, standard deviation 0.217.
    assert area.mean().item() == pytest.approx(0.625, abs=5 * 0.217 / 4000**0.5)
    assert area.std().item() == pytest.approx(0.217, abs=0.01)
    assert ((middle - rows[:, None] / 2 > -1e-3) & (middle + rows[:, None] / 2 < 1 + 1e-3)).all()
    assert middle.min() < 0.35 and middle.max() > 0.65


def test_autocast_and_half_precision_do_not_move_the_crop():
    images = torch.rand(4, 3, 32, 32)
    torch.manual_seed(1)
    exact = random_resized_crop(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        torch.testing.assert_close(random_resized_crop(images), exact, atol=1e-5, rtol=0)
        torch.manual_seed(1)
        torch.testing.assert_close(random_resized_crop(images.bfloat16()).float(), exact, atol=0.005, rtol=0)
