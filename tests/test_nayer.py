"""NAYER's noisy layer, rounds of several batches, and pools that begin with given images."""

import json
import re
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from conftest import rows
from parts import CLASSES, SHAPE, changed, make_card, make_source, network, options, snapshot
from PIL import Image
from resuming import assert_same_run, at_call, checkpoint_of, same, stopped, terminate
from torch import nn

from datafree.checkpoint import read_array
from datafree.config import IncrementalConfig, Replay
from datafree.datasets.cards import CARDS
from datafree.datasets.given import find_images
from datafree.errors import InputError, OptionError
from datafree.plan import describe_cost
from datafree.pool import ImagePool
from datafree.schedule import Schedule
from datafree.signals import Stopped
from datafree.synthesis.build import predictions
from datafree.synthesis.inversion import InversionSynthesis
from datafree.synthesis.noisy_layer import NoisyLayerSynthesis, read_embeddings
from datafree.synthesis.objective import SynthesisObjective

BATCH = 10  # of 4 classes: two whole groups, and one of two classes
SMALL = dict(synthesis_batch_size=BATCH, nz=8, ngf=4, lr_g=0.05, g_steps=2, oh=1.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(kind=NoisyLayerSynthesis, **values):
    """A source; all have the same teacher and student."""
    torch.manual_seed(0)
    return make_source(options(**{**SMALL, **values}), kind=kind)


def test_another_source_has_rounds_of_its_own(distil):
    """Although the file of the method asks for several batches."""
    folder = distil("--source", "generator", "--epochs", 1, method="nayer")
    assert rows(folder)[-1]["images"] > 0


# The noisy layer.


def test_a_group_has_an_image_of_each_class_and_no_two_of_one():
    source = make()
    targets = source._targets()
    counts = targets.bincount(minlength=CLASSES)
    assert len(targets) == BATCH and counts.max() - counts.min() == 1 and targets.equal(targets.sort().values)
    render, _ = source._begin_round(targets)
    weight, bias, layer, _ = render.args
    assert weight.shape == (3, 8, 8) and bias.shape == (3, 1, 8) and layer.bincount().tolist() == [4, 4, 2]
    assert len(set(zip(layer.tolist(), targets.tolist()))) == BATCH
    more = sum(source._targets().bincount(minlength=CLASSES) - BATCH // CLASSES for _ in range(30))
    assert more.sum() == 60 and more.min() > 0  # which classes have one more is random


def test_images_are_those_of_batchnorm_and_a_linear_layer_for_each_group():
    """Against the modules of torch, image by image."""
    source = make()
    targets = source._targets()
    render, _ = source._begin_round(targets)
    weight, bias, layer, _ = render.args
    bias.data.normal_()
    normalised = nn.BatchNorm1d(8)(source.embeddings)  # in training mode, of all classes
    latents = []
    for number, k in zip(layer.tolist(), targets.tolist()):
        linear = nn.Linear(8, 8)
        linear.weight.data, linear.bias.data = weight[number].data / 8**0.5, bias[number, 0].data
        latents.append(linear(normalised[k]))
    torch.testing.assert_close(render(), source.generator(torch.stack(latents)))


def test_latents_begin_with_unit_variance_whatever_the_embeddings_are(tmp_path):
    np.save(tmp_path / "wide.npy", 7 + 30 * np.random.default_rng(0).normal(size=(CLASSES, 500)))
    source = make(class_embeddings=str(tmp_path / "wide.npy"), synthesis_batch_size=400, nz=64)
    render, _ = source._begin_round(source._targets())
    seen = []
    source.generator = lambda latents: seen.append(latents)
    source._render(*render.args)
    assert seen[0].shape == (400, 64) and seen[0].std().item() == pytest.approx(1, abs=0.05)


def test_noise_is_drawn_for_each_batch_and_is_optimised_with_the_generator():
    source, begun = make(round_batches=2), []
    original = source._begin_round

    def begin(targets):
        render, optimizers = original(targets)
        begun.append((render.args[0], render.args[0].detach().clone()))
        return render, optimizers

    source._begin_round = begin
    before, embeddings = snapshot(source.generator, source.norm), source.embeddings.clone()
    source.synthesize()
    (first, first_before), (second, second_before) = begun
    assert not torch.allclose(first_before, second_before)
    assert not torch.equal(first, first_before) and not torch.equal(second, second_before)
    assert {name.split(".")[0] for name in changed(before, source.generator, source.norm)} == {"0", "1"}
    assert torch.equal(source.embeddings, embeddings)
    begun.clear()
    source.settings.lr_z = 0
    source.synthesize()
    assert all(map(torch.equal, *zip(*begun)))


def test_a_generator_lives_for_its_rounds_with_its_optimiser():
    source = make(generator_life=3, round_batches=2)
    optimizers, generators = [], []
    reset, source.generator.reset = source.generator.reset, lambda: generators.append(len(optimizers)) or reset()
    for _ in range(7):
        source.synthesize()
        optimizers.append(source.optimizer)
    first, second, third = optimizers[0], optimizers[3], optimizers[6]
    assert optimizers == [first] * 3 + [second] * 3 + [third] and len({id(o) for o in optimizers}) == 3
    assert generators == [3, 6]
    steps = {int(state["step"]) for state in third.state.values()}
    assert steps == {4}  # two batches of two steps


def test_a_source_goes_on_from_its_state_to_the_last_bit():
    one, other = make(generator_life=2, bn=1.0, bn_momentum=0.5), make(generator_life=2, bn=1.0, bn_momentum=0.5)
    one.synthesize()
    other.load_state_dict(one.round_state() | {"pool": one.pool.state_dict()})
    for _ in range(2):
        for source in (one, other):
            torch.manual_seed(1)
            source.synthesize()
        assert same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("damage", [{"age": "3"}, {"age": -1}, {"embeddings": torch.zeros(3, 8)}])
def test_a_damaged_state_is_refused(damage):
    source = make()
    with pytest.raises(ValueError, match="embeddings of the classes, or the age"):
        source.load_state_dict({**source.state_dict(), **damage})


# Files of embeddings.


def written(path, values, how):
    if how == "numpy":
        np.save(path.with_suffix(".npy"), values)
        return path.with_suffix(".npy")
    torch.save({"dict": {"text": torch.from_numpy(values)}, "half": torch.from_numpy(values).half()}[how], path)
    return path


@pytest.mark.parametrize("how", ["numpy", "dict", "half"])
def test_embeddings_are_read_from_usual_files(how, tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 6)).astype(">f8" if how == "numpy" else "f4")
    found = read_embeddings(written(tmp_path / "classes.pt", values, how), 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.from_numpy(values.astype("f4")), atol=1e-3, rtol=1e-3)


def hostile(header, data=b""):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "write, reason",
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.mkdir(), "there is no file"),
        (lambda path: path.write_bytes(b"words"), "truncated or no torch checkpoint"),
        (lambda path: np.save(path.open("wb"), np.array([object()])), "no whole array of numbers"),
        (
            lambda path: path.write_bytes(
                hostile(b"{'descr': '<f8', 'fortran_order': False, 'shape': (4, 99999999999)}\n", b"few")
            ),
            "no whole array of numbers",
        ),
        (lambda path: torch.save({"a": torch.eye(4), "b": torch.eye(4)}, path), "no single dense array"),
        (lambda path: torch.save(torch.eye(4).to_sparse(), path), "no single dense array"),
        (lambda path: np.save(path.open("wb"), np.zeros((4, 2), complex)), "no single dense array"),
        (lambda path: torch.save(torch.eye(5), path), r"numbers of shape \(5, 5\); it must be \(4, D\)"),
        (lambda path: torch.save(torch.ones(4), path), r"it must be \(4, D\)"),
        (lambda path: torch.save(torch.eye(4) / 0, path), "not finite"),
        (lambda path: torch.save(torch.eye(4)[[0, 1, 2, 1]], path), "the classes 1 and 3 the same embedding"),
        (lambda path: torch.save(nn.Linear(4, 4), path), "refused, nothing was executed"),
    ],
)
def test_a_wrong_file_of_embeddings_is_one_sentence(write, reason, tmp_path):
    path = tmp_path / "classes"
    write(path)
    with pytest.raises(InputError, match=reason) as caught:
        read_embeddings(path, 4)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_array_is_safetensors_too(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"text": torch.eye(3)}, tmp_path / "a.safetensors")
    assert torch.equal(read_array(tmp_path / "a.safetensors"), torch.eye(3))


