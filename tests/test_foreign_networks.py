"""Networks of other people are taken as they are: each works as in plain PyTorch, or is one sentence with the cause."""

import random
import re
import sys
from functools import cache
from types import SimpleNamespace

import nets
import pytest
import torch
import torchvision
from nets import Trunk
from parts import hooks_of, make_card, make_learner, make_source, options, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from datafree import plugins
from datafree.batchnorm import BatchNormTap
from datafree.config import Relation
from datafree.datasets.cards import DatasetCard
from datafree.errors import InputError, OptionError
from datafree.features import FeatureTap
from datafree.network import Network
from datafree.plan import describe_network, describe_statistics
from datafree.relation import triplet_stages
from datafree.runtime import rng_state

SHAPE, MEAN, STD = (3, 16, 16), (0.5,) * 3, (0.25,) * 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network(model, shape=SHAPE, **options):
    return Network(model, shape, (0.5,) * shape[0], (0.25,) * shape[0], "teacher nets-made", **options)


def plain(model, views):
    """What ``model`` returns in plain PyTorch."""
    model.eval()
    return model((views - 0.5) / 0.25)


@cache
def torchvision_network(name):
    return torchvision.models.get_model(name, weights=None, num_classes=10)


def notes(net):
    return " ".join(describe_network(net))


def distil(teacher, student=None, steps=2, **weights):
    """Rounds of synthesis and student steps -> the teacher's source."""
    weights = {"bn": 1.0, "oh": 1.0, "adv": 1.0, "cd_loss": 1.0, **weights}
    given = options(nz=4, ngf=4, synthesis_batch_size=8, pool_size=32, g_steps=steps, batch_size=8, **weights)
    teacher = teacher.freeze()
    teacher.try_run()
    student = student or network(Trunk(teacher.num_classes), teacher.shape)
    student.try_run(training=True)
    source = make_source(given, teacher, student)
    learner = make_learner(given, teacher, student)
    for _ in range(2):
        terms = source.synthesize()
        terms = {**terms, **learner.step(source.sample(8))}
    assert all(term.isfinite() for term in terms.values())
    return source


# ---------------------------------------------------------------- layout, type and mode


class View(Trunk):
    """Flattens its map by view, which needs the plain layout."""

    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.fc = nn.Linear(16 * 16, num_classes)

    def forward(self, x):
        x = self.maps(x)
        return self.fc(x.view(x.size(0), -1))


class ViewInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad.view(len(grad), -1).view(grad.shape)


class FailsInBackward(ViewInBackward):
    @staticmethod
    def backward(ctx, grad):
        raise ValueError("no gradient")


class CustomBackward(Trunk):
    def maps(self, x):
        return self.b(ViewInBackward.apply(self.a(x)))


class TrainedView(Trunk):
    """Flattens by view in training alone."""

    def forward(self, x):
        x = self.maps(x)
        if self.training:
            x.view(len(x), -1)
        return self.fc(x.mean((2, 3)))


class WeightView(nn.Conv2d):
    """Standardises its weights, as rows that are a view of them."""

    def forward(self, x):
        rows = self.weight.view(len(self.weight), -1)
        weight = (rows - rows.mean(1, keepdim=True)).view(self.weight.shape)
        return self._conv_forward(x, weight, self.bias)


class NoSelf(Trunk):
    """A train() that returns nothing, so that neither does eval()."""

    def train(self, mode=True):
        super().train(mode)


class Checkpointed(Trunk):
    """Recomputes its maps in the backward pass."""

    def __init__(self, num_classes=10, reentrant=False):
        super().__init__(num_classes)
        self.reentrant = reentrant

    def maps(self, x):
        return self.b(checkpoint(self.a, x, use_reentrant=self.reentrant))


