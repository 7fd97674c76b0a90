"""The programs as on a command line: what a run leaves, what it reads, and the message of each mistake."""

import json
import os
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
import yaml
from conftest import call, command, forked, rows, scratch, tiny_run
from PIL import Image

import datafree_kd
import registry
import train_scratch
from datafree import session
from datafree.datasets.cards import DatasetCard
from datafree.logger import RunFolder
from datafree.session import Session

METHODS = sorted(registry.METHODS)
STREAMS = ("dafl", "dfad", "dfq", "zskt")  # their images are not kept
SHAPES = DatasetCard("shapes", 3, 12, 12, 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def accuracy(text):
    return float(re.search(r"Acc@1=([\d.]+)", text)[1])


def student_of(folder):
    return torch.load(folder / "checkpoints" / "model_last.pth", weights_only=True)["state_dict"]


def write_images(folder, classes=("circle", "cross", "square"), count=4, size=12):
    """Class folders of random colour images whose brightness depends on the class."""
    random = np.random.default_rng(0)
    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(80 * level, 80 * level + 80, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture
def weights(tmp_path):
    """Write random weights of a network of nets.py -> their path."""

    def write(factory="tiny", classes=3, channels=3, name="weights.pth"):
        torch.manual_seed(0)
        torch.save(getattr(nets, factory)(classes, channels).state_dict(), tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def untrained(weights, tmp_path, monkeypatch):
    """Call datafree_kd.py from ``tmp_path`` for one tiny epoch with a teacher of random weights."""
    monkeypatch.chdir(tmp_path)

    def run(*words, classes=3, channels=3):
        path = weights("tiny", classes, channels)
        call(
            datafree_kd,
            "--teacher",
            nets.name("tiny"),
            "--teacher_weights",
            path,
            *tiny_run(*words),
            "--epochs",
            1,
            *words,
        )

    return run


@pytest.fixture
def shapes(tmp_path):
    """data/shapes with a card and test images, without any training image."""
    write_images(tmp_path / "data" / "shapes" / "test")
    SHAPES.to_yaml(tmp_path / "data" / "shapes" / "card.yaml")
    return tmp_path / "data" / "shapes"


# What a run leaves.


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_leaves_what_is_promised(method, distil, capsys, tmp_path):
    folder = distil("--epochs", 2, method=method)
    assert folder == tmp_path / "runs" / f"digits_{method}_nets-tiny_nets-small" / "run"
    promised = {
        "config.yaml",
        "env.json",
        "log.txt",
        "metrics.jsonl",
        "summary.json",
        "grids/epoch_0000.png",
        "grids/epoch_0001.png",
        "grids/test.png",
        *(f"checkpoints/{name}.pth" for name in ("last", "best", "model_last", "model_best")),
    }
    left = {name for name in files(folder) if not name.startswith("tb/")}
    assert left == promised | {".lock"} and list((folder / "tb").iterdir())
    assert [row["epoch"] for row in rows(folder)] == [0, 1]
    assert {"commit", "torch", "device", "command"} <= json.loads((folder / "env.json").read_text()).keys()
    log, summary = (folder / "log.txt").read_text(), json.loads((folder / "summary.json").read_text())
    assert "Plan: " in log and "Last: " in log and "Best: " in log and log.count("[Eval] Epoch=") == 2
    assert summary["last_acc1"] == pytest.approx(rows(folder)[-1]["acc1"], abs=1e-3)
    assert summary["best_acc1"] >= summary["last_acc1"] and summary["teacher_acc1"] > 80
    shown = 2 * 6 * 16  # those of a pool are shown more than once
    assert summary["images"] == {"real": 0, "folder": 0, "nayer": 128, **dict.fromkeys(("noise", *STREAMS), shown)}.get(
        method, 64
    )
    capsys.readouterr()
    distil("--student_weights", folder / "checkpoints" / "model_last.pth", "--evaluate_only")
    assert accuracy(capsys.readouterr().out) == pytest.approx(summary["last_acc1"], abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_rgal_goes_into_every_method(method, distil, refused):
    triplets = ("--triplet", 0.2, "--striplet", 0.3)
    if method in ("noise", "real", "folder"):  # nothing is synthesised there
        line = refused(partial(distil, method=method), *triplets, code=2)
        assert "--triplet has no effect" in line and f"source is {method}" in line
        triplets = triplets[2:]
    [row] = rows(distil("--epochs", 1, *triplets, method=method))
    assert ("synthesis/triplet" in row) == ("--triplet" in triplets) and "student/striplet" in row


def test_the_configuration_left_repeats_the_run(distil):
    folder = distil("--epochs", 2, "--seed", 3)
    call(datafree_kd, "--config", folder / "config.yaml", "--log_tag", "again")
    again = folder.with_name("again")
    assert rows(folder) == rows(again)
    first, second = (student_of(f) for f in (folder, again))
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [yaml.safe_load((f / "config.yaml").read_text()) for f in (folder, again)]
    assert [c["run"].pop("log_tag") for c in configs] == ["run", "again"] and configs[0] == configs[1]


@pytest.mark.parametrize("method", METHODS)
def test_print_config_reads_back(method, distil, capsys, tmp_path):
    distil("--print-config", method=method)
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    call(datafree_kd, "--config", tmp_path / "printed.yaml", "--print_config")
    assert capsys.readouterr().out == text and yaml.safe_load(text)["method"] == method
    assert files(tmp_path) == ["printed.yaml"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(distil, capsys, tmp_path):
    distil("--dry-run")
    out = capsys.readouterr().out
    assert "8 rounds of 3 synthesis steps, and 24 student steps of 32 views; 128 images" in out
    assert "no training image is opened" in out
    assert (
        f"Plan: distilling {nets.name('tiny')} -> {nets.name('small')} on digits, 1x16x16, 10 classes, "
        "tested on 355 images, on cpu." in out
    )
    assert re.search(
        r"The teacher nets-tiny \(dataset digits, epoch 12, acc1 \d\d\.\d\d\) normalises images by mean", out
    )
    scratch("--model", nets.name("tiny"), "--dry_run")
    assert "1,442 images of digits, 1x16x16, 10 classes, tested on 355 images, on cpu: " in capsys.readouterr().out
    assert files(tmp_path) == []
    write_images(tmp_path / "data" / "own" / "train")
    write_images(tmp_path / "data" / "own" / "test")
    before = files(tmp_path)
    call(train_scratch, "--dataset", "own", "--model", nets.name("tiny"), "--dry_run")
    assert "own, 3x12x12, 3 classes" in capsys.readouterr().out and files(tmp_path) == before


def test_a_dry_run_makes_the_checks_of_a_run(distil, refused):
    assert "kd_steps" in refused(distil, "--kd_steps", 60, "--dry_run")
    assert "fp16" in refused(distil, "--precision", "fp16", "--dry_run")


def test_evaluation_alone_needs_no_teacher(distil, capsys, tmp_path, monkeypatch, teacher, refused):
    monkeypatch.chdir(tmp_path)
    call(
        datafree_kd,
        "--dataset",
        "digits",
        "--student",
        nets.name("tiny"),
        "--student_weights",
        teacher,
        "--evaluate_only",
    )
    assert accuracy(capsys.readouterr().out) > 80 and files(tmp_path) == []
    scratch("--model", nets.name("tiny"), "--weights", teacher, "--evaluate_only")
    assert accuracy(capsys.readouterr().out) > 80 and files(tmp_path) == []
    assert "leave --eval test" in refused(distil, "--evaluate_only", "--eval", "none", code=2)
    assert "--student_weights" in refused(distil, "--evaluate_only", code=2)  # or it would judge random weights
    assert "--weights" in refused(scratch, "--model", nets.name("tiny"), "--evaluate_only", code=2)
    assert "0 to 1" in refused(distil, "--teacher_mean", "125,123,113", code=2)


# A teacher, then its student.


def test_a_teacher_is_published_and_found_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("--model", nets.name("tiny"), "--batch_size", 256)
    scratch(*words, "--epochs", 1)
    published = tmp_path / "checkpoints" / "pretrained" / "digits_nets-tiny.pth"
    call(datafree_kd, "--teacher", nets.name("tiny"), *tiny_run(), "--epochs", 1)
    stored = torch.load(published, weights_only=True)
    assert f"epoch 1, acc1 {stored['acc1']:.2f}" in capsys.readouterr().out
    assert stored["dataset"] == "digits" and stored["shape"] == [1, 16, 16] and stored["epoch"] == 1
    summary = json.loads((tmp_path / "runs" / "digits_scratch_nets-tiny" / "seed0" / "summary.json").read_text())
    assert stored["acc1"] == pytest.approx(summary["last_acc1"], abs=1e-3)


@pytest.mark.parametrize(
    "there, model, replaced",
    [
        (0.0, nets.name("tiny"), True),
        (100.0, nets.name("tiny"), False),
        (None, nets.name("tiny"), False),
        (0.0, "other/nets.py:tiny", False),
    ],
)
def test_a_published_teacher_gives_way_to_a_better_one_only(there, model, replaced, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    published = tmp_path / "checkpoints" / "pretrained" / "digits_nets-tiny.pth"
    published.parent.mkdir(parents=True)
    torch.save({"state_dict": nets.tiny(10, 1).state_dict(), "acc1": there, "model": model}, published)
    before = published.read_bytes()
    scratch("--model", nets.name("tiny"), "--batch_size", 256, "--epochs", 1)
    assert (published.read_bytes() != before) == replaced
    assert ("stays as it is" in capsys.readouterr().out) != replaced


def test_the_normalisation_stored_with_the_weights_is_used_unless_another_is_given(
    distil, teacher, tmp_path, capsys, refused
):
    state = torch.load(teacher, weights_only=True)
    torch.save({**state, "mean": (0.25,), "std": [0.5]}, tmp_path / "other.pth")
    other = ("--teacher_weights", tmp_path / "other.pth", "--dry_run")
    distil(*other)
    assert "mean 0.25, std 0.5" in capsys.readouterr().out
    distil(*other, "--teacher_mean", 0.75)
    assert "mean 0.75, std 0.5" in capsys.readouterr().out
    for values in ([127.5], [0.1, 0.2], ["0.1"], 0.5):
        torch.save({**state, "mean": values}, tmp_path / "other.pth")
        assert "mean is" in refused(distil, *other)


@pytest.fixture
def earlier_run(teacher, tmp_path):
    """The folder of a run of revision 5c7f4c0, with the teacher's weights as its result."""
    stored = torch.load(teacher, weights_only=True)
    stored["settings"] = stored.pop("options")
    (tmp_path / "earlier" / "checkpoints").mkdir(parents=True)
    torch.save(stored, tmp_path / "earlier" / "checkpoints" / "student_last.pth")
    torch.save({**stored, "acc1": 1.0}, tmp_path / "earlier" / "checkpoints" / "student_best.pth")
    return tmp_path / "earlier"


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/student_last.pth"])
def test_weights_of_earlier_versions_are_read(below, distil, earlier_run, teacher, capsys):
    given, tiny = earlier_run / below, nets.name("tiny")
    scratch("--model", tiny, "--weights", teacher, "--evaluate_only")
    expected = capsys.readouterr().out
    assert accuracy(expected) > 80
    scratch("--model", tiny, "--weights", given, "--evaluate_only")
    assert capsys.readouterr().out == expected
    distil("--student", tiny, "--student_weights", given, "--evaluate_only")
    assert accuracy(capsys.readouterr().out) == accuracy(expected)
    one, other = (
        distil("--epochs", 1, "--teacher_weights", weights, "--student", tiny, "--student_weights", weights, tag=tag)
        for tag, weights in (("one", teacher), ("other", given))
    )
    assert rows(one) == rows(other)
    assert "(dataset digits, epoch 12, acc1 " in (other / "log.txt").read_text()


def test_the_folder_of_a_run_may_be_given_for_its_weights(distil, refused, tmp_path, capsys):
    folder = distil("--epochs", 1)
    expected = json.loads((folder / "summary.json").read_text())["last_acc1"]
    small = nets.name("small")
    capsys.readouterr()
    distil("--student_weights", folder, "--evaluate_only")
    assert accuracy(capsys.readouterr().out) == pytest.approx(expected, abs=1e-3)
    scratch("--model", small, "--weights", folder, "--evaluate_only")
    assert accuracy(capsys.readouterr().out) == pytest.approx(expected, abs=1e-3)
    again = distil("--epochs", 1, "--teacher", small, "--teacher_weights", folder, tag="again")
    assert json.loads((again / "summary.json").read_text())["teacher_acc1"] == pytest.approx(expected, abs=1e-3)
    line = refused(distil, "--teacher_weights", tmp_path)
    assert f"{tmp_path} is a folder without checkpoints/model_last.pth" in line and "name a file of weights" in line


def test_a_renamed_class_folder_does_not_shift_the_labels(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "data" / "own"
    for split in ("train", "test"):
        write_images(own / split, count=4)
    words = ("--threads", 1, "--dataset", "own", "--model", nets.name("tiny"), "--epochs", 1, "--batch_size", 12)
    call(train_scratch, *words)
    (own / "test" / "circle").rename(own / "test" / "zebra")
    line = refused(call, train_scratch, *words, "--log_tag", "again", before_run=False)
    assert "circle" in line and "cross" in line


def test_a_folder_of_images_from_teacher_to_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "data" / "own"
    for split in ("train", "test"):
        write_images(own / split, count=12)
    common = ("--threads", 1, "--dataset", "own", "--epochs", 15, "--log_tag", "t")
    call(train_scratch, *common, "--model", nets.name("tiny"), "--batch_size", 12, "--weight_decay", 0)
    card = DatasetCard.from_yaml(own / "card.yaml")
    assert (card.shape, card.num_classes) == ((3, 12, 12), 3)
    (own / "train").rename(tmp_path / "away")
    call(datafree_kd, *tiny_run(), *common, "--teacher", nets.name("tiny"), "--epochs", 2)
    summary = json.loads((tmp_path / "runs" / "own_rgal_nets-tiny_nets-small" / "t" / "summary.json").read_text())
    assert summary["teacher_acc1"] > 90


def test_a_weak_teacher_is_warned_about(distil):
    folder = distil("--epochs", 1, "--teacher_acc", 99.9)
    assert "[Alarm] the teacher reaches only" in (folder / "log.txt").read_text()


def test_networks_may_have_their_own_normalisation(distil, refused):
    folder = distil("--epochs", 1, "--teacher_mean", "0.9", "--teacher_std", "0.01")
    assert json.loads((folder / "summary.json").read_text())["teacher_acc1"] < 80
    assert "--teacher_mean" in refused(distil, "--teacher_mean", "0.5,0.5,0.5")


def test_the_teacher_is_after_a_run_as_it_was(distil, teacher, monkeypatch):
    loaded, load = [], Session.load_teacher
    monkeypatch.setattr(Session, "load_teacher", lambda given: loaded.append(load(given)) or loaded[0])
    distil("--epochs", 2, "--cr", 1, "--gram_loss", 1)
    before, after = torch.load(teacher, weights_only=True)["state_dict"], loaded[0].model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in loaded[0].parameters())


def test_a_teacher_in_bfloat16_with_a_state_that_is_no_tensor(distil, tmp_path):
    (tmp_path / "brain.py").write_text(
        "import torch\n\n\nclass Brain(torch.nn.Sequential):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        layers = torch.nn.Conv2d(in_channels, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()\n"
        "        super().__init__(*layers, torch.nn.Linear(8, num_classes))\n"
        "        self.bfloat16()\n\n"
        "    def get_extra_state(self):\n        return {'version': 1}\n\n"
        "    def set_extra_state(self, state):\n        pass\n"
    )
    hashes, shapes = [], {"0.weight": (8, 1, 3, 3), "0.bias": (8,), "3.weight": (10, 8), "3.bias": (10,)}
    for scale in (1, 2):
        torch.save({k: scale * torch.ones(s) for k, s in shapes.items()}, tmp_path / "brain.pth")
        words = "--teacher", tmp_path / "brain.py:Brain", "--teacher_weights", tmp_path / "brain.pth", "--bn", 0
        folder = distil("--epochs", 1, *words, tag=f"scale{scale}")
        hashes.append(json.loads((folder / "summary.json").read_text())["options"]["teacher_weights"])
    assert hashes[0] != hashes[1]


def test_a_user_defined_source(distil, refused):
    folder = distil("--epochs", 1, "--tv", 0.25, method=nets.name("Stripes"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["images"] == 6 * 16 and summary["options"]["tv"] == 0.25
    assert (folder / "grids" / "epoch_0000.png").exists()
    assert "BaseSynthesis" in refused(distil, "--source", nets.name("Nothing"))
    again = partial(distil, tag="again")  # a run that failed at once does not hold its folder
    assert "(images, targets)" in refused(again, "--source", nets.name("Bare"), before_run=False)
    assert "in [0, 1]" in refused(again, "--source", nets.name("Stripes"), "--tv", 2, before_run=False)
    assert "has no method sample" in refused(distil, "--source", nets.name("Mute"))
    assert "scalar tensor" in refused(again, "--source", nets.name("Wordy"), before_run=False)
    assert "tiny() got an unexpected" in refused(distil, "--source", nets.name("tiny"))
    assert "there is no file 'nowhere.py'" in refused(distil, "--source", "nowhere.py:Stripes")
    assert "inversion, pixels" in refused(distil, "--source", "dreams", code=2)


def test_a_user_defined_source_counts_by_its_code_and_not_by_its_place(distil, refused, tmp_path):
    code = Path(nets.__file__).read_text()
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(code)
    words = ("--epochs", 1, "--tv", 0.25, "--source")
    folder = distil(*words, f"{tmp_path / 'a.py'}:Stripes")
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").rename(tmp_path / "sub" / "a.py")
    resumed = ("--epochs", 2, *words[2:], f"{tmp_path / 'sub' / 'a.py'}:Stripes", "--resume", "auto")
    assert distil(*resumed) == folder and len(rows(folder)) == 2
    (tmp_path / "sub" / "a.py").write_text(code + "\n# another state of it\n")
    assert "the code of a-Stripes has changed" in refused(distil, "--epochs", 3, *resumed[2:])


def test_a_warm_up_that_has_nothing_to_do_is_refused_before_anything_is_written(distil, refused, tmp_path):
    line = refused(partial(distil, method="zskt"), "--warmup", 1, "--dry_run")
    assert "no synthesis term has a weight during --warmup" in line and files(tmp_path) == []


def test_compiling_without_a_compiler(distil, refused, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "g++" in refused(distil, "--compile", "default") and files(tmp_path) == []


def test_the_stages_of_the_triplets_are_named_and_must_be_some(distil, refused, capsys):
    distil("--dry_run", "--start_layer", 0, "--end_layer", 2)
    stages = "stage 0 of 0-1 (6x8x8), stage 1 of 0-1 (12x4x4)"
    assert f"Synthesis triplet loss: student nets-small, {stages}." in capsys.readouterr().out
    assert "--start_layer" in refused(distil, "--start_layer", 3, "--end_layer", 3, code=2)


# Nothing but the card.


@pytest.mark.parametrize("method", METHODS)
def test_the_training_images_are_loaded_by_the_control_alone(method, distil, monkeypatch):
    loaded, load = [], session.load_split
    monkeypatch.setattr(session, "load_split", lambda *given: loaded.append(given[2]) or load(*given))
    distil("--epochs", 1, method=method)
    assert sorted(loaded) == ["test"] + ["train"] * (method == "real")


def test_no_data_at_all(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "load_split", lambda *a: pytest.fail("no data may be loaded"))
    untrained("--dataset", "cifar10", "--eval", "none", classes=10)
    folder = tmp_path / "runs" / "cifar10_rgal_nets-tiny_nets-small" / "seed0"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["last_acc1"] is summary["best_acc1"] is None and summary["images"] == 32
    assert "checkpoints/model_last.pth" in files(folder) and "checkpoints/best.pth" not in files(folder)


def test_a_card_alone_gives_the_shape(untrained, tmp_path):
    DatasetCard("odd", 2, 20, 12, 3, (0.5, 0.5), (0.2, 0.2)).to_yaml("odd.yaml")
    untrained("--card", "odd.yaml", "--eval", "none", channels=2)
    assert (tmp_path / "runs" / "odd_rgal_nets-tiny_nets-small" / "seed0" / "summary.json").exists()


@pytest.mark.parametrize("method", ["rgal", "noise"])
def test_the_folder_of_training_images_may_be_absent(method, untrained, shapes, tmp_path):
    untrained("--dataset", "shapes", "--method", method)
    assert (tmp_path / "runs" / f"shapes_{method}_nets-tiny_nets-small" / "seed0" / "summary.json").exists()


def test_training_images_that_are_there_are_not_touched(untrained, shapes, tmp_path):
    """Every file that a process opens or lists is seen by Python's audit."""
    write_images(shapes / "train")

    def audit(event, arguments):
        if event in ("open", "os.listdir", "os.scandir"):
            if str(shapes / "train") in os.path.abspath(str(arguments[0])):
                os._exit(99)

    def run(method):
        sys.addaudithook(audit)
        untrained("--dataset", "shapes", "--method", method)

    for method, code in (("rgal", 0), ("rgal_release", 0), ("noise", 0), ("real", 99)):
        assert forked(run, method) == code
        finished = (tmp_path / "runs" / f"shapes_{method}_nets-tiny_nets-small" / "seed0" / "summary.json").exists()
        assert finished == (code == 0)


def test_what_an_earlier_run_left_is_never_used(distil, tmp_path):
    """Neither images nor weights: the second run of a crowded folder equals the first of an empty one."""
    first = distil("--epochs", 2, save_dir="fresh")
    distil("--epochs", 1, "--seed", 7, tag="other", save_dir="used")
    Image.new("L", (16, 16)).save(tmp_path / "used" / "digits_rgal_nets-tiny_nets-small" / "0.png")
    assert rows(first) == rows(distil("--epochs", 2, save_dir="used"))


def test_warm_up_ends_with_a_student_whose_rate_has_fallen_to_0(distil, refused):
    folder = distil("--warmup", 2)
    assert [row.get("student/kd") is None for row in rows(folder)] == [True, True, False, False]
    assert rows(folder)[1]["lr"] == pytest.approx(0.1) and rows(folder)[-1]["lr"] == 0
    assert "--warmup" in refused(distil, "--warmup", 4)


def test_half_precision_on_the_cpu(distil):
    folder = distil("--epochs", 1, "--precision", "bf16", "--cr", 1, "--gram_loss", 1)
    assert all(value is not None for value in rows(folder)[0].values())


# Mistakes: one line, a culprit, a remedy, an exit code.


class Creates:
    """Its pickle makes a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_that_cannot_be_used(distil, refused, weights, teacher, tmp_path):
    def given(path):
        return refused(distil, "--teacher_weights", path)

    line = given("nowhere.pth")
    assert "nowhere.pth" in line and "check the path" in line
    (tmp_path / "half.pth").write_bytes(teacher.read_bytes()[:2000])
    assert "half.pth is truncated" in given("half.pth")
    assert "weights of another" in given(weights("plain", 10, 1))
    assert "weights of another" in given(weights("small", 10, 1))
    line = given(weights("tiny", 7, 1))
    assert "has 7 classes" in line and "the model 10" in line
    contents = {"state_dict": nets.tiny(10, 1).state_dict(), "x": Creates(tmp_path / "proof")}
    torch.save(contents, tmp_path / "evil.pth")
    assert "evil.pth contains a pickled" in given("evil.pth") and not (tmp_path / "proof").exists()
    state = nets.tiny(10, 1).state_dict()
    state["0.0.weight"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    assert "nan.pth: 0.0.weight is not finite" in given("nan.pth")
    assert not (tmp_path / "runs").exists()


def test_a_teacher_that_was_never_trained(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(call, datafree_kd, "--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8")
    assert "digits_resnet8.pth" in line and "train_scratch.py --dataset digits --model resnet8" in line


@pytest.mark.parametrize("evaluated", ["test", "none"])
def test_a_teacher_whose_logits_are_not_finite(evaluated, distil, refused, tmp_path):
    torch.save(nets.Overflows(10, 1).state_dict(), tmp_path / "o.pth")
    words = ("--teacher", nets.name("Overflows"), "--teacher_weights", "o.pth")
    line = refused(distil, *words, "--eval", evaluated)
    assert "teacher nets-Overflows gives values that are not finite" in line and "check its weights" in line


@pytest.mark.parametrize("evaluated", ["test", "none"])
@pytest.mark.parametrize("part, scale", [("", 1e4), ("", 1e8), ("", 1e30), ("4.weight", 1e12), ("4.weight", 1e37)])
def test_a_teacher_whose_weights_are_spoiled_but_finite(part, scale, evaluated, distil, refused, teacher, tmp_path):
    contents = torch.load(teacher, weights_only=True)
    for name, tensor in contents["state_dict"].items():
        if tensor.dim() > 1 and name.startswith(part):
            tensor *= scale
    assert all(tensor.isfinite().all() for tensor in contents["state_dict"].values())
    torch.save(contents, tmp_path / "spoiled.pth")
    line = refused(distil, "--teacher_weights", "spoiled.pth", "--eval", evaluated)
    assert re.search(
        r"the teacher nets-tiny gives values (of up to \d\.\de\+\d+|that are not finite) .*check its weights", line
    )


def test_a_student_whose_training_diverges_is_not_said_to_have_wrong_weights(distil, refused):
    line = refused(distil, "--lr", 1e9, "--kd_steps", 1, "--ep_steps", 1, before_run=False)
    assert "student nets-small gave non-finite logits" in line and "check its weights" not in line
    assert "its training diverged: lower the learning rate" in line


def test_a_teacher_without_batch_norm(distil, refused, weights):
    words = ("--teacher", nets.name("plain"), "--teacher_weights", weights("plain", 10, 1))
    line = refused(distil, *words)
    assert "plain has no BatchNorm" in line and "--bn 0" in line
    assert (distil(*words, "--bn", 0, "--epochs", 1) / "summary.json").exists()


def test_networks_that_do_not_fit_the_data(distil, refused):
    line = refused(distil, "--student", nets.name("stubborn"))
    assert "student" in line and "7 classes" in line and "10" in line
    assert "3 channels" in refused(distil, "--student", "alexnet")
    assert "nowhere.py" in refused(distil, "--student", "nowhere.py:net")


def test_a_loss_that_is_not_finite_names_its_term_and_keeps_the_last_checkpoint(distil, refused, tmp_path):
    line = refused(distil, "--student", nets.name("Poisoned"), before_run=False)
    assert re.search(r"student/(kd|cd_loss|striplet) became nan", line) and "learning rate" in line
    folder = next((tmp_path / "runs").glob("*/run"))
    state = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)
    assert state["position"]["epoch"] == 3 == len(rows(folder)) and not (folder / "summary.json").exists()
    assert all(tensor.isfinite().all() for tensor in state["learner"]["student"].values())


def test_data_that_cannot_be_used(refused, untrained, shapes, tmp_path):
    test = shapes / "test"

    def given(*words):
        return refused(untrained, "--dataset", "shapes", *words)

    assert "nearest: shapes" in refused(untrained, "--dataset", "shapse", code=2)
    line = refused(partial(untrained, classes=10), "--dataset", "cifar10", "--download", "false")
    assert "no test images of cifar10" in line and "--data_root" in line and "--eval none" in line
    (test / "cross" / "0.png").write_bytes((test / "cross" / "1.png").read_bytes()[:60])
    line = given()
    assert "cross/0.png" in line and "replace or remove" in line
    for name in ("circle", "square"):
        (test / name).rename(tmp_path / name)
    line = given()
    assert "holds 1 class folders" in line and "at least 2" in line
    (tmp_path / "circle").rename(test / "circle")
    (test / "cross" / "0.png").unlink()
    line = given()
    assert "2 classes" in line and "3 in the data card" in line
    (shapes / "card.yaml").unlink()
    line = given()
    assert "no data card" in line and "train_scratch.py --dataset shapes" in line and "--card" in line
    assert "there is no folder" in refused(call, train_scratch, "--dataset", "shapes", "--model", "resnet8")


def test_mistakes_are_found_in_the_order_of_their_cost(weights, refused, tmp_path, monkeypatch):
    """Names of models and files of weights before a card is derived, networks before images are looked for."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data" / "own" / "train")
    given = ("--dataset", "own", "--data_root", "data")
    assert "resnet88" in refused(call, train_scratch, *given, "--model", "resnet88", code=2)
    assert "none.py" in refused(call, train_scratch, *given, "--model", "none.py:net")
    assert "none.pth" in refused(call, train_scratch, *given, "--model", "resnet8", "--weights", "none.pth")
    assert not (tmp_path / "data" / "own" / "card.yaml").exists()
    given = ("--dataset", "mnist", "--download", "false", "--teacher", "resnet8")
    assert "resnet88" in refused(call, datafree_kd, *given, "--student", "resnet88", code=2)
    assert "mnist_resnet8.pth" in refused(call, datafree_kd, *given, "--student", "resnet8")
    given = (*given[:-1], nets.name("tiny"), "--student", "resnet8", "--teacher_weights")
    assert "none.pth" in refused(call, datafree_kd, *given, "none.pth")
    assert "does not fit" in refused(call, datafree_kd, *given, weights("plain", 10, 1))
    given = (*given, weights("tiny", 10, 1))
    no_term = ("--bn", 0, "--oh", 0, "--adv", 0, "--triplet", 0)
    assert "no synthesis term" in refused(call, datafree_kd, *given, *no_term)
    assert "no test images of mnist" in refused(call, datafree_kd, *given)


def test_images_that_no_memory_holds_are_one_sentence(weights, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SHAPES.to_yaml(tmp_path / "card.yaml")
    given = ("--card", "card.yaml", "--eval", "none", "--teacher", nets.name("tiny"), "--teacher_weights", weights())
    assert "from 1 to 4096" in refused(call, datafree_kd, *given, "--image_size", 10**7, code=2)

    def build(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("datafree.session.Network.build", build)
    line = refused(call, datafree_kd, *given, "--image_size", 4096)
    assert "out of memory during the trial of the student; lower --image_size" in line


def test_a_card_that_is_of_another_data_set_is_called_out(untrained, shapes, capsys):
    untrained("--card", shapes / "card.yaml", "--dataset", "digits", "--dry_run")
    assert f"The data set is shapes, as {shapes / 'card.yaml'} names it, not digits." in capsys.readouterr().out
    untrained("--card", shapes / "card.yaml", "--dataset", "shapes", "--dry_run")
    assert "The data set is" not in capsys.readouterr().out


def test_classes_in_another_order_than_the_teachers_are_called_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_images(tmp_path / "data" / "shapes" / split)
    tiny = ("--model", nets.name("tiny"), "--threads", 1, "--dataset", "shapes")
    call(train_scratch, *tiny, "--epochs", 1)
    weights = tmp_path / "checkpoints" / "pretrained" / "shapes_nets-tiny.pth"
    for classes, alarm in (
        (("circle", "cross", "square"), None),
        ((), None),
        (("circle", "square", "cross"), "Class 1 is cross in the file of the model nets-tiny's weights but square in"),
    ):
        replace(SHAPES, classes=classes).to_yaml("card.yaml")
        capsys.readouterr()
        call(train_scratch, *tiny, "--weights", weights, "--evaluate_only", "--card", "card.yaml")
        assert ("[Alarm] Class" in (printed := capsys.readouterr().out)) == bool(alarm) and (alarm or "") in printed


def test_folders_for_the_output_that_cannot_be_used(distil, refused, tmp_path):
    (tmp_path / "file").touch()
    line = refused(distil, "--save_dir", "file/below")
    assert "could not write file/below" in line and "--save_dir" in line
    folder = distil("--epochs", 1)
    line = refused(distil)
    assert "already holds a run" in line and "--log_tag" in line and "--resume auto" in line
    with RunFolder(folder, "x", resume=True):
        line = refused(distil, "--resume", "auto")
    assert "is in use" in line and "--log_tag" in line


def test_a_gpu_that_is_not_there(distil, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(distil, "--gpu", 0)
    assert "cuda:0" in line and "no such GPU" in line and "--device cpu" in line


@pytest.mark.parametrize(
    "words, code, parts",
    [
        (("--precision", "fp16"), 1, ("fp16", "bf16")),
        (("--kd_steps", 60), 1, ("kd_steps 60", "ep_steps 6", "lower --kd_steps")),
        (("--kd_steps", 4), 1, ("ep_steps 6", "kd_steps 4", "--ep_steps 4 or 8")),
        (("--pool_size", 8), 1, ("--pool_size 8", "--synthesis_batch_size 16")),
        (("--bn", 0, "--oh", 0, "--adv", 0, "--triplet", 0), 1, ("no synthesis term", "--bn 1")),
        (("--kd", 0, "--cd_loss", 0, "--striplet", 0), 1, ("--kd",)),
        (("--g_step", 60), 2, ("--g_step", "--g_steps")),
        (("--bn", "much"), 2, ("--bn", "a number")),
        (("--relation", "papre"), 2, ("papre", "paper")),
        (("--epochs", 0), 2, ("--epochs", "at least 1")),
        (("--method", "rgla"), 2, ("rgla", "rgal")),
        (("--device", "tpu"), 2, ("tpu", "cpu, cuda")),
        (("--student", "resnet9"), 2, ("resnet9", "resnet8")),
        (("--teacher", "resnet9", "--teacher_weights", ""), 2, ("resnet9", "resnet8")),
        (("--config", "nowhere.yaml"), 2, ("nowhere.yaml",)),
    ],
)
def test_options_that_cannot_be(words, code, parts, distil, refused, tmp_path):
    line = refused(distil, *words, code=code)
    assert all(part in line for part in parts) and "train_scratch" not in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("program", ["datafree_kd.py", "train_scratch.py"])
def test_a_mistake_in_a_separate_process(program, tmp_path):
    path = Path(datafree_kd.__file__).with_name(program)
    done = command(path, "--epcohs", "3", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown option --epcohs; did you mean --epochs?\n"
    assert os.listdir(tmp_path) == []
