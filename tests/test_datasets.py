import hashlib
import os
import re
import struct
import tracemalloc
import unicodedata
import urllib.error
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from datafree.datasets.cards import CARDS, DatasetCard, names_of
from datafree.datasets.digits import digits_file
from datafree.datasets.loading import derive_card, load_split, resolve_card
from datafree.datasets.splits import LazySplit, TensorSplit
from datafree.errors import InputError, OptionError

CARD = DatasetCard("own", 3, 6, 5, 2, (0.5,) * 3, (0.25,) * 3)


def write_image(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def random_pixels(seed, shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(root, classes=("cat", "dog"), splits=("train", "test"), count=3, shape=(6, 5, 3)):
    """PNG images with random pixels; returns {(split, class, number): pixels}."""
    written = {}
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            for n in range(count):
                pixels = random_pixels((s, c, n), shape)
                write_image(root / split / name / f"{n}.png", pixels)
                written[split, name, n] = pixels
    return written


def write_mnist(raw, images, labels):
    """The four files of MNIST's idx format; both splits hold the same."""
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + labels.tobytes())


# Cards


def test_cards_are_complete():
    shapes = {name: (card.shape, card.num_classes) for name, card in CARDS.items()}
    assert shapes == {
        "digits": ((1, 16, 16), 10),
        "mnist": ((1, 28, 28), 10),
        "fashion_mnist": ((1, 28, 28), 10),
        "svhn": ((3, 32, 32), 10),
        "cifar10": ((3, 32, 32), 10),
        "cifar100": ((3, 32, 32), 100),
        "tiny_imagenet": ((3, 64, 64), 200),
        "imagenet": ((3, 224, 224), 1000),
    }
    assert CARDS["cifar10"].mean == (0.4914, 0.4822, 0.4465)
    assert CARDS["cifar10"].std == (0.2023, 0.1994, 0.2010)


def test_card_survives_yaml(tmp_path):
    CARD.to_yaml(tmp_path / "card.yaml")
    assert DatasetCard.from_yaml(tmp_path / "card.yaml") == CARD


def test_card_reads_exponents(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text("{name: x, channels: 1, height: 4, width: 4, num_classes: 2, mean: [5e-1], std: [1e-3]}")
    card = DatasetCard.from_yaml(path)
    assert (card.mean, card.std) == ((0.5,), (0.001,))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("name", "''", "needs a name"),
        ("name", "a/b", "without slashes"),
        ("name", "..", "without slashes"),
        ("channels", "0", "channels of the data card own must be a whole number"),
        ("height", "6.5", "height .* not 6.5"),
        ("width", "true", "width .* not True"),
        ("num_classes", "1", "num_classes .* at least 2"),
        ("mean", "[0.5]", "mean .* has 1 numbers"),
        ("mean", "[125.3, 123.0, 113.9]", r"mean .* images in \[0, 1\]"),
        ("mean", "0.5", "mean must be a list"),
        ("mean", "'101'", "mean must be a list"),
        ("mean", "[true, no, 0.5]", "mean must be a list"),
        ("std", "[0.2, 1e-9, 0.2]", "std above 0 .at least 1e-06"),
        ("std", "[0.2, 0, 0.2]", "std above 0"),
        ("std", "[a, b, c]", "std must be a list"),
        ("std", "[.nan, 0.2, 0.2]", r"std .* images in \[0, 1\]"),
        ("nmu_classes", "3", "unknown key 'nmu_classes'; did you mean num_classes"),
    ],
)
def test_bad_card_is_one_sentence(tmp_path, key, value, message):
    path = tmp_path / "card.yaml"
    CARD.to_yaml(path)
    kept = [line for line in path.read_text().splitlines() if ":" in line and not line.startswith(key + ":")]
    kept = [line + " [0.5, 0.5, 0.5]" if line in ("mean:", "std:") else line for line in kept]
    path.write_text("\n".join([*kept, f"{key}: {value}"]))
    with pytest.raises(InputError, match=message) as caught:
        DatasetCard.from_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: own", "channels, height, .* missing"),
        ("- 1", "key: value"),
        ("a: [", "not valid YAML"),
        ("mean: [0.5]\nname: own\nmean: [0.4]", "states mean more than once .*line 3"),
    ],
)
def test_broken_card_file(tmp_path, text, message):
    path = tmp_path / "card.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        resolve_card("anything", tmp_path, card_path=path)


def test_absent_card_file(tmp_path):
    with pytest.raises(InputError, match="none.yaml .*--card"):
        resolve_card("cifar10", tmp_path, card_path=tmp_path / "none.yaml")


# Digits


