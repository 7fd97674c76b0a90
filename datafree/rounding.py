"""Rounding to a grid of integers, with gradients: of a weight, and of an activation whose range is observed.

A grid is the integers from low to high, each times a scale, after a zero point is subtracted.
"""

from typing import Any

import torch
from torch import Tensor, nn

from datafree import shares
from datafree.config import Quantizer

FLOAT = 32  # bits of a number that is not quantised
TINY = 1e-20  # smallest scale, of what is constantly 0
FRACTIONS = torch.linspace(0.2, 1, 17)  # of the range from minimum to maximum, tried for the least squared error
SAMPLE = 2**16  # values of an activation on which that is tried


def grid(bits: int, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest integer."""
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def step_and_zero(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32) of the grid on ranges ``low`` to ``high``, each () or (C,).

    Zero is always on the grid, for the sake of padding and of ReLU: a range without it is widened.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    first, last = grid(bits, symmetric)
    if symmetric:
        scale = torch.maximum(-low, high) / last
        return scale.clamp_min(TINY), torch.zeros_like(low, dtype=torch.int32)
    scale = ((high - low) / (last - first)).clamp_min(TINY)
    return scale, (first - low / scale).round().clamp(first, last).to(torch.int32)


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, bounds: tuple[int, int], axis: int | None) -> Tensor:
    """``x`` on the grid; inside it the gradient passes as if nothing was rounded, outside it stops.

    scale, zero: () if ``axis`` is None, or of one number for each index of that axis of x.
    """
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, *bounds)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, axis, *bounds)


class RoundActivation(torch.autograd.Function):
    """:func:`round_to_grid` for one range, given in numbers: several times as fast on a CPU as torch's kernel.

    scale: of the grid. low, high: its lowest and highest integer, minus the zero point.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.inside = ((low - 0.5) * scale, (high + 0.5) * scale)
        return (x * (1 / scale)).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.ops.aten.hardtanh_backward(grad, *ctx.saved_tensors, *ctx.inside), None, None, None


class LearnedStep(torch.autograd.Function):
    """:func:`round_by_learned_step` for scale and zero point that broadcast to x, without the factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        steps = x / scale
        rounded = steps.round().clamp(low - zero, high - zero)
        ctx.save_for_backward(steps, rounded, scale)
        return (rounded * scale).to(x.dtype)  # which may be half as long as the scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        steps, rounded, scale = ctx.saved_tensors
        inside = steps.round() == rounded
        slope = torch.where(inside, rounded - steps, rounded)
        return grad * inside, (grad * slope).sum_to_size(scale.shape), None, None, None


def round_by_learned_step(
    x: Tensor, scale: Tensor, zero: Tensor, bounds: tuple[int, int], axis: int | None, values: float
) -> Tensor:
    """:func:`round_to_grid` with a gradient for the scale, too (LSQ; Esser et al., ICLR 2020).

    That gradient is divided by sqrt(values per scale * highest integer), as there. values: how many x has.
    """
    share = (values / scale.numel() * bounds[1]) ** -0.5
    scale = scale * share + (scale * (1 - share)).detach()
    if axis is not None:
        shape = [-1 if i == axis else 1 for i in range(x.dim())]
        scale, zero = scale.view(shape), zero.view(shape)
    return LearnedStep.apply(x, scale, zero, *bounds)


class Grid(nn.Module):
    """The grid of one weight or activation.

    bits, symmetric: of the grid. axis: of a weight's output channels, each of which has its own range; None for one
    range. learned: whether the scale is a parameter.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, symmetric: bool, axis: int | None, count: int, learned: bool):
        super().__init__()
        self.bits, self.symmetric, self.axis, self.learned = bits, symmetric, axis, learned
        shape = () if axis is None else (count,)
        if learned:
            self.scale = nn.Parameter(torch.ones(shape))
        else:
            self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero", torch.zeros(shape, dtype=torch.int32))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        scale, zero = step_and_zero(low, high, self.bits, self.symmetric)
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero.copy_(zero)

    def is_sound(self) -> bool:
        """Whether its tensors have values that :meth:`set_range` or training gives them; in float none is read."""
        if self.bits == FLOAT:
            return True
        low, high = grid(self.bits, self.symmetric)
        are_finite = all(bool(tensor.isfinite().all()) for tensor in self.state_dict().values())
        is_inside = bool(((low <= self.zero) & (self.zero <= high)).all())
        return are_finite and is_inside and (self.learned or bool((self.scale > 0).all()))

    def rounded(self, x: Tensor) -> Tensor:
        if self.learned:
            scale = self.scale.abs().clamp_min(TINY)  # a step of training may take it below 0
            bounds, values = grid(self.bits, self.symmetric), self.values_in(x)
            return round_by_learned_step(x, scale, self.zero, bounds, self.axis, values)
        return round_to_grid(x, self.scale, self.zero, grid(self.bits, self.symmetric), self.axis)

    def values_in(self, x: Tensor) -> float:
        """How many values x has, in all processes."""
        return x.numel()

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of each range of x."""
        if self.axis is None:
            return x.aminmax()
        rows = x.transpose(0, self.axis).flatten(1)
        return rows.amin(1), rows.amax(1)

    def best_fraction(self, x: Tensor) -> Tensor:
        """The one of FRACTIONS of the range of the extremes that has the least squared rounding error."""
        low, high = (bound.float() for bound in self.extremes(x))
        least, best = torch.full_like(low, float("inf")), torch.ones_like(low)
        for fraction in FRACTIONS.tolist():
            scale, zero = step_and_zero(fraction * low, fraction * high, self.bits, self.symmetric)
            error = (round_to_grid(x, scale, zero, grid(self.bits, self.symmetric), self.axis) - x).square()
            mean = error.mean() if self.axis is None else error.transpose(0, self.axis).flatten(1).mean(1)
            best = torch.where(mean < least, fraction, best)
            least = torch.minimum(mean, least)
        return best


class WeightGrid(Grid):
    """Rounds a weight. Its range follows the weight, unless the scale is learned.

    fraction: of the range from minimum to maximum, chosen by :meth:`fit`.
    """

    fraction: Tensor

    def __init__(self, bits: int, protocol: Quantizer, axis: int, count: int):
        per_channel = protocol.w_per == "channel"
        super().__init__(bits, protocol.w_symmetric, axis if per_channel else None, count, protocol.ranges == "learned")
        self.register_buffer("fraction", torch.ones_like(self.scale))
        self.fits = protocol.ranges != "ema"

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Choose the range for ``weight`` as it is now, if the protocol does not take minimum and maximum."""
        if self.fits and self.bits < FLOAT:
            self.fraction.copy_(self.best_fraction(weight))
            self._follow(weight)

    def _follow(self, weight: Tensor) -> None:
        low, high = self.extremes(weight.detach())
        self.set_range(self.fraction * low, self.fraction * high)

    def forward(self, weight: Tensor) -> Tensor:
        if self.bits == FLOAT:
            return weight
        if not self.learned:
            self._follow(weight)
        return self.rounded(weight)


