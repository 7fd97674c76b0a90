"""Class-incremental learning: order and tasks, metrics, the hosts' terms by oracles, and whole runs on tiny budgets."""

import gc
import itertools
import json
import math
import runpy
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import nets
import numpy as np
import parts
import pytest
import torch
from conftest import ROOT, call, mostly_slow, rows
from parts import make_card
from PIL import Image
from resuming import at_call, checkpoint_of, kill, same, stopped, terminate
from test_data_free import files_opened
from torch.nn import functional as F

import datafree_incremental
from datafree import config, criterions, relation
from datafree.augment import CropFlip
from datafree.config import Incremental, IncrementalConfig, IncrementalRelation
from datafree.datasets.cards import CARDS, DatasetCard
from datafree.datasets.digits import read_digits
from datafree.datasets.splits import TensorSplit
from datafree.diagnostics import Watch
from datafree.engine import Engine
from datafree.errors import InputError
from datafree.grids import draw_matrix
from datafree.incremental import IncrementalRun, Results, Tasks, task_accuracies
from datafree.learners.base import Learner
from datafree.learners.incremental import (
    DistilledTask,
    Labels,
    ReplayedTask,
    TranslatedTask,
    candidates,
    class_means,
    of_few_classes,
    scale_factors,
)
from datafree.network import Network
from datafree.pool import Batch
from datafree.session import Session
from datafree.synthesis.optimised import OptimisedSynthesis

OLD, NEW = 3, 2
SEEN = OLD + NEW


# The order of the classes, and the tasks.


def test_the_order_of_a_seed_is_the_fields_and_a_list_is_taken_as_it_is():
    card = make_card(classes=100)
    np.random.seed(1993)
    assert Tasks.of(Incremental(), card).order == tuple(np.random.permutation(100))
    given = (3, 1, 0, 2)
    tasks = Tasks.of(Incremental(init_cls=2, increment=1, learner="finetune", class_order=given), make_card(classes=4))
    assert tasks.order == given and tasks.ends == (2, 3, 4) and tasks.classes(tasks.outputs(0)) == (3, 1)
    assert [list(tasks.outputs(task)) for task in range(3)] == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            {"increment": 3},
            "the other 8 are no whole number of tasks of 3; give an --increment that divides 8, such as 2",
        ),
        ({"increment": 9}, "such as 8"),
        ({"init_cls": 10}, "leaves none for a second one; lower --init_cls"),
        ({"init_cls": 12}, "has 10 classes, of which the first task would take 12"),
        ({"increment": 1}, "--increment 1: the cross-entropy over the new classes alone"),
        (
            {"class_order": (0, 1, 2)},
            "--class_order 0,1,2 is not an order of the classes of digits; name each of 0 to 9",
        ),
        ({"class_order": (0.5, *range(1, 10))}, "is not an order"),
        ({"class_order": (0, 0, *range(2, 10))}, "is not an order"),
    ],
)
def test_tasks_that_cannot_be_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(InputError) as error:
        Tasks.of(Incremental(**{"init_cls": 2, "increment": 2, **options}), CARDS["digits"])
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_one_class_a_task_is_possible_where_its_cross_entropy_is_not_over_it_alone():
    for options in ({"learner": "finetune"}, {"learner": "fetril"}, {"learner": "joint"}, {"hce": 1.0}):
        assert len(Tasks.of(Incremental(init_cls=2, increment=1, **options), CARDS["digits"])) == 9


# The metrics, on an example by hand.


def test_the_metrics_of_three_tasks():
    results = Results(images=[10, 30, 20], matrix=[[90.0], [70.0, 50.0], [80.0, 20.0, 60.0]])
    assert results.seen() == pytest.approx([90, (700 + 1500) / 40, (800 + 600 + 1200) / 60])
    assert results.average() == pytest.approx((90 + 55 + 2600 / 60) / 3)
    assert results.forgetting() == pytest.approx(((90 - 80) + (50 - 20)) / 2)
    assert results.numbers() == pytest.approx(
        {"acc1": 2600 / 60, "average_acc1": results.average(), "forgetting": 20.0}
    )
    assert Results(images=[4], matrix=[[75.0]]).forgetting() == 0 and Results(images=[]).numbers() == {}


def test_accuracies_of_tasks_are_among_all_classes_known_then():
    """A network that says the pixel's value; unseen outputs never win, whatever they are."""
    tasks = Tasks(order=(2, 0, 1, 3), ends=(2, 4), names=("a", "b", "c", "d"))
    images = torch.zeros(8, 1, 2, 2, dtype=torch.uint8)
    said = torch.tensor([0, 0, 1, 0, 2, 1, 3, 2])
    images[:, 0, 0, 0] = said.to(torch.uint8)
    test = TensorSplit(images, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), 4)

    class Says(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, x):
            return F.one_hot((x[:, 0, 0, 0] * 255).round().long(), 4).float()

    assert task_accuracies(Says(), test, tasks, 1, batch_size=3) == [75.0, 50.0]


def test_the_picture_of_a_matrix_has_a_cell_for_every_pair():
    small, large = draw_matrix([[100.0]], "row", "column"), draw_matrix([[100.0], [0.0, 50.0]], "row", "column")
    assert large.size[0] - small.size[0] == large.size[1] - small.size[1] > 0
    colours = {
        large.getpixel((large.size[0] - 10, large.size[1] - 8)),
        large.getpixel((large.size[0] - 54, large.size[1] - 8)),
    }
    assert colours == {(155, 155, 255), (255, 255, 255)}


# The terms of the hosts.