def test_digits_files():
    """The bytes are those of the one file of revision 5c7f4c0, from which the arrays of both splits were taken."""
    arrays, bytes_of = {}, hashlib.sha256()
    for split, count in (("train", 1442), ("test", 355)):
        assert digits_file(split).stat().st_size < 75_000
        with np.load(digits_file(split)) as file:
            images, labels = arrays[split] = file["images"], file["labels"]
        assert images.shape == (count, 8, 8) and images.dtype == labels.dtype == np.uint8 and images.max() == 16
        bytes_of.update(images.tobytes() + labels.tobytes())
    assert bytes_of.hexdigest().startswith("eb16a5b9fcc31197")
    counts = [np.bincount(labels) for _, labels in arrays.values()]
    assert sum(counts).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.array_equal(counts[1], sum(counts) // 5)
    train_images = {image.tobytes() for image in arrays["train"][0]}
    assert not any(image.tobytes() in train_images for image in arrays["test"][0])


def test_digits_are_enlarged_bilinearly(tmp_path):
    card = resolve_card("digits", tmp_path)
    train, test = (load_split(card, tmp_path, split) for split in ("train", "test"))
    assert len(train) == 1442 and len(test) == 355 and test.images.shape == (355, 1, 16, 16)
    with np.load(digits_file("test")) as file:
        small = file["images"].astype(float) * 255 / 16
    large = test.images[:, 0].numpy()
    assert np.array_equal(large[:, 0, 0], np.round(small[:, 0, 0]))
    near = 0.75 * small[:, 3] + 0.25 * small[:, 4]
    assert np.array_equal(large[:, 7, 8], np.round(0.75 * near[:, 4] + 0.25 * near[:, 3]))
    pixels = train.images.double() / 255
    assert pixels.mean().item() == pytest.approx(card.mean[0], abs=1e-4)
    assert pixels.std().item() == pytest.approx(card.std[0], abs=1e-4)


# Names of data sets, and their folders


@pytest.mark.parametrize("given", ["data/own", "own/", "./own", "own/train", ".", "/tmp"])
def test_a_path_is_no_name_of_a_data_set(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data" / "own", splits=("train",))
    parts = {"own/train": ("data/own", "train"), ".": (tmp_path.parent, tmp_path.name), "/tmp": ("/", "tmp")}
    root, name = parts.get(given, ("data", "own"))
    with pytest.raises(OptionError, match=f"--dataset {given} is a path, .* --data_root {root} --dataset {name}$"):
        resolve_card(given, "data", may_derive=True)


def test_a_data_root_that_is_none(tmp_path):
    write_folder(tmp_path / "own", splits=("train",))
    with pytest.raises(OptionError, match=f"own is a data set itself; .*: --data_root {tmp_path} --dataset own$"):
        resolve_card("own", tmp_path / "own", may_derive=True)
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="file is no folder; give the one that contains the data sets"):
        resolve_card("cifar10", tmp_path / "file")


@pytest.mark.parametrize("given, nearest", [("CIFAR10", "cifar10"), ("Flower", "flowers"), ("MNIST", "mnist")])
def test_the_nearest_names_are_named_in_any_case(tmp_path, given, nearest):
    write_folder(tmp_path / "flowers", splits=("train",))
    with pytest.raises(OptionError, match=f"--dataset {given} is neither .*nearest: {nearest}"):
        resolve_card(given, tmp_path)


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_folder_keeps_every_byte(tmp_path, test_folder):
    written = write_folder(tmp_path / "own", classes=("dog", "cat"), splits=("train", test_folder))
    split = load_split(CARD, tmp_path, "test")
    assert not any("resized" in note for note in split.notes)
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for index, (name, number) in enumerate((c, n) for c in ("cat", "dog") for n in range(3)):
        image = split.images[index].permute(1, 2, 0).numpy()
        assert np.array_equal(image, written[test_folder, name, number])


def test_classes_are_named_by_the_card_or_the_folders_or_the_publisher_or_a_number():
    cifar = CARDS["cifar10"]
    assert names_of(cifar)[8] == "ship" and names_of(replace(cifar, height=64))[8] == "ship"
    assert names_of(CARDS["fashion_mnist"]) == tuple(torchvision.datasets.FashionMNIST.classes)
    fine = names_of(CARDS["cifar100"])
    assert len(set(fine)) == 100 and list(fine) == sorted(fine)
    numbers = tuple(map(str, range(10)))
    assert names_of(CARDS["digits"]) == names_of(replace(cifar, loader="mine.py:load")) == numbers
    own = replace(cifar, classes=tuple("abcdefghij"))
    assert names_of(own) == names_of(own, numbers) == own.classes and names_of(cifar, own.classes) == own.classes
    assert names_of(replace(cifar, num_classes=3)) == numbers[:3]


def test_images_of_a_split_at_given_places(tmp_path):
    write_folder(tmp_path / "own", splits=("test",))
    small = load_split(CARD, tmp_path, "test")
    large = LazySplit(*files_of(tmp_path / "own" / "test"), CARD.shape, 2, workers=0)
    for split in (small, large):
        [(images, _)] = split.batches(6)
        assert torch.equal(split.at(torch.tensor([4, 0])), images[[4, 0]])


def files_of(folder):
    """Paths and labels of the images in class folders."""
    paths = sorted(folder.glob("*/*"))
    names = sorted({path.parent.name for path in paths})
    return list(map(str, paths)), torch.tensor([names.index(path.parent.name) for path in paths])


def test_folder_takes_precedence_over_torchvision(tmp_path):
    names = [f"class{i}" for i in range(10)]
    written = write_folder(tmp_path / "cifar10", classes=names, splits=("test",), count=1, shape=(32, 32, 3))
    split = load_split(CARDS["cifar10"], tmp_path, "test", download=False)
    assert split.labels.tolist() == list(range(10))
    assert names_of(CARDS["cifar10"], split.folders) == tuple(names)
    assert np.array_equal(split.images[7].permute(1, 2, 0).numpy(), written["test", "class7", 0])
    with pytest.raises(InputError, match="there is no folder .*cifar10/train .found in .*cifar10: test.; arrange"):
        load_split(CARDS["cifar10"], tmp_path, "train", download=False)


@pytest.mark.parametrize(
    "suffix", "png jpg jpeg JPEG jfif mpo webp bmp dib tif tiff TIF ppm pgm gif tga jp2 ico".split()
)
def test_every_format_is_read_and_resized_to_the_card(tmp_path, suffix):
    if f".{suffix.lower()}" not in Image.registered_extensions():
        pytest.skip("this Pillow lacks the format")
    grey = np.full((9, 9), 100, np.uint8)
    for name in ("a", "b"):
        write_image(tmp_path / "own" / "test" / name / f"1.{suffix}", grey)
        (tmp_path / "own" / "test" / name / "._1.png").write_bytes(b"hidden")
        (tmp_path / "own" / "test" / name / "notes.txt").write_text("not an image")
    split = load_split(CARD, tmp_path, "test")
    assert split.images.shape == (2, 3, 6, 5)
    assert (split.images.int() - 100).abs().max() <= 2
    place, notes = tmp_path / "own" / "test", " ".join(split.notes)
    assert f"2 of 2 images in {place} were resized to 5x6 pixels." in notes
    assert f"Not read in {place}: 2 hidden, 2 .txt." in notes


def test_an_image_without_a_suffix_is_known_by_its_contents(tmp_path):
    written = write_folder(tmp_path / "own", splits=("test",))
    for path in (tmp_path / "own" / "test").rglob("*.png"):
        path.rename(path.with_suffix(""))
    (tmp_path / "own" / "test" / "cat" / "README").write_text("of the photographer")
    split = load_split(CARD, tmp_path, "test")
    assert torch.equal(split.images[5].permute(1, 2, 0), torch.from_numpy(written["test", "dog", 2]))
    assert f"Not read in {tmp_path}/own/test: 1 without a suffix." in split.notes


def write_deep_png(path):
    """A PNG of 16 bits per channel, which Pillow cannot write in colour."""
    rows = b"".join(b"\0" + random_pixels(0, (5 * 3 * 2,)).tobytes() for _ in range(6))
    header = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with path.open("ab") as file:
        for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", zlib.crc32(kind + content)))


@pytest.mark.parametrize("height, width", [(6, 5), (130, 130)])  # in memory, and on demand
def test_what_is_changed_or_left_out_in_an_image_is_counted(tmp_path, height, width):
    write_folder(tmp_path / "own", splits=("test",))
    place = tmp_path / "own" / "test" / "cat"
    frames = [Image.new("RGB", (5, 6), (level, 0, 0)) for level in (0, 200)]
    frames[0].save(place / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (5, 6)).save(place / "clear.png")
    Image.new("P", (5, 6)).save(place / "clear.gif", transparency=0)
    turned = Image.new("RGB", (5, 6)).getexif()
    turned[0x0112] = 6
    frames[0].save(place / "turned.jpg", exif=turned)
    write_deep_png(place / "deep.png")
    notes = load_split(replace(CARD, height=height, width=width), tmp_path, "test").notes
    for count, change in (
        (1, "read without their further frames or pages"),
        (2, "read without their transparency"),
        (1, "reduced from 16 to 8 bits per channel"),
        (1, "not turned as their EXIF data ask"),
        *([(11, "scaled and cropped to 130x130 pixels")] if height == 130 else []),
    ):
        assert any(re.search(f"^{count} of 11 images .* (were|are) {change}.$", note) for note in notes), change


def test_colour_becomes_grey_for_a_grey_card(tmp_path):
    write_folder(tmp_path / "own", shape=(6, 5, 3))
    card = DatasetCard("own", 1, 6, 5, 2, (0.5,), (0.25,))
    colours = load_split(CARD, tmp_path, "test").images.double()
    grey = load_split(card, tmp_path, "test").images.double()
    luma = (colours * torch.tensor([0.299, 0.587, 0.114]).double().view(1, 3, 1, 1)).sum(1, keepdim=True)
    assert (grey - luma).abs().max() <= 1


def test_tiny_imagenet_in_its_original_layout(tmp_path):
    root, names = tmp_path / "tiny-imagenet-200", ("n02", "n01")
    for name in names:
        write_image(root / "train" / name / "images" / f"{name}_0.JPEG", random_pixels(0, (64, 64, 3)))
    (root / "test" / "images").mkdir(parents=True)
    for number in range(4):
        write_image(root / "val" / "images" / f"val_{number}.bmp", np.full((64, 64, 3), number, np.uint8))
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{number}.bmp\t{names[number % 2]}\t0\t0\t9\t9\n" for number in range(4))
    )
    card = DatasetCard("tiny_imagenet", 3, 64, 64, 2, (0.5,) * 3, (0.25,) * 3)
    assert load_split(card, tmp_path, "train").labels.tolist() == [0, 1]
    test = load_split(card, tmp_path, "test")
    assert test.labels.tolist() == [0, 0, 1, 1] and test.images[:, 0, 0, 0].tolist() == [1, 3, 0, 2]


