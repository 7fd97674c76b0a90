"""The quantiser against independent ones, and what it finds in networks."""

import copy
import math
import subprocess
import sys

import nets
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, mostly_slow
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as checkpoint_of

from datafree import checkpoint, plan, quantizer, rounding
from datafree.config import Quantizer
from datafree.errors import InputError
from datafree.models import MODELS
from datafree.network import Network
from datafree.quantizer import QuantizedModel, quantise
from datafree.rounding import (
    ActivationGrid,
    RoundActivation,
    WeightGrid,
    round_by_learned_step,
    round_to_grid,
    step_and_zero,
)

SHAPE = (3, 16, 16)


def network(model, shape=SHAPE, frozen=True):
    channels = shape[0]
    made = Network(model, shape, (0.5,) * channels, (0.25,) * channels, name="teacher net")
    return made.freeze() if frozen else made


def observed(quantised, batches=2, n=4):
    """``quantised`` with its ranges observed on noise."""
    with torch.no_grad(), quantised.model.observing():
        for _ in range(batches):
            quantised(torch.rand(n, *quantised.shape))
    return quantised


# The grid.


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_channel_has_few_levels_with_zero_among_them(bits, symmetric):
    weight = torch.randn(5, 7, 3, 3) + torch.tensor([0, 1, -1, 9, -9]).view(-1, 1, 1, 1)  # the last two exclude 0
    grid = WeightGrid(bits, Quantizer(w_symmetric=symmetric), 0, 5)
    rounded = grid(weight)
    for channel, scale, zero in zip(rounded, grid.scale, grid.zero):
        steps = channel / scale
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert len(steps.round().unique()) <= 2**bits
        low, high = rounding.grid(bits, symmetric)
        assert low <= zero <= high and (zero == 0 or not symmetric)
    assert torch.equal(grid(torch.zeros_like(weight)), torch.zeros_like(weight))
    assert torch.allclose(grid(rounded), rounded, atol=1e-6)  # idempotent
    assert (rounded - weight).abs().amax() <= grid.scale.max() * 0.51


