"""Muon beside torch's own, which takes matrices alone, and beside torch's SGD."""

import copy

import nets
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from datafree.muon import Muon, orthogonalised
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


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (12, 12)])
def test_orthogonalised_keeps_singular_vectors_and_makes_values_alike(shape):
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalised(matrix) @ v.T
    assert (inside - inside.diag().diag()).abs().max() < 1e-4
    assert inside.diag().min() > 0.6 and inside.diag().max() < 1.3
    assert not orthogonalised(torch.zeros(shape)).any()


@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (4, 8, 3, 3), (8, 1, 3, 3), (6, 4, 5)])
def test_filters_move_in_the_direction_of_torchs_muon_by_a_share_of_their_norm(shape):
    filters = nn.Parameter(torch.randn(shape))
    norm, matrix = filters.detach().norm(), nn.Parameter(filters.detach().flatten(1).clone())
    ours, theirs = Muon([filters], 1.0, 1e-3), torch.optim.Muon([matrix], 1.0, 0.0, 0.9, nesterov=True)
    for _ in range(4):
        before, matrix_before = filters.detach().flatten(1).clone(), matrix.detach().clone()
        filters.grad = torch.randn(shape)
        matrix.grad = filters.grad.flatten(1).clone()
        ours.step()
        theirs.step()
        across = matrix.detach() - matrix_before
        across = across - (across * before).sum() / norm**2 * before  # the norm stays
        step = filters.detach().flatten(1) - before
        assert F.cosine_similarity(step.flatten(), across.flatten(), 0) > 0.995  # theirs is in bfloat16
        assert 0.5e-3 < step.norm() / norm < 1.2e-3
        torch.testing.assert_close(filters.detach().norm(), norm)


def test_filters_of_zeros_get_a_norm():
    filters = nn.Parameter(torch.zeros(16, 4, 3, 3))
    optimizer = Muon([filters], 1.0)
    filters.grad = torch.zeros_like(filters)
    optimizer.step()
    assert not filters.any()
    filters.grad = torch.randn_like(filters)
    optimizer.step()
    assert filters.norm().item() == pytest.approx(4)


@pytest.mark.parametrize("nesterov", [False, True])
def test_all_but_filters_step_as_by_sgd(nesterov):
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    twin = copy.deepcopy(net)
    kind = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov}
    ours = trained(net, Muon(net.parameters(), **kind))
    theirs = trained(twin, torch.optim.SGD(twin.parameters(), **kind))
    torch.testing.assert_close(ours, theirs)


def test_channels_last_filters_step_alike():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    twin = copy.deepcopy(net).to(memory_format=torch.channels_last)
    steps = [trained(one, Muon(one.parameters(), 0.05)) for one in (net, twin)]
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-5)


def test_a_frozen_filter_stays_and_states_are_restored():
    torch.manual_seed(0)
    net = nets.tiny(4)
    for p in list(net.parameters())[:1]:
        p.requires_grad_(False)
    twin, first = copy.deepcopy(net), Muon(net.parameters(), 0.05)
    start = trained(net, first)
    assert torch.equal(next(twin.parameters()), next(net.parameters()))
    twin.load_state_dict(net.state_dict())
    second = Muon(twin.parameters(), 0.05)
    load_part(second, copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(trained(net, first), trained(twin, second), rtol=0, atol=0)
    assert any((start[name] != p).any() for name, p in net.named_parameters())


def test_muon_lowers_a_loss_faster_than_sgd():
    """On the same few images, after as many steps, with the same learning rate."""
    images, labels = torch.randn(64, 3, 16, 16), torch.randint(4, (64,))
    losses = {}
    for kind in (Muon, torch.optim.SGD):
        torch.manual_seed(2)
        net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
        )
        optimizer = kind(net.parameters(), 0.1, 0.9)
        for _ in range(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses[Muon] < losses[torch.optim.SGD]