def given(**options):
    values = {"batch_size": 6, "replay_batch_size": 4, **options}
    triplets = {name: values.pop(name) for name in list(values) if name in vars(IncrementalRelation())}
    return IncrementalConfig(incremental=Incremental(**values), relation=IncrementalRelation(**triplets))


def real_split(count=40):
    labels = OLD + torch.arange(count) % NEW
    return TensorSplit(torch.randint(256, (count, *parts.SHAPE), dtype=torch.uint8), labels, SEEN)


@pytest.fixture
def learner():
    """A ReplayedTask of tiny networks, with these options."""

    def make(**options):
        torch.manual_seed(0)
        teacher = parts.network(classes=8).freeze().restricted_to(range(OLD))
        student = parts.network(classes=8).restricted_to(range(SEEN))
        return ReplayedTask(student, teacher, CropFlip(0, False), given(**options), 10, real_split())

    return make


def batch(real=6, synthetic=4):
    views = torch.rand(real + synthetic, *parts.SHAPE)
    return views, Labels(torch.cat([OLD + torch.arange(real) % NEW, torch.arange(synthetic) % OLD]), real)


def values(learner, views, labels):
    """(loss, terms) of the learner's terms, in evaluation mode."""
    learner.network.eval()
    teacher, student = learner.teacher.features(views), learner.network.features(views)
    return {term.name: term.compute(teacher, student, labels) for term in learner.terms}, teacher, student


def test_the_cross_entropy_is_over_the_new_classes_of_real_images(learner):
    views, labels = batch()
    found, _, student = values(learner(), views, labels)
    expected = [-student.logits[i, OLD:].log_softmax(0)[labels.classes[i] - OLD] for i in range(6)]
    assert found["lce"].item() == pytest.approx(sum(expected).item() / 6, rel=1e-5)


def test_the_heads_cross_entropy_is_balanced_and_reaches_the_head_alone(learner):
    it = learner(hce=1, lce=0)
    views, labels = batch()
    found, _, student = values(it, views, labels)
    losses = F.cross_entropy(student.logits, labels.classes, reduction="none")
    weights = torch.tensor([NEW / 6 if k >= OLD else OLD / 4 for k in labels.classes])
    assert found["hce"].item() == pytest.approx(((losses * weights).sum() / weights.sum()).item(), rel=1e-5)
    found["hce"].backward()
    trained = {name for name, p in it.network.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"4.weight", "4.bias"}
    assert not it.network.model[4].weight.grad[SEEN:].any()  # unseen classes


def test_the_features_are_distilled_through_the_old_head(learner):
    it = learner(fkd=1)
    views, labels = batch()
    found, teacher, student = values(it, views, labels)
    weight = it.teacher.model[4].weight[:OLD]
    expected = (((student.embed - teacher.embed) @ weight.T) ** 2).mean()
    assert found["fkd"].item() == pytest.approx(expected.item(), rel=1e-4)
    found["fkd"].backward()
    assert it.network.model[0][0].weight.grad.any() and it.network.model[4].weight.grad is None


def test_old_logits_are_kept_on_synthetic_images_and_by_lwf_on_all(learner):
    it = learner(hkd=1, kd=1, T=2)
    views, labels = batch()
    found, teacher, student = values(it, views, labels)
    assert found["hkd"].item() == pytest.approx((student.logits[6:, :OLD] - teacher.logits[6:]).abs().mean().item())
    divergence = criterions.distillation(student.logits[:, :OLD], teacher.logits, 2.0)
    assert found["kd"].item() == pytest.approx(divergence.item())


def test_the_angles_are_those_of_all_triples_of_mapped_embeddings(learner):
    it = learner(rkd=1)
    views, labels = batch()
    found, teacher, student = values(it, views, labels)
    of_student, of_teacher = it.modules["maps"]
    pair = of_student(student.embed[:6]), of_teacher(teacher.embed[:6])
    assert pair[0].shape == (6, 2 * 16)
    total = 0.0
    for i, j, k in itertools.product(range(6), repeat=3):
        cosines = []
        for rows_ in pair:
            a, b = rows_[i] - rows_[j], rows_[k] - rows_[j]
            norms = a.norm() * b.norm()
            cosines.append((a @ b / norms).item() if norms > 0 else 0.0)
        total += abs(cosines[0] - cosines[1])
    assert found["rkd"].item() == pytest.approx(total / 6**3, rel=1e-4)
    assert {"maps"} < set(it.parts()) and "real" in it.parts()


@pytest.mark.parametrize("separate", ["apart", "together"])
def test_triplets_are_formed_among_real_and_synthetic_images_apart_or_together(separate, learner, monkeypatch):
    it = learner(striplet=1, separate=separate, striplet_sampling="uniform", lce=0)
    groups = []
    monkeypatch.setattr(
        relation,
        "relation_loss",
        lambda layers, labels, space, *more, **options: (
            groups.append((layers[0], labels, space)) or labels.sum().float()
        ),
    )
    views, labels = batch()
    found, teacher, student = values(it, views, labels)
    sizes = [len(group[1]) for group in groups]
    assert sizes == ([10] if separate == "together" else [6, 4])
    assert torch.equal(torch.cat([group[1] for group in groups]), labels.classes)
    assert torch.equal(torch.cat([group[0] for group in groups]), student.embed)
    assert torch.equal(torch.cat([group[2] for group in groups]), teacher.embed)
    assert found["striplet"] == sum(group[1].sum() for group in groups) / len(groups)


def test_the_scales_are_those_of_the_papers():
    assert scale_factors("off", 50, 10) == (1, 1) and scale_factors("share", 6, 2) == (0.25, 1)
    alpha, beta = math.log2(10 / 2 + 1), math.sqrt(50 / 10)
    assert scale_factors("adaptive", 50, 10) == pytest.approx(((1 + 1 / alpha) / beta, alpha * beta))