def test_one_range_for_a_whole_weight_and_the_other_axis_of_transposed_convolutions():
    weight = torch.randn(4, 6, 3, 3)
    whole = WeightGrid(4, Quantizer(w_per="tensor"), 0, 4)
    assert len(whole(weight).unique()) <= 16 and whole.scale.shape == ()
    transposed = WeightGrid(4, Quantizer(), 1, 6)
    expected = torch.stack([WeightGrid(4, Quantizer(w_per="tensor"), 0, 1)(weight[:, i]) for i in range(6)], 1)
    assert torch.allclose(transposed(weight), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_of_activations_is_torchs_with_its_gradient(symmetric):
    x = torch.randn(1000) * 2
    scale, zero = step_and_zero(torch.tensor(-1.3), torch.tensor(2.1), 4, symmetric)
    low, high = rounding.grid(4, symmetric)
    given, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(given, scale, zero, low, high)
    found = RoundActivation.apply(ours, float(scale), low - int(zero), high - int(zero))
    assert torch.allclose(found, expected, atol=1e-6)
    upstream = torch.randn(1000)
    expected.backward(upstream)
    found.backward(upstream)
    assert torch.equal(ours.grad, given.grad) and 0 < (ours.grad == 0).sum() < 1000


def test_the_gradient_is_that_of_the_clipped_identity():
    """Finite differences of what is rounded are 0 or infinite; the soft function is the identity inside the range."""
    scale, zero = step_and_zero(torch.tensor(-1.0), torch.tensor(1.0), 4, False)
    x = torch.tensor([-3.0, -0.4, 0.0, 0.7, 3.0], dtype=torch.float64)

    def soft(x):
        return x.clamp((0.0 - zero - 0.5) * scale, (15.0 - zero + 0.5) * scale)

    slopes = (soft(x + 1e-4) - soft(x - 1e-4)) / 2e-4
    given = x.float().requires_grad_()
    round_to_grid(given, scale, zero, (0, 15), None).sum().backward()
    assert torch.allclose(given.grad.double(), slopes, atol=1e-4)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_learned_steps_against_torchs_learnable_kernel(axis):
    torch.manual_seed(0)  # of values that are not half-way between two steps
    x, low, high = torch.randn(4, 6, 5), -8, 7
    count = 1 if axis is None else x.shape[axis]
    scale, zero = torch.rand(count) * 0.3 + 0.05, torch.randint(-2, 3, (count,), dtype=torch.int32)
    factor = (x.numel() / count * high) ** -0.5
    theirs = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    ours = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    if axis is None:
        expected = torch._fake_quantize_learnable_per_tensor_affine(*theirs, zero.float(), low, high, factor)
        found = round_by_learned_step(ours[0], ours[1][0], zero[0], (low, high), None, x.numel())
    else:
        expected = torch._fake_quantize_learnable_per_channel_affine(*theirs, zero.float(), axis, low, high, factor)
        found = round_by_learned_step(*ours, zero, (low, high), axis, x.numel())
    upstream = torch.randn_like(x)
    expected.backward(upstream)
    found.backward(upstream)
    assert torch.allclose(found, expected, atol=1e-5)
    for mine, other in zip(ours, theirs):
        assert torch.allclose(mine.grad, other.grad, atol=1e-4)


def test_learned_steps_against_torchao():
    module = pytest.importorskip("torchao.quantization.pt2e.learnable_fake_quantize")
    observers = pytest.importorskip("torchao.quantization.pt2e.observer")
    theirs = module.LearnableFakeQuantize(
        observers.MinMaxObserver, 0, 15, use_grad_scaling=True, dtype=torch.quint8, qscheme=torch.per_tensor_affine
    )
    theirs.enable_range_learning()
    x = torch.randn(8, 8)
    given, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs(given)
    scale = theirs.scale.detach().clone().requires_grad_()
    found = round_by_learned_step(ours, scale[0], theirs.zero_point[0].detach(), (0, 15), None, x.numel())
    expected.square().sum().backward()
    found.square().sum().backward()
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(ours.grad, given.grad, atol=1e-4)
    assert torch.allclose(scale.grad, theirs.scale.grad, rtol=1e-3)


# Ranges.


@pytest.mark.parametrize("batches", [1, 2, 21])
def test_a_constant_activation_has_its_own_range(batches):
    grid = ActivationGrid(8, Quantizer(a_bits=8))
    for _ in range(batches):
        grid.observe(torch.tensor([0.0, 2.55]))
    assert torch.allclose(grid.range, torch.tensor([0.0, 2.55]))
    assert torch.allclose(grid(torch.tensor([2.55, 0.01])), torch.tensor([2.55, 0.01]), atol=1e-6)


def test_the_moving_average_of_ranges_against_its_sum():
    """sum of (1 - m) m^(n - i) x_i over the sum of the weights."""
    grid, highs = ActivationGrid(8, Quantizer(a_bits=8, range_momentum=0.8)), [3.0, 1.0, 7.0, 2.0]
    for high in highs:
        grid.observe(torch.tensor([-high, high]))
    weights = np.array([0.2 * 0.8 ** (len(highs) - 1 - i) for i in range(len(highs))])
    assert grid.range[1].item() == pytest.approx((weights * highs).sum() / weights.sum(), rel=1e-5)


def test_a_learned_step_that_overshoots_below_zero_still_learns():
    grid, weight = WeightGrid(4, Quantizer(ranges="learned"), 0, 3), torch.randn(3, 5)
    grid.fit(weight)
    with torch.no_grad():
        grid.scale[1] *= -1
    rounded = grid(weight)
    assert (rounded[1] - weight[1]).abs().max() <= grid.scale[1].abs()
    rounded.square().sum().backward()
    assert grid.scale.grad[1] != 0


def test_nothing_is_rounded_before_a_range_is_observed_and_observing_starts_anew():
    grid, x = ActivationGrid(2, Quantizer(a_bits=2)), torch.randn(100)
    assert grid(x) is x
    grid.observe(x)
    assert len(grid(x).unique()) <= 4
    grid.forget()
    assert grid(x) is x
    grid.observe(torch.tensor([0.0, 1.0]))
    assert grid.range.tolist() == [0, 1]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_range_of_least_squared_error_against_a_search(symmetric):
    weight = torch.randn(3, 500) ** 3  # with outliers
    grid = WeightGrid(3, Quantizer(w_bits=3, ranges="mse", w_symmetric=symmetric), 0, 3)
    plain = WeightGrid(3, Quantizer(w_bits=3, w_symmetric=symmetric), 0, 3)
    grid.fit(weight)
    low, high = rounding.grid(3, symmetric)
    for channel, rounded, straight in zip(weight, grid(weight), plain(weight)):
        errors = []
        for fraction in np.linspace(0.2, 1, 17):
            bottom, top = fraction * channel.min().item(), fraction * channel.max().item()
            scale = max(-bottom, top) / high if symmetric else (top - bottom) / (high - low)
            zero = 0 if symmetric else min(max(round(low - bottom / scale), low), high)
            steps = np.clip(np.round(channel.numpy() / scale) + zero, low, high) - zero
            errors.append(((steps * scale - channel.numpy()) ** 2).mean())
        assert (rounded - channel).square().mean().item() == pytest.approx(min(errors), rel=1e-3)
        assert (rounded - channel).square().mean() < (straight - channel).square().mean()


# What is found in a network.


class Written(nn.Module):
    """One network, with activation functions written in the way that ``write`` does."""

    def __init__(self, write):
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.norm.running_mean.normal_(std=0.1), self.norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        x = self.write(self.first(x))
        x = self.write(x + self.norm(self.second(x)))
        return self.head(x.mean((2, 3)))


def statement(x):
    F.relu_(x)
    return x


RELUS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu in place by position": lambda x: F.relu(x, True),
    "torch.relu": torch.relu,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "statement in place": statement,
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min in place": lambda x: x.clamp_min_(0),
    "clip": lambda x: torch.clip(x, 0),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "threshold in place": nn.Threshold(0.0, 0.0, inplace=True),
}


