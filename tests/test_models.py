"""Networks: shapes, sizes known from the literature, names of parameters, and user-defined networks."""

import sys

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from datafree.errors import InputError, OptionError
from datafree.models import MODELS
from datafree.models.factory import build_model
from datafree.models.resnet_cifar import Subsample
from datafree.models.shufflenetv2 import Unit, shuffled
from datafree.models.wresnet import PreActBlock

SMALL = ["wrn16_1", "resnet8", "cifar_resnet20", "vgg8", "mobilenetv2", "shufflenetv2", "lenet5"]

# Trainable parameters for 3 channels, from papers, RepDistiller, torchvision and published checkpoints.
PARAMETERS = {
    ("wrn16_1", 10): 175_066,
    ("wrn16_2", 100): 703_284,
    ("wrn40_1", 100): 569_780,
    ("wrn40_2", 100): 2_255_156,
    ("resnet8", 10): 78_042,
    ("resnet20", 100): 278_324,
    ("resnet32", 100): 472_756,
    ("resnet56", 100): 861_620,
    ("resnet110", 100): 1_736_564,
    ("resnet8x4", 100): 1_233_540,
    ("resnet32x4", 100): 7_433_860,
    ("cifar_resnet20", 10): 269_722,
    ("cifar_resnet32", 10): 464_154,
    ("cifar_resnet44", 10): 658_586,
    ("cifar_resnet56", 10): 853_018,
    ("cifar_resnet110", 10): 1_727_962,
    ("resnet18", 10): 11_173_962,
    ("resnet34", 10): 21_282_122,
    ("resnet50", 10): 23_520_842,
    ("vgg8", 100): 3_965_028,
    ("vgg13", 100): 9_462_180,
    ("mobilenetv2", 1000): 3_504_872,
    ("shufflenetv2", 10): 1_263_278,
    ("shufflenetv2_torchvision", 1000): 2_278_604,
}


