"""The claim that a data-free run opens no training image, proved by the files that are opened."""

import gzip
import hashlib
import pickle
import random
import struct
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from resuming import checkpoint_of, same

from datafree.datasets import digits
from datafree.datasets.cards import CARDS, DatasetCard
from datafree.datasets.loading import load_split
from datafree.datasets.splits import TensorSplit
from datafree.errors import InputError
from datafree.grids import Gallery
from datafree.runtime import rng_state
from datafree.session import Session

opened: list[str] | None = None  # while files are recorded; an audit hook cannot be removed


def record(event, arguments):
    if opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, Path)):
        opened.append(
            str(Path(arguments[0] if isinstance(arguments[0], (str, Path)) else arguments[0].decode()).resolve())
        )


sys.addaudithook(record)


@contextmanager
def files_opened():
    """Yield the list of the paths of all files that are opened inside the block, by whatever code."""
    global opened
    opened = found = []
    try:
        yield found
    finally:
        opened = None


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(card, count):
    return np.arange(count) % card.num_classes


# Files of each data set, with 2 * classes training and 1 * classes test images. -> (training files, images of the test)


class OfPython2:
    """An array that pickle writes as Python 2 did, whose bytes are text."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        rebuild = np.zeros(0).__reduce__()[0]
        state = (1, self.array.shape, self.array.dtype, False, self.array.tobytes().decode("latin1"))
        return rebuild, (np.ndarray, (0,), "b"), state


def old_pickle(values):
    return pickle.dumps(values, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar(root, card, patch):
    published = getattr(torchvision.datasets, card.name.upper())
    folder, key = root / published.base_folder, "labels" if card.name == "cifar10" else "fine_labels"
    folder.mkdir()
    images = {}
    for split, name in (("train", "train_list"), ("test", "test_list")):
        listed = []
        for seed, (file, _) in enumerate(getattr(published, name)):
            images[split] = pixels(seed + 10 * (split == "test"), card.num_classes, 3, 32, 32)
            data = OfPython2(images[split].reshape(card.num_classes, -1))
            content = old_pickle({"data": data, key: labels(card, card.num_classes).tolist(), "filenames": ["a.png"]})
            (folder / file).write_bytes(content)
            listed.append([file, hashlib.md5(content).hexdigest()])
        patch.setattr(published, name, listed)
    return [folder / file for file, _ in published.train_list], images["test"]


def mnist(root, card, patch):
    folder = root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[card.name] / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 2 * card.num_classes), ("t10k", card.num_classes)):
        images = pixels(count, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()
        )
        values = labels(card, count).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + values.tobytes())
    return list(folder.glob("train-*")), images[:, None]


def svhn(root, card, patch):
    io = pytest.importorskip("scipy.io")
    published, sums = torchvision.datasets.SVHN, {}
    for split, count in (("train", 20), ("test", 10)):
        images, path = pixels(count, count, 3, 32, 32), root / f"{split}_32x32.mat"
        io.savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels(card, count)[:, None] + 1})
        sums[split] = [None, path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    patch.setattr(published, "split_list", sums)
    return [root / "train_32x32.mat"], images


def folders(root, card, patch, test="test"):
    training = []
    for name in (f"class{k:04}" for k in range(card.num_classes)):
        for split in ("train", test):
            place = root / card.name / split / name / f"{split}.bmp"
            place.parent.mkdir(parents=True)
            Image.fromarray(pixels(len(training), card.height, card.width, 3)).save(place)
        training.append(root / card.name / "train" / name / "train.bmp")
    return training, None


def imagenet(root, card, patch):
    return folders(root, card, patch, "val")


def tiny_imagenet(root, card, patch):
    place, training, lines = root / "tiny-imagenet-200", [], []
    (place / "val" / "images").mkdir(parents=True)
    for k in range(card.num_classes):
        training.append(place / "train" / f"n{k:03}" / "images" / "0.bmp")
        training[-1].parent.mkdir(parents=True)
        Image.fromarray(pixels(k, 64, 64, 3)).save(training[-1])
        Image.fromarray(pixels(k, 64, 64, 3)).save(place / "val" / "images" / f"{k}.bmp")
        lines.append(f"{k}.bmp\tn{k:03}\t0\t0\t1\t1")
    (place / "val" / "val_annotations.txt").write_text("\n".join(lines))
    return training, None


def loader(root, card, patch):
    for split in ("train", "test"):
        np.savez(root / f"{split}.npz", images=pixels(1, 4, 3, 6, 5), labels=[0, 1, 0, 1])
    return [root / "train.npz"], pixels(1, 4, 3, 6, 5)


def shipped(root, card, patch):
    return [digits.digits_file("train")], None


LOADER = """
import numpy as np