class ActivationGrid(Grid):
    """Rounds an activation, to a range that is observed on batches and then kept.

    batches: how many were observed; before the first one nothing is rounded.
    """

    range: Tensor

    def __init__(self, bits: int, protocol: Quantizer):
        super().__init__(bits, protocol.a_symmetric, None, 1, protocol.ranges == "learned")
        self.register_buffer("range", torch.zeros(2))
        self.batches, self.momentum, self.fits = 0, protocol.range_momentum, protocol.ranges != "ema"
        self._numbers: tuple[float, int, int] | None = None

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range towards that of ``x``: the exponential moving average of the batches, without a bias.

        So an activation that is the same in each batch has its own range, from the first batch on.
        """
        if self.bits == FLOAT:
            return
        values = x.detach().float().flatten()
        if self.fits:
            values = values[:: max(1, len(values) // SAMPLE)]
        observed = torch.stack(self.extremes(values))
        if self.fits:
            observed *= self.best_fraction(values)
        self.batches += 1
        rate = (1 - self.momentum) / (1 - self.momentum**self.batches)
        self.range += rate * (observed - self.range)
        self.set_range(*self.range)
        self._numbers = None

    def values_in(self, x: Tensor) -> float:
        return shares.in_whole_batch(x.numel())

    def forget(self) -> None:
        """Observe anew."""
        self.batches = 0
        self.range.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.bits == FLOAT or not self.batches:
            return x
        return self.rounded(x) if self.learned else RoundActivation.apply(x, *self.numbers)

    @property
    def numbers(self) -> tuple[float, int, int]:
        """What :class:`RoundActivation` is given; read from the device once."""
        if self._numbers is None:
            zero, bounds = int(self.zero), grid(self.bits, self.symmetric)
            self._numbers = float(self.scale), bounds[0] - zero, bounds[1] - zero
        return self._numbers

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.batches)

    def set_extra_state(self, state: Tensor) -> None:
        self.batches, self._numbers = int(state), None