def test_labels_of_synthetic_images_are_the_old_networks_predictions(learner, monkeypatch):
    it = learner(lce=1, hkd=1)
    taken = parts.count_calls(monkeypatch, it, "_lce")
    it.terms = [term._replace(compute=it._lce) if term.name == "lce" else term for term in it.terms]
    images = torch.rand(4, *parts.SHAPE)
    it.step(Batch(images, torch.zeros(4, dtype=torch.long)))
    labels = taken[0][0][2]
    assert torch.equal(labels.classes[6:], it.teacher(images).argmax(1)) and labels.real == 6
    assert set(labels.classes[:6].tolist()) <= set(range(OLD, SEEN))


def test_passes_apart_give_each_half_its_own_batch_statistics(learner):
    it = learner(passes="apart")
    views, labels = batch()
    it.network.train()
    found = it._features(views, labels.real)
    apart = torch.cat([it.network.features(views[:6]).embed, it.network.features(views[6:]).embed])
    assert torch.allclose(found.embed, apart, atol=1e-5)
    together = it.network.features(views).embed
    assert not torch.allclose(found.embed, together, atol=1e-3)


def test_the_last_steps_train_the_head_alone(learner):
    it = learner(hce=1, hkd=1, rkd=1, head_share=0.2)
    images = torch.rand(4, *parts.SHAPE)
    for _ in range(8):  # of ten; what the source needed before them does not count
        assert set(it.step(Batch(images), progress=0.9)) == {"lce", "hkd", "rkd"}
    before = parts.snapshot(it.network.model)
    assert set(it.step(Batch(images), progress=0.0)) == {"hce", "hkd"}
    assert parts.changed(before, it.network.model) == {"0.4.weight", "0.4.bias"}


def test_either_phase_has_a_step_where_the_head_is_trained_alone_at_the_end(learner):
    assert learner(hce=1, head_share=0.01).head_steps == 1
    with pytest.raises(InputError, match="a task of 10 student steps leaves none before"):
        learner(hce=1, head_share=0.99)


def test_few_classes_have_as_many_images_each_as_there_are():
    torch.manual_seed(0)
    labels = torch.randint(20, (200,))
    chosen = of_few_classes(labels, 20, few=5, count=40)
    counts = labels[chosen].bincount()
    assert len(set(chosen.tolist())) == 40 and sorted(counts[counts > 0].tolist()) >= [1] and (counts == 8).sum() >= 3
    absent = torch.tensor([0] * 6 + [7] * 6)
    assert sorted(absent[of_few_classes(absent, 10, few=2, count=8)].tolist()) == [0] * 4 + [7] * 4
    assert (
        len(of_few_classes(torch.zeros(8, dtype=torch.long), 10, few=3, count=8)) == 8
    )  # one class, made up by others
    assert candidates(32, 90, 16) == 32 * 6 and candidates(32, 4, 16) == 32 and candidates(32, 4, 0) == 32


def test_few_classes_in_a_batch_of_the_learner(learner):
    it = learner(classes_per_batch=1)
    it.step(Batch(torch.rand(candidates(4, OLD, 1), *parts.SHAPE)))
    assert it.real.state_dict()["drawn"] == candidates(6, NEW, 1) == 12


def test_lwf_uses_the_images_of_the_task_alone():
    teacher, student = parts.network(classes=8).freeze().restricted_to(range(OLD)), parts.network(classes=8)
    it = DistilledTask(student.restricted_to(range(SEEN)), teacher, CropFlip(0, False), given(kd=1), 10)
    assert set(it.step(Batch(torch.rand(6, *parts.SHAPE), OLD + torch.arange(6) % NEW))) == {"lce", "kd"}
    with pytest.raises(InputError, match="has no term; give a weight to one, such as --lce 1"):
        DistilledTask(student.restricted_to(range(SEEN)), teacher, CropFlip(0, False), given(lce=0.0), 10)


def test_fetril_translates_features_of_the_most_similar_new_class():
    torch.manual_seed(0)
    network = parts.network(classes=8).restricted_to(range(4))
    means = torch.zeros(4, 16)
    means[0, 0], means[1, 1], means[2, 0], means[3, 1] = 1, 2, 3, 4  # classes 0 and 2 are alike, and 1 and 3
    it = TranslatedTask(network, means, 2, IncrementalConfig(), 10)
    embed, labels = torch.rand(8, 16), torch.tensor([2, 3] * 4)
    old, moved = it.translated(embed, labels)
    for k, feature in zip(old.tolist(), moved):
        sources = [embed[i] + means[k] - means[labels[i]] for i in range(8) if labels[i] == k + 2]
        assert any(torch.allclose(feature, source) for source in sources)
    before = parts.snapshot(network.model)
    it.step(Batch(torch.rand(8, *parts.SHAPE), labels))
    assert parts.changed(before, network.model) == {"0.4.weight", "0.4.bias"}


def test_class_means_are_means_of_embeddings():
    network, split = parts.network(classes=8), real_split(10)
    means = class_means(network, split, batch_size=4)
    embed = network.eval().features(split.images.float() / 255).embed
    assert torch.allclose(means[OLD], embed[split.labels == OLD].mean(0), atol=1e-6) and not means[0].any()


def test_a_network_without_a_linear_head_is_refused_for_what_needs_it(learner):
    network = parts.network(classes=8)
    network.tap.head = None
    with pytest.raises(InputError, match="has no linear layer as its head"):
        network.classify(torch.rand(2, 16))