@pytest.mark.parametrize("name", RELUS)
def test_a_relu_is_quantised_however_it_is_written(name):
    images = torch.rand(4, *SHAPE)
    reference = network(Written(F.relu))
    expected = quantise(reference, Quantizer(w_bits=3, a_bits=3))
    found = quantise(network(Written(RELUS[name])), Quantizer(w_bits=3, a_bits=3))
    assert len(found.model.sites.layers) == 3 and len(found.model.sites.activations) == 2
    for quantised in (expected, found):
        torch.manual_seed(1)
        observed(quantised)
    assert torch.equal(found(images), expected(images)) and not torch.allclose(found(images), reference(images))
    for quantised in (expected, found):
        quantised(images).square().sum().backward()
    for ours, theirs in zip(found.parameters(), expected.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


@pytest.mark.parametrize(
    "write",
    [F.relu6, F.hardswish, F.silu, F.gelu, F.leaky_relu, nn.PReLU(), nn.Hardswish(inplace=True), nn.SiLU(inplace=True)],
    ids=lambda write: getattr(write, "__name__", str(write)),
)
def test_other_activation_functions_are_on_the_grid_too(write):
    seen, quantised = [], quantise(network(Written(write)), Quantizer(w_bits=4, a_bits=3))
    assert len(quantised.model.sites.activations) == 2
    quantised.model.model.second.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    observed(quantised)
    quantised(torch.rand(4, *SHAPE))
    assert len(seen[-1].unique()) <= 8


@pytest.mark.parametrize("ranges", ["mse", "learned"])
def test_a_channel_of_one_value_keeps_it(ranges):
    weight, grid = torch.tensor([0.5, -2.0, 0.0]).view(3, 1, 1, 1), WeightGrid(8, Quantizer(ranges=ranges), 0, 3)
    grid.fit(weight)
    assert torch.allclose(grid(weight), weight, atol=0.01)


def slices_in_place(x):
    x[:, :4].relu_()
    F.silu(x[:, 4:], inplace=True)
    return x


def beside_its_view(x):
    rows = x.flatten(1)
    F.relu(x, inplace=True)
    return rows.view(x.shape)


@pytest.mark.parametrize("write", [slices_in_place, beside_its_view])
def test_what_is_written_into_the_memory_of_another_tensor_is_read_there(write):
    teacher, images = network(Written(write)), torch.rand(4, *SHAPE)
    quantised = observed(quantise(teacher, Quantizer(w_bits=16, a_bits=16)), n=64)
    assert torch.allclose(quantised(images), teacher(images), atol=1e-2)
    quantised(images).sum().backward()


def test_outputs_against_a_hand_made_quantised_network():
    """NumPy rounds weights and activations; torch's float convolutions do the rest."""
    torch.manual_seed(0)
    teacher = network(nets.plain(5))
    quantised, images = quantise(teacher, Quantizer(w_bits=4, a_bits=4)), torch.rand(8, *SHAPE)
    with torch.no_grad(), quantised.model.observing():
        quantised(images)

    def rounded(x, axis):
        x = x.detach().numpy()
        axes = tuple(i for i in range(x.ndim) if i != axis) if axis is not None else None
        low = np.minimum(x.min(axes, keepdims=True), 0)
        scale = (np.maximum(x.max(axes, keepdims=True), 0) - low) / 15
        zero = np.round(-low / scale)
        return torch.from_numpy((np.clip(np.round(x / scale) + zero, 0, 15) - zero) * scale).float()

    layers = [module for module in teacher.model if isinstance(module, (nn.Conv2d, nn.Linear))]
    x = teacher.normalise(images)
    for layer in layers[:-1]:
        x = rounded(F.relu(F.conv2d(x, rounded(layer.weight, 0), layer.bias, layer.stride, layer.padding)), None)
    expected = F.linear(x.mean((2, 3)), rounded(layers[-1].weight, 0), layers[-1].bias)
    assert torch.allclose(quantised(images), expected, atol=1e-4)


def test_the_network_itself_is_left_alone_and_statistics_stay_as_they_are():
    teacher = network(nets.tiny(5))
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    quantised = observed(quantise(teacher, Quantizer()))
    optimizer = torch.optim.SGD(quantised.parameters(), 0.1)
    for _ in range(3):
        quantised.train()
        quantised(torch.rand(4, *SHAPE)).square().sum().backward()
        optimizer.step()
    after = quantised.model.model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(teacher.model.state_dict()[name], tensor)
        is_statistic = "running" in name or "tracked" in name
        assert torch.equal(after[name], tensor) == is_statistic, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_first_and_last_layers_may_have_their_own_bits():
    model = quantise(network(nets.plain(5)), Quantizer(w_bits=3, a_bits=2, first_last_bits=8)).model
    assert [grid.bits for grid in model.weights] == [8, 3, 8]
    assert [grid.bits for grid in model.activations] == [2, 8]
    assert [grid.bits for grid in quantise(network(nets.plain(5)), Quantizer(w_bits=32)).model.weights] == [32] * 3


def test_32_bits_leave_the_network_as_it_is():
    teacher, images = network(nets.tiny(5)), torch.rand(4, *SHAPE)
    quantised = observed(quantise(teacher, Quantizer(w_bits=32, a_bits=32)))
    assert torch.equal(quantised(images), teacher(images))
    assert quantised.model.packed_bytes == 4 * quantised.model.sites.of


@pytest.mark.parametrize("ranges", ["ema", "mse", "learned"])
@pytest.mark.parametrize("option", ["w_bits", "a_bits", "first_last_bits"])
def test_ranges_of_a_network_that_is_partly_in_float_are_loaded_again(option, ranges):
    protocol = Quantizer(**{option: 32}, ranges=ranges)
    quantised, again = (quantise(network(nets.plain(5)), protocol) for _ in range(2))
    images = torch.rand(4, *SHAPE)
    again.model.model.load_state_dict(observed(quantised).model.model.state_dict())
    again.model.load_grids({f"grids.{name}": tensor for name, tensor in quantised.model.grids.state_dict().items()})
    assert torch.equal(again(images), quantised(images))


class Beside(Written):
    """Returns an embedding by a head of its own, which is called after that of the logits."""

    def __init__(self):
        super().__init__(F.relu)
        self.projection = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x)))).mean((2, 3))
        return {"logits": self.head(x), "embedding": self.projection(x)}