def weight_views():
    return nn.Sequential(WeightView(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def old_weight_norm():
    model = Trunk()
    model.a[0] = torch.nn.utils.weight_norm(model.a[0])
    return model


TAKEN = {
    "view": View,
    "view in the backward pass": CustomBackward,
    "view in training": TrainedView,
    "view of weights": weight_views,
    "train without return": NoSelf,
    "lazy": lambda: nets.lazy(10),
    "double": lambda: Trunk().double(),
    "old weight_norm": old_weight_norm,
    "already channels_last": lambda: Trunk().to(memory_format=torch.channels_last),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("kind", TAKEN)
def test_a_network_is_taken_as_it_is(kind):
    net, student = network(TAKEN[kind]()), network(TAKEN[kind]())
    views = torch.rand(3, *SHAPE)
    expected = plain(
        net.model.double() if kind == "double" else net.model, views.double() if kind == "double" else views
    )
    torch.testing.assert_close(net.eval()(views), expected.float(), rtol=1e-4, atol=1e-5)
    distil(net, student)


@pytest.mark.parametrize(
    "factory, works", [(Trunk, True), (View, False), (CustomBackward, False), (weight_views, False)]
)
def test_channels_last_is_used_where_it_works_and_agrees(factory, works):
    net = network(factory())
    assert net.trial.channels_last == works and ("plain memory layout" in notes(net)) != works
    weight = next(p for p in net.model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last) == works


AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"


@pytest.mark.parametrize(
    "cpu, channels, kernel, stride, groups, works",
    [
        ("AVX2", 4, 1, 2, 1, False),
        ("AVX2", 8, 1, 2, 1, True),
        ("AVX2", 4, 3, 2, 1, True),
        ("AVX2", 4, 1, 1, 1, True),
        ("AVX2", 4, 1, 2, 4, True),
        pytest.param("AVX512", 4, 1, 2, 1, True, marks=pytest.mark.skipif(AVX2, reason="it corrupts memory here")),
    ],
)
def test_a_layout_in_which_training_corrupts_memory_is_not_tried(
    cpu, channels, kernel, stride, groups, works, monkeypatch
):
    shortcut = nn.Conv2d(channels, 16, kernel, stride, kernel // 2, groups=groups)
    trunk = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), shortcut, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    net = network(nn.Sequential(trunk, nn.Linear(16, 10)))
    assert net.trial.channels_last == works and ("corrupt memory" in notes(net)) != works


def test_a_network_that_was_turned_already_is_turned_back_where_training_would_corrupt_memory(monkeypatch):
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 16, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    net = network(nn.Sequential(trunk, nn.Linear(16, 10)).to(memory_format=torch.channels_last))
    assert "corrupt memory" in notes(net)
    assert all(weight.is_contiguous() for weight in net.model.parameters())


def test_rounding_is_no_disagreement():
    assert network(torchvision_network("resnet50"), (3, 64, 64)).trial.channels_last


def test_a_network_that_is_compiled_already_is_taken():
    net = network(torch.compile(Trunk(), backend="eager"))
    assert len(net.tap.stages) == 2 and net.tap.embed_dim == 16


def test_another_layout_that_gives_other_outputs_is_not_used():
    class Strides(Trunk):
        def maps(self, x):
            return super().maps(x) * (1 + x.is_contiguous())

    assert "gives other outputs" in notes(network(Strides()))


def test_a_layout_that_fails_in_training_alone_is_not_used():
    net = network(TrainedView())
    assert net.trial.channels_last
    net.try_run(training=True)
    assert not net.trial.channels_last and "its training fails" in notes(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision_is_given_images_of_its_type(dtype):
    net, views = network(Trunk().to(dtype)), torch.rand(4, *SHAPE)
    features = net.eval().features(views)
    assert features.logits.dtype == features.embed.dtype == features.stages[0].dtype == torch.float32
    expected = plain(net.model, views.to(dtype))
    torch.testing.assert_close(features.logits, expected.float(), rtol=0.05, atol=0.05)
    assert str(dtype)[6:] in notes(net) and next(net.model.parameters()).dtype == dtype
    distil(net)
    with pytest.raises(InputError, match="weights in b?float16.*build it in float32"):
        net.try_run(training=True)


class Mixed16(Trunk):
    """Its first weight is not of the type of the images."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

    def maps(self, x):
        return super().maps(x) * self.scale.float()


def test_a_network_of_several_types_is_given_images_of_the_one_that_it_takes():
    model = Mixed16()
    assert next(model.parameters()).dtype == torch.bfloat16
    net = network(model)
    assert net.trial.dtype == torch.float32 and "type of its weights" not in notes(net)
    distil(net)


def test_lazy_layers_get_their_shapes_before_weights_are_loaded(tmp_path):
    trained = nets.lazy(10)
    trained(torch.rand(2, *SHAPE))
    torch.save(trained.state_dict(), tmp_path / "lazy.pth")
    net = Network.from_file(tmp_path / "lazy.pth", nets.name("lazy"), make_card(SHAPE, 10)).eval()
    views = torch.rand(2, *SHAPE)
    torch.testing.assert_close(net(views), trained.eval()((views - 0.5) / 0.25))


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), torch.rand(2, *SHAPE))])
def test_torchscript_is_refused_by_its_name(make):
    for model in (make(nets.tiny(10)), nn.Sequential(make(nets.tiny(10)), nn.Identity())):
        with pytest.raises(InputError, match="TorchScript module.*give the Python class"):
            network(model)


def test_a_scripted_activation_is_no_obstacle():
    model = Trunk()
    model.a[2] = torch.jit.script(nn.ReLU())
    distil(network(model))


def test_a_network_without_an_evaluation_mode_is_refused():
    class Exported(Trunk):
        def train(self, mode=True):
            raise NotImplementedError("Calling eval() is not supported yet.")

    with pytest.raises(InputError, match="has no evaluation mode .*not supported"):
        network(Exported())


def test_the_message_about_other_images_names_what_the_network_takes():
    with pytest.raises(InputError, match="takes images of 3 channels: correct the data card"):
        network(Trunk(), (1, 16, 16))
    with pytest.raises(InputError, match="takes images of 32x32 pixels: build it for this size"):
        network(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))


def test_a_network_that_normalises_by_itself_is_not_said_to_take_another_size():
    class FromZeroToOne(Trunk):
        def forward(self, x):
            assert 0 <= x.min() and x.max() <= 1
            return super().forward(x)

    with pytest.raises(InputError, match="takes values from 0 to 1 alone: .*--teacher_mean 0 --teacher_std 1"):
        network(FromZeroToOne())


def test_a_forward_pass_that_needs_more_than_images_is_named_with_the_remedy():
    class Masked(Trunk):
        def forward(self, x, mask):
            return super().forward(x)

    with pytest.raises(InputError, match="missing 1 required .*mask.*; give .* forward takes the images alone"):
        network(Masked())


def test_several_outputs_are_refused_with_the_remedy():
    class Pair(Trunk):
        def forward(self, x):
            f = self.maps(x).mean((2, 3))
            return self.fc(f), f

    with pytest.raises(InputError, match="not tuple of .*; give .* that returns the logits alone"):
        network(Pair())


# ---------------------------------------------------------------- the modes of the run


def returns(training, evaluation=lambda z, f: z):
    """A network that returns other things in training than in evaluation."""

    class Differs(Trunk):
        def forward(self, x):
            f = self.maps(x).mean((2, 3))
            return (training if self.training else evaluation)(self.fc(f), f)

    return Differs()


@pytest.mark.parametrize(
    "training, sentence",
    [
        (lambda z, f: (z, f), r"not tuple of tensors \(4, 10\), \(4, 16\) in training mode"),
        (lambda z, f: z[:, :3], r"returns \(4, 3\) for 4 images in training mode"),
        (lambda z, f: z.sigmoid(), "values in .0, 1. that do not add up to 1"),
        (lambda z, f: z.detach(), "no weights to train"),
        (lambda z, f: z.undefined, "in training mode .*AttributeError"),
        (lambda z, f: FailsInBackward.apply(z), "fails in the backward pass of its training .ValueError: no gradient."),
    ],
    ids=["tuple", "other classes", "sigmoids", "no gradient", "fails", "fails in backward"],
)
def test_a_student_that_cannot_be_trained_is_refused_before_anything_is_computed(training, sentence):
    net = network(returns(training))
    net.try_run()
    with pytest.raises(InputError, match=sentence):
        net.try_run(training=True)


def test_a_student_may_return_logits_in_training_and_probabilities_in_evaluation():
    net = network(returns(lambda z, f: z, lambda z, f: z.softmax(1)))
    net.try_run(training=True)
    assert "probabilities" in notes(net) and "in training mode it returns logits" in notes(net)
    views = torch.rand(4, *SHAPE)
    torch.testing.assert_close(net.eval()(views).softmax(1), plain(net.model, views))
    net.model.apply(lambda m: setattr(m, "momentum", 0.0) if isinstance(m, nn.BatchNorm2d) else None)
    torch.testing.assert_close(net.train()(views), net.model((views - 0.5) / 0.25))


class Dropping(Trunk):
    """Skips each of its equal blocks with some probability in training."""

    def __init__(self, num_classes=10, blocks=3, rate=0.5):
        super().__init__(num_classes)
        self.rate = rate
        self.blocks = nn.ModuleList(nets.Same(16) for _ in range(blocks))

    def maps(self, x):
        x = super().maps(x)
        for block in self.blocks:
            if not self.training or random.random() >= self.rate:
                x = block(x)
        return x


def test_a_network_that_drops_layers_gives_the_last_block_that_ran():
    net = network(Dropping(blocks=8))
    net.try_run(training=True)
    random.seed(0)
    for _ in range(20):
        features = net.train().features(torch.rand(2, *SHAPE))
        torch.testing.assert_close(features.embed, features.stages[-1].mean((2, 3)))


def test_a_stage_that_is_dropped_is_named():
    net = network(Dropping(blocks=1, rate=1.0))
    with pytest.raises(InputError, match="did not compute blocks.0 .*drops layers at random"):
        net.try_run(training=True)


def test_a_head_that_is_not_run_in_training_is_named():
    class OtherHead(Trunk):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(16, 10)

        def forward(self, x):
            return (self.other if self.training else self.fc)(self.maps(x).mean((2, 3)))

    with pytest.raises(InputError, match="did not compute its head"):
        network(OtherHead()).try_run(training=True)


def test_a_checkpointed_network_works_without_statistics_and_as_a_student():
    for reentrant in (False, True):
        distil(network(Trunk()), network(Checkpointed(reentrant=reentrant)))
        distil(network(Checkpointed(reentrant=reentrant)), bn=0.0)


@pytest.mark.parametrize(
    "reentrant, sentence", [(False, "checkpointing computes again in the backward"), (True, "without a gradient")]
)
def test_statistics_that_checkpointing_spoils_are_refused(reentrant, sentence):
    with pytest.raises(InputError, match=f"BatchNorm statistics .*{sentence}"):
        distil(network(Checkpointed(reentrant=reentrant)))


def test_the_trial_leaves_everything_as_it_was():
    class Counts(Trunk):
        def __init__(self):
            super().__init__()
            self.passes, self.dropout = 0, nn.Dropout()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            self.seen += 1
            random.random()
            return super().forward(self.dropout(x))

    model = Counts().train()
    model.b.eval()
    model.a[0].requires_grad_(False)
    model(torch.rand(2, *SHAPE)).sum().backward()
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    before, state = snapshot(model), rng_state()
    net = network(model)
    net.try_run(training=True)
    assert model.passes == 1 and all(torch.equal(before[f"0.{name}"], t) for name, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients))
    assert str(rng_state()) == str(state) and hooks_of(model) == len(net.tap.stages) + 1


# ---------------------------------------------------------------- asked twice


class Dropout(Trunk):
    def forward(self, x):
        return self.fc(F.dropout(self.maps(x).mean((2, 3))))


class BatchNormalised(Trunk):
    def forward(self, x):
        return self.fc(F.batch_norm(self.maps(x).mean((2, 3)), None, None, training=True))


@pytest.mark.parametrize(
    "factory, sentence",
    [
        (Dropout, r"\[Alarm\] the teacher .*different outputs for the same .*repeatable, .*F.dropout.*\.$"),
        (BatchNormalised, "the other images of the batch"),
    ],
)
def test_a_teacher_whose_outputs_are_not_repeatable_is_called_out(factory, sentence):
    net = network(factory())
    assert not net.trial.repeatable
    assert re.search(sentence, notes(net))
    assert network(Trunk()).trial.repeatable and "Alarm" not in notes(network(Trunk()))


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    "last",
    [
        lambda z: z.softmax(1),
        lambda z: z.exp() / z.exp().sum(1, keepdim=True),
        lambda z: 100 * z.softmax(1),
        lambda z: z.softmax(1).clamp(1e-7, 1),
        lambda z: (z / 3).softmax(1),
        lambda z: z.double().softmax(1),
    ],
    ids=["softmax", "by hand", "percent", "clamped", "temperature", "double"],
)
@pytest.mark.parametrize("classes", [2, 10])
def test_probabilities_are_converted_to_logits(last, classes):
    torch.manual_seed(classes)
    net = network(nets.Ends(last, classes)).eval()
    assert net.outputs[False].kind == "probabilities" and "returns probabilities" in notes(net)
    views = torch.rand(8, *SHAPE)
    p = plain(net.model, views).float()
    torch.testing.assert_close(net(views).softmax(1), p / p.sum(1, keepdim=True), rtol=1e-3, atol=1e-6)
    assert net.num_classes == classes and net.tap.embed_dim == 16  # the head is found behind them
    distil(net)


@pytest.mark.parametrize(
    "last",
    [
        lambda z: -z.log_softmax(1),
        lambda z: -1 * z.log_softmax(1),
        lambda z: z.softmax(1).clamp_min(1e-7).log().neg(),
        lambda z: z.logsumexp(1, keepdim=True) - z,
        lambda z: (-z.log_softmax(1)).bfloat16(),
        lambda z: -(z / 1e4).log_softmax(1),  # their sum, too, is the same for all images
        lambda z: -(z * 1e4).log_softmax(1),  # near 0 for one class, as rectified logits can be
    ],
    ids=["negative", "times -1", "by hand", "logsumexp", "half", "untrained", "certain"],
)
@pytest.mark.parametrize("classes", [2, 10])
def test_costs_are_negated_to_logits(last, classes):
    """As negative logarithms of probabilities, which would otherwise be learned upside down."""
    torch.manual_seed(classes)
    net = network(nets.Ends(last, classes)).eval()
    net.try_run(training=True)
    assert net.outputs[True].kind == net.outputs[False].kind == "costs"
    assert "negative logarithms of probabilities" in notes(net)
    views = torch.rand(8, *SHAPE)
    expected = plain(net.model, views).float().neg().exp()
    torch.testing.assert_close(
        net(views).float().softmax(1), expected / expected.sum(1, keepdim=True), rtol=1e-2, atol=1e-3
    )
    assert net.num_classes == classes and net.tap.embed_dim == 16
    distil(net)


@pytest.mark.parametrize(
    "last",
    [
        lambda z: z,
        lambda z: z.log_softmax(1),
        lambda z: z.relu(),
        lambda z: 5 * z.tanh(),
        lambda z: F.softplus(z),
        lambda z: 100 * z.relu() + 0 * z.exp(),  # rows (0, much), whose exp(-x) add up to 1 for two classes
    ],
)
@pytest.mark.parametrize("classes", [2, 10])
def test_logits_are_unchanged(last, classes):
    net = network(nets.Ends(last, classes)).eval()
    assert net.outputs[False].kind == "logits"
    views = torch.rand(4, *SHAPE)
    torch.testing.assert_close(net(views), plain(net.model, views))


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


def test_untrained_networks_of_two_classes_are_never_taken_for_sigmoids():
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.LayerNorm(48), (nn.Linear, Scaled)[seed % 2](48, 2))
        net = network(model, (3, 4, 4))
        net.try_run(training=True)
        assert net.outputs[False].kind == net.outputs[True].kind == "logits"


@pytest.mark.parametrize("last", [torch.sigmoid, lambda z: z.tanh() / 2 + 0.5])
def test_sigmoids_of_several_classes_are_refused(last):
    with pytest.raises(InputError, match="do not add up to 1, as sigmoids"):
        network(nets.Ends(last, 10))


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("last, kind", [(lambda z: z, "logit"), (torch.sigmoid, "probability")])
def test_one_output_is_two_classes(last, kind, squeezed):
    net = network(nets.Ends(lambda z: last(z).squeeze(1) if squeezed else last(z), 1)).eval()
    views = torch.rand(8, *SHAPE)
    assert net.num_classes == 2 and net.outputs[False].kind == kind and "two classes" in notes(net)
    raw = plain(net.model, views).view(-1)
    p = raw.sigmoid() if kind == "logit" else raw
    torch.testing.assert_close(net(views).softmax(1)[:, 1], p, rtol=1e-4, atol=1e-6)
    assert torch.equal(net(views), net.features(views).logits) and net.tap.embed_dim == 16
    distil(net)


CONTAINERS = {
    "object": lambda z: SimpleNamespace(logits=z, loss=None),
    "dict": lambda z: {"logits": z, "features": z[:, :3]},
    "only matrix": lambda z: {"out": z, "maps": z[:, :, None, None]},
    "tuple of one": lambda z: (z,),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_logits_are_found_in_what_a_network_returns(kind):
    net = network(nets.Ends(CONTAINERS[kind], 10)).eval()
    views = torch.rand(4, *SHAPE)
    bare = nets.Ends(lambda z: z, 10)
    bare.load_state_dict(net.model.state_dict())
    torch.testing.assert_close(net(views), plain(bare, views))
    assert "its logits are the" in notes(net)
    distil(net)


# ---------------------------------------------------------------- BatchNorm


class Manual(nn.Module):
    """Normalises by its running statistics without torch's function."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.rand(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, images):
        return (images - self.running_mean[:, None, None]) * self.running_var.rsqrt()[:, None, None]


class Keywords(Trunk):
    def maps(self, x):
        for conv, bn, relu in (self.a, self.b):
            x = relu(bn(input=conv(x)))
        return x


class ManualKeywords(Trunk):
    def maps(self, x):
        for conv, bn, relu in (self.a, self.b):
            x = relu(bn(images=conv(x)))
        return x


class Functional(Trunk):
    """BatchNorm modules hold the numbers, a function does the work."""

    def maps(self, x):
        for conv, bn, relu in (self.a, self.b):
            x = relu(self.normalise(conv(x), bn))
        return x

    def normalise(self, x, bn):
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)


class Torch(Functional):
    def normalise(self, x, bn):
        return torch.batch_norm(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.1, 1e-5, False)


class Slimmed(Functional):
    """Only some of the channels."""

    def normalise(self, x, bn):
        half = x.shape[1] // 2
        y = F.batch_norm(x[:, :half], running_mean=bn.running_mean[:half], running_var=bn.running_var[:half])
        return torch.cat([y, y], 1)


class Mixed(Functional):
    def maps(self, x):
        return self.b(self.a[2](self.normalise(self.a[0](x), self.a[1])))


NORMALISERS = {
    "modules": Trunk,
    "FrozenBatchNorm2d": lambda: Trunk(norm=FrozenBatchNorm2d),
    "by hand": lambda: Trunk(norm=Manual),
    "keywords": Keywords,
    "keywords of a class": lambda: ManualKeywords(norm=Manual),
    "F.batch_norm": Functional,
    "torch.batch_norm": Torch,
    "slices": Slimmed,
    "both": Mixed,
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Trunk()),
}


@pytest.mark.parametrize("kind", NORMALISERS)
def test_whatever_normalises_by_running_statistics_counts(kind):
    model = NORMALISERS[kind]()
    for module in model.modules():
        if hasattr(module, "running_mean"):
            nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    net = network(model).freeze()
    source = distil(net)
    assert source.objective.bn_tap.matched == source.objective.bn_tap.total == 2
    assert "2 of 2 layers" in describe_statistics(source.objective)[0]
    # The oracle: the inputs are the convolutions' outputs.
    inputs, views = [], torch.rand(6, *SHAPE)
    handles = [part[0].register_forward_hook(lambda m, a, output: inputs.append(output)) for part in (model.a, model.b)]
    with source.objective.bn_tap as tap:
        net.features(views.requires_grad_())
    for handle in handles:
        handle.remove()
    for layer, x in zip(tap.statistics, inputs, strict=True):
        width = len(layer.mean)
        torch.testing.assert_close(layer.mean, x.mean((0, 2, 3))[:width])
        torch.testing.assert_close(layer.variance, x.var((0, 2, 3), unbiased=False)[:width])
        assert layer.running_mean.shape == layer.mean.shape and layer.mean.requires_grad


def test_layers_that_do_not_run_are_not_matched_and_counted():
    model = Trunk()
    model.unused = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
    source = distil(network(model))
    assert "2 of 5 layers" in describe_statistics(source.objective)[0]


class Unused(Trunk):
    """BatchNorm modules that nothing calls, as after they were folded into the convolutions."""

    def maps(self, x):
        return self.b[0](self.a[0](x))


class ByBatch(Functional):
    """Normalises by the batch, although it keeps running statistics."""

    def normalise(self, x, bn):
        return F.batch_norm(x, bn.running_mean.clone(), bn.running_var.clone(), training=True)


@pytest.mark.parametrize("factory", [Unused, ByBatch])
def test_statistics_by_which_nothing_is_normalised_are_refused(factory):
    with pytest.raises(InputError, match="in 2 layers, but none of them normalises by them"):
        distil(network(factory()))
    distil(network(factory()), bn=0.0)


class FrozenStem(Trunk):
    def maps(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


class Detached(Trunk):
    def forward(self, x):
        return super().forward(x).detach()


def test_images_are_not_synthesised_without_a_gradient():
    for factory in (FrozenStem, Detached):
        net = network(factory())
        assert net.trial.gradient
        with pytest.raises(InputError, match="images cannot be synthesised with the teacher"):
            distil(net, bn=0.0)
    distil(network(Trunk()), network(FrozenStem()), adv=0.0)  # whose stem is not trained


# ---------------------------------------------------------------- the head


class Aux(Trunk):
    """A layer of the head's width after it, of which nothing is used."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(8, 10)

    def forward(self, x):
        x = self.a(x)
        z = self.fc(self.b(x).mean((2, 3)))
        self.aux(x.mean((2, 3)))
        return z


class Gate(Trunk):
    """Layers of the head's width in the trunk; the head itself is a function."""

    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.squeeze, self.excite = nn.Linear(16, num_classes), nn.Linear(num_classes, 16)
        self.bottleneck, self.expand = nn.Conv2d(16, num_classes, 1), nn.Conv2d(num_classes, 16, 1)
        self.weight = nn.Parameter(torch.randn(num_classes, 16))
        del self.fc

    def maps(self, x):
        x = self.expand(self.bottleneck(super().maps(x)))
        return x * self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]

    def forward(self, x):
        return F.linear(self.maps(x).mean((2, 3)), self.weight)


class LowRank(Trunk):
    """A head of two parallel layers, as in LoRA."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(16, 10), nn.Linear(16, 2), nn.Linear(2, 10)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    def __init__(self):
        super().__init__()
        self.fc = self.Sum()


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 16))

    def forward(self, x):
        return 8 * F.linear(F.normalize(x), F.normalize(self.weight))


def cosine():
    model = Trunk()
    model.fc = Cosine()
    return model


def scaled():
    return nn.Sequential(Trunk(), nn.BatchNorm1d(10))


@pytest.mark.parametrize("factory", [Trunk, Aux, Gate, lambda: Gate(2), LowRank, cosine, scaled])
def test_the_head_is_the_layer_whose_output_is_the_logits(factory):
    net = network(factory()).eval()
    features = net.features(torch.rand(4, *SHAPE))
    assert net.tap.embed_dim == 16
    if not isinstance(net.model, Gate):
        torch.testing.assert_close(features.embed, features.stages[-1].mean((2, 3)))
    else:
        assert net.tap.head is None


# ---------------------------------------------------------------- the stages


class ChannelsLast(nn.Module):
    """Maps (N, H, W, C) after a convolution."""

    def __init__(self, width=24):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 10)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x):
        return self.head(self.mix(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("width", [24, 8, 7])
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 24, 32)], ids=str)
def test_maps_with_the_channels_last_are_read_as_such(width, shape):
    net = network(ChannelsLast(width), shape).eval()
    features = net.features(torch.rand(2, *shape))
    assert net.tap.stage_channels == [width] and net.tap.stage_sizes == [(shape[1] // 4, shape[2] // 4)]
    torch.testing.assert_close(features.embed, features.pooled[0])


class Encoder(nn.Module):
    """Blocks in a module that adds something, as in torchvision's ViT."""

    def __init__(self, blocks):
        super().__init__()
        self.layers = blocks

    def forward(self, x):
        return self.layers(x + 1)


class Tokens(nn.Module):
    """A ViT of ``depth`` blocks with ``prefix`` tokens before those of the patches."""

    def __init__(self, depth=8, prefix=1):
        super().__init__()
        self.patches, self.prefix = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.randn(1, prefix, 12))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.prefix.expand(len(x), -1, -1), x], 1))
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("depth, last", [(8, [1, 3, 5, 7]), (6, [1, 2, 4, 5]), (2, [0, 1])])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tokens_are_maps_of_four_stages(depth, last, prefix):
    net = network(Tokens(depth, prefix), (3, 16, 24)).eval()
    assert net.tap.stage_names == [f"blocks.{i}" for i in last]
    assert net.tap.stage_channels == [12] * len(last) and net.tap.stage_sizes == [(4, 6)] * len(last)
    outputs = []
    net.model.blocks[-1].register_forward_hook(lambda m, a, output: outputs.append(output))
    stage = net.features(torch.rand(2, 3, 16, 24)).stages[-1]
    torch.testing.assert_close(stage.flatten(2).transpose(1, 2), outputs[0][:, prefix:])