def test_a_run_is_not_continued_with_other_embeddings(distil, refused, tmp_path):
    def write(seed):
        np.save(tmp_path / "classes.npy", np.random.default_rng(seed).normal(size=(10, 5)))

    write(0)
    words = ("--class_embeddings", tmp_path / "classes.npy", "--eval", "none")
    folder = distil("--epochs", 1, *words, method="nayer")
    assert checkpoint_of(folder)["source"]["embeddings"].shape == (10, 5)
    write(1)
    line = refused(distil, "--epochs", 2, *words, "--resume", "auto", "--method", "nayer")
    assert "--class_embeddings" in line and "resume with the same options" in line


@pytest.mark.parametrize(
    "words, reason",
    [
        ("--method nayer --generator_init maml", "--generator_init has no effect because source is noisy_layer"),
        ("--method nayer --class_noise 1", "--class_noise has no effect"),
        ("--method rgal --generator_life 3", "--generator_life has no effect because source is inversion"),
        ("--method rgal --class_embeddings x.npy", "--class_embeddings has no effect"),
        ("--method dfq --round_batches 2", "--round_batches has no effect"),
        ("--method noise --warmup_batches 2", "--warmup_batches has no effect"),
        ("--method rgal --warmup_batches 2", "--warmup_batches has no effect because warmup is 0"),
        ("--method noise --pool_images x", "--pool_images has no effect"),
        ("--method folder --pool_size 9", "--pool_size has no effect"),
    ],
)
def test_options_that_nothing_reads_are_refused(words, reason, distil, refused):
    assert reason in refused(distil, *words.split(), code=2)


