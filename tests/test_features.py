"""Features of networks: what the hooks return, against hooks set by hand, and what they leave unchanged."""

import copy

import pytest
import torch
import torchvision
from nets import Residual, SharedReLU, conv, toy
from parts import changed, hooks_of, snapshot
from torch import nn
from torch.nn import functional as F

from datafree.batchnorm import BatchNormTap
from datafree.errors import InputError
from datafree.features import Features, FeatureTap, pooled


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def captured(module, run):
    """Input and output of ``module`` in each of its calls while ``run()`` runs."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    run()
    handle.remove()
    return seen


# ---------------------------------------------------------------- stages and embedding


def test_stages_of_a_network_of_blocks_are_the_last_module_of_every_size():
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


def test_plain_layers_are_stages_if_there_are_no_blocks():
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
    # There is no layer with weights at 3 px, so the pooled maps of that size are not a stage.
    for stage, oracle in zip(features.stages, (model[:2](images), model[:5](images)), strict=True):
        torch.testing.assert_close(stage, oracle)
    torch.testing.assert_close(features.embed, model[:9](images))
    assert tap.embed_dim == 7


class Normalise(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


class Holder(nn.Module):
    """A backbone, pooling and a head."""

    def __init__(self, backbone, width, classes):
        super().__init__()
        self.backbone, self.classifier = backbone, nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier(self.backbone(x).mean((2, 3)))


class OneBackbone(nn.Module):
    """A trunk as one module, which maps images to images of several sizes."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = conv(3, 4), nn.ModuleList([Residual(4, 6), Residual(6, 8)])

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
def test_wrapped_networks_have_the_stages_of_the_network_inside(model):
    tap = FeatureTap(model, (3, 16, 16))
    assert tap.stage_channels == [4, 6, 8]
    assert [tuple(size) for size in tap.stage_sizes] == [(16, 16), (8, 8), (4, 4)]
    features = tap(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(features.embed, features.stages[-1].mean((2, 3)))


# Stages: size -> channels, without a stem that halves the image; the name of the last linear layer.
TORCHVISION = {
    "resnet18": ({16: 64, 8: 128, 4: 256, 2: 512}, "fc"),
    "densenet121": ({16: 256, 8: 512, 4: 1024, 2: 1024}, "classifier"),
    "mobilenet_v3_small": ({16: 16, 8: 24, 4: 48, 2: 96}, "classifier.3"),
    "vgg11_bn": ({64: 64, 32: 128, 16: 256, 8: 512, 4: 512}, "classifier.6"),
    "efficientnet_b0": ({32: 16, 16: 24, 8: 40, 4: 112, 2: 320}, "classifier.1"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(name):
    expected, head = TORCHVISION[name]
    options = {"init_weights": False} if name == "vgg11_bn" else {}  # initialisation takes seconds
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()
    tap, images = FeatureTap(model, (3, 64, 64)), torch.randn(2, 3, 64, 64)
    assert {size[0]: channels for size, channels in zip(tap.stage_sizes, tap.stage_channels)} == expected
    result = {}
    with torch.no_grad():
        seen = captured(model.get_submodule(head), lambda: result.update(features=tap(images)))
        plain = model(images)
    features = result["features"]
    assert [tuple(s.shape) for s in features.stages] == [(2, c, n, n) for n, c in expected.items()]
    ((given, returned),) = seen
    assert torch.equal(features.embed, given) and torch.equal(features.logits, returned)
    assert features.embed.shape == (2, tap.embed_dim) and torch.equal(features.logits, plain)


def test_stages_of_a_torchvision_resnet_are_its_layers():
    model = torchvision.models.resnet18(num_classes=3).eval()
    tap, images, result = FeatureTap(model, (3, 64, 64)), torch.randn(1, 3, 64, 64), {}
    seen = [
        captured(layer, lambda: result.update(stages=tap(images).stages))[0][1]
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4)
    ]
    for stage, oracle in zip(result["stages"], seen, strict=True):
        torch.testing.assert_close(stage, oracle)


def test_a_module_used_several_times_gives_the_right_call():
    model, images = SharedReLU(), torch.randn(2, 1, 12, 12)
    tap = FeatureTap(model, (1, 12, 12))
    assert tap.stage_channels == [4, 5, 6]
    for _ in range(2):  # calls are counted from 0 in every forward pass
        x = F.relu(model.first(images))
        for stage, layer in zip(tap(images).stages, (model.a, model.b, model.c), strict=True):
            x = F.relu(layer(x))
            torch.testing.assert_close(stage, x)
        model(images)


class ResidualSequential(nn.Sequential):
    """A block written as a container with its own forward pass."""

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
def test_a_convolution_as_head_is_no_stage_and_is_given_the_embedding(tail):
    model = nn.Sequential(conv(3, 4), conv(4, 6, 2), *tail, nn.Flatten()).eval()
    tap, images = FeatureTap(model, (3, 8, 8)), torch.randn(2, 3, 8, 8)
    features = tap(images)
    assert tap.stage_channels == [4, 6] and tap.embed_dim == 6 and features.logits.shape == (2, 5)
    torch.testing.assert_close(features.stages[-1], model[:2](images))
    torch.testing.assert_close(features.embed, model[:2](images).mean((2, 3)))


def test_the_head_is_the_last_linear_layer_whose_outputs_are_the_classes():
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


def test_a_layer_whose_outputs_are_some_of_the_classes_is_no_head():
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


def test_the_embedding_of_a_network_without_head_is_its_last_stage_pooled():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.weight = conv(3, 4), nn.Parameter(torch.randn(5, 4))

        def forward(self, x):
            return F.linear(self.trunk(x).mean((2, 3)), self.weight)

    features = FeatureTap(Functional(), (3, 8, 8))(torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(features.embed, features.stages[-1].mean((2, 3)))


def test_pooling_returns_rows_unchanged_and_averages_maps():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pooled(x), x.mean((2, 3)))
    assert pooled(x[:, :, 0, 0]).shape == (2, 3)


# ---------------------------------------------------------------- what the tap leaves unchanged


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
def test_tracing_leaves_modes_and_statistics_unchanged(shape):
    model = toy().train()
    model[1].eval()
    modes, before = [m.training for m in model.modules()], snapshot(model)
    gradients = [p.requires_grad for p in model.parameters()]
    try:
        FeatureTap(model, shape)
    except InputError:
        assert hooks_of(model) == 0
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes
    assert not changed(before, model)
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


class Returns(nn.Module):
    """A network whose output is a function of its logits."""

    def __init__(self, output):
        super().__init__()
        self.layer, self.output = nn.Linear(12, 5), output

    def forward(self, x):
        return self.output(self.layer(x.flatten(1)))


@pytest.mark.parametrize(
    "output",
    [lambda x: {"a": x, "b": x}, lambda x: (x, x), lambda x: x[:, :, None], lambda x: x[0], lambda x: None],
    ids=["dict", "tuple", "three dimensions", "one dimension", "none"],
)
def test_an_output_that_is_not_a_matrix_of_logits_is_refused(output):
    with pytest.raises(InputError, match="Returns must return logits"):
        FeatureTap(Returns(output), (3, 2, 2))


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
    sentence = "Refuses fails on images of 3 channels and 2x2 pixels in evaluation mode"
    with pytest.raises(InputError, match=sentence) as refusal:
        FeatureTap(Refuses(error), (3, 2, 2))
    assert "\n" not in str(refusal.value)


def test_a_vision_transformer_of_another_image_size_is_refused():
    model = torchvision.models.VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=3)
    with pytest.raises(InputError, match="VisionTransformer fails on images .* Expected 16 but got 32"):
        FeatureTap(model, (3, 32, 32))
    assert FeatureTap(model, (3, 16, 16)).embed_dim == 8


def test_a_network_without_features_is_refused():
    with pytest.raises(InputError, match="no features"):
        FeatureTap(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 8, 8))