def test_the_last_layer_is_that_of_the_logits():
    model = quantise(network(Beside()), Quantizer(w_bits=2, a_bits=2, first_last_bits=8)).model
    bits = {layer.name: grid.bits for layer, grid in zip(model.sites.layers, model.weights)}
    assert bits == {"first": 8, "second": 2, "head": 8, "projection.0": 2, "projection.2": 2}
    assert [grid.bits for grid in model.activations] == [2, 8, 2]
    assert "First and last layer, in 8 bits: first and head." in plan.describe_grids(model)


class Bottleneck(Written):
    """A layer reads what a linear one gives, and the head what is pooled."""

    def forward(self, x):
        x = self.norm(self.second(F.relu(self.first(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(self.second(x)), 1), 1))


def test_layers_whose_inputs_stay_in_float_are_named():
    lines = plan.describe_grids(quantise(network(Bottleneck(F.relu)), Quantizer()).model)
    assert "The inputs of 1 layer after the first stay in float" in lines[1] and lines[1].endswith(": second.")
    assert len(plan.describe_grids(quantise(network(Written(F.relu)), Quantizer()).model)) == 1


def test_a_quantised_network_is_in_evaluation_mode_from_the_beginning():
    model = quantise(network(nets.tiny(5), frozen=False), Quantizer()).model
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("per, same", [("channel", True), ("tensor", False)])
def test_folding_changes_nothing_but_ranges_that_channels_share(per, same):
    teacher, images = network(Written(F.relu)), torch.rand(4, *SHAPE)
    apart, folded = (quantise(teacher, Quantizer(w_per=per, fold_bn=fold, a_bits=32)) for fold in (False, True))
    assert [layer.norm for layer in folded.model.sites.layers] == ["", "norm", ""]
    assert torch.allclose(apart(images), folded(images), atol=1e-4) == same
    folded(images).sum().backward()
    assert folded.model.model.norm.weight.grad.abs().sum() > 0


class Twice(Written):
    """Reads the output of a convolution beside its normalisation."""

    def forward(self, x):
        x = F.relu(self.first(x))
        y = self.second(x)
        return self.head((F.relu(self.norm(y)) + y).mean((2, 3)))


def test_what_is_read_elsewhere_too_is_not_folded():
    folded = quantise(network(Twice(None)), Quantizer(fold_bn=True))
    assert not any(layer.norm for layer in folded.model.sites.layers)


class OwnNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.rand(channels))
        self.register_buffer("running_var", torch.rand(channels) + 1)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, 1 + self.gain, self.shift)