def test_a_test_folder_without_classes_leaves_the_test_to_val(tmp_path):
    """As in Tiny-ImageNet with its validation images sorted by class, and in sets whose test has no labels."""
    root = tmp_path / "tiny-imagenet-200"
    for k, name in enumerate(("n01", "n02")):
        write_image(root / "val" / name / "images" / "0.png", np.full((64, 64, 3), k, np.uint8))
    write_image(root / "test" / "images" / "0.png", random_pixels(0, (64, 64, 3)))
    split = load_split(DatasetCard("tiny_imagenet", 3, 64, 64, 2, (0.5,) * 3, (0.25,) * 3), tmp_path, "test")
    assert split.images[:, 0, 0, 0].tolist() == split.labels.tolist() == [0, 1]
    assert f"The test images are those of {root}/val; {root}/test is not read." in split.notes


def test_broken_image_is_named(tmp_path):
    write_folder(tmp_path / "own")
    path = tmp_path / "own" / "test" / "dog" / "1.png"
    for broken in (b"", b"not an image", path.read_bytes()[:60]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"cannot read the image .*dog.1\.png"):
            load_split(CARD, tmp_path, "test")


def test_sixteen_bits_are_refused(tmp_path):
    write_folder(tmp_path / "own")
    Image.fromarray(np.full((6, 5), 40_000, np.uint16)).save(tmp_path / "own" / "test" / "cat" / "0.png")
    with pytest.raises(InputError, match=r"cat.0\.png has more than 8 bits"):
        load_split(CARD, tmp_path, "test")


@pytest.mark.parametrize("classes", [(), ("cat",)])
def test_too_few_classes(tmp_path, classes):
    (tmp_path / "own" / "test").mkdir(parents=True)
    write_folder(tmp_path / "own", classes=classes, splits=("test",))
    with pytest.raises(InputError, match=f"holds {len(classes)} class folders but at least 2.*--eval none"):
        load_split(CARD, tmp_path, "test")


