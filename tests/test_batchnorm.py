"""Batch statistics of BatchNorm layers, against torch and finite differences, and what their hooks leave unchanged."""

import pytest
import torch
from nets import toy
from parts import changed, hooks_of, snapshot
from torch import nn

from datafree.batchnorm import BatchNormTap, ChannelStatistics, FrozenBatchNorm, LayerStatistics
from datafree.models import MODELS


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "model, shape",
    [
        (toy(), (3, 16, 12)),
        (MODELS["wrn16_1"](4), (3, 16, 16)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)), (3, 2, 2)),
    ],
    ids=["toy", "wrn16_1", "BatchNorm1d"],
)
def test_statistics_are_those_of_the_layers_inputs(model, shape):
    model.eval()
    layers = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    inputs = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0].double()})) for layer in layers
    ]
    with BatchNormTap(model) as tap:
        model(torch.randn(5, *shape))
    for handle in handles:
        handle.remove()
    assert len(tap.statistics) == len(layers) > 0
    for statistics, (layer, x) in zip(tap.statistics, inputs.items(), strict=True):
        assert isinstance(statistics, LayerStatistics)
        mean, variance, running_mean, running_variance = statistics
        assert statistics.running_variance is running_variance and statistics.variance is variance
        dims = [d for d in range(x.dim()) if d != 1]
        torch.testing.assert_close(mean, x.mean(dims).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, x.var(dims, unbiased=False).float(), rtol=1e-4, atol=1e-5)
        assert running_mean is layer.running_mean and running_variance is layer.running_var


def test_statistic_hooks_exist_only_inside_the_context():
    model, images = toy().eval(), torch.randn(2, 3, 16, 16)
    before, tap = snapshot(model), BatchNormTap(model)
    with tap:
        assert hooks_of(model) == 3
        model(images)
    assert hooks_of(model) == 0 and len(tap.statistics) == 3
    model(images)
    assert len(tap.statistics) == 3
    with pytest.raises(ZeroDivisionError), tap:
        1 / 0
    assert hooks_of(model) == 0
    assert not changed(before, model)


def norm_layer(shape, affine, dtype=torch.float64):
    """A BatchNorm layer for inputs of ``shape``, frozen in evaluation mode, with random parameters and statistics."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    layer = kind(shape[1], affine=affine, eps=0.1).to(dtype)
    for tensor in [*layer.parameters(), layer.running_mean, layer.running_var]:
        nn.init.uniform_(tensor, 0.5, 2.0)
    return layer.eval().requires_grad_(False)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 6), (4, 3, 2, 5), (2, 3, 2, 2, 2)], ids=str)
def test_a_frozen_layer_with_its_statistics_is_the_layer_and_the_statistics(shape, affine):
    layer, x = norm_layer(shape, affine), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dims = [d for d in range(len(shape)) if d != 1]
    found = FrozenBatchNorm.apply(x, layer)
    plain = layer(x), x.mean(dims), x.var(dims, unbiased=False)
    weights = [torch.randn_like(part) for part in plain]
    gradients = [torch.autograd.grad([part for part in parts], x, weights)[0] for parts in (found, plain)]
    for ours, theirs in zip([*found, gradients[0]], [*plain, gradients[1]]):
        torch.testing.assert_close(ours, theirs)
    assert torch.autograd.gradcheck(lambda x: FrozenBatchNorm.apply(x, layer), x)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_frozen_layer_keeps_half_precision(precision):
    x = torch.randn(4, 3, 6, 5).to(precision).requires_grad_()
    layer = norm_layer(x.shape, True, torch.float32)
    output, mean, _ = FrozenBatchNorm.apply(x, layer)
    (output.float().sum() + mean.sum()).backward()
    assert output.dtype == x.grad.dtype == precision and mean.dtype == torch.float32
    scale = (layer.running_var + 0.1).rsqrt() * layer.weight
    torch.testing.assert_close(x.grad[0, :, 0, 0].float(), scale + 1 / 120, rtol=0.01, atol=0)


class ReLUNorm(nn.BatchNorm2d):
    """A subclass that does more than normalise."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("change", ["subclass", "other forward", "training mode", "trainable"])
def test_only_plain_frozen_layers_are_replaced(change):
    layer = ReLUNorm(3) if change == "subclass" else nn.BatchNorm2d(3)
    layer.train(change == "training mode").requires_grad_(change == "trainable")
    if change == "other forward":
        layer.forward = lambda x: x * 2
    x = torch.randn(4, 3, 5, 5) + 1
    before, forward = layer(x), layer.forward
    with BatchNormTap(layer) as tap:
        output = layer(x)
        assert output.grad_fn is None or change == "trainable"
    torch.testing.assert_close(output, before)
    torch.testing.assert_close(tap.statistics[0][0], x.mean((0, 2, 3)))
    if change == "other forward":
        assert layer.forward is forward
    if change == "trainable":
        output.square().sum().backward()
        assert layer.weight.grad.abs().sum() > 0


def test_a_frozen_network_is_as_before_after_the_context():
    model, images = toy().eval().requires_grad_(False), torch.randn(2, 3, 16, 16)
    before, tap = model(images), BatchNormTap(model)
    with pytest.raises(ZeroDivisionError), tap:
        torch.testing.assert_close(model(images), before)
        1 / 0
    assert len(tap.statistics) == 3 and not any("forward" in layer.__dict__ for layer in tap.layers)
    assert torch.equal(model(images), before) and len(tap.statistics) == 3


def test_layers_without_running_statistics_are_left_out():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3))
    assert BatchNormTap(model).layers == []


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 2, 5), (4, 3, 6)], ids=str)
def test_gradient_of_the_statistics(shape):
    x = (torch.randn(shape, dtype=torch.float64) + 2).requires_grad_()
    assert torch.autograd.gradcheck(ChannelStatistics.apply, x)
    mean, variance = ChannelStatistics.apply(x)
    dims = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(mean, x.mean(dims))
    torch.testing.assert_close(variance, x.var(dims, unbiased=False))


def test_statistics_of_channels_last_maps_and_of_half_precision():
    x = torch.randn(4, 3, 6, 5).bfloat16().to(memory_format=torch.channels_last)
    mean, variance = ChannelStatistics.apply(x)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.float().var((0, 2, 3), unbiased=False))


def test_gradient_of_half_precision_maps_survives_a_large_mean():
    # Differences from the mean are a 50th of the values, which bfloat16 does not resolve.
    x = (torch.randn(64, 1, 4, 4) + 50).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    ChannelStatistics.apply(x)[1].sum().backward()
    exact.var((0, 2, 3), unbiased=False).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0.01, atol=1e-5)


def test_autocast_does_not_lower_the_precision_of_statistics():
    x = torch.randn(4, 3, 6, 5) + 3
    with torch.autocast("cpu", torch.bfloat16):
        mean, variance = ChannelStatistics.apply(x)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), unbiased=False))


def test_statistics_of_many_pixels_are_exact_enough():
    x = torch.randn(128, 2, 32, 32) + 20
    mean, variance = ChannelStatistics.apply(x)
    x = x.double()
    torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=1e-4, atol=0)
    torch.testing.assert_close(variance.double(), x.var((0, 2, 3), unbiased=False), rtol=1e-3, atol=0)
