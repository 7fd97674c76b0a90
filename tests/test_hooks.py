"""Looking inside networks: what the hooks hand out, against hooks set by hand, and what they leave behind."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from datafree.errors import InputError
from datafree.hooks import BatchNormTap, ChannelStatistics, FeatureTap, FrozenBatchNorm, pooled
from datafree.models import MODELS
from datafree.network import Network


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def buffers_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def captured(module, run):
    """What ``module`` was given and what it returned while ``run()`` ran, one pair a call."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    run()
    handle.remove()
    return seen


def conv(in_channels, out_channels, stride=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class Block(nn.Module):
    """A residual block that halves the image."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.body, self.skip = conv(in_channels, out_channels, 2), nn.Conv2d(in_channels, out_channels, 1, 2)

    def forward(self, x):
        return self.body(x) + self.skip(x)


def toy(classes=5):
    return nn.Sequential(
        conv(3, 4), Block(4, 6), Block(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )


# ---------------------------------------------------------------- stages and embedding


def test_a_net_of_blocks_gives_the_last_module_of_every_size():
    model = toy().eval()
    tap, images = FeatureTap(model, (3, 16, 12)), torch.randn(2, 3, 16, 12)
    assert tap.stage_channels == [4, 6, 8] and tap.embed_dim == 8 and tap.num_classes == 5
    assert [tuple(size) for size in tap.stage_sizes] == [(16, 12), (8, 6), (4, 3)]
    features = tap(images)
    first = model[0](images)
    second = model[1](first)
    third = model[2](second)
    for stage, oracle in zip(features.stages, (first, second, third), strict=True):
        torch.testing.assert_close(stage, oracle)
    torch.testing.assert_close(features.embed, third.mean((2, 3)))
    torch.testing.assert_close(features.logits, model(images))


def test_plain_layers_are_stages_where_there_are_no_blocks():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 9, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )
    tap, images = FeatureTap(model, (1, 12, 12)), torch.randn(2, 1, 12, 12)
    features = tap(images)
    # The pooled maps at 3 px passed no layer with weights of that size: they are no stage.
    for stage, oracle in zip(features.stages, (model[:2](images), model[:5](images)), strict=True):
        torch.testing.assert_close(stage, oracle)
    torch.testing.assert_close(features.embed, model[:9](images))
    assert tap.embed_dim == 7


class Normalise(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


class Holder(nn.Module):
    """A backbone of pooled features and a head, as people write them."""

    def __init__(self, backbone, width, classes):
        super().__init__()
        self.backbone, self.classifier = backbone, nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier(self.backbone(x).mean((2, 3)))


class OneBackbone(nn.Module):
    """A trunk as one module, which maps images to images of several sizes."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = conv(3, 4), nn.ModuleList([Block(4, 6), Block(6, 8)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(Normalise(), toy()),
        Holder(OneBackbone(), 8, 5),
        Holder(nn.Sequential(Normalise(), OneBackbone()), 8, 5),
        nn.Sequential(Normalise(), nn.Sequential(Holder(OneBackbone(), 8, 5))),
    ],
    ids=["sequential", "backbone", "both", "nested"],
)
def test_wrapped_networks_have_the_stages_of_what_they_wrap(model):
    tap = FeatureTap(model, (3, 16, 16))
    assert tap.stage_channels == [4, 6, 8]
    assert [tuple(size) for size in tap.stage_sizes] == [(16, 16), (8, 8), (4, 4)]
    features = tap(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(features.embed, features.stages[-1].mean((2, 3)))


# Stages: channels by size from the halved input on; the head: what its last linear layer is called.
TORCHVISION = {
    "resnet18": ({32: 64, 16: 64, 8: 128, 4: 256, 2: 512}, "fc"),
    "densenet121": ({32: 64, 16: 256, 8: 512, 4: 1024, 2: 1024}, "classifier"),
    "mobilenet_v3_small": ({32: 16, 16: 16, 8: 24, 4: 48, 2: 96}, "classifier.3"),
    "vgg11_bn": ({64: 64, 32: 128, 16: 256, 8: 512, 4: 512}, "classifier.6"),
    "efficientnet_b0": ({32: 16, 16: 24, 8: 40, 4: 112, 2: 320}, "classifier.1"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(name):
    expected, head = TORCHVISION[name]
    options = {"init_weights": False} if name == "vgg11_bn" else {}  # which takes seconds
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()
    tap, images = FeatureTap(model, (3, 64, 64)), torch.randn(2, 3, 64, 64)
    assert {size[0]: channels for size, channels in zip(tap.stage_sizes, tap.stage_channels)} == expected
    result = {}
    with torch.no_grad():
        seen = captured(model.get_submodule(head), lambda: result.update(features=tap(images)))
        plain = model(images)
    features = result["features"]
    assert [tuple(s.shape) for s in features.stages] == [(2, c, n, n) for n, c in expected.items()]
    ((given, answered),) = seen
    assert torch.equal(features.embed, given) and torch.equal(features.logits, answered)
    assert features.embed.shape == (2, tap.embed_dim) and torch.equal(features.logits, plain)


def test_stages_of_a_torchvision_resnet_are_its_layers():
    model = torchvision.models.resnet18(num_classes=3).eval()
    tap, images, result = FeatureTap(model, (3, 64, 64)), torch.randn(1, 3, 64, 64), {}
    seen = [
        captured(layer, lambda: result.update(stages=tap(images).stages))[0][1]
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4)
    ]
    for stage, oracle in zip(result["stages"][1:], seen, strict=True):
        torch.testing.assert_close(stage, oracle)


class SharedReLU(nn.Module):
    """One ReLU module after each of four convolutions, of which two are at one size."""

    def __init__(self):
        super().__init__()
        self.first, self.a = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b, self.c = nn.Conv2d(4, 5, 3, 2, 1), nn.Conv2d(5, 6, 3, 2, 1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        for layer in (self.first, self.a, self.b, self.c):
            x = self.relu(layer(x))
        return self.fc(x.mean((2, 3)))


def test_a_module_used_several_times_gives_the_right_call():
    model, images = SharedReLU(), torch.randn(2, 1, 12, 12)
    tap = FeatureTap(model, (1, 12, 12))
    assert tap.stage_channels == [4, 5, 6]
    for _ in range(2):  # the count of calls begins anew with every pass
        x = F.relu(model.first(images))
        for stage, layer in zip(tap(images).stages, (model.a, model.b, model.c), strict=True):
            x = F.relu(layer(x))
            torch.testing.assert_close(stage, x)
        model(images)


class ResidualSequential(nn.Sequential):
    """A block written as a container with a forward pass of its own."""

    def forward(self, x):
        return x + super().forward(x)


def test_a_container_with_its_own_forward_is_a_block():
    model = nn.Sequential(
        conv(3, 4), ResidualSequential(*conv(4, 4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    (stage,) = FeatureTap(model, (3, 8, 8))(images).stages
    torch.testing.assert_close(stage, model[:2](images))


@pytest.mark.parametrize(
    "tail",
    [
        [nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1)],
        [nn.Dropout(0.1), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)],
        [nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 5, 1)],
        [nn.Conv2d(6, 5, 4)],
    ],
    ids=["pooled after", "as SqueezeNet", "pooled before", "as wide as the map"],
)
def test_a_convolution_as_head_is_no_stage_and_gets_the_embedding(tail):
    model = nn.Sequential(conv(3, 4), conv(4, 6, 2), *tail, nn.Flatten()).eval()
    tap, images = FeatureTap(model, (3, 8, 8)), torch.randn(2, 3, 8, 8)
    features = tap(images)
    assert tap.stage_channels == [4, 6] and tap.embed_dim == 6 and features.logits.shape == (2, 5)
    torch.testing.assert_close(features.stages[-1], model[:2](images))
    torch.testing.assert_close(features.embed, model[:2](images).mean((2, 3)))


def test_the_head_is_the_last_linear_layer_that_answers_the_classes():
    model = nn.Sequential(
        conv(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5)
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(FeatureTap(model, (3, 8, 8))(images).embed, model[:5](images))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.left, self.right = conv(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        x = self.trunk(x).mean((2, 3))
        return torch.cat([self.left(x), self.right(x / 2)], 1)


def test_a_layer_that_answers_some_of_the_classes_is_no_head():
    features = FeatureTap(TwoHeads(), (3, 8, 8))(torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(features.embed, features.stages[-1].mean((2, 3)))


class Attention(nn.Module):
    """A transformer of one layer on 4-px patches; no convolution, no BatchNorm."""

    def __init__(self, classes=5):
        super().__init__()
        self.patches, self.norm = nn.Linear(48, 16), nn.LayerNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, classes)

    def forward(self, x):
        tokens = self.patches(F.unfold(x, 4, stride=4).transpose(1, 2))
        y = self.norm(tokens)
        return self.head((tokens + self.attention(y, y, y)[0]).mean(1))


def test_a_transformer_has_an_embedding_and_nothing_else():
    model = Attention()
    tap, images, result = FeatureTap(model, (3, 8, 8)), torch.randn(2, 3, 8, 8), {}
    seen = captured(model.head, lambda: result.update(features=tap(images)))
    assert tap.stage_channels == tap.stage_sizes == result["features"].stages == []
    assert torch.equal(result["features"].embed, seen[0][0]) and tap.embed_dim == 16
    with BatchNormTap(model) as bn:
        model(images)
    assert bn.layers == bn.statistics == []


def test_a_network_without_head_gives_its_last_stage_pooled():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.weight = conv(3, 4), nn.Parameter(torch.randn(5, 4))

        def forward(self, x):
            return F.linear(self.trunk(x).mean((2, 3)), self.weight)

    features = FeatureTap(Functional(), (3, 8, 8))(torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(features.embed, features.stages[-1].mean((2, 3)))


def test_pooled_keeps_rows_and_averages_maps():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(x), x.mean((2, 3)))
    assert pooled(x[:, :, 0, 0]).shape == (2, 3)


# ---------------------------------------------------------------- what the tap leaves alone


def test_nothing_is_kept_between_calls():
    model = toy()
    before = hooks_of(model)
    tap = FeatureTap(model, (3, 16, 16))
    left = hooks_of(model)
    assert left - before == 4  # three stages and the head
    images = torch.randn(2, 3, 16, 16)
    tap(images)
    model(images)
    assert tap._taken is None and hooks_of(model) == left
    assert not any(torch.is_tensor(value) for value in [*vars(tap).values(), *tap._calls.values()])


def test_nothing_is_kept_after_a_failing_call():
    model = toy()
    tap = FeatureTap(model, (3, 16, 16))
    with pytest.raises(RuntimeError):
        tap(torch.randn(2, 7, 16, 16))
    assert tap._taken is None
    assert len(tap(torch.randn(2, 3, 16, 16)).stages) == 3


@pytest.mark.parametrize("shape", [(3, 16, 16), (7, 16, 16)], ids=["fits", "does not fit"])
def test_tracing_leaves_modes_and_statistics_alone(shape):
    model = toy().train()
    model[1].eval()
    modes, buffers = [m.training for m in model.modules()], buffers_of(model)
    gradients = [p.requires_grad for p in model.parameters()]
    try:
        FeatureTap(model, shape)
    except InputError:
        assert hooks_of(model) == 0
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(p.grad is None for p in model.parameters())


def test_gradients_flow_through_every_feature():
    model, images = toy(), torch.randn(2, 3, 16, 16, requires_grad=True)
    features = FeatureTap(model, (3, 16, 16))(images)
    for x in (*features.stages, features.embed, features.logits):
        (gradient,) = torch.autograd.grad(x.square().sum(), images, retain_graph=True)
        assert gradient.norm() > 0


def test_two_taps_on_one_model_do_not_mix():
    model, images = toy().eval(), torch.randn(2, 3, 16, 16)
    one, two = FeatureTap(model, (3, 16, 16)), FeatureTap(model, (3, 16, 16))
    first, second = one(images), two(images * 2)
    torch.testing.assert_close(one(images).embed, first.embed)
    assert not torch.equal(first.embed, second.embed)


# ---------------------------------------------------------------- networks that cannot be used


class Answers(nn.Module):
    """A network that answers what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.layer, self.answer = nn.Linear(12, 5), answer

    def forward(self, x):
        return self.answer(self.layer(x.flatten(1)))


@pytest.mark.parametrize(
    "answer",
    [lambda x: {"logits": x}, lambda x: (x, x), lambda x: x[:, :, None], lambda x: x[0], lambda x: None],
    ids=["dict", "tuple", "three dimensions", "one dimension", "none"],
)
def test_an_answer_that_is_not_a_matrix_of_logits_is_refused(answer):
    with pytest.raises(InputError, match="Answers must return logits"):
        FeatureTap(Answers(answer), (3, 2, 2))


class Refuses(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Linear(12, 5), error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [AssertionError("Wrong image height! Expected 224"), ValueError(), TypeError("no"), RuntimeError("size\nmismatch")],
    ids=lambda error: type(error).__name__,
)
def test_a_network_that_cannot_take_the_images_is_refused_in_one_sentence(error):
    sentence = "Refuses cannot take images of 3 channels and 2x2 pixels"
    with pytest.raises(InputError, match=sentence) as refusal:
        FeatureTap(Refuses(error), (3, 2, 2))
    assert "\n" not in str(refusal.value)


def test_a_vision_transformer_of_another_image_size_is_refused():
    model = torchvision.models.VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=3)
    with pytest.raises(InputError, match="VisionTransformer cannot take images"):
        FeatureTap(model, (3, 32, 32))
    assert FeatureTap(model, (3, 16, 16)).embed_dim == 8


def test_a_network_without_features_is_refused():
    with pytest.raises(InputError, match="no features"):
        FeatureTap(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 8, 8))


# ---------------------------------------------------------------- BatchNorm statistics


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
        mean, variance, running_mean, running_var = statistics
        dims = [d for d in range(x.dim()) if d != 1]
        torch.testing.assert_close(mean, x.mean(dims).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, x.var(dims, unbiased=False).float(), rtol=1e-4, atol=1e-5)
        assert running_mean is layer.running_mean and running_var is layer.running_var


def test_statistic_hooks_exist_only_inside_the_context():
    model, images = toy().eval(), torch.randn(2, 3, 16, 16)
    buffers, tap = buffers_of(model), BatchNormTap(model)
    with tap:
        assert hooks_of(model) == 3
        model(images)
    assert hooks_of(model) == 0 and len(tap.statistics) == 3
    model(images)
    assert len(tap.statistics) == 3
    with pytest.raises(ZeroDivisionError), tap:
        1 / 0
    assert hooks_of(model) == 0
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def norm_layer(shape, affine, dtype=torch.float64):
    """A BatchNorm layer for inputs of ``shape``, frozen in evaluation mode, whose numbers are all its own."""
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
def test_a_frozen_layer_passes_half_precision_on(precision):
    x = torch.randn(4, 3, 6, 5).to(precision).requires_grad_()
    layer = norm_layer(x.shape, True, torch.float32)
    output, mean, _ = FrozenBatchNorm.apply(x, layer)
    (output.float().sum() + mean.sum()).backward()
    assert output.dtype == x.grad.dtype == precision and mean.dtype == torch.float32
    scale = (layer.running_var + 0.1).rsqrt() * layer.weight
    torch.testing.assert_close(x.grad[0, :, 0, 0].float(), scale + 1 / 120, rtol=0.01, atol=0)


class OwnNorm(nn.BatchNorm2d):
    """A layer that does more than normalise."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("change", ["own class", "own forward", "trained", "learning"])
def test_only_plain_frozen_layers_are_computed_anew(change):
    layer = OwnNorm(3) if change == "own class" else nn.BatchNorm2d(3)
    layer.train(change == "trained").requires_grad_(change == "learning")
    if change == "own forward":
        layer.forward = lambda x: x * 2
    x = torch.randn(4, 3, 5, 5) + 1
    before, forward = layer(x), layer.forward
    with BatchNormTap(layer) as tap:
        output = layer(x)
        assert output.grad_fn is None or change == "learning"
    torch.testing.assert_close(output, before)
    torch.testing.assert_close(tap.statistics[0][0], x.mean((0, 2, 3)))
    if change == "own forward":
        assert layer.forward is forward
    if change == "learning":
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
    # Differences from the mean are a 50th of the values: taken in bfloat16 they would be lost.
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


# ---------------------------------------------------------------- the network around them


def test_network_normalises_what_it_is_given():
    model, views = toy().eval(), torch.rand(2, 3, 16, 16)
    network = Network(model, (3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).eval()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    logits = model((views - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(network(views), logits)
    torch.testing.assert_close(network.features(views).logits, logits)
    assert network.num_classes == 5
    assert set(network.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_frozen_holds_inside_and_leaves_everything_as_it_was():
    network = Network(toy(), (3, 16, 16), (0.5,) * 3, (0.2,) * 3).train()
    network.model[1].eval()
    network.model[2].requires_grad_(False)
    modes, wanted = [m.training for m in network.modules()], [p.requires_grad for p in network.parameters()]
    buffers, views = buffers_of(network), torch.rand(2, 3, 16, 16, requires_grad=True)
    with pytest.raises(ZeroDivisionError), network.frozen():
        network(views).sum().backward()
        1 / 0
    assert views.grad.norm() > 0 and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == wanted


def test_freeze_is_what_a_teacher_is():
    network = Network(toy(), (3, 16, 16), (0.5,) * 3, (0.2,) * 3).freeze()
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