def test_the_blocks_of_an_encoder_are_found():
    model = Tokens()
    model.blocks = Encoder(model.blocks)
    assert network(model).tap.stage_names == [f"blocks.layers.{i}" for i in (1, 3, 5, 7)]
    vit = torchvision.models.VisionTransformer(32, 4, 8, 2, 16, 32, num_classes=10)
    assert len(network(vit, (3, 32, 32)).tap.stages) == 4


def test_a_token_teacher_and_a_convolutional_student():
    distil(network(Tokens()), bn=0.0, triplet=1.0, triplet_target="teacher", sampling="uniform")


class Pooled(Trunk):
    """A layer behind the pooling, as in MobileNetV3 and ConvNeXt."""

    def __init__(self):
        super().__init__()
        self.last, self.fc = nn.Sequential(nn.Conv2d(16, 20, 1), nn.GroupNorm(1, 20)), nn.Linear(20, 10)

    def forward(self, x):
        return self.fc(self.last(self.maps(x).mean((2, 3), keepdim=True)).flatten(1))


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32, 160])
def test_there_are_as_many_stages_at_every_size_and_none_behind_the_pooling(side):
    assert network(Pooled(), (3, side, side)).tap.stage_channels == [8, 16]


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize(
    "name, stages",
    [
        ("resnet50", ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
        ("mobilenet_v3_small", ["features.1", "features.3", "features.8", "features.11"]),
        ("convnext_tiny", ["features.1.2", "features.3.2", "features.5.8", "features.7.2"]),
        ("swin_t", ["features.1.1", "features.3.1", "features.5.5", "features.7.1"]),
    ],
)
def test_torchvision_networks_have_the_stages_of_their_trunk_at_every_size(name, stages, side):
    tap = FeatureTap(torchvision_network(name), (3, side, side))
    assert tap.stage_names == stages
    widths = {"resnet50": 256, "mobilenet_v3_small": 16, "convnext_tiny": 96, "swin_t": 96}
    assert tap.stage_channels[0] == widths[name] and tap.stage_sizes[0] == (side // 4, side // 4)


def test_stages_are_named_by_hand():
    net = network(Trunk(), stages=["a", "b.0"]).eval()
    features = net.features(torch.rand(2, *SHAPE))
    assert net.tap.stage_names == ["a", "b.0"] and [s.shape[1] for s in features.stages] == [8, 16]
    assert (features.stages[1] < 0).any()  # before BatchNorm and ReLU
    for name, sentence in (("c", "has no module 'c'"), ("fc", "'fc' of Trunk outputs"), ("spare", "is not run")):
        model = Trunk()
        model.spare = nn.Conv2d(3, 3, 1)
        with pytest.raises(OptionError, match=f"--teacher_stages: .*{sentence}"):
            network(model, stages=[name])


def test_a_tap_without_a_trial_matches_all_layers():
    with BatchNormTap(Trunk().eval()) as tap:
        assert tap.matched == tap.total == 2


# ---------------------------------------------------------------- against timm's own lists

TIMM = """
resnet18 resnet50 resnet18d resnext50_32x4d wide_resnet50_2 res2net50_26w_4s seresnet18 skresnet18 regnetx_002
regnety_002 densenet121 mobilenetv2_050 mobilenetv3_small_100 efficientnet_b0 tf_efficientnetv2_b0 mixnet_s tinynet_e
rexnet_100 ghostnet_100 lcnet_050 mobilenetv4_conv_small mnasnet_small fbnetc_100 hardcorenas_a convnext_atto
convnextv2_atto edgenext_xx_small poolformer_s12 mobilevit_xxs inception_next_tiny fastvit_t8 repvgg_a0 mobileone_s0
dla34 selecsls42 cspresnet50 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 levit_128s efficientformer_l1 pvt_v2_b0
coat_lite_tiny davit_tiny
""".split()
FOUND = """
resnet18 resnet50 resnet18d resnext50_32x4d wide_resnet50_2 res2net50_26w_4s seresnet18 skresnet18 regnetx_002
regnety_002 densenet121 mobilenetv2_050 efficientnet_b0 tinynet_e rexnet_100 fbnetc_100 convnext_atto poolformer_s12
swin_tiny_patch4_window7_224 pvt_v2_b0 davit_tiny
""".split()  # also without timm's list, of which the widths agree


def assert_stages_of(timm, name, with_list):
    """The stages are timm's list, but for a first entry before a quarter of the image's size, which may be a stem."""
    model = timm.create_model(name, num_classes=10).eval()
    listed = getattr(model.feature_info, "info", model.feature_info)
    if not with_list:
        del model.feature_info
    tap = FeatureTap(model, model.default_cfg["input_size"])
    stems = listed[: len(listed) - len(tap.stages)]
    assert all(entry["reduction"] < 4 for entry in stems) and len(tap.stages) >= 3
    for width, stage, entry in zip(tap.stage_channels, tap.stage_names, listed[len(stems) :], strict=True):
        assert width == entry["num_chs"] and (stage.startswith(entry["module"]) or not with_list)


@pytest.mark.parametrize("name", TIMM)
def test_the_stages_of_timms_networks_are_those_of_its_lists(name):
    assert_stages_of(pytest.importorskip("timm"), name, with_list=True)


@pytest.mark.parametrize("name", FOUND)
def test_the_stages_of_timms_networks_are_found_without_its_lists(name):
    assert_stages_of(pytest.importorskip("timm"), name, with_list=False)


@pytest.mark.parametrize("name, depth", [("vit_tiny_patch16_224", 12), ("deit_tiny_distilled_patch16_224", 12)])
def test_a_vit_of_timm_has_four_token_stages(name, depth):
    timm = pytest.importorskip("timm")
    tap = FeatureTap(timm.create_model(name, num_classes=10).eval(), (3, 224, 224))
    assert tap.stage_names == [f"blocks.{depth * k // 4 - 1}" for k in (1, 2, 3, 4)]
    assert tap.stage_sizes == [(14, 14)] * 4 and tap.stage_channels == [192] * 4


# ---------------------------------------------------------------- through the program


def test_the_plan_states_stages_and_statistics(distil, capsys):
    distil("--dry_run", "--teacher_stages", "0.0,1", "--triplet_target", "teacher")
    printed = capsys.readouterr().out
    assert "Stages of the teacher nets-tiny: 0.0 (8x8x8), 1 (16x4x4)." in printed
    assert "Stages of the student nets-small: " in printed
    assert "BatchNorm statistics: 2 of 2 layers of the teacher nets-tiny are matched." in printed


def test_an_unknown_stage_is_refused(distil, refused):
    assert "has no module '7.layer'" in refused(distil, "--dry_run", "--teacher_stages", "7.layer", code=2)


def test_a_network_that_fails_for_another_reason_is_not_said_to_be_of_another_size():
    class Numpy(Trunk):
        def forward(self, x):
            return super().forward(torch.from_numpy(x.numpy()))

    with pytest.raises(InputError, match="Can't call numpy") as refusal:
        network(Numpy())
    assert "it takes images" not in str(refusal.value)


@pytest.mark.parametrize("count, chosen", [(1, [0]), (2, [1]), (3, [2]), (4, [2, 3]), (5, [3, 4]), (6, [4, 5])])
def test_the_default_layers_are_the_last_two_of_four(count, chosen):
    assert list(triplet_stages(count, Relation())) == chosen
    assert list(triplet_stages(count, Relation(start_layer=-1, end_layer=4))) == [count - 1]
    assert list(triplet_stages(5, Relation(start_layer=-5, end_layer=-3))) == [0, 1]


class Normalising(nn.Module):
    """Shifts and scales the images before anything else."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))
        self.trunk = Trunk()

    def forward(self, x):
        return self.trunk((x - self.mean) / 0.2)


@pytest.mark.parametrize(
    "make, mean, std, alarm",
    [
        (Normalising, 0.5, 0.25, True),
        (Normalising, 0.0, 1.0, False),
        (lambda: nn.Sequential(torchvision.transforms.Normalize([0.4] * 3, [0.2] * 3), Trunk()), 0.5, 0.25, True),
        (Trunk, 0.5, 0.25, False),
    ],
)
def test_a_network_that_normalises_the_images_again_is_called_out(make, mean, std, alarm):
    net = Network(make(), SHAPE, (mean,) * 3, (std,) * 3)
    assert ("[Alarm] the network: it shifts or scales the images itself" in notes(net)) == alarm


class Seeding(Trunk):
    def forward(self, x):
        torch.manual_seed(0)
        return super().forward(x)


class Late(Trunk):
    """Makes its head when it is called first."""

    def __init__(self):
        super().__init__()
        self.fc = None

    def forward(self, x):
        maps = self.maps(x).mean((2, 3))
        if self.fc is None:
            self.fc = nn.Linear(maps.shape[1], 10)
        return self.fc(maps)


def test_a_network_that_sets_the_seed_is_called_out():
    assert "[Alarm] the teacher nets-made: its forward pass sets torch's seed" in notes(network(Seeding()))
    assert "sets torch's seed" not in notes(network(Trunk()))


def test_layers_that_are_made_in_the_forward_pass_are_refused():
    with pytest.raises(InputError, match=r"makes fc.weight in its forward pass.*make it in __init__"):
        network(Late())


def test_a_factory_that_sets_the_seed_is_called_out_and_does_not_set_that_of_the_run(tmp_path):
    (tmp_path / "net.py").write_text(
        "import nets, torch\n\ndef seeded():\n    torch.manual_seed(3)\n    return nets.Trunk()\n"
    )
    torch.manual_seed(11)
    card = DatasetCard("mine", 3, 16, 16, 10, (0.5,) * 3, (0.25,) * 3)
    net = Network.build(f"{tmp_path / 'net.py'}:seeded", card)
    assert any("its factory sets torch's seed" in note for note in net.notes) and torch.initial_seed() == 11


def test_neighbours_of_equal_names_are_each_files_own(tmp_path):
    for name, width in (("one", 8), ("two", 16)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "layers.py").write_text(f"WIDTH = {width}\n\nclass Net:\n    pass\n")
        (tmp_path / name / "later.py").write_text(f"DEPTH = {width}\n")
        (tmp_path / name / "net.py").write_text(
            "from layers import WIDTH, Net\n\ndef width():\n    from later import DEPTH\n    return WIDTH, DEPTH\n"
        )
    found, digests = {}, set()
    for name in ("one", "two", "one"):
        source = f"{tmp_path / name / 'net.py'}"
        with plugins.beside(f"{source}:width"):
            found[name] = plugins.load_object(f"{source}:width")()
        digests.add(plugins.code_digest(f"{source}:Net"))
    assert found == {"one": (8, 8), "two": (16, 16)} and len(digests) == 2


def test_a_file_that_reads_the_command_line_sees_none_of_our_options(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text("import sys\n\ndef words():\n    return WORDS\n\nWORDS = list(sys.argv)\n")
    monkeypatch.setattr(sys, "argv", ["datafree_kd.py", "--seed", "1"])
    assert plugins.load_object(f"{tmp_path / 'net.py'}:words")() == ["datafree_kd.py"]


def test_weights_without_values_are_refused():
    card = DatasetCard("mine", 3, 16, 16, 10, (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(InputError, match="has weights without values, on the device meta"):
        Network.build(Trunk().to("meta"), card)