class Doubled(nn.BatchNorm2d):
    """Normalises by other numbers than its own."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, 2 * self.weight, self.bias)


class Masked(nn.Conv2d):
    """Writes into its output afterwards."""

    def forward(self, x):
        y = super().forward(x)
        y[:, :4] = 0
        return y


@pytest.mark.parametrize(
    "layer, norm",
    [
        (nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)),
        (nn.Conv2d(8, 8, 1), OwnNorm(8)),
        (nn.Conv2d(8, 8, 1), Doubled(8)),
        (Masked(8, 8, 1), nn.BatchNorm2d(8)),
    ],
    ids=str,
)
def test_a_normalisation_that_cannot_be_folded_stays(layer, norm):
    model, images = Written(F.relu), torch.rand(4, *SHAPE)
    model.second, model.norm = layer, norm
    teacher = network(model)
    quantised = quantise(teacher, Quantizer(w_bits=16, a_bits=32, fold_bn=True))
    assert not any(layer.norm for layer in quantised.model.sites.layers)
    assert torch.allclose(quantised(images), teacher(images), atol=1e-3)


class TwoNorms(Written):
    """Normalises what is normalised already, as PyramidNet's first block does."""

    def __init__(self):
        super().__init__(F.relu)
        self.further = nn.BatchNorm2d(8)
        self.further.running_mean.normal_()

    def forward(self, x):
        x = self.norm(self.second(F.relu(self.first(x))))
        return self.head((F.relu(self.further(x)) + x).mean((2, 3)))


def test_a_second_normalisation_of_a_folded_one_stays():
    teacher, images = network(TwoNorms()), torch.rand(4, *SHAPE)
    quantised = quantise(teacher, Quantizer(w_bits=16, a_bits=32, fold_bn=True))
    assert [layer.norm for layer in quantised.model.sites.layers] == ["", "norm", ""]
    assert torch.allclose(quantised(images), teacher(images), atol=1e-3)


def test_folding_that_gives_other_outputs_is_refused(monkeypatch):
    monkeypatch.setattr(quantizer, "_folded", lambda weight, bias, norm, axis: (2 * weight, bias))
    with pytest.raises(InputError, match="gives other outputs with BatchNorm folded.*leave --fold_bn out"):
        quantise(network(Written(F.relu)), Quantizer(fold_bn=True))


class Again(Written):
    """Calls a layer three times."""

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = F.relu(self.norm(self.second(x)))
        return self.head(x.mean((2, 3)))


class Rows(Written):
    """Normalises the rows of what a linear layer gives, which are as many as its channels."""

    def __init__(self):
        super().__init__(F.relu)
        self.linear, self.rows = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.rows.running_mean.normal_()

    def forward(self, x):
        return self.head(F.relu(self.rows(self.linear(x[:, 0])))[:, :8].mean(2))


def test_a_normalisation_of_another_axis_is_not_folded():
    teacher, images = network(Rows()), torch.rand(4, *SHAPE)
    quantised = quantise(teacher, Quantizer(w_bits=16, a_bits=32, fold_bn=True))
    assert torch.allclose(quantised(images), teacher(images), atol=1e-3)