def trunk(module):
    """The children of the root, with those of plain containers in their place."""
    for child in module.children():
        if isinstance(child, nn.Sequential):
            yield from trunk(child)
        else:
            yield child


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", MODELS)
def test_logits_depend_on_each_image_alone_in_eval_mode_and_repeat_exactly(name):
    model = MODELS[name](7).eval()
    views = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = model(views)
        assert logits.shape == (3, 7)
        assert torch.equal(logits, model(views))
        torch.testing.assert_close(logits[1:2], model(views[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_finite_gradient(name, shape):
    model = MODELS[name](5, in_channels=shape[0])
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 5)
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_images_may_be_small_and_not_square(name):
    assert MODELS[name](5).eval()(torch.randn(2, 3, 16, 20)).shape == (2, 5)


@pytest.mark.parametrize("name, num_classes", PARAMETERS)
def test_number_of_parameters(name, num_classes):
    assert sum(p.numel() for p in MODELS[name](num_classes).parameters()) == PARAMETERS[name, num_classes]


def test_lenet5_has_the_papers_parameters_and_those_of_its_batch_norms():
    norms = 2 * (6 + 16)
    assert sum(p.numel() for p in MODELS["lenet5"](10, in_channels=1).parameters()) == 61_706 + norms


@pytest.mark.parametrize("name", [*SMALL, "resnet18"])
def test_no_later_layer_changes_the_output_of_an_earlier_one(name):
    model, seen = MODELS[name](4), []
    for module in trunk(model):
        module.register_forward_hook(lambda _, args, output: seen.append((output, output.detach().clone())))
    model(torch.randn(2, 3, 32, 32))
    assert len(seen) > 4
    assert all(torch.equal(output, copied) for output, copied in seen)


@pytest.mark.parametrize(
    "name, keys, absent",
    [
        (
            "wrn40_2",
            [
                "conv1.weight",
                "block1.layer.0.bn1.weight",
                "block1.layer.0.conv1.weight",
                "block1.layer.0.convShortcut.weight",
                "block2.layer.5.bn2.running_mean",
                "block3.layer.5.conv2.weight",
                "bn1.weight",
                "fc.weight",
                "fc.bias",
            ],
            ["block1.layer.1.convShortcut.weight", "conv1.bias"],
        ),
        ("wrn16_1", ["block2.layer.0.convShortcut.weight"], ["block1.layer.0.convShortcut.weight"]),
        (
            "resnet8x4",
            ["bn1.weight", "layer1.0.downsample.0.weight", "layer2.0.downsample.1.running_var", "fc.weight"],
            [],
        ),
        ("resnet20", ["layer1.0.conv1.weight", "layer3.2.bn2.weight"], ["layer1.0.downsample.0.weight"]),
        ("cifar_resnet20", ["layer2.0.conv1.weight", "linear.weight"], ["layer2.0.shortcut.0.weight"]),
        (
            "resnet18",
            ["layer2.0.shortcut.0.weight", "layer4.1.bn2.weight", "linear.weight"],
            ["layer1.0.shortcut.0.weight"],
        ),
        ("resnet50", ["layer1.0.shortcut.1.weight", "layer4.2.conv3.weight"], ["layer1.1.shortcut.0.weight"]),
        (
            "shufflenetv2",
            [
                "bn1.weight",
                "layer1.0.bn5.weight",
                "layer2.7.conv3.weight",
                "layer3.3.bn3.bias",
                "bn2.bias",
                "linear.bias",
            ],
            ["layer1.1.conv4.weight", "layer1.4.conv1.weight", "conv1.bias"],
        ),
        (
            "vgg11",
            ["block0.0.bias", "block2.3.weight", "block2.4.running_var", "classifier.weight"],
            ["block1.3.weight"],
        ),
    ],
)
def test_parameters_have_the_names_of_published_checkpoints(name, keys, absent):
    names = set(MODELS[name](10).state_dict())
    assert set(keys) <= names
    assert not names & set(absent)


@pytest.mark.parametrize(
    "name, original", [("mobilenetv2", "mobilenet_v2"), ("shufflenetv2_torchvision", "shufflenet_v2_x1_0")]
)
def test_torchvisions_weights_fit_where_only_strides_differ(name, original):
    weights = torchvision.models.get_model(original, num_classes=10).state_dict()
    MODELS[name](10).load_state_dict(weights)


@pytest.mark.parametrize("width, stride", [(6, 2), (7, 2), (6, 1)])
def test_option_a_shortcut_takes_every_second_pixel_and_pads_both_sides(width, stride):
    images = np.random.default_rng(0).normal(size=(2, 3, 5, 6)).astype(np.float32)
    expected = np.zeros((2, width, -(-5 // stride), -(-6 // stride)), np.float32)
    before = (width - 3) // 2
    for row in range(expected.shape[2]):
        for column in range(expected.shape[3]):
            expected[:, before : before + 3, row, column] = images[:, :, stride * row, stride * column]
    assert np.array_equal(Subsample(width - 3, stride)(torch.from_numpy(images)).numpy(), expected)


@pytest.mark.parametrize("out_channels, stride", [(4, 1), (6, 2)])
def test_preactivation_block_feeds_the_activated_input_to_a_shortcut_convolution(out_channels, stride):
    block = PreActBlock(4, out_channels, stride).eval()
    for norm in (block.bn1, block.bn2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 6, 6)

    def activated(norm, x):
        shape = (1, -1, 1, 1)
        deviation = (norm.running_var.view(shape) + 1e-5).sqrt()
        return ((x - norm.running_mean.view(shape)) / deviation).clamp(min=0)

    first = activated(block.bn1, x)
    expected = F.conv2d(first, block.conv1.weight, stride=stride, padding=1)
    expected = F.conv2d(activated(block.bn2, expected), block.conv2.weight, padding=1)
    expected += x if stride == 1 else F.conv2d(first, block.convShortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("size, last", [(16, 2), (28, 3), (32, 4), (48, 3), (64, 4)])
def test_vgg_skips_its_last_max_pool_on_small_maps(size, last):
    model, sizes = MODELS["vgg8"](4), []
    model.block4.register_forward_hook(lambda _, args, output: sizes.append(output.shape[2:]))
    model(torch.randn(2, 3, size, size))
    assert sizes == [(last, last)]


def test_he_init_scales_by_fan_out():
    weight = MODELS["wrn40_2"](10).block3.layer[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


FACTORIES = """
from dataclasses import dataclass

from torch import nn

import neighbour_of_factories


@dataclass
class Size:
    channels: "int" = 3


def named(num_classes, in_channels=3):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


def fixed():
    return named(2, Size().channels)


def keywords(**kwargs):
    model = named(kwargs["num_classes"])
    model.kwargs = kwargs
    return model


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes


def text(num_classes):
    return "a network"


def needs_more(depth, num_classes):
    return named(num_classes)
"""


@pytest.fixture
def factories(tmp_path):
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "neighbour_of_factories.py").write_text("")
    return f"{tmp_path}/factories.py"


def test_factory_in_a_file_is_called_with_the_arguments_that_it_names(factories):
    path = list(sys.path)
    assert build_model(f"{factories}:named", 4, in_channels=1)(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    assert build_model(f"{factories}:fixed", 4)(torch.randn(2, 3, 8, 8)).shape == (2, 2)
    assert build_model(f"{factories}:keywords", 4, in_channels=1).kwargs == {"num_classes": 4}
    assert build_model(f"{factories}:Net", 4).num_classes == 4
    assert sys.path == path
    assert "factories" not in sys.modules


def test_models_by_name_by_package_and_from_torchvision():
    assert build_model("wrn16_1", 6, in_channels=1)(torch.randn(2, 1, 16, 16)).shape == (2, 6)
    ours, theirs = build_model("resnet18", 6), build_model("torchvision.models:resnet18", 6)
    assert ours.conv1.kernel_size == (3, 3) and theirs.conv1.kernel_size == (7, 7)
    assert theirs.fc.out_features == 6
    assert build_model("densenet121", 6).classifier.out_features == 6


def test_torchvisions_auxiliary_heads_are_off():
    model = build_model("googlenet", 6)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 6)
    assert model.training


def test_a_shuffle_takes_the_channels_of_both_halves_in_turns():
    left, right = torch.arange(3.0).view(1, 3, 1, 1), 10 + torch.arange(3.0).view(1, 3, 1, 1)
    assert shuffled(left, right).flatten().tolist() == [0, 10, 1, 11, 2, 12]


def test_a_shuffle_unit_passes_half_of_its_channels():
    unit, x = Unit(8).eval(), torch.randn(2, 8, 5, 5)
    assert torch.equal(unit(x)[:, ::2], x[:, :4]) and (unit(x)[:, 1::2] >= 0).all()


def test_torchvisions_models_have_a_name_that_no_registered_model_hides():
    assert build_model("torchvision:resnet18", 6).conv1.kernel_size == (7, 7)
    with pytest.raises(OptionError, match="torchvision has no model 'resnet19': the nearest are resnet18"):
        build_model("torchvision:resnet19", 6)


def test_a_factory_gets_the_channels_under_either_name(tmp_path):
    code = "from torch import nn\ndef make({}=3, num_classes=2): return nn.Linear({}, num_classes)"
    for name in ("in_channels", "in_chans"):
        (tmp_path / f"{name}.py").write_text(code.format(name, name))
        model = build_model(f"{tmp_path / name}.py:make", 6, in_channels=1)
        assert (model.in_features, model.out_features) == (1, 6)


def test_timms_models_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="timm:NAME need the package timm: pip install timm"):
        build_model("timm:resnet18d", 6)


def test_timms_models_by_name():
    pytest.importorskip("timm")
    assert build_model("timm:resnet10t", 6, in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 6)
    assert build_model("timm.models:resnet10t", 6, in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 6)
    with pytest.raises(OptionError, match="timm has no model 'resnet18e': the nearest are .*resnet18d"):
        build_model("timm:resnet18e", 6)


def test_unknown_model_names_the_nearest_and_how_to_name_a_user_defined_one():
    with pytest.raises(OptionError, match="'wrn40-2': the nearest are wrn40_2, .* path/to/file.py:factory"):
        build_model("wrn40-2", 10)
    with pytest.raises(OptionError, match="densenet121"):
        build_model("densenet_121", 10)
    with pytest.raises(OptionError, match="known models are wrn16_1, wrn16_2, "):
        build_model("@", 10)


def test_torchvisions_models_need_three_channels():
    with pytest.raises(InputError, match="torchvision's densenet121 takes images of 3 channels, not 1"):
        build_model("densenet121", 10, in_channels=1)


@pytest.mark.parametrize(
    "factory, sentence",
    [
        ("missing", "has no function or class 'missing'"),
        ("FACTORIES", "has no function or class 'FACTORIES'"),
        ("text", "text' returned a str; it must return a torch.nn.Module"),
        (
            "needs_more",
            "needs_more' failed when called with .*num_classes=10 .*: TypeError: .*depth.*; other arguments need def",
        ),
    ],
)
def test_a_factory_that_cannot_be_used_is_named(factories, factory, sentence):
    with pytest.raises(InputError, match=sentence):
        build_model(f"{factories}:{factory}", 10)


def test_a_source_that_cannot_be_imported_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no file '.*nowhere.py'"):
        build_model(f"{tmp_path}/nowhere.py:net", 10)
    (tmp_path / "broken.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(InputError, match="broken.py' cannot be imported: ModuleNotFoundError: .*no_such_"):
        build_model(f"{tmp_path}/broken.py:net", 10)
    (tmp_path / "script.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(InputError, match="script.py' cannot be imported: SystemExit: 3"):
        build_model(f"{tmp_path}/script.py:net", 10)
    with pytest.raises(InputError, match="'no_such_package_at_all.nets' cannot be imported"):
        build_model("no_such_package_at_all.nets:net", 10)


def in_package(folder, **files):
    """Write the files (name -> text) of a package, without an __init__.py unless one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


NET = "from .parts import Head\n\n\ndef make(num_classes):\n    return Head(4, num_classes)\n"


@pytest.mark.parametrize("init", [True, False], ids=["package", "folder"])
def test_a_model_file_may_import_its_neighbours_by_a_dot(init, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    in_package(
        tmp_path / "nets", net=NET, parts="from torch.nn import Linear as Head\n", **{"__init__": ""} if init else {}
    )
    before, name = list(sys.path), f"{tmp_path}/nets/net.py:make"
    assert build_model(name, 6).out_features == 6
    assert sys.path == before and "nets" in sys.modules  # that of the tests is still the one of this name
    assert sys.modules["nets"].__file__.endswith("tests/nets.py")
    (tmp_path / "nets" / "net.py").write_text(NET.replace("4", "5"))
    assert build_model(name, 6).in_features == 5
    assert not list(tmp_path.rglob("*.pyc"))


def test_a_model_file_may_import_from_the_package_above_and_by_its_full_name(tmp_path):
    top = tmp_path / "zoo"
    in_package(top, __init__="SIZE = 4\n", parts="from torch.nn import Linear as Head\n")
    imports = "from .. import SIZE\nfrom ..parts import Head\nfrom zoo.parts import Head as Same\n"
    in_package(top / "small", __init__="", net=imports + "def make(num_classes):\n    return Head(SIZE, num_classes)\n")
    assert build_model(f"{top}/small/net.py:make", 6).in_features == 4


def test_packages_of_one_name_do_not_replace_one_another(tmp_path):
    for number in (4, 5):
        in_package(tmp_path / str(number) / "nets", __init__="", parts=f"SIZE = {number}\n")
        net = "from torch.nn import Linear\nfrom .parts import SIZE\n\n\ndef make(num_classes):\n"
        in_package(tmp_path / str(number) / "nets", net=net + "    return Linear(SIZE, num_classes)\n")
    assert [build_model(f"{tmp_path}/{n}/nets/net.py:make", 6).in_features for n in (4, 5)] == [4, 5]


def test_what_a_model_file_in_a_package_lacks_is_named_as_the_user_wrote_it(tmp_path):
    in_package(tmp_path / "nets", __init__="", net=NET)
    with pytest.raises(
        InputError, match=r"net.py' cannot be imported: ModuleNotFoundError: No module named 'nets.parts'$"
    ):
        build_model(f"{tmp_path}/nets/net.py:make", 6)


def test_every_way_to_look_into_the_registry_gives_factories():
    by_item = MODELS["lenet5"]
    assert callable(by_item) and by_item is MODELS.get("lenet5") is dict(MODELS.items())["lenet5"]
    assert all(map(callable, MODELS.values())) and "lenet5" in MODELS and MODELS.get("nobody") is None
