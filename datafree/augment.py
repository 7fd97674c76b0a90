"""Batched augmentation on the device, as functions of tensors."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _ShiftFlip(torch.autograd.Function):
    """Shift each image by its own offset, with zeros outside, and mirror some of them.

    A view is a selection of pixels, so its gradient is the inverse selection: mirrored
    first, then shifted back. Both passes are one gather; indexing would scatter in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        ctx.save_for_backward(shift, flip)
        ctx.count = len(images)
        return _gather(images, shift, flip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shift, flip = ctx.saved_tensors
        # In a mirrored view the columns run backwards, so that undoing its shift keeps the sign.
        columns = torch.where(flip, shift[:, 1], -shift[:, 1])
        grad = _gather(grad, torch.stack([-shift[:, 0], columns], 1), flip)
        return grad if len(grad) == ctx.count else grad.unflatten(0, (-1, ctx.count)).sum(0), None, None


def _gather(images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """view[k, :, i, j] = image[k % N, :, i + dy, j' + dx], j' = j or its mirror; 0 outside the image."""
    n, c, h, w = images.shape
    rows = torch.arange(h, device=images.device) + shift[:, :1]
    columns = torch.arange(w, device=images.device).expand(len(shift), w)
    columns = torch.where(flip[:, None], w - 1 - columns, columns) + shift[:, 1:]
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    first = torch.arange(len(shift), device=images.device) % n * (h * w)
    index = torch.where(inside, rows[:, :, None] * w + columns[:, None, :] + first[:, None, None], n * h * w)
    pixels = images.new_zeros(n * h * w + 1, c)  # the last row: zeros, for positions outside the image
    pixels[:-1].view(n, h, w, c).copy_(images.permute(0, 2, 3, 1))
    return pixels.index_select(0, index.flatten()).view(-1, h, w, c).permute(0, 3, 1, 2)


def shift_flip(images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Views (K, C, H, W) of images (N, C, H, W): view k shows image k % N, with zeros outside it.

    shift: (K, 2) integers, in pixels (rows, columns). flip: (K,) bool, whether the view is mirrored horizontally.
    Differentiable in the images if K is a multiple of N.
    """
    return _ShiftFlip.apply(images, shift, flip)


class CropFlip:
    """Random crop after zero padding and, with ``flip``, random horizontal mirroring, independently for each image.

    ``images`` (N, C, H, W) -> views of the same shape and range, differentiable. padding: in pixels. count: number
    of different views of an image.
    """

    def __init__(self, padding: int = 4, flip: bool = True):
        self.padding, self.flip = padding, flip
        self.count = (2 * padding + 1) ** 2 * (1 + flip)

    def __call__(self, images: Tensor) -> Tensor:
        return shift_flip(images, *self.draw(len(images), images.device))

    def draw(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random shifts (n, 2), int64, in pixels, and mirrorings (n,), bool."""
        shift = torch.randint(-self.padding, self.padding + 1, (n, 2), device=device)
        return shift, torch.rand(n, device=device) < (0.5 if self.flip else 0.0)

    def number(self, shift: Tensor, flip: Tensor) -> Tensor:
        """Index of each view among the ``count`` views of an image, int64 (n,), from 0."""
        rows, columns = (shift + self.padding).unbind(1)
        return (rows * (2 * self.padding + 1) + columns) * (1 + self.flip) + flip


def random_resized_crop(images: Tensor, scale: tuple[float, float] = (0.25, 1.0)) -> Tensor:
    """CMI's local views, fp32: a crop of random area and position of each image (N, C, H, W), resized to its size.

    scale: range of the area of a crop, as a fraction of the image's; the aspect ratio is kept.
    """
    n, device = len(images), images.device
    side = torch.empty(n, device=device).uniform_(*scale).sqrt()
    centre = (torch.rand(n, 2, device=device) * 2 - 1) * (1 - side)[:, None]
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = centre
    with torch.autocast(device.type, enabled=False):  # half-precision coordinates would shift pixels
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def mixup(views: Tensor, share: float) -> Tensor:
    """Blend a random ``share`` of the views (N, C, H, W), each with a random other one, by a weight uniform in [0, 1].

    Zhang et al. (2018), without labels: the target is the teacher's output on the blend.
    """
    n, device = len(views), views.device
    weight = torch.rand(n, device=device)
    weight = torch.where(torch.rand(n, device=device) < share, weight, 1.0)[:, None, None, None]
    return weight * views + (1 - weight) * views[torch.randperm(n, device=device)]
