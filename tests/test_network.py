"""Networks: normalisation, freezing, copies, restriction to some classes, and networks from files."""

import copy

import nets
import pytest
import torch
from parts import CLASSES, SHAPE, changed, make_card, network, options, snapshot
from torch import nn

from datafree.batchnorm import BatchNormTap
from datafree.errors import InputError, OptionError
from datafree.models import MODELS
from datafree.network import Network
from datafree.pool import Batch
from datafree.synthesis.objective import SynthesisObjective

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images_of(count=4, shape=SHAPE):
    return torch.rand(count, *shape)


def assert_equal_features(found, expected):
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.embed, expected.embed)
    for ours, theirs in zip(found.stages, expected.stages, strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- normalisation and freezing


def test_network_normalises_what_it_is_given():
    model, views = nets.toy().eval(), torch.rand(2, 3, 16, 16)
    net = Network(model, (3, 16, 16), MEAN, STD).eval()
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    logits = model((views - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(net(views), logits)
    torch.testing.assert_close(net.features(views).logits, logits)
    assert net.num_classes == 5 and net.shape == (3, 16, 16) and net.device == torch.device("cpu")
    assert set(net.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_frozen_holds_inside_and_restores_everything():
    net = network(nets.toy).train()
    net.model[1].eval()
    net.model[2].requires_grad_(False)
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    before, views = snapshot(net), torch.rand(2, 3, 16, 16, requires_grad=True)
    with pytest.raises(ZeroDivisionError), net.frozen():
        net(views).sum().backward()
        1 / 0
    assert views.grad.norm() > 0 and all(p.grad is None for p in net.parameters())
    assert not changed(before, net)
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags


def test_a_teacher_is_in_evaluation_mode_and_has_no_weight_gradients():
    net = network(nets.toy).freeze()
    assert not any(m.training for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())


# ---------------------------------------------------------------- copies

COPIES = pytest.mark.parametrize("copied", [Network.copy, copy.deepcopy], ids=["copy", "deepcopy"])
FACTORIES = pytest.mark.parametrize(
    "factory", [nets.toy, nets.SharedReLU, nets.plain, MODELS["resnet8"]], ids=["toy", "shared", "plain", "resnet8"]
)


@COPIES
@FACTORIES
def test_a_copy_gives_the_same_outputs(copied, factory):
    net = network(factory).eval()
    other, images = copied(net), images_of()
    assert torch.equal(other(images), net(images))
    assert_equal_features(other.features(images), net.features(images))
    assert (other.name, other.shape, other.num_classes) == (net.name, net.shape, net.num_classes)
    assert torch.equal(other.mean, net.mean) and torch.equal(other.std, net.std)
    assert other.metadata == net.metadata and other.metadata is not net.metadata
    assert type(other.model) is type(net.model)


@COPIES
@FACTORIES
def test_a_copy_is_trained_apart_from_its_original(copied, factory):
    net = network(factory)
    other, images = copied(net), images_of(8)
    assert not {id(x) for x in [*net.parameters(), *net.buffers()]} & {
        id(x) for x in [*other.parameters(), *other.buffers()]
    }
    assert other.tap is not net.tap and other.tap.model is other.model
    before, expected = snapshot(net), net.eval().features(images)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    other.train()
    for _ in range(3):
        optimizer.zero_grad()
        features = other.features(images)
        sum(x.square().mean() for x in (features.logits, features.embed, *features.stages)).backward()
        optimizer.step()
    assert not changed(before, net) and all(p.grad is None for p in net.parameters())
    assert changed(before, other) >= {f"0.{name}" for name, _ in other.named_parameters()}
    assert_equal_features(net.features(images), expected)
    assert not torch.equal(other.eval().features(images).logits, expected.logits)
    torch.testing.assert_close(other.features(images).logits, other(images))


@COPIES
def test_a_copy_has_the_modes_and_gradient_flags_of_its_original(copied):
    net = network(nets.toy).train()
    net.model[1].eval()
    net.model[2].requires_grad_(False)
    other = copied(net)
    assert [m.training for m in other.modules()] == [m.training for m in net.modules()]
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in net.parameters()]
    other.freeze()
    assert net.training and any(p.requires_grad for p in net.parameters())


def test_a_copy_of_a_copy_outlives_its_original():
    net = network(nets.toy).eval()
    images = images_of()
    expected = net.features(images)
    other = net.copy().copy()
    del net
    assert_equal_features(other.features(images), expected)


def test_networks_that_are_copied_together_stay_one_where_they_are_one():
    net = network(nets.toy)
    one, two = copy.deepcopy([net, net])
    assert one is two and one is not net


def test_a_copy_has_statistics_of_its_own():
    net = network(nets.toy).freeze()
    other = net.copy()
    with BatchNormTap(other) as tap:
        net.features(images_of())
        assert not tap.statistics
        other.features(images_of())
    assert len(tap.statistics) == len(tap.layers) == 3


@FACTORIES
def test_a_network_can_be_saved_whole(factory, tmp_path):
    net, images = network(factory).eval(), images_of()
    torch.save(net, tmp_path / "network.pth")
    loaded = torch.load(tmp_path / "network.pth", weights_only=False)
    assert_equal_features(loaded.features(images), net.features(images))
    for parameter in loaded.parameters():
        parameter.data.zero_()
    assert not loaded.features(images).logits.any() and net.features(images).logits.any()


# ---------------------------------------------------------------- some of the classes


@pytest.mark.parametrize("classes", [range(0, 3), range(2, 5), range(0, 5), range(1, 2)], ids=str)
def test_a_restricted_network_has_the_logits_of_its_classes(classes):
    net, images = network(nets.toy, classes=5).eval(), images_of()
    restricted = net.restricted_to(classes)
    whole, part = net.features(images), restricted.features(images)
    expected = whole.logits[:, classes.start : classes.stop]
    assert torch.equal(restricted(images), expected) and torch.equal(part.logits, expected)
    assert restricted.num_classes == len(classes) and net.num_classes == 5
    assert torch.equal(part.embed, whole.embed) and all(map(torch.equal, part.stages, whole.stages))
    assert [id(p) for p in restricted.parameters()] == [id(p) for p in net.parameters()]


def test_a_restricted_network_follows_the_training_of_the_whole_one():
    net, images = network(nets.toy, classes=5), images_of()
    restricted = net.restricted_to(range(0, 3))
    optimizer, before = torch.optim.SGD(net.parameters(), 0.1), restricted.eval()(images)
    net.train()(images).square().sum().backward()
    optimizer.step()
    assert torch.equal(restricted.eval()(images), net.eval()(images)[:, :3])
    assert not torch.equal(restricted(images), before)
    net.train()
    with restricted.frozen():
        assert not any(m.training for m in net.model.modules())
    assert all(m.training for m in net.modules()) and all(p.requires_grad for p in net.parameters())


def test_a_copy_of_a_restricted_network_is_restricted():
    net, images = network(nets.toy, classes=5).eval(), images_of()
    restricted = net.restricted_to(range(1, 3))
    other = restricted.copy()
    assert torch.equal(other(images), net(images)[:, 1:3]) and other.num_classes == 2
    assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.parametrize(
    "classes",
    [range(0, 6), range(-1, 2), range(3, 3), range(4, 2), range(0, 4, 2), range(5, 6), range(4, 0, -1)],
    ids=str,
)
def test_a_range_that_is_not_of_the_classes_is_refused(classes):
    with pytest.raises(InputError, match=r"has 5 classes, which do not include range\("):
        network(nets.toy, classes=5).restricted_to(classes)


@pytest.mark.parametrize("target", ["student", "teacher"])
def test_a_student_of_more_classes_is_compared_on_those_of_the_teacher(target):
    """Old classes are 0 to 3 of 7: no gradient reaches the rows of the others in the student's head."""
    teacher, student = network(classes=4).freeze(), network(nets.small, classes=7)
    given = options(adv=1.0, adv_where="all", triplet=1.0, triplet_target=target, start_layer=0, sampling="uniform")
    views, targets = images_of(8).requires_grad_(), torch.arange(8) % 4
    with pytest.raises(RuntimeError):
        SynthesisObjective(given.synthesis, given.relation, teacher, student)(views, views, targets)
    objective = SynthesisObjective(given.synthesis, given.relation, teacher, student.restricted_to(range(4)))
    loss, terms = objective(*Batch(views, views, targets))
    loss.backward()
    assert set(terms) == {"adv", "triplet"} and loss.isfinite() and views.grad.isfinite().all() and views.grad.any()
    head = student.model[-1]
    assert head.weight.grad[:4].any(1).all() and head.bias.grad[:4].all()
    assert not head.weight.grad[4:].any() and not head.bias.grad[4:].any()
    assert all(p.grad is None for p in teacher.parameters())


# ---------------------------------------------------------------- from files


def stored(path, net, **more):
    """Write the weights of ``net`` to ``path`` as a run does; more: further or other values, None to leave one out."""
    metadata = {
        "model": "lenet5",
        "num_classes": net.num_classes,
        "shape": list(net.shape),
        "mean": net.mean.flatten().tolist(),
        "std": net.std.flatten().tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {"state_dict": net.model.state_dict(), **metadata, **more}
    torch.save({key: value for key, value in contents.items() if value is not None}, path)


def trained(factory=MODELS["lenet5"], shape=SHAPE, classes=CLASSES):
    """A network whose weights and statistics are not those of its initialisation."""
    net = network(factory, shape, classes, mean=0.3, std=0.25)
    net(images_of(8, shape))
    return net.eval()


@pytest.mark.parametrize("shape, classes", [((3, 16, 16), 4), ((1, 12, 20), 7)], ids=str)
def test_a_network_is_rebuilt_from_what_its_file_states(shape, classes, tmp_path):
    net, images = trained(shape=shape, classes=classes), images_of(4, shape)
    stored(tmp_path / "net.pth", net, acc1=73.5, dataset="own", epoch=9)
    other = Network.from_file(tmp_path / "net.pth").eval()
    assert torch.equal(other(images), net(images)) and other.shape == shape and other.num_classes == classes
    assert torch.equal(other.mean, net.mean) and torch.equal(other.std, net.std)
    assert {key: other.metadata[key] for key in ("acc1", "dataset", "epoch")} == dict(acc1=73.5, dataset="own", epoch=9)
    assert "lenet5" in other.name


def test_arguments_take_the_place_of_what_the_file_states(tmp_path):
    net, images = trained(), images_of()
    stored(tmp_path / "net.pth", net, model="resnet8")  # whose weights have other names
    with pytest.raises(InputError, match="net.pth"):
        Network.from_file(tmp_path / "net.pth")
    other = Network.from_file(tmp_path / "net.pth", "lenet5", mean=(0.1,) * 3, std=(0.9,) * 3).eval()
    torch.testing.assert_close(other(images), net.model((images - 0.1) / 0.9))


def test_a_bare_state_dict_needs_a_model_and_a_card(tmp_path):
    net, path, images = trained(), tmp_path / "bare.pth", images_of()
    torch.save(net.model.state_dict(), path)
    with pytest.raises(InputError, match="bare.pth does not state the model of its network; name the model"):
        Network.from_file(path)
    with pytest.raises(InputError, match="bare.pth does not state the shape .* give a data card"):
        Network.from_file(path, "lenet5")
    other = Network.from_file(path, "lenet5", make_card()).eval()
    torch.testing.assert_close(other(images), net.model((images - 0.5) / 0.25))  # by the card's mean and std


@pytest.mark.parametrize("missing", ["model", "num_classes", "shape", "mean", "std"])
def test_a_file_that_does_not_state_all_is_refused(missing, tmp_path):
    stored(tmp_path / "net.pth", trained(), **{missing: None})
    with pytest.raises(InputError, match=f"does not state the {missing} of its network"):
        Network.from_file(tmp_path / "net.pth")


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [3, 16]},
        {"shape": [3, 16, 16, 16]},
        {"shape": 3},
        {"shape": ["a", "b", "c"]},
        {"shape": [3, 16.5, 16]},
        {"shape": [3, 16, -1]},
        {"shape": [3, 16, 0]},
        {"num_classes": "4"},
        {"num_classes": 4.5},
        {"num_classes": -4},
        {"num_classes": [4]},
        {"mean": 0.5},
        {"mean": [[0.3] * 3]},
        {"mean": [float("nan")] * 3},
        {"mean": [0.3]},
        {"mean": "grey"},
        {"std": [0.0, 0.0, 0.0]},
        {"std": 0.25},
        {"num_classes": 9},
        {"model": "resnet_of_nobody"},
        {"model": "os:getcwd"},
        {"model": 5},
        {"model": ["lenet5"]},
    ],
    ids=str,
)
def test_a_file_that_states_something_wrong_is_refused(wrong, tmp_path):
    stored(tmp_path / "net.pth", trained(), **wrong)
    with pytest.raises(InputError) as refusal:
        Network.from_file(tmp_path / "net.pth")
    assert "\n" not in str(refusal.value)


def test_a_user_defined_model_is_named_by_the_user_and_not_by_the_file(tmp_path):
    """What a file states must not choose the code that is run."""
    net, images = trained(nets.tiny), images_of()
    stored(tmp_path / "net.pth", net, model=nets.name("tiny"))
    with pytest.raises(InputError, match="nets.py:tiny.*not a registered one; name the model"):
        Network.from_file(tmp_path / "net.pth")
    assert torch.equal(Network.from_file(tmp_path / "net.pth", nets.name("tiny")).eval()(images), net(images))


def test_an_unknown_model_is_reported_before_a_missing_file(tmp_path):
    with pytest.raises(OptionError, match="resnet_of_nobody"):
        Network.from_file(tmp_path / "nothing.pth", "resnet_of_nobody")
    with pytest.raises(InputError, match="there is no file"):
        Network.from_file(tmp_path / "nothing.pth", nets.name("tiny"))


@pytest.mark.parametrize(
    "place", ["checkpoints/model_last.pth", "checkpoints/student_last.pth", "model_last.pth", "student_last.pth"]
)
def test_the_last_weights_in_the_folder_of_a_run_are_found(place, tmp_path):
    net, images = trained(), images_of()
    stored(tmp_path / "run" / place, net)
    for path in (tmp_path / "run", str(tmp_path / "run")):
        assert torch.equal(Network.from_file(path).eval()(images), net(images))


def test_of_old_and_new_weights_in_a_folder_the_new_ones_are_read(tmp_path):
    net, images = trained(), images_of()
    stored(tmp_path / "run" / "checkpoints" / "student_last.pth", trained())
    stored(tmp_path / "run" / "checkpoints" / "model_last.pth", net)
    assert torch.equal(Network.from_file(tmp_path / "run").eval()(images), net(images))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder without checkpoints/model_last.pth"):
        Network.from_file(tmp_path)


@pytest.mark.parametrize("classes, rows", [(0, CLASSES), (3, 3)])
def test_a_network_is_built_by_name_for_a_card(classes, rows):
    net = Network.build(nets.name("tiny"), make_card(), num_classes=classes, mean=MEAN, role="student")
    assert net.num_classes == rows and isinstance(net.model[-1], nn.Linear) and net.name == "student nets-tiny"
    assert net.mean.flatten().tolist() == pytest.approx(MEAN) and net.std.flatten().tolist() == [0.25] * 3
    with pytest.raises(InputError, match="the student's std is .*correct the data card"):
        Network.build(nets.name("tiny"), make_card(), std=(0.2,), role="student")


def test_a_restricted_network_can_be_restricted_again():
    net, images = network(classes=7).eval(), images_of()
    assert torch.equal(net.restricted_to(range(2, 6)).restricted_to(range(0, 2))(images), net(images)[:, 2:4])