# ---------------------------------------------------------------- the fields of features

FIELDS = ("logits", "embed", "stages", "pooled", "batch_norm")


def full_features():
    """Features with all fields."""
    model = toy().eval()
    with BatchNormTap(model) as tap:
        features = FeatureTap(model, (3, 16, 16))(torch.randn(2, 3, 16, 16))
    return features.with_batch_norm(tap.statistics)


@pytest.mark.parametrize("field", FIELDS)
def test_reading_an_absent_field_is_refused_by_its_name(field):
    of_others = full_features().only(set(FIELDS) - {field, "stages"})  # of which pooled stages could be computed
    for read in (
        lambda: getattr(Features(), field),
        lambda: getattr(of_others, field),
        lambda: Features().only([field]),
    ):
        with pytest.raises(InputError, match=f"reads '{field}' .*add '{field}'") as refusal:
            read()
        assert not any(f"'{other}'" in str(refusal.value) for other in FIELDS if other != field)


@pytest.mark.parametrize("field", FIELDS)
def test_features_without_the_fields_that_are_not_named(field):
    features = full_features()
    one = features.only([field])
    assert getattr(one, field) is getattr(features, field)
    for other in set(FIELDS) - {field} - ({"pooled"} if field == "stages" else set()):
        with pytest.raises(InputError, match=f"'{other}'"):
            getattr(one, other)


def test_pooled_stages_are_computed_of_the_stages():
    features = full_features()
    assert [tuple(rows.shape) for rows in features.pooled] == [(2, 4), (2, 6), (2, 8)]
    for rows, stage in zip(features.pooled, features.stages, strict=True):
        torch.testing.assert_close(rows, stage.mean((2, 3)))


@pytest.mark.parametrize("network", [toy, lambda: SharedReLU(3, 3)], ids=["blocks", "shared module"])
def test_a_copy_of_model_and_tap_has_its_own_hooks(network):
    model, images = network().eval(), torch.randn(2, 3, 16, 16)
    tap = FeatureTap(model, (3, 16, 16))
    copied, copied_tap = copy.deepcopy((model, tap))
    assert copied_tap.model is copied and hooks_of(copied) == hooks_of(model)
    expected = tap(images)
    for parameter in copied.parameters():
        parameter.data.zero_()
    for stage, oracle in zip(tap(images).stages, expected.stages, strict=True):
        assert torch.equal(stage, oracle)
    assert not copied_tap(images).logits.any() and copied_tap._taken is tap._taken is None