@pytest.mark.parametrize("found", ["Train, Val", "training, validation", "cat, dog", "own"])
def test_another_layout_is_named(tmp_path, found):
    for name in found.split(", "):
        write_image(tmp_path / "own" / name / "0.png", random_pixels(0, (6, 5, 3)))
    with pytest.raises(InputError, match=f"there is no folder .*own/train .found in .*own: {found}.; arrange the"):
        derive_card("own", tmp_path / "own")
    (tmp_path / "own").rename(tmp_path / "train")
    if found == "own":
        with pytest.raises(InputError, match="train holds 1 class folders but at least 2 .* .found in .*train: own.;"):
            derive_card("own", tmp_path)


def test_images_of_one_value_have_no_card(tmp_path):
    for name in ("cat", "dog"):
        write_image(tmp_path / "own" / "train" / name / "0.png", np.full((6, 5, 3), 7, np.uint8))
    with pytest.raises(InputError, match="all pixels of a channel have the same value in the 2 images sampled from"):
        resolve_card("own", tmp_path, may_derive=True)
    assert not (tmp_path / "own" / "card.yaml").exists()


def test_a_huge_image_is_refused(tmp_path, monkeypatch):
    write_folder(tmp_path / "own", splits=("test",), shape=(30, 30, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(InputError, match="cat.0.png .more than 800 pixels.; replace or remove it"):
        load_split(CARD, tmp_path, "test")


def test_class_without_images(tmp_path):
    write_folder(tmp_path / "own")
    (tmp_path / "own" / "train" / "emu").mkdir()
    with pytest.raises(InputError, match="emu holds no images"):
        load_split(CARD, tmp_path, "train")


def test_class_count_that_differs_from_the_card(tmp_path):
    write_folder(tmp_path / "own", classes=("a", "b", "c"))
    with pytest.raises(InputError, match="3 classes in .*own/test but 2 in the data card own"):
        load_split(CARD, tmp_path, "test")


def test_missing_data_set(tmp_path):
    with pytest.raises(InputError, match="no test images of own: looked for .*own/test/<class>.*--eval none"):
        load_split(CARD, tmp_path, "test")
    with pytest.raises(InputError) as caught:
        load_split(CARD, tmp_path, "train")
    assert "--eval none" not in str(caught.value)


# Classes: the order of the labels, and those without images


def write_classes(root, names, split="test", card=None):
    """One image of each class, of the grey level of its place in ``names``."""
    for level, name in enumerate(names):
        write_image(root / split / name / "0.png", np.full((6, 5, 3), level, np.uint8))
    return card or replace(CARD, num_classes=len(names))


NUMBERS = [str(number) for number in range(12)]


def test_the_order_of_the_card_is_the_order_of_the_labels(tmp_path):
    card = replace(write_classes(tmp_path / "own", NUMBERS), classes=tuple(NUMBERS))
    split = load_split(card, tmp_path, "test")
    assert split.labels.tolist() == split.images[:, 0, 0, 0].tolist() == list(range(12)) and not split.notes
    backwards = load_split(replace(card, classes=tuple(NUMBERS[::-1])), tmp_path, "test")
    assert backwards.labels.tolist() == list(range(12)) and backwards.images[:, 0, 0, 0].tolist() == [*range(12)][::-1]


@pytest.mark.parametrize("size", [(6, 5), (128, 128)])  # in memory, and decoded on demand
def test_chosen_classes_are_loaded_alone_and_labelled_by_their_places(tmp_path, size):
    card = replace(write_classes(tmp_path / "own", NUMBERS[:5]), height=size[0], width=size[1])
    split = load_split(card, tmp_path, "test", workers=0, classes=(3, 0))
    levels = [round(image[0, 0, 0].item() * 255) for image, _ in split.batches(1) for image in image]
    assert dict(zip(split.labels.tolist(), levels)) == {0: 3, 1: 0} and split.num_classes == 2 and len(split) == 2
    again = split.of_classes([1], [7], 8)
    [(images, labels)] = again.batches(4)
    assert labels.tolist() == [7] and images.amax() == 0 and again.num_classes == 8
    assert len(split.of_classes([5], [0], 1)) == 0  # a class that no image has


@pytest.mark.parametrize(
    "names, alarm",
    [
        (NUMBERS, "order of plain text: 0, 1, 10, 11, 2, .* counts them as 0, 1, 2, 3, "),
        (["class9", "class10"], "class10, class9; for .* counts them as class9, class10"),
        (["bird", "Cat"], "Cat, bird; for .* bird, Cat"),
        (["00", "01", "10"], None),
        (["dog", "cat"], None),
    ],
)
def test_an_order_that_may_be_another_than_the_teachers_is_called_out(tmp_path, names, alarm):
    card = write_classes(tmp_path / "own", names)
    split = load_split(card, tmp_path, "test")
    (note,) = split.notes
    assert split.labels.tolist() == list(range(len(names)))
    assert "`classes`" in note and note.startswith("[Alarm]") == bool(alarm)
    assert re.search(alarm or ", ".join(sorted(names)), note)
    # With such a list in the card it is known; in that of ImageFolder it is told still, though not as an alarm.
    again = load_split(replace(card, classes=tuple(sorted(names))), tmp_path, "test").notes
    assert [note.startswith("The classes of") for note in again] == [True] * bool(alarm)


@pytest.mark.parametrize("empty_folder", [False, True])
def test_a_class_that_the_test_set_lacks_counts_as_none(tmp_path, empty_folder):
    card = replace(write_classes(tmp_path / "own", "ac"), num_classes=3, classes=("a", "b", "c"))
    if empty_folder:
        (tmp_path / "own" / "test" / "b").mkdir()
    split = load_split(card, tmp_path, "test")
    assert split.labels.tolist() == [0, 2] and split.num_classes == 3
    assert split.notes == [f"{tmp_path}/own/test has no images of 1 of 3 classes: b."]
    silent = replace(card, classes=())
    if empty_folder:
        assert load_split(silent, tmp_path, "test").labels.tolist() == [0, 2]
    else:
        with pytest.raises(InputError, match="2 classes in .* but 3 in .* list `classes` in the card"):
            load_split(silent, tmp_path, "test")


def test_one_class_of_the_card_is_enough_to_test(tmp_path):
    card = write_classes(tmp_path / "own", ["dog"], card=replace(CARD, classes=("cat", "dog")))
    assert load_split(card, tmp_path, "test").labels.tolist() == [1]


def test_a_class_that_the_training_set_lacks_is_an_error(tmp_path):
    card = replace(write_classes(tmp_path / "own", "ac", "train"), num_classes=3, classes=("a", "b", "c"))
    with pytest.raises(InputError, match="train/b holds no images"):
        load_split(card, tmp_path, "train")


def test_a_folder_that_is_no_class_of_the_card(tmp_path):
    card = replace(write_classes(tmp_path / "own", "abx"), classes=("a", "b", "c"))
    with pytest.raises(InputError, match="none of the classes of the data card: x, where the card names a, b, c;"):
        load_split(card, tmp_path, "test")
    (tmp_path / "own" / "test" / "x" / "0.png").rename(tmp_path / "own" / "test" / "x" / "._0.png")
    notes = load_split(card, tmp_path, "test").notes
    assert f"Folders without images in {tmp_path}/own/test are left out: x." in notes


def test_a_folder_beside_the_classes_without_images_is_no_class(tmp_path):
    card = write_classes(tmp_path / "own", "ab")
    (tmp_path / "own" / "test" / "__MACOSX").mkdir()
    split = load_split(card, tmp_path, "test")
    assert split.labels.tolist() == [0, 1] and any("left out: __MACOSX" in note for note in split.notes)


@pytest.mark.parametrize("card_form, folder_form", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_compared_in_one_unicode_form(tmp_path, card_form, folder_form):
    names = [unicodedata.normalize(folder_form, name) for name in ("café", "zoë")]
    card = replace(write_classes(tmp_path / "own", names))
    path = tmp_path / "card.yaml"
    replace(card, classes=tuple(unicodedata.normalize(card_form, name) for name in names)).to_yaml(path)
    assert load_split(DatasetCard.from_yaml(path), tmp_path, "test").labels.tolist() == [0, 1]
    write_classes(tmp_path / "own", names, "train")
    (tmp_path / "own").rename(tmp_path / unicodedata.normalize(folder_form, "öwn"))
    derived = resolve_card(unicodedata.normalize(card_form, "öwn"), tmp_path, may_derive=True)
    assert len(load_split(derived, tmp_path, "train")) == 2
    (tmp_path / unicodedata.normalize(folder_form, "öwn")).rename(tmp_path / "own")
    assert derived.classes == ("café", "zoë") == DatasetCard.from_yaml(tmp_path / "own" / "card.yaml").classes


def test_folders_that_differ_in_their_unicode_form_are_one_class(tmp_path):
    write_classes(tmp_path / "own", [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")] + ["x"])
    split = load_split(CARD, tmp_path, "test")
    assert split.labels.tolist() == [0, 0, 1]
    place = tmp_path / "own" / "test"
    assert f"Folders of {place} that differ in the Unicode form of their names are one class: café." in split.notes


def test_a_name_in_another_encoding_is_refused(tmp_path):
    write_classes(tmp_path / "own", "xy")
    os.mkdir(os.fsencode(tmp_path / "own" / "test") + b"/caf\xe9")
    with pytest.raises(InputError, match=r"'.*test/caf\\udce9' is not in UTF-8; rename it"):
        load_split(CARD, tmp_path, "test")


def test_words_of_a_card_stay_words(tmp_path):
    path = tmp_path / "card.yaml"
    names = ["no", "yes", "On", "010", "1_0", "0x1F", "1e3", "1:30", "~", "null", "2024-01-01", "3.0"]
    for text in (f"[{', '.join(names)}]", "".join(f"\n- {name}" for name in names)):
        path.write_text(
            "name: 2024\nchannels: 1\nheight: 4\nwidth: 4\nflip: no\nmean: [0.5]\nstd: [0.2]\n"
            f"num_classes: {len(names)}\nclasses: {text}\n"
        )
        card = DatasetCard.from_yaml(path)
        assert card.classes == tuple(names) and card.name == "2024" and card.flip is False
        card.to_yaml(path)
        assert DatasetCard.from_yaml(path) == card


@pytest.mark.parametrize(
    "text, message",
    [
        ("{0: cat, 1: dog}", "classes must be a list of names"),
        ("cat dog", "classes must be a list of names"),
        ("[[cat], dog]", "classes must be a list of names"),
        ("['', dog]", "classes must be a list of names"),
        ("[cat, cat]", "names the class cat more than once"),
        ("[cat]", "names 1 classes but num_classes is 2"),
    ],
)
def test_classes_that_are_no_list_of_names(tmp_path, text, message):
    path = tmp_path / "card.yaml"
    CARD.to_yaml(path)
    path.write_text(path.read_text().replace("classes: []", f"classes: {text}"))
    with pytest.raises(InputError, match=message):
        DatasetCard.from_yaml(path)


# What is left out is counted


def test_images_in_folders_below_the_class_are_read_and_other_files_counted(tmp_path):
    root = tmp_path / "own" / "test"
    written = write_folder(tmp_path / "own", splits=("test",), count=2)
    write_image(root / "cat" / "more" / "deep" / "2.png", random_pixels(9, (6, 5, 3)))
    (root / "cat" / "loop").symlink_to(root / "cat")
    write_image(root / "cat" / ".ipynb_checkpoints" / "0.png", random_pixels(9, (6, 5, 3)))
    write_image(root / "stray.png", random_pixels(9, (6, 5, 3)))
    (root / "emu").symlink_to(tmp_path / "nowhere")
    for name in ("a.heic", "b.heic", "c.npy", "README"):
        (root / "dog" / name).write_bytes(b"x")
    split = load_split(CARD, tmp_path, "test")
    assert split.labels.tolist() == [0, 0, 0, 1, 1] and len(written) == 4
    assert torch.equal(split.images[2].permute(1, 2, 0), torch.from_numpy(random_pixels(9, (6, 5, 3))))
    (note,) = (note for note in split.notes if "Not read" in note)
    assert note.startswith(f"Not read in {root}: 2 .heic, ")
    assert all(
        kind in note
        for kind in ("1 .npy", "1 without a suffix", "1 hidden", "1 outside the class folders", "1 broken links")
    )


def test_images_that_tiny_imagenets_annotations_lack_are_counted(tmp_path):
    root = tmp_path / "tiny-imagenet-200" / "val"
    for number in range(3):
        write_image(root / "images" / f"{number}.png", np.zeros((64, 64, 3), np.uint8))
    (root / "val_annotations.txt").write_text("0.png\tn1\n1.png\tn2\n")
    card = DatasetCard("tiny_imagenet", 3, 64, 64, 2, (0.5,) * 3, (0.25,) * 3)
    notes = " ".join(load_split(card, tmp_path, "test").notes)
    assert f"Not read in {root}: 1 without an annotation." in notes


def test_a_class_of_files_that_are_not_read(tmp_path):
    write_folder(tmp_path / "own", splits=("train",), count=1)
    (tmp_path / "own" / "train" / "cat" / "0.png").rename(tmp_path / "own" / "train" / "cat" / "0.heic")
    with pytest.raises(InputError, match=r"cat holds no images \(not read in .*train: 1 .heic\); add images"):
        derive_card("own", tmp_path / "own")


def test_the_other_folder_for_testing_is_mentioned(tmp_path):
    write_folder(tmp_path / "own", splits=("test", "val"))
    assert any(note.endswith("own/val is not read.") for note in load_split(CARD, tmp_path, "test").notes)


def test_frames_after_the_first_are_counted(tmp_path):
    frames = [Image.new("RGB", (5, 6), colour) for colour in ("red", "blue")]
    for name in ("cat", "dog"):
        (tmp_path / "own" / "test" / name).mkdir(parents=True)
        frames[0].save(tmp_path / "own" / "test" / name / "0.gif", save_all=True, append_images=frames[1:])
    split = load_split(CARD, tmp_path, "test")
    assert split.images[:, :, 0, 0].tolist() == [[255, 0, 0]] * 2
    assert any("2 of 2 images in" in note and "without their further frames" in note for note in split.notes)


def test_a_file_of_another_format_than_its_name_is_read_but_not_as_one_without_a_signature(tmp_path):
    write_folder(tmp_path / "own", splits=("test",))
    path = tmp_path / "own" / "test" / "cat" / "0.png"
    Image.new("RGB", (5, 6), "red").save(path, format="GIF")
    assert load_split(CARD, tmp_path, "test").images[0, :, 0, 0].tolist() == [255, 0, 0]
    Image.new("RGB", (5, 6), "red").save(path, format="TGA")
    with pytest.raises(InputError, match="cannot read the image"):
        load_split(CARD, tmp_path, "test")


# Torchvision's files


@pytest.mark.parametrize("place", ["", "mnist"])
def test_mnist_files_of_torchvision(tmp_path, place):
    images, labels = random_pixels(0, (20, 28, 28)), np.arange(20, dtype=np.uint8) % 10
    write_mnist(tmp_path / place / "MNIST" / "raw", images, labels)
    split = load_split(CARDS["mnist"], tmp_path, "test", download=False)
    assert np.array_equal(split.images[:, 0].numpy(), images) and split.labels.tolist() == labels.tolist()
    assert split.labels.dtype == torch.int64


def test_torchvision_shape_that_differs_from_the_card(tmp_path):
    images, labels = random_pixels(0, (20, 28, 28)), np.arange(20, dtype=np.uint8) % 10
    write_mnist(tmp_path / "MNIST" / "raw", images, labels)
    card = DatasetCard("mnist", 1, 32, 32, 10, (0.5,), (0.25,))
    with pytest.raises(InputError, match=r"shape \(1, 28, 28\).* states \(1, 32, 32\)"):
        load_split(card, tmp_path, "test", download=False)


@pytest.mark.parametrize(
    "name, files",
    [
        ("mnist", "MNIST/raw/t10k-*-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw/t10k-*-ubyte"),
        ("svhn", "test_32x32.mat"),
        ("cifar10", "cifar-10-batches-py/test_batch"),
        ("cifar100", "cifar-100-python/test"),
    ],
)
def test_absent_torchvision_files(tmp_path, name, files):
    with pytest.raises(InputError, match="looked for .* torchvision's .*--data_root.*--eval none") as caught:
        load_split(CARDS[name], tmp_path, "test", download=False)
    assert f"torchvision's files {files} in {tmp_path} " in str(caught.value) and "\n" not in str(caught.value)


def test_failed_download(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(InputError, match="download failed: .*no route to host.*--data_root"):
        load_split(CARDS["cifar10"], tmp_path, "train")


# Cards of user-defined data sets


def test_unknown_data_set_names_the_nearest(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(OptionError, match="nearest: cifar10"):
        resolve_card("cifar1O", tmp_path, may_derive=True)
    with pytest.raises(OptionError, match="nearest: flowers"):
        resolve_card("flower", tmp_path)


@pytest.mark.parametrize("shape, channels", [((6, 5, 3), 3), ((6, 5), 1)])
def test_derived_card_equals_numpy(tmp_path, shape, channels, capsys):
    written = write_folder(tmp_path / "own", shape=shape)
    card = resolve_card("own", tmp_path, may_derive=True)
    pixels = np.stack([p for (split, *_), p in written.items() if split == "train"]) / 255
    pixels = pixels.reshape(-1, channels)
    assert (card.name, card.shape, card.num_classes) == ("own", (channels, 6, 5), 2)
    assert card.mean == pytest.approx(pixels.mean(0), abs=1e-6)
    assert card.std == pytest.approx(pixels.std(0), abs=1e-6)
    assert DatasetCard.from_yaml(tmp_path / "own" / "card.yaml") == card
    assert "card.yaml" in capsys.readouterr().out


def test_card_needs_no_images_once_written(tmp_path):
    write_folder(tmp_path / "own", splits=("train",))
    card = resolve_card("own", tmp_path, may_derive=True)
    (tmp_path / "own" / "train").rename(tmp_path / "gone")
    assert resolve_card("own", tmp_path) == card


def test_a_card_in_a_renamed_folder_takes_its_name(tmp_path):
    (tmp_path / "renamed").mkdir()
    CARD.to_yaml(tmp_path / "renamed" / "card.yaml")
    assert resolve_card("renamed", tmp_path).name == "renamed"


def test_distillation_derives_no_card(tmp_path):
    write_folder(tmp_path / "own")
    with pytest.raises(InputError, match="train_scratch.py --dataset own.*--card"):
        resolve_card("own", tmp_path)
    assert not (tmp_path / "own" / "card.yaml").exists()


def test_card_is_derived_from_evenly_spaced_files(tmp_path, monkeypatch):
    for name, grey in (("black", 0), ("white", 255)):
        for number in range(6):
            write_image(tmp_path / "train" / name / f"{number}.png", np.full((4, 4), grey, np.uint8))
    monkeypatch.setattr("datafree.datasets.loading.CARD_SAMPLE", 4)
    assert derive_card("own", tmp_path)[0].mean == (0.5,)


def test_one_grey_image_does_not_make_the_card_grey(tmp_path, capsys):
    write_folder(tmp_path / "own", splits=("train",))
    Image.fromarray(np.full((6, 5), 90, np.uint8)).save(tmp_path / "own" / "train" / "cat" / "0.png")
    card = resolve_card("own", tmp_path, may_derive=True)
    assert card.channels == 3
    told = f"1 of 6 images in {tmp_path}/own/train were converted from grey to colour."
    assert told in capsys.readouterr().out and told in load_split(card, tmp_path, "train").notes


def test_the_size_of_a_derived_card_is_the_most_common_one(tmp_path, capsys):
    write_folder(tmp_path / "own", splits=("train",))
    write_image(tmp_path / "own" / "train" / "cat" / "0.png", random_pixels(0, (9, 9, 3)))
    card = resolve_card("own", tmp_path, may_derive=True)
    assert card.shape == (3, 6, 5)
    printed = capsys.readouterr().out
    assert "2 different sizes; 5x6 is the most common, with 5 of 6 images" in printed and "--image_size" in printed
    assert "1 of 6 images in" in printed and "resized to 5x6" in printed


def test_photographs_need_a_size_and_do_not_fill_the_memory(tmp_path, monkeypatch):
    for number in range(40):
        grey = np.full((600, 800, 3), number % 20, np.uint8)
        write_image(tmp_path / "own" / "train" / f"{number % 2}" / f"{number}.png", grey)
    with pytest.raises(InputError, match="have up to 800 pixels a side, most of them 800x600, .* give --image_size N"):
        resolve_card("own", tmp_path, may_derive=True)
    assert not (tmp_path / "own" / "card.yaml").exists()
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    tracemalloc.start()
    card = resolve_card("own", tmp_path, may_derive=True, image_size=600)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert card.shape == (3, 600, 600) and card.mean == pytest.approx((9.5 / 255,) * 3, abs=1e-6)
    assert peak < 15 * 600 * 600 * 3  # of the 40 images, or more than that of the numbers of their pixels


def test_the_image_size_replaces_that_of_a_card(tmp_path):
    CARD.to_yaml(tmp_path / "card.yaml")
    assert resolve_card("own", tmp_path, tmp_path / "card.yaml", image_size=8).shape == (3, 8, 8)
    assert resolve_card("imagenet", tmp_path, image_size=64).shape == (3, 64, 64)
    write_folder(tmp_path / "own", splits=("test",))
    split = load_split(replace(CARD, height=8, width=8), tmp_path, "test")
    assert split.images.shape == (6, 3, 8, 8) and any("6 of 6" in note and "8x8" in note for note in split.notes)
    with pytest.raises(InputError, match="digits hold images of shape .*--image_size for folders"):
        load_split(resolve_card("digits", tmp_path, image_size=32), tmp_path, "test")


def test_a_card_of_other_channels_than_files_have(tmp_path):
    write_folder(tmp_path / "own", splits=("test",))
    card = DatasetCard("own", 4, 6, 5, 2, (0.5,) * 4, (0.25,) * 4)
    for size in (6, 200):  # in memory, and on demand
        with pytest.raises(InputError, match="1 or 3 channels but the data card own states 4"):
            load_split(replace(card, height=size, width=size), tmp_path, "test")


# Splits


def numbered_split(size=7):
    images = torch.arange(size, dtype=torch.uint8).view(size, 1, 1, 1)
    return TensorSplit(images, torch.arange(size), size)


def test_batches_are_in_order_and_in_0_to_1():
    batches = list(numbered_split().batches(3))
    assert [labels.tolist() for _, labels in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(torch.cat([images for images, _ in batches]).flatten(), torch.arange(7.0) / 255)


def test_every_pass_has_each_image_once_in_a_new_order():
    split = numbered_split().to("cpu")
    sampled = torch.cat([split.sample(3)[1] for _ in range(14)])
    passes = sampled.view(6, 7)
    assert all(sorted(one.tolist()) == list(range(7)) for one in passes)
    assert len({tuple(one.tolist()) for one in passes}) > 1


def test_images_stay_with_their_labels_and_may_exceed_a_pass():
    images, labels = numbered_split().sample(20)
    assert torch.equal((images.flatten() * 255).round().long(), labels) and len(labels) == 20


def test_stream_depends_on_the_seed_alone():
    sampled = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        sampled.append(numbered_split(50).sample(50)[1])
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


def test_stream_resumes():
    split, again = numbered_split(), numbered_split()
    split.sample(10)
    state = split.state_dict()
    expected = [split.sample(4)[1].tolist() for _ in range(5)]
    again.sample(2)
    again.load_state_dict(state)
    assert [again.sample(4)[1].tolist() for _ in range(5)] == expected
    with pytest.raises(InputError, match="7 images but there are 8"):
        numbered_split(8).load_state_dict(state)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    for index in range(6):
        shape = [(150, 200, 3), (200, 150, 3), (128, 144, 3)][index % 3]
        write_image(root / "own" / "val" / f"class{index // 3}" / f"{index}.png", random_pixels(index, shape))
    return root


LARGE_CARD = DatasetCard("own", 3, 128, 144, 2, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_large_images_are_decoded_on_demand(photographs, workers):
    split = load_split(LARGE_CARD, photographs, "test", workers=workers)
    assert isinstance(split, LazySplit) and len(split) == 6 and split.num_classes == 2
    images, labels = (torch.cat(parts) for parts in zip(*split.batches(4)))
    assert images.shape == (6, 3, 128, 144) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(
        (images[2] * 255).round().byte().permute(1, 2, 0), torch.from_numpy(random_pixels(2, (128, 144, 3)))
    )


def test_grey_files_among_large_images_are_counted(tmp_path):
    for number in range(4):
        pixels = random_pixels(number, (128, 144, 3) if number else (128, 144))
        write_image(tmp_path / "own" / "test" / f"class{number % 2}" / f"{number}.png", pixels)
    split = load_split(LARGE_CARD, tmp_path, "test", workers=0)
    assert f"1 of 4 images sampled from {tmp_path}/own are converted from grey to colour." in split.notes
    assert next(split.batches(4))[0].shape == (4, 3, 128, 144)


def test_evaluation_crop_equals_torchvisions(photographs):
    card = DatasetCard("own", 3, 130, 130, 2, (0.5,) * 3, (0.25,) * 3)
    images, _ = next(load_split(card, photographs, "test", workers=0).batches(1))
    transforms = torchvision.transforms
    oracle = transforms.Compose([transforms.Resize(149), transforms.CenterCrop(130), transforms.ToTensor()])
    assert torch.allclose(images[0], oracle(Image.open(photographs / "own" / "val" / "class0" / "0.png")))


def test_lazy_stream_resumes_with_its_crops(photographs):
    split, again = (load_split(LARGE_CARD, photographs, "test", workers=w) for w in (1, 0))
    labels = torch.cat([split.sample(2)[1] for _ in range(3)])
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    state, random_state = split.state_dict(), torch.get_rng_state()
    images, labels = split.sample(5)
    again.load_state_dict(state)
    images_again, labels_again = again.sample(5)
    assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    assert images.shape == (5, 3, 128, 144) and torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_large_image_is_one_sentence(tmp_path, workers):
    write_folder(tmp_path / "own", shape=(128, 144, 3))
    path = tmp_path / "own" / "test" / "dog" / "1.png"
    path.write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        list(load_split(LARGE_CARD, tmp_path, "test", workers=workers).batches(3))
    assert str(caught.value) == f"cannot read the image {path} (unknown format); replace or remove it"


# A loader of the card's own


LOADER = """
import numpy as np

def load(data_root, split):
    pixels = np.load(data_root / f"{split}.npz")
    return pixels["images"], pixels["labels"]

def wrong(data_root, split):
    return np.zeros((2, 3, 6, 5), np.float32), [0, 1]
"""


def test_a_card_may_name_the_function_that_loads_its_images(tmp_path):
    (tmp_path / "mine.py").write_text(LOADER)
    images, labels = random_pixels(0, (4, 3, 6, 5)), np.array([0, 1, 1, 0])
    np.savez(tmp_path / "test.npz", images=images, labels=labels)  # the training split is absent
    card = replace(CARD, loader=f"{tmp_path / 'mine.py'}:load")
    card.to_yaml(tmp_path / "card.yaml")
    split = load_split(DatasetCard.from_yaml(tmp_path / "card.yaml"), tmp_path, "test")
    assert torch.equal(split.images, torch.from_numpy(images)) and split.labels.tolist() == [0, 1, 1, 0]
    with pytest.raises(InputError, match="mine.py:load failed for the split train: FileNotFoundError"):
        load_split(card, tmp_path, "train")
    with pytest.raises(InputError, match=r"wrong returned images \(2, 3, 6, 5\) of torch.float32"):
        load_split(replace(CARD, loader=f"{tmp_path / 'mine.py'}:wrong"), tmp_path, "test")
    with pytest.raises(InputError, match="states"):
        load_split(replace(card, height=7), tmp_path, "test")


def test_a_loader_comes_before_folders_and_may_return_any_view(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\ndef load(data_root, split):\n"
        "    return np.load(data_root / 'images.npy', mmap_mode='r')[..., ::-1].transpose(0, 3, 1, 2), (1, 0)\n"
    )
    write_folder(tmp_path / "own", splits=("test",))
    pixels = random_pixels(0, (2, 6, 5, 3))
    np.save(tmp_path / "images.npy", pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = load_split(replace(CARD, loader=f"{tmp_path / 'mine.py'}:load"), tmp_path, "test")
    assert np.array_equal(split.images.permute(0, 2, 3, 1).numpy(), pixels[..., ::-1]) and split.labels.tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("given", [[0, 0, 2], [0, 3, 1], [-1, 0, 1]])
def test_labels_of_a_loader(tmp_path, given):
    (tmp_path / "mine.py").write_text(LOADER)
    np.savez(tmp_path / "test.npz", images=random_pixels(0, (3, 3, 6, 5)), labels=given)
    card = replace(CARD, num_classes=3, loader=f"{tmp_path / 'mine.py'}:load")
    if max(given) > 2 or min(given) < 0:
        with pytest.raises(InputError, match=f"labels of .* from {min(given)} to {max(given)} but .* 3 classes"):
            load_split(card, tmp_path, "test")
    else:
        assert "mine.py:load have no images of 1 of 3 classes: 1." in load_split(card, tmp_path, "test").notes[0]