# Rounds of several batches.


@pytest.mark.parametrize("kind", [InversionSynthesis, NoisyLayerSynthesis])
def test_all_batches_of_a_round_enter_the_pool(kind):
    source = make(kind, round_batches=2, warmup_batches=3, warmup=1)
    source.round(0, with_student=False)
    assert source.images_made == len(source.pool) == 3 * BATCH
    source.round(1, with_student=True)
    assert source.images_made == len(source.pool) == 5 * BATCH
    assert len(source.pool.images[: 5 * BATCH].flatten(1).unique(dim=0)) == 5 * BATCH
    assert source.latest()[0].shape == (BATCH, *SHAPE)


def test_the_terms_of_a_round_are_the_means_of_its_batches():
    one, several = make(keep="last"), make(keep="last", round_batches=2)
    several.load_state_dict(one.state_dict())
    torch.manual_seed(1)
    terms, losses = zip(*((one.synthesize(), one.round_loss) for _ in range(2)))
    torch.manual_seed(1)
    assert several.synthesize()["oh"] == torch.stack([term["oh"] for term in terms]).mean()
    assert several.round_loss == torch.stack(losses).mean()
    assert torch.equal(several.pool.images[: 2 * BATCH], one.pool.images[: 2 * BATCH])


def test_a_round_that_is_stopped_leaves_nothing(monkeypatch):
    source = make(round_batches=3, generator_life=1)
    source.synthesize()
    before, size, calls = source.round_state(), len(source.pool), []

    def tick():
        calls.append(1)
        if len(calls) == 5:  # in the third batch
            raise Stopped

    monkeypatch.setattr(source, "tick", tick)
    with suppress(Stopped):
        source.synthesize()
    assert len(calls) == 5 and not same(source.round_state(), before)
    source.restore_round(before)
    assert same(source.round_state(), before) and len(source.pool) == size


def test_a_pool_must_hold_the_batches_of_a_round():
    with pytest.raises(InputError, match=r"raise it to 30 \(--synthesis_batch_size 10 times 3 batches\)"):
        make(pool_size=29, round_batches=3)
    assert make(pool_size=30, round_batches=3, epochs=5).pool.capacity == 30


@pytest.mark.parametrize(
    "given, text",
    [
        (
            dict(warmup=0),
            "8 rounds of 2 batches of 3 synthesis steps, and 24 student steps of 8 views; 160 images, 160",
        ),
        (
            dict(warmup=1, warmup_batches=5),
            "8 rounds of 2 batches (5 in the warm-up) of 3 synthesis steps, and 18 student steps of 8 views; 220",
        ),
        (dict(warmup=1), "8 rounds of 2 batches of 3 synthesis steps, and 18"),
        (dict(round_batches=1, warmup=1), "8 rounds of 3 synthesis steps, and 18"),
    ],
)
def test_the_plan_counts_batches(given, text):
    values = {"epochs": 4, "ep_steps": 6, "kd_steps": 3, "g_steps": 3, "round_batches": 2, **given}
    source = make(InversionSynthesis, **values)
    schedule = Schedule.of(source.config.schedule, 8, source)
    assert text in describe_cost(schedule, source, 8, BATCH)


def test_the_pool_has_exactly_the_room_that_a_run_fills(distil):
    words = ("--warmup", 1, "--round_batches", 2, "--warmup_batches", 3, "--synthesis_rounds", 5, "--eval", "none")
    folder = distil("--epochs", 4, *words, method="nayer")
    images = (2 * 3 + 3 * 2) * 16  # two rounds of the warm-up and three others
    assert checkpoint_of(folder)["source"]["pool"]["images"].shape[0] == images
    assert f"; {images} images, {images} of them kept in the pool" in (folder / "log.txt").read_text()
    assert rows(folder)[-1]["images"] == images


