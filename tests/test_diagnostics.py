"""Metrics of images in cases worked out by hand, and warnings that are given only when they should be."""

import math
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import rows
from test_engine import Pupil
from torch import nn

from datafree.config import DistillConfig, Relation, Run, sections
from datafree.diagnostics import Watch, alarms, describe
from datafree.engine import Engine
from datafree.logger import RunFolder
from datafree.network import Network
from datafree.plan import check_teacher
from datafree.schedule import Schedule
from datafree.synthesis import CONTROL
from datafree.synthesis.base import BaseSynthesis


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def linear(rows):
    """A network whose embedding is the image, a row of pixels, and whose logits are ``rows`` times it."""
    rows = torch.tensor(rows, dtype=torch.float32)
    layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
    layer.weight.data = rows
    return Network(nn.Sequential(nn.Flatten(), layer), (1, 1, rows.shape[1]), (0.0,), (1.0,))


def as_images(rows):
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), 1, 1, -1)


TEACHER = [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
SWAPPED = [[10, 0, 0], [0, 0, 10], [0, 10, 0]]  # predicts 2 for class 1 and 1 for class 2
ROWS = [[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]]  # the teacher predicts 0 0 1 2
TARGETS = torch.tensor([0, 1, 1, 2])


def test_metrics_of_a_case_worked_out_by_hand():
    numbers = describe(as_images(ROWS), TARGETS, linear(TEACHER).freeze(), linear(SWAPPED))
    root2, slant = math.sqrt(2), math.sqrt(0.8)  # from (0.8, 0.6, 0) to (0, 1, 0)
    apart = [math.sqrt(0.4), root2, root2, slant, root2, root2]
    confidence = [1 / (1 + 2 * math.exp(-10)), 1 / (1 + math.exp(-2) + math.exp(-8))]
    assert numbers == pytest.approx(
        {
            "label_entropy": 1.5 * math.log(2) / math.log(3),
            "classes_hit": 3,
            "teacher_confidence": (3 * confidence[0] + confidence[1]) / 4,
            "student_agreement": 0.5,
            "target_agreement": 0.75,
            "distance_within_class": math.sqrt(0.4),
            "distance_to_other_class": (2 * root2 + 2 * slant) / 4,
            "anchors_with_positive": 0.5,
            "anchors_with_negative_in_band": 0.5,  # the two ends of the slant, which is within 0.5 and 1
            "effective_candidates": (2 + 1 + 1 + 3) / 4,  # an empty band leaves all of the other classes
            "pixel_distance": sum(apart) / 6 / math.sqrt(3),
            "near_duplicates": 0.0,
        },
        rel=1e-5,
    )
    assert all(isinstance(value, (int, float)) for value in numbers.values())


def test_without_targets_there_is_no_agreement_with_them():
    numbers = describe(as_images(ROWS), None, linear(TEACHER).freeze(), linear(SWAPPED))
    assert "target_agreement" not in numbers and not alarms(numbers, numbers)


def test_the_band_is_measured_in_the_space_of_negative_sampling():
    rows = (torch.rand(40, 6) + 0.5).numpy()
    weights = torch.randn(5, 6).numpy()
    weights -= weights.mean(1, keepdims=True)  # what all rows share has no influence on the class
    teacher = linear(weights).freeze()
    labels = (rows @ weights.T).argmax(1)
    for space, vectors in (("embedding", rows), ("logits", rows @ weights.T)):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        r = np.linalg.norm(unit[:, None] - unit[None], axis=2)
        other = labels[:, None] != labels[None]
        oracle = (other & (r > 0.5) & (r < 1.0)).any(1).mean()
        found = describe(as_images(rows), None, teacher, teacher, Relation(sampling_space=space))
        assert found["anchors_with_negative_in_band"] == pytest.approx(oracle, abs=1e-6)
        assert 0 < oracle < 1


@pytest.mark.parametrize(
    "rows",
    [[[1, 0, 0]], [[1, 0, 0]] * 5, [[0, 0, 0]] * 3, [[1, 0, 0], [0, 1, 0]]],
    ids=["one image", "one class", "black images", "two images"],
)
def test_metrics_of_few_or_equal_images_are_finite(rows):
    targets = torch.zeros(len(rows), dtype=torch.long)
    numbers = describe(as_images(rows), targets, linear(TEACHER), linear(TEACHER))
    assert all(math.isfinite(value) for value in numbers.values()), numbers


def test_one_image_causes_no_warning():
    numbers = describe(as_images([[1, 0, 0]]), torch.tensor([0]), linear(TEACHER), linear(TEACHER))
    assert alarms(numbers, numbers) == []


def test_near_duplicates_are_distinguished_from_similar_images():
    images = torch.rand(40, 3, 64, 64)
    step = torch.randn(3, 64, 64)
    step /= step.square().mean().sqrt()
    images[1] = images[0]  # equal
    images[3] = images[2] + 0.01 * step
    images[5] = images[4] + 0.03 * step  # too different
    network = Network(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), (3, 64, 64), (0.0,) * 3, (1.0,) * 3
    )
    numbers = describe(images, None, network, network)
    assert numbers["near_duplicates"] == pytest.approx(4 / 40)
    oracle = torch.pdist(images.flatten(1).double()).mean().item() / math.sqrt(3 * 64 * 64)
    assert numbers["pixel_distance"] == pytest.approx(oracle, rel=1e-3)


