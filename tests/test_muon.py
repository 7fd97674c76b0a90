"""Muon beside torch's own, which takes matrices alone, and beside torch's SGD."""

import copy

import nets
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from datafree.config import Optim
from datafree.learners.base import make_optimizer
from datafree.muon import Muon, filters_of, orthogonalised
from datafree.plan import describe_optimizer
from datafree.update import load_part


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(net, optimizer, steps=5):
    """The parameters of ``net`` after some steps on the same random images."""
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_the_plan_states_what_it_steps():
    two, none = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), nn.Linear(4, 2)
    assert describe_optimizer(Muon(two, 0.1)) == [
        "Muon steps the filters of 2 convolutions; SGD trains everything else."
    ]
    [line] = describe_optimizer(Muon(none, 0.1))
    assert line == "Muon finds no filters of convolutions to step here: SGD trains everything."
    assert describe_optimizer(torch.optim.SGD(two.parameters(), 0.1)) == []


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (12, 12)])
def test_orthogonalised_keeps_singular_vectors_and_makes_values_alike(shape):
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalised(matrix[None])[0] @ v.T
    assert (inside - inside.diag().diag()).abs().max() < 1e-4
    assert inside.diag().min() > 0.6 and inside.diag().max() < 1.3
    assert not orthogonalised(torch.zeros(2, *shape)).any()


CONVOLUTIONS = {
    "wide": nn.Conv2d(3, 16, 3),
    "tall": nn.Conv2d(3, 64, 3),
    "pointwise": nn.Conv2d(4, 12, 1),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    "one-dimensional": nn.Conv1d(4, 6, 5),
}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_filters_step_in_the_direction_of_torchs_muon_by_a_share_of_their_norm(name):
    layer = copy.deepcopy(CONVOLUTIONS[name])
    filters = layer.weight
    norm, matrix = filters.detach().norm(), nn.Parameter(filters.detach().flatten(1).clone())
    ours, theirs = Muon(layer, 1.0, 1e-3), torch.optim.Muon([matrix], 1.0, 0.0, 0.9, nesterov=True)
    for _ in range(4):
        before, matrix_before = filters.detach().flatten(1).clone(), matrix.detach().clone()
        filters.grad = torch.randn_like(filters)
        matrix.grad = filters.grad.flatten(1).clone()
        ours.step()
        theirs.step()
        across = matrix.detach() - matrix_before
        across = across - (across * before).sum() / norm**2 * before  # the norm stays
        step = filters.detach().flatten(1) - before
        assert F.cosine_similarity(step.flatten(), across.flatten(), 0) > 0.99  # theirs is in bfloat16
        assert 0.5e-3 < step.norm() / norm < 1.2e-3
        torch.testing.assert_close(filters.detach().norm(), norm)


def test_filters_are_weights_of_convolutions_whose_norm_may_stay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=4), nn.Linear(4, 4))
    net.scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))  # as of a ConvNeXt
    net.position = nn.Parameter(torch.zeros(1, 5, 4))  # as of a ViT
    nn.init.zeros_(net[1].weight)
    assert list(filters_of(net)) == [net[0].weight]
    optimizer = make_optimizer([net], Optim(optimizer="muon", lr=0.1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))


@pytest.mark.parametrize(
    "computed",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_filters_that_are_computed_of_other_parameters_are_left_to_sgd(computed):
    net = nn.Sequential(computed(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 3))
    optimizer, before = Muon(net, 0.05), copy.deepcopy(net.state_dict())
    assert list(filters_of(net)) == [net[2].weight]
    after = trained(net, optimizer)
    assert all(not torch.equal(after[name], before[name]) for name in after)


def test_filters_of_one_shape_step_together_as_each_alone():
    net = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3, groups=2), nn.Conv2d(4, 8, 3), nn.Conv1d(4, 8, 9)])
    twin = copy.deepcopy(net)
    together, alone = Muon(net, 0.05), [Muon(layer, 0.05) for layer in twin]
    for step in range(3):
        for ours, theirs in zip(net, twin):
            ours.weight.grad = torch.randn_like(ours.weight) * 10**step
            theirs.weight.grad = ours.weight.grad.clone()
        net[1].weight.grad = twin[1].weight.grad = None  # as of a layer that was not used
        for optimizer in (together, *alone):
            optimizer.step()
    torch.testing.assert_close(net.state_dict(), twin.state_dict())
    assert {len(state) for state in together.state.values()} == {1} and len(together.state) == 3


def test_steps_fade_with_the_momentum():
    layer = nn.Conv2d(3, 16, 3)
    optimizer = Muon(layer, 0.1)
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    layer.weight.grad.zero_()
    for _ in range(1000):
        before = layer.weight.detach().clone()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("nesterov", [False, True])
def test_all_but_filters_step_as_by_sgd(nesterov):
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    twin = copy.deepcopy(net)
    kind = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov}
    ours = trained(net, Muon(net, **kind))
    theirs = trained(twin, torch.optim.SGD(twin.parameters(), **kind))
    torch.testing.assert_close(ours, theirs)


def test_channels_last_filters_step_alike():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    twin = copy.deepcopy(net).to(memory_format=torch.channels_last)
    steps = [trained(one, Muon(one, 0.05)) for one in (net, twin)]
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-5)


def test_a_frozen_filter_stays_and_states_are_restored():
    net = nets.tiny(4)
    next(net.parameters()).requires_grad_(False)
    twin, first = copy.deepcopy(net), Muon(net, 0.05)
    trained(net, first)
    assert torch.equal(next(twin.parameters()), next(net.parameters()))
    twin.load_state_dict(net.state_dict())
    second = Muon(twin, 0.05)
    load_part(second, copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(trained(net, first), trained(twin, second), rtol=0, atol=0)


@pytest.mark.parametrize(
    "damage",
    [
        dict.clear,
        lambda state: state.update(momentum_buffer=None),
        lambda state: state.update(momentum_buffer=torch.zeros(())),
    ],
)
def test_a_state_that_would_fail_in_the_next_step_is_refused(damage):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    optimizer = Muon(net, 0.05)
    trained(net, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    damage(state["state"][0])
    with pytest.raises(ValueError, match="of Muon"):
        load_part(optimizer, state)


def test_a_closure_computes_the_gradients():
    layer = nn.Conv2d(3, 8, 3)
    before = layer.weight.detach().clone()

    def loss():
        value = layer(torch.ones(1, 3, 8, 8)).sum()
        value.backward()
        return value

    assert Muon(layer, 0.1).step(loss) != 0 and not torch.equal(before, layer.weight)