def load(data_root, split):
    with np.load(data_root / f"{split}.npz") as file:
        return file["images"], file["labels"]
"""
MORE = {
    "own": DatasetCard("own", 3, 6, 5, 2, (0.5,) * 3, (0.25,) * 3),
    "loader": DatasetCard("loader", 3, 6, 5, 2, (0.5,) * 3, (0.25,) * 3, loader="mine.py:load"),
}
WRITERS = {
    **{"digits": shipped, "mnist": mnist, "fashion_mnist": mnist, "svhn": svhn, "cifar10": cifar, "cifar100": cifar},
    **{"tiny_imagenet": tiny_imagenet, "imagenet": imagenet, "own": folders, "loader": loader},
}


def test_every_registered_data_set_is_tried():
    assert WRITERS.keys() == {*CARDS, *MORE}


@pytest.mark.parametrize("name", WRITERS)
def test_the_test_split_opens_no_training_file_and_needs_none(name, tmp_path, monkeypatch):
    card = {**CARDS, **MORE}[name]
    if name == "imagenet":  # a thousand classes show no more than ten
        card = DatasetCard(name, 3, 224, 224, 10, card.mean, card.std)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(LOADER)
    root = tmp_path / "data"
    root.mkdir()
    training, images = WRITERS[name](root, card, monkeypatch)

    def read():
        split = load_split(card, root, "test", False, "cpu", 0)
        return torch.cat([batch for batch, _ in split.batches(64)]), torch.cat([part for _, part in split.batches(64)])

    with files_opened() as found:
        before = read()
    secret = {str(path.resolve()) for path in training}
    assert secret and all(Path(path).is_file() for path in secret)
    assert not secret & set(found) and len(found) > 0
    if images is not None:
        assert torch.equal((before[0] * 255).round().byte(), torch.from_numpy(images))
    if name == "digits":
        return  # its training file is part of the source
    with files_opened() as found:
        load_split(card, root, "train", False, "cpu", 0).sample(len(training))
    assert secret & set(found)  # that the hook sees such a file
    for path in training:
        path.unlink()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(read(), before))
    with pytest.raises(InputError):
        load_split(card, root, "train", False, "cpu", 0).sample(1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_checked_by_its_digest_and_runs_no_code(name, tmp_path, monkeypatch):
    (root := tmp_path / "data").mkdir()
    cifar(root, CARDS[name], monkeypatch)
    published = getattr(torchvision.datasets, name.upper())
    file = root / published.base_folder / published.test_list[0][0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(InputError, match=f"{file.name} is corrupt or another file: its MD5 is .*--data_root"):
        load_split(CARDS[name], root, "test", download=False)
    evil = b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    file.write_bytes(evil)
    monkeypatch.setattr(published, "test_list", [[file.name, hashlib.md5(evil).hexdigest()]])
    with pytest.raises(InputError, match="posix.system is refused; nothing was executed"):
        load_split(CARDS[name], root, "test", download=False)
    assert not (tmp_path / "ran").exists()


def test_all_of_cifars_training_files_are_joined_in_order(tmp_path, monkeypatch):
    cifar(tmp_path, CARDS["cifar10"], monkeypatch)
    train = load_split(CARDS["cifar10"], tmp_path, "train", download=False)
    expected = np.concatenate([pixels(seed, 10, 3, 32, 32) for seed in range(5)])
    assert torch.equal(train.images, torch.from_numpy(expected)) and train.labels.tolist() == list(range(10)) * 5


def test_files_of_mnist_that_do_not_belong_together_are_refused(tmp_path, monkeypatch):
    mnist(tmp_path, CARDS["mnist"], monkeypatch)
    labels_file = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels_file.write_bytes(struct.pack(">II", 0x801, 20) + bytes(20))
    with pytest.raises(InputError, match="MNIST/raw/t10k-.*-ubyte hold 10 images but 20 labels"):
        load_split(CARDS["mnist"], tmp_path, "test", download=False)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "svhn", "cifar10", "cifar100"])
def test_absent_files_are_told_in_words_of_the_options(name, tmp_path):
    pytest.importorskip("scipy")  # which SVHN needs
    with pytest.raises(InputError) as caught:
        load_split(CARDS[name], tmp_path, "test", download=False)
    assert "--download false and a dry run download nothing" in str(caught.value)
    assert "download=True" not in str(caught.value)


def test_only_the_needed_files_of_mnist_are_downloaded(tmp_path, monkeypatch):
    images, wanted = pixels(0, 10, 28, 28), []

    def fetch(url, download_root, filename, md5):
        wanted.append(filename)
        kind = struct.pack(">IIII", 0x803, *images.shape) + images.tobytes()
        if "labels" in filename:
            kind = struct.pack(">II", 0x801, 10) + bytes(range(10))
        Path(download_root, filename.removesuffix(".gz")).write_bytes(gzip.decompress(gzip.compress(kind)))

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    assert len(load_split(CARDS["mnist"], tmp_path, "test")) == 10
    assert wanted == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


@pytest.mark.parametrize("words", [("--eval", "test"), ("--eval", "none"), ("--method", "fast"), ("--source", "noise")])
def test_a_whole_distillation_opens_no_training_image(words, distil):
    training, test = (str(digits.digits_file(split).resolve()) for split in ("train", "test"))
    with files_opened() as found:
        folder = distil("--epochs", 1, *words)
    assert training not in found and (test in found) == ("none" not in words)
    assert (folder / "grids" / "test.png").exists() == ("none" not in words)


def test_the_picture_of_real_images_shows_test_images_alone(distil, monkeypatch):
    drawn = []
    monkeypatch.setattr(Gallery, "draw_test", lambda gallery: drawn.append(gallery.test))
    distil("--epochs", 1)
    [shown] = drawn
    assert torch.equal(shown.images, digits.read_digits("test")[0])


def test_the_control_on_real_images_opens_them(distil):
    with files_opened() as found:
        distil("--epochs", 1, method="real")
    assert str(digits.digits_file("train").resolve()) in found


@pytest.mark.parametrize("method", ["rgal", "dfq", "fast", "noise", "real"])
def test_a_test_set_does_not_change_the_training(method, distil):
    """Neither the weights nor what any later step would draw at random."""
    tested, untested = (
        checkpoint_of(distil("--epochs", 2, "--eval", test_set, method=method, tag=test_set))
        for test_set in ("test", "none")
    )
    for part in ("learner", "source", "rng", "means", "monitor"):
        assert same(tested[part], untested[part]), part


RANDOM_LOADER = """
import random
import numpy as np
import torch