def own_parts(model):
    """Names and numbers of what is rounded, and the size if it is packed."""
    found = quantise(network(model), Quantizer(w_bits=8, a_bits=8)).model
    return found.sites.numbers, found.sites.in_float, found.packed_bytes


def test_weights_that_are_computed_or_called_again_are_counted_once():
    plain = own_parts(Written(F.relu))
    computed, again = Written(F.relu), Again(F.relu)
    torch.nn.utils.parametrizations.spectral_norm(computed.second)
    assert own_parts(computed) == plain
    twice = quantise(network(again), Quantizer(w_bits=8, a_bits=8)).model
    assert len(twice.sites.layers) == 5 and (twice.sites.numbers, twice.packed_bytes) == (plain[0], plain[2])
    torch.nn.utils.parametrizations.weight_norm(computed.first)
    numbers, in_float, packed = own_parts(computed)
    assert numbers == plain[0] + 8 and not in_float and packed == plain[2]


class Recurrent(Written):
    def __init__(self):
        super().__init__(None)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        rows = F.relu(self.first(x)).mean(3).transpose(1, 2)
        return self.head(self.lstm(rows)[0][:, -1])


def test_matrices_that_stay_in_float_are_named():
    found = quantise(network(Recurrent()), Quantizer()).model
    named = ["second.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert found.sites.in_float == named
    on, inputs, rest = plan.describe_grids(found)
    assert "the weights of 2 layers" in on and ", ".join(named) in rest and inputs.endswith(": head.")


def test_numbers_in_float_are_not_said_to_be_on_the_grid():
    in_float = QuantizedModel(nets.plain(5).eval(), Quantizer(w_bits=32, a_bits=32), torch.rand(2, *SHAPE))
    assert "the weights of 0 layers (0.0% of all parameters), and 0 activations" in plan.describe_grids(in_float)[0]
    outer = QuantizedModel(nets.plain(5).eval(), Quantizer(first_last_bits=32), torch.rand(2, *SHAPE))
    assert "the weights of 1 layer (" in plan.describe_grids(outer)[0]


@pytest.mark.parametrize("ranges", ["ema", "learned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_of_weights_are_calibrated(dtype, ranges):
    teacher, images = network(nets.plain(5).to(dtype)), torch.rand(4, *SHAPE)
    quantised = observed(quantise(teacher, Quantizer(w_bits=8, a_bits=8, ranges=ranges)))
    assert torch.allclose(quantised(images), teacher(images), atol=0.1)


class Chosen(Written):
    """Has a parameter of integers."""

    def __init__(self):
        super().__init__(F.relu)
        self.order = nn.Parameter(torch.arange(8).flip(0), requires_grad=False)

    def forward(self, x):
        return self.head(self.second(F.relu(self.first(x))[:, self.order]).relu().mean((2, 3)))


def test_a_parameter_of_integers_is_not_trained():
    quantised = quantise(network(Chosen()), Quantizer())
    assert [name for name, p in quantised.model.model.named_parameters() if not p.requires_grad] == ["order"]


class Checkpointed(Written):
    def __init__(self, reentrant):
        super().__init__(F.relu)
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint_of(lambda x: F.relu(self.second(x)), self.first(x), use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


class Product(nn.Module):
    def __init__(self, multiply):
        super().__init__()
        self.conv, self.weight, self.multiply = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8, 5)), multiply

    def forward(self, x):
        return self.multiply(F.relu(self.conv(x)).mean((2, 3)), self.weight)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 8, 4, stride=4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        tokens = F.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


class Changing(Written):
    """Calls a layer only in its first passes."""

    calls = 0

    def forward(self, x):
        x, self.calls = F.relu(self.first(x)), self.calls + 1
        return self.head((self.second(x) if self.calls % 2 else x).mean((2, 3)))


@pytest.mark.parametrize(
    "model, protocol, parts",
    [
        (Product(torch.matmul), {}, ("matmul", "Product", "nn.Linear")),
        (Product(lambda x, w: x @ w), {}, ("multiplies by its weight", "nn.Linear")),
        (Product(lambda x, w: (w.t() @ x.t()).t()), {}, ("network Product multiplies by its weight",)),
        (Product(lambda x, w: torch.einsum("nc,co->no", [x, w])), {}, ("multiplies by its weight in einsum",)),
        (Checkpointed(True), {}, ("torch.utils.checkpoint", "off")),
        (Checkpointed(False), {}, ("torch.utils.checkpoint", "off")),
        (Written(torch.jit.script(nn.ReLU())), {}, ("TorchScript module, 'write'", "Python class")),
        (Attention(), {}, ("'attention'", "MultiheadAttention", "multi_head_attention_forward")),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
            {},
            ("--a_bits 4",),
        ),
        (nets.plain(5), {"w_bits": 0}, ("--w_bits cannot be 0", "2 to 16")),
        (nets.plain(5), {"a_bits": 33}, ("--a_bits cannot be 33",)),
        (nets.plain(5), {"first_last_bits": 1}, ("--first_last_bits cannot be 1",)),
    ],
    ids=str,
)
def test_what_cannot_be_quantised_is_one_sentence(model, protocol, parts):
    with pytest.raises(InputError) as caught:
        quantise(network(model), Quantizer(**protocol))
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message


def test_a_network_that_calls_other_layers_in_another_pass_is_called_out():
    quantised = QuantizedModel(Changing(None).eval(), Quantizer(), torch.rand(2, *SHAPE))
    with pytest.raises(InputError, match="as layer 2 one of 5 channels, where 'second' had 8.*make it call the same"):
        for _ in range(2):
            quantised(torch.rand(2, *SHAPE))


class OfTheBatch(Written):
    """Has a convolution whose weight holds one filter for each image."""

    def forward(self, x):
        x = F.relu(self.first(x))
        filters = self.second.weight.repeat(len(x), 1, 1, 1)
        x = F.conv2d(x.reshape(1, -1, 16, 16), filters, padding=1, groups=4 * len(x)).reshape(x.shape)
        return self.head(x.mean((2, 3)))


def test_a_layer_whose_channels_follow_the_batch_is_named():
    quantised = QuantizedModel(OfTheBatch(None).eval(), Quantizer(), torch.rand(2, *SHAPE))
    with pytest.raises(InputError, match="called as layer 2 one of 32 channels, where '' had 16"):
        quantised(torch.rand(4, *SHAPE))


def test_a_quantised_network_is_not_quantised_again():
    with pytest.raises(InputError, match="is quantised already; give its weights in float"):
        quantise(observed(quantise(network(nets.plain(5)), Quantizer())), Quantizer(w_bits=2))


TORCHVISION = {
    "resnet18": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "regnet_x_400mf": 64,
    "densenet121": 64,
    "vgg11_bn": 32,
}


def calibrated(model, shape):
    """``model`` with BatchNorm statistics that fit its weights, as those of a trained one do."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, *shape))
    return model


@pytest.mark.parametrize(
    "name", mostly_slow([*MODELS, *TORCHVISION], ["wrn16_1", "cifar_resnet20", "mobilenetv2", "mobilenet_v3_small"])
)
def test_networks_are_quantised_and_take_a_step(name):
    torch.manual_seed(0)
    if name in MODELS:
        model, shape = MODELS[name](5, 3), (3, 32, 32)
    else:
        model, size = torchvision.models.get_model(name, weights=None, num_classes=5), TORCHVISION[name]
        shape = (3, size, size)
    teacher = network(calibrated(model, shape), shape)
    quantised = observed(quantise(teacher, Quantizer(w_bits=8, a_bits=8)), batches=1)
    images = torch.rand(4, *shape)
    kinds = (nn.Conv2d, nn.Linear)
    assert len(quantised.model.sites.layers) == sum(isinstance(module, kinds) for module in model.modules())
    assert quantised.model.sites.numbers > 0.9 * quantised.model.sites.of
    distance = (quantised(images) - teacher(images)).norm() / teacher(images).norm()
    assert 0 < distance < 0.5
    F.cross_entropy(quantised.features(images).logits, torch.arange(4)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in quantised.parameters())
    before = quantised(images)
    torch.optim.SGD(quantised.parameters(), 1e-3).step()
    assert not torch.equal(quantised(images), before)


# Files.


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore")
def test_weights_that_a_hook_computes_can_be_copied(norm):
    model = Written(F.relu)
    norm(model.second)
    teacher, images = network(model), torch.rand(4, *SHAPE)
    quantised = observed(quantise(teacher, Quantizer(w_bits=16, a_bits=16)), n=64)
    assert torch.allclose(quantised(images), teacher(images), atol=1e-2)


def test_a_copy_is_independent():
    quantised, images = observed(quantise(network(nets.tiny(5)), Quantizer())), torch.rand(4, *SHAPE)
    before = quantised(images)
    other = copy.deepcopy(quantised)
    assert torch.equal(other(images), before)
    with torch.no_grad(), other.model.observing():
        other(10 * images)
    assert torch.equal(quantised(images), before) and not torch.equal(other(images), before)


@pytest.mark.parametrize("ranges", mostly_slow(["ema", "mse", "learned"], ["learned"]))
def test_a_file_gives_equal_outputs_in_another_process(ranges, tmp_path):
    teacher = network(MODELS["resnet8"](5, 3))
    quantised = observed(quantise(teacher, Quantizer(w_bits=3, a_bits=5, ranges=ranges, first_last_bits=8)))
    images = torch.rand(4, *SHAPE)
    facts = {"model": "resnet8", "num_classes": 5, "shape": list(SHAPE), "mean": [0.5] * 3, "std": [0.25] * 3}
    state = {"state_dict": quantised.model.state_dict(), **facts, **quantizer.stated(quantised.model)}
    checkpoint.save(tmp_path / "student.pth", state)
    torch.save(images, tmp_path / "images.pth")
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from datafree.network import Network\n"
        "network = Network.from_file('student.pth').eval()\n"
        "torch.save(network(torch.load('images.pth')).detach(), 'logits.pth')\n"
        "print(network.notes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "W3A5 simulated" in done.stdout
    assert torch.equal(torch.load(tmp_path / "logits.pth"), quantised(images))


def test_compiled_code_is_refused_because_its_calls_are_not_seen():
    quantised = observed(quantise(network(nets.plain(5)), Quantizer()))
    with pytest.raises(InputError, match="student net .w4a4. is quantised, .* --compile off"):
        quantised.compiled("default")


def test_ranges_of_another_network_or_protocol_are_refused(tmp_path):
    quantised = observed(quantise(network(MODELS["resnet8"](5, 3)), Quantizer()))
    facts = {"model": "resnet8", "num_classes": 5, "shape": list(SHAPE), "mean": [0.5] * 3, "std": [0.25] * 3}
    state = {"state_dict": quantised.model.state_dict(), **facts, **quantizer.stated(quantised.model)}
    for change, message in [
        ({"quantization": '{"w_bits": 33}'}, "does not know"),
        ({"quantization": "no json"}, "does not know"),
        ({"quantization": 3}, "does not know"),
        ({"quantization": '{"ranges": "foo"}'}, "ranges cannot be 'foo'; it takes one of ema, mse, learned"),
        ({"quantization": '{"w_bits": 4.0}'}, "w_bits cannot be 4.0"),
        ({"quantization": '{"a_bits": null}'}, "a_bits cannot be None"),
        ({"quantization": '{"range_momentum": 5}'}, "range_momentum cannot be 5"),
        ({"quantization": '{"w_symmetric": "no"}'}, "w_symmetric cannot be 'no'"),
        *(
            ({"state_dict": {**state["state_dict"], f"grids.{name}": torch.full_like(value, number)}}, "spoiled")
            for name, number in [
                ("activations.0.scale", float("nan")),
                ("activations.0.scale", 0),
                ("activations.0.zero", 999),
                ("weights.0.fraction", float("inf")),
            ]
            for value in [state["state_dict"][f"grids.{name}"]]
        ),
        ({"quantization": '{"ranges": "learned", "w_per": "tensor"}'}, "another network or protocol"),
    ]:
        checkpoint.save(tmp_path / "student.pth", {**state, **change})
        with pytest.raises(InputError, match=message) as caught:
            Network.from_file(tmp_path / "student.pth")
        assert "\n" not in str(caught.value)


def test_bits_are_named_in_one_line():
    protocol = Quantizer(w_bits=3, a_bits=5, first_last_bits=8, w_symmetric=True, ranges="mse", w_per="tensor")
    assert protocol.short == "w3a5-fl8-per-tensor-symmetric-w-mse"
    for part in ("W3A5", "per tensor symmetric", "8 bits", "least squared error", "32 batches", "not folded"):
        assert part in protocol.sentence
    in_float = Quantizer(w_bits=32, first_last_bits=8).sentence
    assert "last activations 8 bits" in in_float and "layer" not in in_float
    assert "observed" not in Quantizer(a_bits=32).sentence
    assert "first and last layer in float" in Quantizer(first_last_bits=32).sentence
    assert "\n" not in protocol.sentence and math.isfinite(protocol.range_momentum)