# A pool that begins with given images.


def test_given_images_stay_while_others_come_and_go():
    pool = ImagePool(3, (1, 1, 1), 9, CPU)
    pool.begin_with(2, lambda: (torch.tensor([7, 8], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([7, 8])))
    assert len(pool) == 2 and pool.capacity == 5 and pool.newest(9)[1].tolist() == [7, 8]
    for number in range(5):
        pool.add(torch.full((1, 1, 1, 1), number / 255), torch.tensor([number]))
    assert len(pool) == 5 and pool.added == 5 and pool.newest(9)[1].tolist() == [7, 8, 2, 3, 4]
    assert pool.newest(2)[1].tolist() == [3, 4] and pool.spread(2)[1].tolist()[0] == 7
    batch = pool.sample(50)
    pairs = set(zip(batch.targets.tolist(), batch.ids.tolist()))
    assert pairs == {(7, 0), (8, 1), (2, 4), (3, 5), (4, 6)}  # images keep their ids, and none is used twice
    other = ImagePool(3, (1, 1, 1), 9, CPU)
    with pytest.raises(ValueError, match="begins with 2 images, not 0"):
        other.load_state_dict(pool.state_dict())
    other.begin_with(2, lambda: (torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)))
    other.load_state_dict(pool.state_dict())
    assert all(map(torch.equal, other.newest(9), pool.newest(9)))