def load(data_root, split):
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    return np.random.randint(256, size=(10, 1, 16, 16), dtype=np.uint8), range(10)
"""


def test_a_loader_that_draws_at_random_does_not_change_the_training(distil, tmp_path):
    (tmp_path / "mine.py").write_text(RANDOM_LOADER)
    replace(CARDS["digits"], loader=f"{tmp_path}/mine.py:load").to_yaml(tmp_path / "card.yaml")
    tested, untested = (
        checkpoint_of(distil("--epochs", 1, "--eval", test_set, "--card", "card.yaml", tag=test_set))
        for test_set in ("test", "none")
    )
    assert same(tested["learner"], untested["learner"]) and same(tested["rng"], untested["rng"])


@pytest.mark.parametrize("side, most", [(32, 500), (128, 500), (512, 31)])
def test_large_images_are_evaluated_a_few_at_a_time(side, most, monkeypatch):
    sizes = []
    monkeypatch.setattr("datafree.session.evaluate", lambda network, split, batch_size, *_: sizes.append(batch_size))
    session = Session.__new__(Session)
    session.device, session.card, session.test = (
        torch.device("cpu"),
        replace(CARDS["imagenet"], height=side, width=side),
        1,
    )
    network = torch.nn.Flatten()
    network.name = "network"
    session.score(network)
    assert sizes == [most]


def test_evaluating_a_network_that_draws_at_random_changes_no_later_draw():
    class Random(torch.nn.Module):
        name = "network"

        def forward(self, images):
            return torch.rand(len(images), 10) + np.random.rand() + random.random()

    session = Session.__new__(Session)
    session.device, session.card = torch.device("cpu"), CARDS["digits"]
    for session.test in (TensorSplit(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.arange(4), 10), None):
        state = rng_state()
        session.score(Random())
        assert same(rng_state(), state)
