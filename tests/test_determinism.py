"""--deterministic on a GPU is refused where the backward pass of an operation has no deterministic kernel there.

Only the type of the device decides, so no GPU is needed.
"""

import resource
from pathlib import Path
from types import SimpleNamespace

import nets
import pytest
import torch
import torchvision
from parts import CLASSES, SHAPE, make_card, network, options
from torch import nn
from torch.nn import functional as F

import datafree.network
from datafree.augment import CropFlip, random_resized_crop
from datafree.determinism import nondeterministic_operations, require_deterministic
from datafree.errors import InputError
from datafree.network import Network
from datafree.plugins import construct
from datafree.pool import ImagePool
from datafree.synthesis import build
from datafree.synthesis.build import build_source

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def deterministic():
    """Whether torch is restricted to deterministic kernels is a switch of the process."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Through(nn.Module):
    """A network with a function of maps (N, 8, 8, 8) on its way."""

    def __init__(self, function, num_classes=CLASSES):
        super().__init__()
        self.stem, self.function, self.fc = nn.Conv2d(3, 8, 3, 2, 1), function, nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.function(self.stem(x)).mean((2, 3)))


def sampled(x):
    return F.grid_sample(x, torch.zeros(len(x), 4, 4, 2), align_corners=False)


WITHOUT_KERNEL = {
    "adaptive average pooling to a size other than 1": lambda x: F.adaptive_avg_pool2d(x, (1, 4)),
    "adaptive max pooling": nn.AdaptiveMaxPool2d(1),
    "fractional max pooling": nn.FractionalMaxPool2d(2, output_size=3),
    "reflection padding": nn.ReflectionPad2d(1),
    "linear interpolation": lambda x: F.interpolate(x.flatten(2), scale_factor=2, mode="linear").unsqueeze(3),
    "bicubic interpolation": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "antialiased interpolation": lambda x: F.interpolate(x, size=4, mode="bilinear", antialias=True),
    "grid_sample": sampled,
}
WITH_KERNEL = {
    "pooling to 1": nn.AdaptiveAvgPool2d(1),
    "pooling": lambda x: F.max_pool2d(F.avg_pool2d(x, 2), 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),  # on a GPU torch composes these two
    "replicated": nn.ReplicationPad2d(1),
    "without a gradient": lambda x: x + F.adaptive_avg_pool2d(x.detach(), 8),
}


@pytest.mark.parametrize("operation", WITHOUT_KERNEL)
def test_an_operation_without_a_kernel_is_found_in_a_network(operation):
    net = network(lambda classes, channels: Through(WITHOUT_KERNEL[operation], classes))
    assert net.trial.nondeterministic == [operation]
    with pytest.raises(InputError, match=f"--deterministic is not possible with the t: .* of {operation} has no"):
        require_deterministic(net.trial.nondeterministic, "the t", GPU)
    require_deterministic(net.trial.nondeterministic, "the t", CPU)
    torch.use_deterministic_algorithms(False)
    require_deterministic(net.trial.nondeterministic, "the t", GPU)


@pytest.mark.parametrize("operation", WITH_KERNEL)
def test_an_operation_with_a_kernel_is_not_found(operation):
    net = network(lambda classes, channels: Through(WITH_KERNEL[operation], classes))
    assert not net.trial.nondeterministic
    require_deterministic(net.trial.nondeterministic, "the t", GPU)


def test_each_operation_is_named_once():
    vgg = torchvision.models.vgg11(num_classes=CLASSES, init_weights=False)
    [operation] = nondeterministic_operations(vgg(torch.rand(2, 3, 32, 32)))
    assert operation.startswith("adaptive average")
    both = Through(nn.Sequential(nn.ReflectionPad2d(1), nn.ReflectionPad2d(1), nn.AdaptiveAvgPool2d(2)))
    assert len(nondeterministic_operations(both(torch.rand(2, *SHAPE)))) == 2


def session(device, **values):
    return SimpleNamespace(config=options(**values), device=device, card=make_card(), augment=CropFlip(0, False))


def pooling(num_classes, in_channels=3):
    return Through(nn.AdaptiveAvgPool2d(2), num_classes)


def test_a_teacher_through_which_images_are_synthesised_is_refused(monkeypatch):
    teacher, student = network(pooling).freeze(), network(nets.small)
    given = dict(oh=1.0, nz=4, ngf=4, synthesis_batch_size=8, g_steps=1)
    with pytest.raises(InputError, match="not possible with the network: the backward pass of adaptive average"):
        build_source(session(GPU, **given), teacher, student)
    build_source(session(CPU, **given), teacher, student)
    monkeypatch.setattr(build, "construct", lambda *words, **parts: construct(*words, **{**parts, "device": CPU}))
    build_source(session(GPU, source="noise"), teacher, student)  # nothing flows back through the teacher


def test_crops_of_the_contrast_are_refused():
    teacher, student = network().freeze(), network(nets.small)
    with pytest.raises(InputError, match="not possible with --cr: the backward pass of grid_sample"):
        build_source(session(GPU, cr=1.0), teacher, student)
    views = random_resized_crop(torch.rand(2, *SHAPE, requires_grad=True))
    assert nondeterministic_operations(views) == ["grid_sample"]


class PooledParameter(Through):
    """Pools a parameter, so that its gradient matters in training alone."""

    def __init__(self, num_classes=CLASSES):
        super().__init__(self.add, num_classes)
        self.positions = nn.Parameter(torch.rand(1, 8, 4, 4))

    def add(self, x):
        return x + F.interpolate(self.positions, size=x.shape[2:], mode="bicubic")


@pytest.mark.parametrize("training", [False, True])
def test_what_is_trained_is_asked_for_in_training(training, monkeypatch):
    """No GPU is here, so the network is tried on the CPU and refused as if on a GPU."""
    net = Network(PooledParameter(), SHAPE, (0.5,) * 3, (0.25,) * 3, "student nets-made")
    assert not net.trial.nondeterministic
    monkeypatch.setattr(
        datafree.network, "require_deterministic", lambda found, user, _: require_deterministic(found, user, GPU)
    )
    if training:
        with pytest.raises(InputError, match="with the student nets-made: the backward pass of bicubic"):
            net.try_run(training=True)
    else:
        net.try_run()


def test_a_pool_uses_memory_only_as_it_fills():
    before = memory_in_use()
    pool = ImagePool(10**8, (3, 1, 1), 10, torch.device("cpu"))
    assert memory_in_use() - before < 2**25 < pool.images.nbytes
    assert torch.utils.deterministic.fill_uninitialized_memory


def memory_in_use() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
