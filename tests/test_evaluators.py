import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datafree.datasets.splits import TensorSplit
from datafree.errors import InputError
from datafree.evaluators import evaluate, scores_line


def random_split(classes, size=37):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (size, 3, 4, 5), generator=generator, dtype=torch.uint8)
    return TensorSplit(images, torch.randint(classes, (size,), generator=generator), classes)


def linear_network(classes):
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(60, classes))


@pytest.mark.parametrize("classes", [3, 5, 12])
@pytest.mark.parametrize("batch_size", [1, 10, 500])
def test_equals_the_oracle(classes, batch_size):
    split, network = random_split(classes), linear_network(classes)
    logits = network(split.images / 255).detach()
    ranks = (-logits).argsort(1).numpy()
    labels = split.labels.numpy()
    found = evaluate(network, split, batch_size)
    assert found["acc1"] == pytest.approx(100 * np.mean(ranks[:, 0] == labels))
    if classes > 5:
        assert found["acc5"] == pytest.approx(100 * np.mean([y in r[:5] for y, r in zip(labels, ranks)]))
    else:  # it would be 100 % whatever the network does
        assert "acc5" not in found and "Acc@5" not in scores_line(found)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-5)


def test_mode_and_gradients_are_not_changed():
    network = linear_network(4).train()
    evaluate(network, random_split(4))
    assert network.training and all(p.grad is None for p in network.parameters())


def test_images_are_given_in_0_to_1():
    seen = []

    def network(images):
        seen.append(images)
        return torch.zeros(len(images), 2)

    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    evaluate(network, TensorSplit(images, torch.zeros(3, dtype=torch.int64), 2))
    assert torch.cat(seen).flatten().tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_are_named(value):
    def network(images):
        logits = torch.zeros(len(images), 4)
        logits[0, 2] = value
        return logits

    with pytest.raises(InputError, match="the teacher gave non-finite logits for 4 of 37 images"):
        evaluate(network, random_split(4), batch_size=10, name="teacher")


def test_another_class_count_is_named():
    with pytest.raises(InputError, match=r"the student gave logits of shape \(37, 5\).*4 classes"):
        evaluate(linear_network(5), random_split(4), name="student")
