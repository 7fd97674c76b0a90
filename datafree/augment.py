"""Batched augmentation on the device, as functions of tensors."""

import torch
from torch.nn import functional as F


class _ShiftFlip(torch.autograd.Function):
    """Shift every image by its own offset, zeros entering, and mirror some of them.

    A view is a selection of pixels, so the gradient is the opposite selection: mirrored
    first, then shifted back. Both ways are one gather, where indexing would scatter.
    """

    @staticmethod
    def forward(ctx, images, shift, flip):
        ctx.save_for_backward(shift, flip)
        ctx.count = len(images)
        return _gather(images, shift, flip)

    @staticmethod
    def backward(ctx, grad):
        shift, flip = ctx.saved_tensors
        # After a mirror the columns run backwards, so the way back shifts them the other way round.
        columns = torch.where(flip, shift[:, 1], -shift[:, 1])
        grad = _gather(grad, torch.stack([-shift[:, 0], columns], 1), flip)
        return grad if len(grad) == ctx.count else grad.unflatten(0, (-1, ctx.count)).sum(0), None, None


def _gather(images, shift, flip):
    """view[k, :, i, j] = image[k % N, :, i + dy, j' + dx], j' = j or its mirror; 0 outside the image."""
    n, c, h, w = images.shape
    rows = torch.arange(h, device=images.device) + shift[:, :1]
    columns = torch.arange(w, device=images.device).expand(len(shift), w)
    columns = torch.where(flip[:, None], w - 1 - columns, columns) + shift[:, 1:]
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    first = torch.arange(len(shift), device=images.device) % n * (h * w)
    index = torch.where(inside, rows[:, :, None] * w + columns[:, None, :] + first[:, None, None], n * h * w)
    pixels = images.new_zeros(n * h * w + 1, c)  # the last one is what stands outside
    pixels[:-1].view(n, h, w, c).copy_(images.permute(0, 2, 3, 1))
    return pixels.index_select(0, index.flatten()).view(-1, h, w, c).permute(0, 3, 1, 2)


def shift_flip(images, shift, flip):
    """The views that ``shift`` (K, 2), in pixels (rows, columns), and ``flip`` (K,) bool define, k of image k % N."""
    return _ShiftFlip.apply(images, shift, flip)


class CropFlip:
    """Random crop after zero padding and, if asked, random mirroring; every image its own.

    ``images`` (N, C, H, W) -> views of the same shape and range, differentiable.
    """

    def __init__(self, padding=4, flip=True):
        self.padding, self.flip = padding, flip
        self.count = (2 * padding + 1) ** 2 * (1 + flip)  # different views of an image

    def __call__(self, images):
        return shift_flip(images, *self.draw(len(images), images.device))

    def draw(self, n, device):
        """Random shifts (n, 2) and mirrorings (n,)."""
        shift = torch.randint(-self.padding, self.padding + 1, (n, 2), device=device)
        return shift, torch.rand(n, device=device) < (0.5 if self.flip else 0.0)

    def number(self, shift, flip):
        """Which of an image's ``count`` views each of these is, (n,) from 0."""
        rows, columns = (shift + self.padding).unbind(1)
        return (rows * (2 * self.padding + 1) + columns) * (1 + self.flip) + flip


def random_resized_crop(images, scale=(0.25, 1.0)):
    """A square-aspect crop of random area and place, resized back; every image its own (CMI's local view)."""
    n, device = len(images), images.device
    side = torch.empty(n, device=device).uniform_(*scale).sqrt()
    centre = (torch.rand(n, 2, device=device) * 2 - 1) * (1 - side)[:, None]
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = centre
    with torch.autocast(device.type, enabled=False):  # coordinates of half precision would move pixels
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def mixup(views, share):
    """Blend a random ``share`` of the views (N, C, H, W) with another one each, by a weight uniform in [0, 1].

    Zhang et al. 2018, without labels: whoever learns from a teacher takes its answer on the blend.
    """
    n, device = len(views), views.device
    weight = torch.rand(n, device=device)
    weight = torch.where(torch.rand(n, device=device) < share, weight, 1.0)[:, None, None, None]
    return weight * views + (1 - weight) * views[torch.randperm(n, device=device)]