# Whole runs.

TINY = (
    *("--threads", 1, "--dataset", "digits", "--crop_padding", 1, "--model", nets.name("tiny")),
    *("--init_cls", 4, "--increment", 3, "--epochs", 2, "--ep_steps", 4, "--kd_steps", 2, "--batch_size", 24),
)
SYNTHESIS = ("--replay_batch_size", 12, "--g_steps", 3, "--synthesis_batch_size", 16, "--ngf", 4, "--nz", 16)
REPLAYING = ("abd", "abd_inversion", "rdfcil", "rgal")


def incremental(method, tag, *words):
    """Call datafree_incremental.py on a tiny budget -> the folder of the run."""
    own = SYNTHESIS if method in REPLAYING else ()
    call(datafree_incremental, "--method", method, "--log_tag", tag, *TINY, *own, *words)
    return next(Path("runs").resolve().glob(f"*/{tag}"), None)


@pytest.fixture
def learn(tmp_path, monkeypatch):
    """:func:`incremental` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words, method="rgal", tag="run": incremental(method, tag, *words)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """method -> the folder of a run without an interruption, made once."""

    @cache
    def run(method):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("straight"))
            return incremental(method, "straight")

    return run


def tasks_of(folder):
    return sorted(path for path in folder.iterdir() if path.name.startswith("task_"))


def results_of(folder):
    return json.loads((folder / "matrix.json").read_text())


def assert_same_incremental(one, other):
    for first, second in zip(tasks_of(one), tasks_of(other), strict=True):
        a, b = checkpoint_of(first), checkpoint_of(second)
        assert all(same(a[part], b[part]) for part in a) and rows(first) == rows(second)
    assert rows(one) == rows(other)
    first, second = results_of(one), results_of(other)
    assert first == second


@pytest.mark.parametrize("method", ["finetune", "joint", "lwf", "fetril", *REPLAYING])
def test_a_run_of_three_tasks(method, learn):
    folder = learn(method=method)
    found, summary = results_of(folder), json.loads((folder / "summary.json").read_text())
    assert [path.name for path in tasks_of(folder)] == ["task_00", "task_01", "task_02"]
    assert [len(row) for row in found["accuracy"]] == [1, 2, 3] and found["finished"] == 3
    assert found["class_order"] == np.random.RandomState(1993).permutation(10).tolist()
    assert found["classes"] == [str(k) for k in found["class_order"]] and sum(found["test_images"]) == 355
    assert found["tasks"] == [found["class_order"][:4], found["class_order"][4:7], found["class_order"][7:]]
    assert summary["last_acc1"] == found["acc1"] == found["seen"][-1] == rows(folder)[-1]["acc1"]
    assert summary["run"] == f"digits_{method}_nets-tiny" and summary["options"]["init_cls"] == 4
    assert (folder / "matrix.png").exists() and (folder / "checkpoints" / "model_last.pth").exists()
    last = [json.loads((task / "summary.json").read_text())["last_acc1"] for task in tasks_of(folder)]
    assert last == pytest.approx(found["seen"], abs=1e-3)  # the engine's and ours agree
    made = [json.loads((task / "summary.json").read_text())["images"] for task in tasks_of(folder)]
    assert (made[1] > 0) == (method in REPLAYING)
    assert bool(list((folder / "task_01" / "grids").iterdir())) == (method in REPLAYING)  # no training image is drawn
    assert not list((folder / "task_00" / "grids").iterdir())


def test_a_user_defined_source_replays_too(learn):
    folder = learn("--hce", 1, "--replay_batch_size", 12, method=nets.name("Stripes"))
    assert results_of(folder)["finished"] == 3 and set(rows(folder / "task_01")[-1]) >= {"student/lce", "student/hce"}


def test_alarms_and_metrics_of_the_replay_are_logged_for_each_task(learn):
    folder = learn()
    row = rows(folder / "task_02")[-1]
    assert row["images/classes_hit"] <= 7 and {"images/label_entropy", "images/distance_within_class"} <= row.keys()
    assert not any(key.startswith("images/") for key in rows(folder / "task_00")[-1])


def test_a_weak_base_task_is_called_out(learn):
    log = (learn("--base_acc", 99.9, method="finetune") / "log.txt").read_text()
    assert log.count("[Alarm] the first task reaches only") == 1 and "(99.9 % was expected)" in log
    assert (
        "[Alarm] the first task"
        not in (learn("--base_epochs", 12, method="finetune", tag="long") / "log.txt").read_text()
    )


def test_a_weak_base_task_stops_the_run_if_it_is_to(learn):
    with pytest.raises(SystemExit) as end:
        learn("--base_acc", 99.9, "--on_alarm", "stop", method="finetune")
    folder = run_folder()
    assert end.value.code == 3 and results_of(folder)["finished"] == 1
    assert "(--on_alarm stop): the first task reaches only" in (folder / "log.txt").read_text()
    again = learn("--base_acc", 99.9, "--on_alarm", "stop", "--resume", "auto", method="finetune")
    assert results_of(again)["finished"] == 3  # of the later tasks


def test_the_base_may_have_epochs_of_its_own_and_replay_may_go_on(learn):
    folder = learn("--base_epochs", 3, "--synthesis_rounds", "", method="abd")
    assert [len(rows(task)) for task in tasks_of(folder)] == [3, 2, 2]
    images = [[row["images"] for row in rows(task)] for task in tasks_of(folder)]
    assert images[0] == [0, 0, 0] and images[1][0] < images[1][1]
    row = rows(folder / "task_01")
    assert "synthesis/bn" in row[0] and "synthesis/bn" in row[1]
    once = rows(learn(method="abd", tag="once") / "task_01")
    assert "synthesis/bn" in once[0] and "synthesis/bn" not in once[1]


def test_a_pool_is_filled_in_extra_epochs_before_the_task(learn):
    folder = learn("--source", "inversion", "--warmup", 1, "--synthesis_rounds", 2, "--balanced_sampling")
    assert [len(rows(task)) for task in tasks_of(folder)] == [2, 3, 3]
    assert [row["images"] for row in rows(folder / "task_02")] == [32, 32, 32]


def test_a_dry_run_prints_the_plan_of_each_task_and_writes_nothing(learn, capsys, tmp_path):
    learn("--dry_run")
    printed = capsys.readouterr().out
    assert printed.count("Plan: task") == 3 and "no image of an earlier task is opened or kept" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_states_what_is_known_of_the_images_once(learn, capsys, tmp_path):
    words = folder_data(tmp_path / "data")
    card = tmp_path / "data" / "mine" / "card.yaml"
    replace(DatasetCard.from_yaml(card), classes=()).to_yaml(card)
    learn(*words, "--dry_run")
    printed = capsys.readouterr().out
    assert printed.count("Plan: task") == 2
    for split in ("train", "test"):
        assert (
            printed.count(f"The classes of {tmp_path / 'data' / 'mine' / split} are in the order of their names") == 1
        )


def test_without_a_test_set_there_is_no_matrix(learn):
    folder = learn("--eval", "none", method="finetune")
    assert results_of(folder)["accuracy"] == [] and results_of(folder)["finished"] == 3
    assert json.loads((folder / "summary.json").read_text())["last_acc1"] is None


# Resuming.

STEPS = 8  # of a task


@pytest.mark.parametrize(
    "method, step, act",
    mostly_slow(
        [
            ("rgal", 3, kill),
            ("rgal", STEPS + 2, kill),
            ("rgal", STEPS + 7, terminate),
            ("rdfcil", 2 * STEPS + 6, kill),
            ("fetril", STEPS + 6, terminate),
        ],
        [("rgal", STEPS + 7, terminate), ("rdfcil", 2 * STEPS + 6, kill)],
    ),
)
def test_a_stopped_task_goes_on_exactly(method, step, act, learn, straight, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", step, act)
        with stopped(act):
            learn(method=method, tag="stopped")
    resumed = learn("--resume", "auto", method=method, tag="stopped")
    assert_same_incremental(straight(method), resumed)


def test_a_signal_while_a_task_is_closed_ends_the_run_before_the_next(learn, straight, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Engine, "_save_epoch", 5, terminate)  # the last epoch of the second task, with its warm-up
        with stopped(terminate):
            learn(tag="stopped")
    folder = next(Path("runs").glob("*/stopped"))
    assert results_of(folder)["finished"] == 2 and len(tasks_of(folder)) == 2
    assert_same_incremental(straight("rgal"), learn("--resume", "auto", tag="stopped"))


def test_an_alarm_of_a_tasks_last_epoch_stops_the_run_if_it_is_to(learn, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", STEPS // 2 + 1, kill)  # so that the first task, which is weak, is finished
        with stopped(kill):
            learn("--epochs", 1)
        patch.setattr(Watch, "__call__", lambda self: ({}, ["all images are alike"]))
        with pytest.raises(SystemExit) as end:
            learn("--epochs", 1, "--on_alarm", "stop", "--resume", "auto")
    assert end.value.code == 3 and results_of(run_folder())["finished"] == 2
    assert results_of(learn("--epochs", 1, "--resume", "auto"))["finished"] == 3


@pytest.mark.parametrize("method, number", [("rgal", 1), ("rgal", 3), ("fetril", 1), ("fetril", 2)])
def test_a_run_killed_at_a_tasks_boundary_goes_on_exactly(method, number, learn, straight, monkeypatch):
    """Before a task's results are written, its training is complete; afterwards it is not looked at again."""
    with monkeypatch.context() as patch:
        at_call(patch, IncrementalRun, "finish", number, kill)
        with stopped(kill):
            learn(method=method, tag="stopped")
    assert_same_incremental(straight(method), learn("--resume", "auto", method=method, tag="stopped"))