def pictures(folder, *names, count=3, size=16):
    """PNG files in subfolders of these names ("": in the folder itself) -> the folder."""
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(random.integers(256, size=(size, size), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


DIGITS = CARDS["digits"]


@pytest.mark.parametrize(
    "names, labels, note",
    [
        (("7", "0"), [0, 0, 0, 7, 7, 7], ""),
        (("",), None, ""),
        (("0", "cat"), None, "because these are none: cat"),
        (("0", ""), None, r"because these are none: \(no folder\)"),
    ],
)
def test_classes_are_those_of_the_folders_if_all_of_them_are_classes(names, labels, note, tmp_path):
    found = find_images(pictures(tmp_path / "given", *names), DIGITS, None)
    assert found.count == 3 * len(names) and found.read().shape == (found.count, 1, 16, 16)
    assert (found.labels if labels is None else found.labels.tolist()) == labels
    assert re.search(note, " ".join(found.notes))


def test_images_of_another_form_are_converted_and_that_is_noted(tmp_path):
    folder = pictures(tmp_path / "given", "", size=20)
    (folder / "notes.txt").touch()
    found = find_images(folder, make_card((3, 16, 16)), None)
    assert found.read().shape == (3, 3, 16, 16)
    assert [re.sub(r" in .*? were", "", note) for note in found.notes[1:]] == [
        "3 of 3 images converted from grey to colour.",
        "3 of 3 images resized to 16x16 pixels.",
    ]
    assert found.notes[0] == f"Not read in {folder}: 1 .txt."


@pytest.mark.parametrize(
    "make_folder, reason",
    [
        (lambda place: place / "none", "there is no such folder"),
        (lambda place: pictures(place / "empty", "0", count=0), "holds no images"),
        (lambda place: pictures(place / "digits" / "train", "0").parent / "train", "has images of the data set digits"),
        (lambda place: pictures(place / "digits" / "train", "0"), "has images of the data set digits"),
        (lambda place: pictures(place / "digits" / "val", "0").parents[1], "has images of the data set digits"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(make_folder, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        find_images(make_folder(tmp_path), DIGITS, tmp_path / "digits")
    beside = pictures(tmp_path / "digits" / "mine", "0")
    assert find_images(beside, DIGITS, tmp_path / "digits").count == 3


def test_the_teacher_names_the_classes_of_unsorted_images():
    teacher, images = network().freeze(), torch.randint(256, (300, *SHAPE), dtype=torch.uint8)
    assert torch.equal(predictions(teacher, images), teacher(images / 255).argmax(1))


def test_a_run_begins_with_the_images_of_a_folder_and_keeps_them(distil, refused, tmp_path):
    folder = pictures(tmp_path / "given", "2", "5", count=2)
    words = ("--pool_images", folder, "--pool_size", 16, "--round_batches", 1)
    run = distil("--epochs", 2, *words)
    pool, log = checkpoint_of(run)["source"]["pool"], (run / "log.txt").read_text()
    assert pool["start"] == 4 and len(pool["images"]) == 20 and pool["targets"][:4].tolist() == [2, 2, 5, 5]
    assert torch.equal(pool["images"][:4], find_images(folder, DIGITS, None).read())
    assert f"The pool begins with 4 images of {folder}, which stay in it; their classes are stated there." in log
    assert f"no training image is opened, if none is in {folder}" in log
    assert "; 64 images, 16 of them kept in the pool beside 4 given ones (0 MB)" in log
    assert json.loads((run / "summary.json").read_text())["images"] == 64
    distil("--epochs", 3, *words, "--resume", "auto")
    (folder / "2" / "0.png").rename(folder / "5" / "9.png")
    line = refused(distil, "--epochs", 4, *words, "--resume", "auto")
    assert "--pool_images" in line and "resume with the same options" in line


def test_a_run_that_is_stopped_in_a_later_batch_goes_on_to_the_last_bit(distil, monkeypatch, tmp_path):
    words = ("--method", "nayer", "--round_batches", 2, "--warmup", 1, "--warmup_batches", 3, "--generator_life", 2)
    words += ("--pool_images", pictures(tmp_path / "given", ""), "--pool_size", 64, "--balanced_sampling")
    straight = distil(*words)
    with monkeypatch.context() as patch:
        at_call(patch, SynthesisObjective, "__call__", 23, terminate)  # two rounds of 9 steps, then the fifth of 6
        with stopped(terminate):
            distil(*words, tag="interrupted")
    assert_same_run(straight, distil(*words, "--resume", "auto", tag="interrupted"))


def test_a_run_begins_with_the_pool_of_an_earlier_one(distil, refused):
    first = distil("--epochs", 1, "--eval", "none", tag="first")
    words = ("--epochs", 1, "--eval", "none", "--method", "folder", "--pool_images")
    second = distil(*words, first, tag="second")
    one, other = (checkpoint_of(run)["source"]["pool"] for run in (first, second))
    assert torch.equal(one["images"], other["images"]) and torch.equal(one["targets"], other["targets"])
    assert other["start"] == len(one["images"]) and rows(second)[0]["images"] == 0
    fourth = partial(distil, *words, tag="fourth")
    third = distil("--epochs", 1, "--eval", "none", method="dfq", tag="third")
    assert "has no pool of images" in refused(fourth, third)
    state = torch.load(first / "checkpoints" / "last.pth", weights_only=True)
    for damage, reason in (
        ({"targets": one["targets"] + 90}, "has other classes than digits"),
        ({"images": one["images"][:, :, 1:]}, "where digits has bytes of shape"),
        ({"images": 7}, "is damaged"),
    ):
        state["source"]["pool"].update(damage)
        torch.save(state, first / "checkpoints" / "last.pth")
        assert reason in refused(fourth, first)
        state["source"]["pool"].update(one)


def test_a_folder_alone_is_a_transfer_set(distil, refused, capsys, tmp_path):
    folder = pictures(tmp_path / "given", "")
    line = refused(distil, "--method", "folder", "--pool_images", "", code=2)
    assert line.endswith("--source folder needs --pool_images FOLDER, whose images are all that the student sees")
    distil("--method", "folder", "--pool_images", folder, "--dry_run")
    out = capsys.readouterr().out
    assert f"Images: those of {folder}." in out and "their classes are what the teacher nets-tiny predicts." in out
    assert "Cost: 24 student steps of 16 views; 3 given images (0 MB)." in out


@pytest.mark.parametrize("name", ["pool_images", "class_embeddings"])
def test_incremental_learning_has_other_classes(name):
    given = IncrementalConfig(synthesis=Replay(source="noisy_layer", **{name: "x"}))
    with pytest.raises(OptionError, match=f"--{name} does not go with incremental learning"):
        given.validate()


def test_a_source_without_rounds_or_a_pool_says_so(distil, refused, tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "from datafree.synthesis.base import BaseSynthesis\n"
        "class Plain(BaseSynthesis):\n"
        "    def sample(self, n):\n"
        "        return torch.rand(n, *self.card.shape), None\n"
    )
    distil = partial(distil, method=f"{tmp_path / 'own.py'}:Plain")
    assert "is no RoundSynthesis, which alone reads --round_batches" in refused(
        distil, "--round_batches", 2, before_run=False
    )
    line = refused(distil, "--pool_images", pictures(tmp_path / "given", ""))
    assert "Plain keeps no ImagePool called pool for --pool_images" in line
