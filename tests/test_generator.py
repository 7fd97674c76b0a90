"""The generator: its fused upsampling against torch's two steps, its sizes, its initialisation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from datafree.models.generator import Generator, UpsampleConv

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 96, 96), (3, 30, 46), (1, 16, 16), (3, 224, 224), (2, 5, 40)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------- upsampling and convolution as one


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 1), (1, 6)], ids=str)
def test_upsample_conv_equals_upsampling_then_convolution(size):
    layer = UpsampleConv(3, 5).double()
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    oracle = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), layer.weight, padding=1)
    found = layer(x)
    torch.testing.assert_close(found, oracle, rtol=0, atol=1e-12)
    weights = torch.randn_like(oracle)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (x, layer.weight)),
        torch.autograd.grad((oracle * weights).sum(), (x, layer.weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_gradient_of_upsample_conv():
    layer = UpsampleConv(2, 3).double()
    nn.init.normal_(layer.weight)
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_upsample_conv_under_autocast_is_half_precision():
    layer = UpsampleConv(2, 3)
    nn.init.normal_(layer.weight)
    x = torch.randn(1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), rtol=0.05, atol=0.1)


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_have_the_given_shape_and_lie_within_0_and_1(shape):
    generator = Generator(nz=8, ngf=2, shape=shape)
    z = torch.randn(2, 8, requires_grad=True)
    images = generator(z)
    assert images.shape == (2, *shape) and images.min() >= 0 and images.max() <= 1
    images.square().sum().backward()
    assert z.grad.isfinite().all() and (z.grad != 0).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())


def test_images_do_not_depend_on_the_mode_because_all_statistics_are_of_the_batch():
    generator, z = Generator(nz=10, ngf=4, shape=(3, 16, 16)), torch.randn(6, 10)
    assert not list(generator.buffers()) and torch.equal(generator.train()(z), generator.eval()(z))


def test_at_32_pixels_it_equals_the_papers_network():
    generator = Generator(nz=10, ngf=4, shape=(3, 32, 32))
    up = {"scale_factor": 2, "mode": "nearest"}
    oracle = nn.Sequential(
        nn.Linear(10, 8 * 8 * 8),
        nn.Unflatten(1, (8, 8, 8)),
        nn.BatchNorm2d(8),
        nn.Upsample(**up),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2),
        nn.Upsample(**up),
        nn.Conv2d(8, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Sigmoid(),
    )
    weights = list(generator.parameters())
    assert [p.shape for p in weights] == [p.shape for p in oracle.parameters()]
    with torch.no_grad():
        for mine, theirs in zip(weights, oracle.parameters()):
            theirs.copy_(mine)
    z = torch.randn(6, 10)
    torch.testing.assert_close(generator(z), oracle(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape, doublings",
    [
        ((1, 16, 16), 2),
        ((1, 28, 28), 2),
        ((3, 32, 32), 2),
        ((3, 33, 32), 3),
        ((3, 64, 64), 3),
        ((3, 96, 96), 4),
        ((3, 30, 46), 3),
        ((3, 224, 224), 5),
    ],
)
def test_larger_images_get_more_upsamplings_but_no_superfluous_one(shape, doublings):
    generator = Generator(4, 2, shape)
    assert sum(isinstance(m, UpsampleConv) for m in generator.modules()) == doublings
    for pixels, base in zip(shape[1:], generator.base[1:]):
        assert 0 <= base * 2**doublings - pixels < 2**doublings


def test_odd_sizes_are_cropped_from_the_centre():
    generator = Generator(4, 2, (3, 30, 46))
    z = torch.randn(3, 4)
    whole = torch.sigmoid(generator.layers(generator.project(z).view(-1, *generator.base)))
    assert whole.shape[2:] == (32, 48)
    torch.testing.assert_close(generator(z), whole[:, :, 1:31, 1:47])


def test_different_latents_give_different_images():
    images = Generator(16, 8, (1, 16, 16))(torch.randn(8, 16))
    assert torch.pdist(images.flatten(1)).min() > 0.05


# ---------------------------------------------------------------- initialisation


def test_reset_samples_the_distributions_of_the_method():
    generator = Generator(nz=100, ngf=64, shape=(3, 32, 32))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.fill_(9.0)
    generator.reset()
    norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm2d)]
    scales = torch.cat([m.weight for m in norms])
    assert len(norms) == 3
    assert scales.mean().item() == pytest.approx(1.0, abs=5 * 0.02 / len(scales) ** 0.5)
    assert scales.std().item() == pytest.approx(0.02, rel=0.2)
    for module in generator.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, UpsampleConv)):
            n = module.weight.numel()
            assert module.weight.mean().item() == pytest.approx(0.0, abs=5 * 0.02 / n**0.5)
            assert module.weight.std().item() == pytest.approx(0.02, rel=5 / n**0.5)
    biases = [p for name, p in generator.named_parameters() if name.endswith("bias")]
    assert len(biases) == 5 and all((bias == 0).all() for bias in biases)


def test_every_reset_differs_repeats_with_the_seed_and_keeps_the_parameters_in_place():
    generator = Generator(8, 4, (1, 16, 16))
    places, draws = [p.data_ptr() for p in generator.parameters()], []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        generator.reset()
        draws.append(torch.cat([p.detach().flatten() for p in generator.parameters()]))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    assert [p.data_ptr() for p in generator.parameters()] == places
    assert all(p.requires_grad for p in generator.parameters())
