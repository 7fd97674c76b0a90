"""datafree.distill: the program for networks and cards as objects."""

import signal

import nets
import numpy as np
import pytest
import torch
from torch import nn

import datafree
from datafree.datasets.cards import CARDS, DatasetCard
from datafree.errors import InputError
from datafree.learners.distill import DistillLearner

CARD = {"name": "mine", "channels": 1, "height": 16, "width": 16, "num_classes": 10, "mean": [0.3], "std": (0.3,)}
STEPS = {"epochs": 2, "ep_steps": 4, "kd_steps": 2, "g_steps": 2, "batch_size": 16}
TINY = {**STEPS, "synthesis_batch_size": 16, "nz": 8, "ngf": 4, "threads": 1}


@pytest.fixture
def pair(tmp_path, monkeypatch, teacher):
    """A trained teacher and a new student; runs go into an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    trained, student = nets.tiny(10, 1).eval(), nets.small(10, 1)
    trained.load_state_dict(torch.load(teacher, weights_only=True)["state_dict"])
    return trained, student


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_copy_of_the_student_is_trained_without_any_file_and_nothing_else_changes(pair):
    teacher, student = pair
    before, random = [state(teacher), state(student)], torch.get_rng_state()
    result = datafree.distill(teacher, student, CARD, **TINY)
    assert equal(state(teacher), before[0]) and equal(state(student), before[1])
    assert student.training and all(p.requires_grad for module in pair for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not equal(state(result.student.model), before[1]) and not result.student.training
    assert result.student(torch.rand(3, 1, 16, 16)).shape == (3, 10)
    assert result.folder.as_posix() == "runs/mine_rgal_object-Sequential_object-Sequential/seed0"
    assert result.numbers["last_acc1"] is None and result.numbers["images"] == 64
    assert (result.folder / "summary.json").exists() and list(result.folder.glob("grids/*.png"))


def test_the_result_is_loaded_with_an_object_in_place_of_a_name(pair):
    result = datafree.distill(*pair, CARD, **TINY)
    images = torch.rand(4, 1, 16, 16)
    loaded = datafree.load(result.folder, model=nets.small(10, 1))
    assert torch.equal(loaded(images), result.student(images))
    with pytest.raises(InputError, match="states the model 'object:Sequential', which is not a registered one"):
        datafree.load(result.folder)


def test_a_network_that_was_loaded_keeps_its_normalisation_and_its_name(teacher, pair):
    loaded = datafree.load(teacher, model=nets.name("tiny"))
    loaded.metadata["model"] = "resnet8"  # as of a registered one
    result = datafree.distill(loaded, pair[1], {**CARD, "mean": [0.5]}, **TINY)
    log = (result.folder / "log.txt").read_text()
    assert "The teacher resnet8 (dataset digits, epoch" in log and "normalises images by mean 0.3051, std 0.3188" in log
    given = datafree.distill(loaded, pair[1], CARD, teacher_mean=(0.25,), log_tag="given", **TINY)
    assert "normalises images by mean 0.25, std 0.3188" in (given.folder / "log.txt").read_text()


def test_the_name_of_a_data_set_has_test_images_and_a_name_is_a_registered_student(pair):
    result = datafree.distill(pair[0], "lenet5", "digits", method="noise", epochs=1, ep_steps=2, kd_steps=2)
    assert result.numbers["teacher_acc1"] > 80 and 0 <= result.numbers["last_acc1"] <= 100
    assert datafree.load(result.folder).name == "network lenet5" and result.student.metadata["dataset"] == "digits"
    more = datafree.distill(*pair, CARDS["digits"], eval="test", log_tag="tested", **TINY)
    assert more.numbers["teacher_acc1"] == result.numbers["teacher_acc1"]


def test_an_interrupted_call_is_continued_to_the_same_weights(pair, monkeypatch):
    teacher, student = pair
    straight, step, calls = datafree.distill(*pair, CARD, log_tag="straight", **TINY), DistillLearner.step, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(DistillLearner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same call with resume='auto' continues it"):
        datafree.distill(teacher, student, CARD, **TINY)
    fresh = nets.small(10, 1)  # whose weights do not matter, as those of the run are loaded
    resumed = datafree.distill(teacher, fresh, CARD, resume="auto", **TINY)
    assert equal(state(resumed.student.model), state(straight.student.model)) and len(calls) == 8
    with pytest.raises(InputError, match="was written with --teacher_weights .* start a new run by --log_tag NEW"):
        datafree.distill(nets.tiny(10, 1), fresh, CARD, resume="auto", **TINY)
    with pytest.raises(InputError, match="already holds a run"):
        datafree.distill(teacher, student, CARD, **TINY)


def test_values_are_taken_as_python_writes_them(pair, tmp_path):
    (tmp_path / "more.yaml").write_text("synthesis: {bn: 0.5}\ndata: {eval: test}\n")
    card = DatasetCard.from_mapping({**CARD, "mean": [np.float32(0.5)]}, "here")
    options = {**TINY, "config": tmp_path / "more.yaml", "pair_sample": False, "teacher_std": [np.float64(0.25)]}
    result = datafree.distill(*pair, card, image_size=8, synthesis_rounds=None, **options)
    written = (result.folder / "config.yaml").read_text()
    for line in ("bn: 0.5", "eval: none", "pair_sample: false", "teacher_std: [0.25]", "image_size: 8"):
        assert f"\n  {line}\n" in written
    assert result.student.shape == (1, 8, 8)


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.lock = nets.tiny(10, 1), (step for step in ())

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epocs": 3}, "unknown option --epocs; did you mean --epochs"),
        ({"epochs": 0}, "--epochs cannot be '0'"),
        ({"eval_every": 3}, "--eval_every has no effect because eval is none"),
        ({"dry_run": True}, "datafree.distill takes no dry_run"),
        ({"dataset": "digits"}, "datafree.distill takes no dataset"),
        ({"teacher_weights": "x.pth"}, "teacher_weights has no effect because the teacher is an object"),
        ({"student_weights": "x.pth"}, "student_weights has no effect because the student is an object"),
        ({"method": "rgall"}, "--method cannot be 'rgall'"),
        ({"card": "digts"}, "nearest: digits"),
        ({"card": None}, "the card is a NoneType; give the name of a data set"),
        ({"card": {**CARD, "hight": 3}}, "the card: unknown key 'hight'; did you mean height"),
        ({"card": {"name": "mine"}}, "the card: channels, .* missing"),
        ({"teacher": nets.tiny}, "the teacher is a function; give a torch.nn.Module"),
        ({"teacher": nets.tiny(7, 1)}, "the teacher object:Sequential has 7 classes but mine has 10"),
        ({"teacher": nn.Identity()}, "must return logits"),
        ({"teacher": Holder()}, "the teacher Holder cannot be copied .* generators in its attributes"),
        ({"student": nets.tiny(10, 3)}, "expected input.* to have 3 channels"),
        ({"student": "resnet9"}, "there is no model 'resnet9': the nearest are"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0][:40],
)
def test_what_cannot_be_done_is_an_exception_of_one_sentence(change, message, pair, tmp_path):
    arguments = {"teacher": pair[0], "student": pair[1], "card": CARD, **TINY, **change}
    with pytest.raises(InputError, match=message) as error:
        datafree.distill(**arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