def test_describing_leaves_the_student_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))
    student = Network(model, (1, 4, 4), (0.0,), (1.0,)).train()
    teacher = Network(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), (1, 4, 4), (0.0,), (1.0,)).freeze()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    describe(torch.rand(8, 1, 4, 4), None, teacher, student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.training and model[1].training and all(p.requires_grad for p in student.parameters())


# ---------------------------------------------------------------- warnings

HEALTHY = {
    "label_entropy": 0.95,
    "classes_hit": 10,
    "teacher_confidence": 0.9,
    "student_agreement": 0.6,
    "target_agreement": 0.9,
    "distance_within_class": 0.4,
    "distance_to_other_class": 0.7,
    "anchors_with_positive": 1.0,
    "anchors_with_negative_in_band": 0.9,
    "pixel_distance": 0.25,
    "near_duplicates": 0.0,
}


@pytest.mark.parametrize(
    "now",
    [
        {},
        {"pixel_distance": 0.15},
        {"near_duplicates": 0.1},
        {"student_agreement": 0.2},
        {"target_agreement": 0.35},
        {"label_entropy": 0.6},
        {"classes_hit": 2, "student_agreement": 0.7},
        {"classes_hit": 100, "student_agreement": 0.03},
        {"classes_hit": 1, "student_agreement": 0.0},
    ],
    ids=str,
)
def test_a_healthy_run_causes_no_warning(now):
    assert alarms({**HEALTHY, **now}, HEALTHY) == []


@pytest.mark.parametrize(
    "now, seen, option",
    [
        ({"label_entropy": 0.3}, "entropy 0.30 of 1", "--oh"),
        ({"target_agreement": 0.12}, "12% of the target classes", "--g_steps"),
        ({"pixel_distance": 0.1}, "0.100 after 0.250", "--adv"),
        ({"near_duplicates": 0.4}, "40% of the images are near-duplicates", "--lr_g"),
        ({"student_agreement": 0.11}, "11% of the new images", "--lr"),
        ({"classes_hit": 2, "student_agreement": 0.52}, "52% of the new images", "--adv"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_each_trouble_causes_its_own_warning(now, seen, option):
    (warning,) = alarms({**HEALTHY, **now}, HEALTHY)
    assert seen in warning and option in warning


@pytest.mark.parametrize("metric", ["label_entropy", "target_agreement", "student_agreement"])
def test_the_adversarial_term_is_blamed_only_where_it_has_a_weight(metric):
    now = {metric: 0.11}
    (warning,) = alarms({**HEALTHY, **now}, HEALTHY)
    assert "--adv" in warning
    (warning,) = alarms({**HEALTHY, **now}, HEALTHY, adversarial=False)
    assert "--adv" not in warning and re.search(r"(check --lr|lower --lr_g, or raise --oh or --g_steps)$", warning)


def test_the_classes_are_balanced_where_the_images_have_no_targets():
    without = {name: value for name, value in HEALTHY.items() if name != "target_agreement"}
    (warning,) = alarms({**without, "label_entropy": 0.3}, without)
    assert warning.endswith("; raise --balance")


def test_no_alarm_advises_triplets_which_were_not_seen_to_help():
    worst = {**HEALTHY, "label_entropy": 0, "target_agreement": 0, "pixel_distance": 0, "near_duplicates": 1}
    assert "triplet" not in " ".join(alarms({**worst, "student_agreement": 0}, HEALTHY))


def test_weak_agreement_with_the_targets_causes_a_warning_from_the_first_epoch_until_it_grows():
    first = {**HEALTHY, "target_agreement": 0.2}
    assert len(alarms(first, first)) == 1
    assert alarms({**HEALTHY, "target_agreement": 0.25}, first) == []


def test_warnings_name_options_that_exist():
    worst = {
        **HEALTHY,
        "label_entropy": 0,
        "target_agreement": 0,
        "pixel_distance": 0,
        "near_duplicates": 1,
        "student_agreement": 0,
    }
    found = alarms(worst, HEALTHY)
    options = {field.name for section in sections(DistillConfig).values() for field in fields(section)}
    named = set(re.findall(r"--(\w+)", " ".join(found)))
    assert len(found) == 5 and named and named <= options


def test_collapsed_images_cause_the_warnings_and_good_ones_do_not():
    teacher, student = linear(TEACHER).freeze(), linear(SWAPPED)
    targets = torch.arange(30) % 3
    good = as_images((torch.eye(3)[targets] + 0.3 * torch.rand(30, 3)).numpy())
    numbers = describe(good, targets, teacher, teacher)
    assert alarms(numbers, numbers) == []
    collapsed = good[:1].expand(30, -1, -1, -1)
    found = " ".join(alarms(describe(collapsed, targets, teacher, student), numbers))
    assert all(words in found for words in ("few classes", "half as diverse", "near-duplicates"))


class Source(BaseSynthesis):
    """Images that fade towards grey from one epoch to the next."""

    def __init__(self):
        self.strength = 1 / 0.6

    def latest(self):
        self.strength *= 0.6
        return self.strength * as_images(ROWS), TARGETS


class Control(Source):
    """The same images, as those of a control."""

    traits = CONTROL


# Each alarm, provoked in a run by what its images are: (images of epoch 0, of the later ones), targets, student, words.

EACH = torch.arange(30) % 3
GOOD = as_images((torch.eye(3)[EACH] + 0.8 * torch.rand(30, 3, generator=torch.Generator().manual_seed(1))).numpy())
ONE_CLASS = as_images((torch.eye(3)[[0] * 30] + 0.6 * torch.rand(30, 3)).numpy())
TROUBLES = {
    "few classes": ((ONE_CLASS, ONE_CLASS), torch.zeros(30, dtype=torch.long), TEACHER, "sees few classes"),
    "other targets": ((GOOD, GOOD), (EACH + 1) % 3, TEACHER, "agrees with only 0% of the target classes"),
    "fading": ((GOOD, 0.45 * GOOD), EACH, TEACHER, "half as diverse as in the first epoch"),
    "copies": ((GOOD[EACH], GOOD[EACH]), EACH, TEACHER, "100% of the images are near-duplicates"),
    "a student at chance": ((GOOD, GOOD), EACH, [TEACHER[1], TEACHER[2], TEACHER[0]], "the student agrees with the"),
}


class Given(BaseSynthesis):
    """A source whose latest images are given, for its first round and for the later ones."""

    def __init__(self, first, later, targets):
        super().__init__()
        self.images, self.targets, self.rounds = (first, later), targets, 0

    def synthesize(self):
        self.rounds += 1

    def sample(self, n):
        return torch.rand(n, 1, 8, 8), None

    def latest(self):
        return self.images[self.rounds > 1], self.targets

    def state_dict(self):
        return {**super().state_dict(), "rounds": self.rounds}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.rounds = state["rounds"]


@pytest.fixture
def watched(tmp_path):
    """An engine with a source of these images, a watch, and this --on_alarm."""

    def make(trouble, on_alarm, resume=False):
        images, targets, student, _ = TROUBLES[trouble]
        source, teacher = Given(*images, targets), linear(TEACHER).freeze()
        watch = Watch(source, teacher, linear(student), Relation())
        folder = RunFolder(tmp_path / "run", "run", resume)
        return Engine(Pupil([]), source, Schedule(3, 1, 1, 4), folder, Run(on_alarm=on_alarm), monitor=watch)

    return make


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_alarm_stops_the_run_if_it_is_to_and_the_run_goes_on_from_there(trouble, watched, tmp_path):
    log, epoch = tmp_path / "run" / "log.txt", 2 if trouble == "fading" else 1
    engine = watched(trouble, "stop")
    with engine.folder, pytest.raises(SystemExit) as end:
        engine.train()
    lines = log.read_text().splitlines()
    assert end.value.code == 3 and engine.position["epoch"] == epoch
    assert sum("[Alarm]" in line for line in lines) == 1 and TROUBLES[trouble][-1] in lines[-2]
    assert "Stopped by an alarm (--on_alarm stop): " in lines[-1] and TROUBLES[trouble][-1] in lines[-1]
    engine = watched(trouble, "warn", resume=True)
    with engine.folder:
        engine.load(tmp_path / "run" / "checkpoints" / "last.pth")
        engine.train()
    assert engine.position["epoch"] == 3 and log.read_text().count("[Alarm]") == 4 - epoch
    assert log.read_text().count("Stopped by an alarm") == 1


def test_an_alarm_of_the_last_epoch_stops_nothing(watched, tmp_path):
    engine = watched("copies", "stop")
    engine.schedule = Schedule(1, 1, 1, 4)
    with engine.folder:
        engine.train()
    assert "[Alarm]" in (tmp_path / "run" / "log.txt").read_text()


def test_a_weak_teacher_stops_a_run_before_its_training_if_it_is_to(distil, tmp_path):
    with pytest.raises(SystemExit) as end:
        distil("--teacher_acc", 100, "--on_alarm", "stop")
    [folder] = (tmp_path / "runs").glob("*/run")
    log = (folder / "log.txt").read_text()
    assert (
        end.value.code == 3
        and "(--on_alarm stop): the teacher reaches only" in log
        and not list(folder.glob("*.jsonl"))
    )
    assert len(rows(distil("--teacher_acc", 100, "--epochs", 1, "--resume", "auto"))) == 1


def test_watch_compares_with_the_first_epoch():
    teacher = linear(TEACHER).freeze()
    watch = Watch(Source(), teacher, teacher, Relation())
    epochs = [watch() for _ in range(3)]
    first = epochs[0][0]["pixel_distance"]
    distances = [numbers["pixel_distance"] for numbers, _ in epochs]
    assert distances == pytest.approx([first, 0.6 * first, 0.36 * first], rel=1e-4)
    assert [len(found) for _, found in epochs] == [0, 0, 1] and "half as diverse" in epochs[2][1][0]


def test_a_resumed_run_is_compared_with_the_first_epoch_of_all():
    teacher = linear(TEACHER).freeze()
    source = Source()
    watch, resumed = (Watch(source, teacher, teacher, Relation()) for _ in range(2))
    assert resumed.state_dict() == {"first": None}
    watch()
    resumed.load_state_dict(watch.state_dict())
    found = [resumed()[1] for _ in range(2)]
    assert not found[0] and "half as diverse" in found[1][0]


def test_a_control_is_described_but_causes_no_warning():
    teacher = linear(TEACHER).freeze()
    watch = Watch(Control(), teacher, teacher, Relation())
    epochs = [watch() for _ in range(3)]
    assert all(numbers["pixel_distance"] > 0 and not found for numbers, found in epochs)


@pytest.mark.parametrize(
    "triplets, space",
    [
        (Relation(triplet=1.0, sampling_space="logits"), "logits"),
        (Relation(striplet=1.0, sampling_space="logits"), "logits"),
        (Relation(triplet=1.0, sampling_space="embedding"), "embedding"),
        (Relation(sampling_space="logits"), "embedding"),  # no triplet loss samples there
    ],
    ids=["synthesis", "student", "embedding", "no triplets"],
)
def test_watch_measures_the_band_in_the_space_of_the_triplets(triplets, space):
    weights = torch.randn(5, 6)
    teacher = linear((weights - weights.mean(1, keepdim=True)).tolist()).freeze()
    images = as_images((torch.rand(40, 6) + 0.5).tolist())
    source = Control()
    source.latest = lambda: (images, None)
    numbers, _ = Watch(source, teacher, teacher, triplets)()
    other = {"embedding": "logits", "logits": "embedding"}[space]
    assert numbers == describe(images, None, teacher, teacher, Relation(sampling_space=space))
    assert numbers != describe(images, None, teacher, teacher, Relation(sampling_space=other))


@pytest.mark.parametrize(
    "accuracy, expected, classes, reason",
    [
        (99.0, 0, 2, None),
        (99.0, 99.5, 2, None),
        (66.0, 0, 3, None),
        (56.0, 0, 2, None),
        (54.0, 0, 2, "chance is 50.00 %"),
        (16.67, 0, 12, "chance is 8.33 %"),
        (92.0, 95, 10, "95 % was expected"),
        (12.0, 10, 10, "chance is 10.00 %"),
        (94.1, 95, 10, None),
        (70.0, 0, 1000, None),
        (0.1, 0, 1000, "chance is 0.10 %"),
    ],
)
def test_a_weak_teacher_is_told_by_what_is_expected_or_by_chance(accuracy, expected, classes, reason):
    warnings = check_teacher(accuracy, expected, classes)
    assert len(warnings) == bool(reason)
    if reason:
        assert reason in warnings[0] and "order of the classes" in warnings[0] and "--teacher_mean" in warnings[0]