def test_finished_tasks_are_neither_repeated_nor_are_their_images_opened(learn, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", 2 * STEPS + 1, kill)
        with stopped(kill):
            learn()
    steps = parts.count_calls(monkeypatch, Learner, "step")
    before = [
        path.stat().st_mtime_ns
        for task in ("task_00", "task_01")
        for path in sorted((run_folder() / task).rglob("*"))
        if path.is_file()
    ]
    folder = learn("--resume", "auto")
    after = [
        path.stat().st_mtime_ns
        for task in ("task_00", "task_01")
        for path in sorted((folder / task).rglob("*"))
        if path.is_file()
    ]
    assert len(steps) == STEPS and before == after
    assert "2 of 3 tasks are finished and not repeated" in (folder / "log.txt").read_text()
    steps.clear()
    learn("--resume", "auto")
    assert not steps


def run_folder():
    return next(Path("runs").glob("*/run"))


DAMAGES = {
    "no JSON": lambda found: "{",
    "a list": lambda found: "[1]",
    "no finished": lambda found: {key: value for key, value in found.items() if key != "finished"},
    "options as text": lambda found: {**found, "options": "none"},
    "finished as text": lambda found: {**found, "finished": "2"},
    "more tasks than there are": lambda found: {**found, "finished": 4},
    "accuracy as a number": lambda found: {**found, "accuracy": 5},
    "accuracies as text": lambda found: {**found, "accuracy": [["90"], ["1", "2"]]},
    "rows of other lengths": lambda found: {**found, "accuracy": [[90.0, 1.0], [80.0]]},
    "more rows than tasks": lambda found: {**found, "accuracy": [[1.0], [1.0, 2.0], [1.0, 2.0, 3.0]]},
    "not in per cent": lambda found: {**found, "accuracy": [[90.0], [80.0, float("nan")]]},
}


def test_a_damaged_matrix_is_one_sentence_and_without_it_the_run_goes_on(learn, refused, straight, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", 2 * STEPS + 1, kill)
        with stopped(kill):
            learn(method="finetune")
    path = run_folder() / "matrix.json"
    whole = path.read_text()
    for name, damage in DAMAGES.items():
        damaged = damage(json.loads(whole))
        path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        before = path.read_bytes()
        line = refused(partial(learn, method="finetune"), "--resume", "auto")
        assert "matrix.json is not the matrix of this run (" in line and "remove it" in line, name
        assert path.read_bytes() == before
    path.unlink()
    assert_same_incremental(straight("finetune"), learn("--resume", "auto", method="finetune"))


def test_a_run_with_other_options_is_refused_and_keeps_what_is_there(learn, refused, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", STEPS + 1, kill)
        with stopped(kill):
            learn()
    kept = (run_folder() / "config.yaml").read_text()
    for words, sentence in [
        (("--resume", "auto", "--triplet", 3), "was written with --triplet 1.0, not 3.0"),
        (("--resume", "auto", "--class_seed", 1), "was written with --class_seed 1993, not 1"),
        ((), "already holds a run; give this one a name of its own by --log_tag NEW"),
    ]:
        assert sentence in refused(learn, *words)
        assert (run_folder() / "config.yaml").read_text() == kept
    learn("--resume", "auto")


def test_a_run_killed_in_its_first_task_is_not_overwritten(learn, refused, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", 6, kill)
        with stopped(kill):
            learn()
    kept = (run_folder() / "config.yaml").read_text()
    assert "already holds a run" in refused(learn, "--lr", 0.3)
    assert "was written with --lr 0.1, not 0.3" in refused(learn, "--lr", 0.3, "--resume", "auto")
    assert (run_folder() / "config.yaml").read_text() == kept


def test_a_run_with_other_tasks_is_refused_for_them_and_without_its_matrix_too(learn, refused):
    folder = learn(method="finetune")
    kept = (folder / "config.yaml").read_text()
    other = ("--init_cls", 8, "--increment", 2, "--resume", "auto")
    assert "was written with --init_cls 4, not 8" in refused(partial(learn, method="finetune"), *other)
    (folder / "matrix.json").unlink()
    assert "was written with --init_cls 4, not 8" in refused(partial(learn, method="finetune"), *other)
    assert not (folder / "matrix.json").exists() and (folder / "config.yaml").read_text() == kept


@pytest.mark.parametrize("first, then", [("test", "none"), ("none", "test")])
def test_tasks_are_tested_all_or_none(first, then, learn, refused, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", STEPS + 1, kill)
        with stopped(kill):
            learn("--eval", first, method="finetune")
    line = refused(partial(learn, method="finetune"), "--eval", then, "--resume", "auto")
    assert f"resume with{'out' * (first == 'test')} --eval none" in line and "tested" in line
    assert results_of(learn("--eval", first, "--resume", "auto", method="finetune"))["finished"] == 3


# The base network by its file.


def test_a_base_network_is_taken_from_its_task_and_gives_the_same_later_tasks(learn):
    whole = learn(tag="whole")
    taken = learn("--weights", whole / "task_00", tag="taken")
    assert [path.name for path in tasks_of(taken)] == ["task_01", "task_02"]
    assert results_of(taken)["accuracy"] == results_of(whole)["accuracy"]
    assert same(checkpoint_of(whole / "task_02")["learner"], checkpoint_of(taken / "task_02")["learner"])
    learn("--weights", whole / "task_00", "--resume", "auto", tag="taken")
    means = learn("--weights", whole / "task_00", method="fetril", tag="means")
    assert len(results_of(means)["accuracy"]) == 3


def test_a_base_network_that_does_not_fit_is_refused(learn, refused, tmp_path):
    whole = learn(method="finetune", tag="whole")
    other = refused(lambda: learn("--weights", whole / "task_00", "--class_seed", 3, tag="b"))
    assert "knows the classes" in other and "give its --class_seed or --class_order" in other
    torch.save(nets.tiny(4, 1).state_dict(), tmp_path / "four.pth")
    assert "has 4 classes" in refused(lambda: learn("--weights", tmp_path / "four.pth", tag="c"))
    torch.save(nets.small(10, 1).state_dict(), tmp_path / "small.pth")
    assert "weights of another architecture?" in refused(lambda: learn("--weights", tmp_path / "small.pth", tag="d"))
    assert "there is no" in refused(lambda: learn("--weights", tmp_path / "none.pth", tag="e"))
    assert "has learned 10 classes, not the 4 of the first task" in refused(lambda: learn("--weights", whole, tag="f"))
    more = refused(lambda: learn("--weights", whole / "task_00", "--init_cls", 7, tag="g"))
    assert "has learned 4 classes, not the 7" in more and "give the folder task_00" in more
    assert not list(Path("runs").glob("*/[fg]/matrix.json"))


def test_a_base_network_whose_file_states_nothing_is_taken_at_its_word(learn, tmp_path):
    torch.save(nets.tiny(10, 1).state_dict(), tmp_path / "foreign.pth")
    folder = learn("--weights", tmp_path / "foreign.pth", method="finetune")
    log = "".join(path.read_text() for path in folder.rglob("log.txt"))
    assert "states no order of the classes: its first 4 outputs are taken for" in log
    assert "check --weights and the order of its classes" in log


def test_a_network_of_incremental_learning_is_a_teacher_in_the_cards_order(learn):
    whole, session = learn(method="joint"), Session(parts.options(device="cpu", dataset="digits"), write=False)
    found = session.network("teacher", nets.name("tiny"), whole)
    raw, images = Network.from_file(whole, nets.name("tiny")), torch.rand(5, 1, 16, 16)
    order = results_of(whole)["class_order"]
    assert torch.allclose(found.eval()(images)[:, order], raw.eval()(images), atol=1e-6)
    assert "class_order" not in found.metadata
    assert any("were put in the order of the data card" in note for note in found.notes)
    with pytest.raises(InputError, match="has learned 7 of the 10 classes"):
        session.network("teacher", nets.name("tiny"), whole / "task_01")
    torch.save({"state_dict": raw.model.state_dict(), "seen": 1e9, "class_order": "by name"}, whole / "foreign.pth")
    assert session.network("teacher", nets.name("tiny"), whole / "foreign.pth").metadata["seen"] == 1e9


def test_a_trained_network_is_evaluated_on_the_classes_that_it_knows(learn, capsys):
    whole = learn(method="finetune", tag="whole")
    capsys.readouterr()
    learn("--weights", whole / "task_01", "--evaluate_only", "--init_cls", 10, method="finetune")
    accuracy = float(capsys.readouterr().out.split("Acc@1=")[1].split()[0])
    assert accuracy == pytest.approx(results_of(whole)["seen"][1], abs=1e-3)
    network = Network.from_file(whole, nets.name("tiny"))
    assert network.num_classes == 10 and network.metadata["seen"] == 10 and network.metadata["task"] == 2


# Bad input.


def test_what_cannot_be_learnt_is_refused_in_one_sentence(learn, refused):
    assert "an --increment that divides 8" in refused(learn, "--init_cls", 2, "--increment", 3)
    assert "--resume last.pth: a run of several tasks" in refused(lambda: learn("--resume", "last.pth"), code=2)
    assert "no effect because learner is finetune" in refused(lambda: learn("--striplet", 1, method="finetune"), code=2)
    assert "no effect because learner is lwf" in refused(lambda: learn("--g_steps", 7, method="lwf"), code=2)
    assert "no effect because source is noise" in refused(lambda: learn("--source", "noise"), code=2)
    assert "--lce 0 leaves no term that teaches" in refused(lambda: learn("--lce", 0, method="lwf"), code=2)
    assert "or one to --hce" in refused(lambda: learn("--lce", 0, "--hce", 0), code=2)
    assert "give --increment 2 or more" in refused(learn, "--init_cls", 8, "--increment", 1, "--hce", 0)
    few = refused(learn, "--classes_per_batch", 7)
    assert "--replay_batch_size 12 has fewer than two images for each of 7 classes; lower it to 6" in few


def test_what_a_later_task_cannot_build_is_said_before_the_first_is_trained(learn, refused):
    pool = refused(partial(learn, method="abd_inversion"), "--pool_size", 8)
    assert "raise it to 16" in pool or "16" in pool, pool
    assert not list(Path("runs").glob("*/run"))
    learn("--pool_size", 16, method="abd_inversion")


def test_the_largest_seed(learn):
    assert results_of(learn("--seed", 2**63 - 1, method="finetune"))["finished"] == 3


def folder_data(root, classes=4):
    """A data set in class folders: 16 px, 6 training and 2 test images a class."""
    for split, count in (("train", 6), ("test", 2)):
        for k in range(classes):
            place = root / "mine" / split / f"class{k}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(100 * k + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    card = replace(make_card(classes=classes), name="mine", classes=tuple(f"class{k}" for k in range(classes)))
    card.to_yaml(root / "mine" / "card.yaml")
    return ("--dataset", "mine", "--data_root", root, "--init_cls", 2, "--increment", 2)


LOADER = """
import torch

def load(data_root, split):
    labels = torch.arange(24) % 4
    labels[labels == {absent}] = 0
    return torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8), labels
"""


def test_a_class_without_images_is_named(learn, refused, tmp_path):
    (tmp_path / "files.py").write_text(LOADER.format(absent=3))
    replace(make_card(classes=4), loader=f"{tmp_path}/files.py:load").to_yaml(tmp_path / "card.yaml")
    words = ("--card", tmp_path / "card.yaml", "--init_cls", 2, "--increment", 2)
    line = refused(lambda: learn(*words), before_run=False)  # after the announcement of the card's loader
    assert "test has no training images of 3; add some, or leave" in line
    order = ("--class_order", "0,1,3,2", "--increment", 1, "--learner", "finetune")
    assert "no test image of the classes of task 2 (3)" in refused(lambda: learn(*words, *order, method="finetune"))


def test_fewer_images_than_a_batch_are_drawn_several_times(learn, tmp_path):
    folder = learn(*folder_data(tmp_path / "data"), "--batch_size", 40)
    assert results_of(folder)["finished"] == 2


# Pictures for a page.


def test_replayed_images_are_drawn_beside_real_ones(learn, refused, tmp_path, monkeypatch):
    folder, script = learn("--synthesis_batch_size", 64), ROOT / "scripts" / "incremental_pictures.py"

    def draw(run, picture):
        monkeypatch.setattr(sys, "argv", [script.name, str(run), str(picture)])
        runpy.run_path(str(script), run_name="__main__")

    draw(folder, tmp_path / "beside.png")
    assert 0 < Image.open(tmp_path / "beside.png").size[0] - 12 * (64 + 4) < 126  # the names of the classes
    other = learn(method="finetune", tag="other")
    sentence = refused(draw, other, tmp_path / "none.png")
    assert "keeps no images; name a run of a method that fills a pool" in sentence


def test_grids_and_results_name_the_classes_in_the_order_in_which_they_arrive(learn, tmp_path, monkeypatch):
    headings = []
    blank = Image.new("RGB", (8, 8))
    monkeypatch.setattr("datafree.grids.draw_grid", lambda *given: headings.append(given[2]) or blank)
    words = folder_data(tmp_path / "data")
    folder = learn(*words, "--class_order", "2,0,3,1")
    assert results_of(folder)["classes"] == ["class2", "class0", "class3", "class1"]
    assert set().union(*headings) == {"class2", "class0"}  # the old classes of the only later task
    assert (folder / "task_01" / "grids" / "test.png").is_file()
    (tmp_path / "data" / "mine" / "card.yaml").unlink()
    replace(make_card(), name="mine", num_classes=4).to_yaml(tmp_path / "data" / "mine" / "card.yaml")
    unnamed = learn(*words, "--class_order", "2,0,3,1", tag="unnamed")
    assert results_of(unnamed)["classes"] == ["class2", "class0", "class3", "class1"]


# Exemplars stored: 0.


def test_no_real_image_is_opened_after_the_first_task_has_begun(learn, tmp_path, monkeypatch):
    """All real images are opened before the first task; each task's are in memory until it ends (see below)."""
    words, opened_before = folder_data(tmp_path / "data", classes=6), []
    run = IncrementalRun
    original = run.train_images

    def counted(self, task):
        opened_before.append(len(found))
        return original(self, task)

    monkeypatch.setattr(run, "train_images", counted)
    with files_opened() as found:
        learn(*words)
    training = str(tmp_path / "data" / "mine" / "train")
    assert len(opened_before) == 3 and any(path.startswith(training) for path in found[: opened_before[0]])
    assert not [path for path in found[opened_before[0] :] if path.startswith(training)]


def test_a_resumed_run_opens_no_image_of_a_finished_task(learn, tmp_path, monkeypatch):
    words = folder_data(tmp_path / "data", classes=6)
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", STEPS + 1, kill)
        with stopped(kill):
            learn(*words)
    with files_opened() as found:
        folder = learn(*words, "--resume", "auto")
    old, *later = results_of(folder)["tasks"]
    place = str(tmp_path / "data" / "mine" / "train")
    opened = {path.split("/")[-2] for path in found if path.startswith(place) and path.endswith(".png")}
    assert opened == {f"class{k}" for part in later for k in part} and not opened & {f"class{k}" for k in old}


@pytest.mark.parametrize("method", ["finetune", "rgal", "fetril"])
def test_no_file_of_a_run_holds_a_real_image(method, learn):
    """Every tensor that a run writes is compared with the training images."""
    folder = learn(method=method)
    real = {image.numpy().tobytes() for image in read_digits("train")[0]}
    images = 0

    def walk(value):
        nonlocal images
        if torch.is_tensor(value) and value.dim() == 4 and value.shape[1:] == (1, 16, 16):
            images += len(value)
            bytes_ = value if value.dtype == torch.uint8 else (value * 255).round().clamp(0, 255).byte()
            assert not real & {image.numpy().tobytes() for image in bytes_}
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            walk(part)

    for path in folder.rglob("*.pth"):
        walk(torch.load(path, weights_only=True))
    assert (images > 0) == (method == "rgal")  # of the pool


def test_the_images_of_a_task_are_released_when_it_ends(learn, monkeypatch):
    """While a later task trains, no split in memory has labels of an earlier one, but the test's."""
    run, seen, steps = IncrementalRun, [], []
    loss = ReplayedTask.loss

    def watched(self, *given):
        steps.append(1)
        if len(steps) % 4:  # looking at all objects takes long
            return loss(self, *given)
        gc.collect()
        splits = [o for o in gc.get_objects() if type(o) is TensorSplit]
        seen.append((self.old, [sorted(set(s.labels.tolist())) for s in splits if s.images.data_ptr() not in tests]))
        return loss(self, *given)

    tests = set()
    of_test = run.test_images

    def test_images(self, task):
        split = of_test(self, task)
        tests.update({split.images.data_ptr(), self.session.test.images.data_ptr()})
        return split

    monkeypatch.setattr(ReplayedTask, "loss", watched)
    monkeypatch.setattr(run, "test_images", test_images)
    learn()
    assert len(seen) == 2 * STEPS / 4
    for old, labels in seen:
        assert labels and all(min(part) >= old for part in labels), (old, labels)


def test_replay_has_the_class_slice_everywhere(learn, monkeypatch):
    """Teacher, balance, student's logits: none of a class that was not seen yet."""
    shapes = set()
    original = OptimisedSynthesis.__init__

    def init(self, teacher, student, *more, **options):
        shapes.add((teacher.num_classes, student.num_classes))
        original(self, teacher, student, *more, **options)

    monkeypatch.setattr(OptimisedSynthesis, "__init__", init)
    learn("--adv", 1, "--balance", 1)
    assert shapes == {(4, 4), (7, 7)}


def test_the_defaults_that_differ_from_the_shared_sections():
    ours = IncrementalConfig()
    assert ours.relation.triplet_target == "teacher" and ours.relation.start_layer == -1
    assert ours.schedule.warmup_is_extra and not config.DistillConfig().schedule.warmup_is_extra
