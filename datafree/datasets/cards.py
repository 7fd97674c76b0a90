"""Data cards: all that distillation needs to know about a data set in place of its training images."""

import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from datafree.errors import InputError, printable, shown
from datafree.files import write_text
from datafree.untrusted import Bounded, is_name, read_text

SMALLEST_STD = 1e-6
RANGES = {"channels": (1, 4096), "height": (1, 4096), "width": (1, 4096), "num_classes": (2, 10**6)}


@dataclass(frozen=True)
class DatasetCard:
    """Shape, number of classes and normalisation of a data set.

    height, width: in pixels. mean, std: one number per channel, for images in [0, 1]. flip: whether a
    horizontally mirrored image keeps its class. classes: their names in the order of the teacher's outputs, composed
    (Unicode's NFC); empty if they are unknown, and class folders are in the order of their names.
    loader: for images that are neither in class folders nor torchvision's, the name of a function, such as
    path/to/file.py:load: (data_root, split) -> uint8 images (N, C, H, W) and int64 labels (N,) of "train" or "test".
    Raises InputError for an invalid value.
    """

    name: str
    channels: int
    height: int
    width: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True
    classes: tuple[str, ...] = ()
    loader: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not is_name(self.name):
            raise InputError(
                f"a data card needs a name (short text without slashes or control characters), not {shown(self.name)}"
            )
        for key, (low, high) in RANGES.items():
            value = getattr(self, key)
            if type(value) is not int or not low <= value <= high:
                raise InputError(
                    f"{key} of the data card {self.name} must be a whole number of at least {low} (and at most "
                    f"{high:,}), not {shown(value)}"
                )
        for key in ("mean", "std"):
            values = getattr(self, key)
            if len(values) != self.channels:
                raise InputError(
                    f"{key} of the data card {self.name} has {len(values)} numbers but the card has "
                    f"{self.channels} channels; give one number per channel"
                )
            least = SMALLEST_STD if key == "std" else 0
            if not all(isinstance(v, (int, float)) and least <= v <= 1 for v in values):
                raise InputError(
                    f"{key} of the data card {self.name} is {shown(values)}; give it for images in [0, 1], with std "
                    f"above 0 (at least {SMALLEST_STD})"
                )
        if not isinstance(self.loader, str):
            raise InputError(f"loader of the data card {self.name} is the name of a function, not {shown(self.loader)}")
        if type(self.flip) is not bool:
            raise InputError(f"flip of the data card {self.name} must be true or false, not {shown(self.flip)}")
        if self.classes and len(self.classes) != self.num_classes:
            raise InputError(
                f"the data card {self.name} names {len(self.classes)} classes but num_classes is "
                f"{self.num_classes}; correct one of them"
            )
        for name in self.classes:
            if not name.isprintable():
                raise InputError(f"the data card {self.name} names the class {shown(name)}, which is not printable")
        twice = sorted(name for name, count in Counter(self.classes).items() if count > 1)
        if twice:
            raise InputError(
                f"the data card {self.name} names the class {twice[0]} more than once; correct its classes"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    def resized(self, image_size: int | None) -> "DatasetCard":
        """The card of the same images with this height and width in pixels; itself if none is given."""
        return replace(self, height=image_size, width=image_size) if image_size else self

    def to_yaml(self, path: str | Path) -> None:
        """Write the card to ``path``; raises InputError if the file cannot be written."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        write_text(path, text, after=", or give a card in another place with --card")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "DatasetCard":
        """Read a card written by :meth:`to_yaml` or by hand; raises InputError naming file and key."""
        values = _read_mapping(path)
        beside = Path(path).parent / str(values.get("loader", "")).rpartition(":")[0]
        if os.path.isfile(beside):  # a path in a card is relative to the card
            values["loader"] = f"{beside}:{values['loader'].rpartition(':')[2]}"
        return cls.from_mapping(values, str(path))

    @classmethod
    def from_mapping(cls, values: Mapping[Any, Any], place: str) -> "DatasetCard":
        """The card of these values by key; raises InputError naming ``place``, where they are from, and key."""
        values = dict(values)
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                near = get_close_matches(str(key), known, n=1) or known
                raise InputError(f"{place}: unknown key {shown(key)}; did you mean {' or '.join(near)}?")
        missing = [f.name for f in fields(cls) if f.name not in values and f.default is MISSING]
        if missing:
            raise InputError(f"{place}: {', '.join(missing)} missing; the keys of a data card are {', '.join(known)}")
        for key in ("mean", "std"):
            values[key] = _numbers(place, key, values[key])
        classes = values.get("classes")
        classes = () if classes is None else classes
        if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) and name for name in classes):
            raise InputError(
                f"{place}: classes must be a list of names in the order of the labels, not {shown(classes)}"
            )
        values["classes"] = tuple(map(composed, classes))
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None


def composed(name: str) -> str:
    """The name in Unicode's NFC, because archives of macOS spell an accent as a letter of its own."""
    return unicodedata.normalize("NFC", name)


def _read_mapping(path: str | Path) -> dict[Any, Any]:
    """The top level of a YAML file; its keys may be of any type."""
    try:
        values = yaml.load(read_text(path), _CardLoader)
    except OSError as error:
        raise InputError(f"cannot read the data card {path} ({error.strerror}); check --card") from error
    except Exception as error:  # its tags convert texts, which fails in many ways
        raise InputError(f"the data card {path} is not valid YAML ({printable(str(error))})") from error
    if not isinstance(values, dict):
        raise InputError(f"the data card {path} must consist of `key: value` lines")
    return values


class _CardLoader(Bounded, yaml.SafeLoader):
    """Leaves names as they are written (to YAML, `no` is false, `010` is 8 and `1_0` is 10) and refuses a key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        known: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem=f"a {key.id} cannot be a name", problem_mark=key.start_mark)
            if key.value in known:
                raise yaml.MarkedYAMLError(problem=f"it states {key.value} more than once", problem_mark=key.start_mark)
            known.add(key.value)
            if key.value == "name":
                _as_text(value)
            elif key.value == "classes" and isinstance(value, yaml.SequenceNode):
                for name in value.value:
                    _as_text(name)
        return super().construct_mapping(node, deep)


def _as_text(node: Any) -> None:
    if isinstance(node, yaml.ScalarNode):
        node.tag = "tag:yaml.org,2002:str"


def _numbers(place: str, key: str, values: Any) -> tuple[float, ...]:
    # PyYAML reads 1e-3 as a string, hence float() instead of a type check.
    if isinstance(values, (list, tuple)) and not any(isinstance(value, bool) for value in values):
        with suppress(TypeError, ValueError, OverflowError):
            return tuple(float(value) for value in values)
    raise InputError(f"{place}: {key} must be a list of one number per channel, not {shown(values)}")


DIGITS = tuple("0123456789")
# Not part of the cards: files of these data sets in class folders are taken in the folders' order, whatever they are
# called, and the options of a run name its card by a digest.
PUBLIC_CLASSES = {
    **{"digits": DIGITS, "mnist": DIGITS, "svhn": DIGITS},
    "cifar10": tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar100": tuple(
        """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()
    ),
}


def names_of(card: DatasetCard, folders: Sequence[str] = ()) -> tuple[str, ...]:
    """The name of each class of ``card``: its own, or that of its folder, or the public one, or else its number.

    folders: of the classes, in the order of their labels, if the images were found in such.
    """
    public = PUBLIC_CLASSES.get(card.name, ()) if not card.loader else ()
    known = card.classes or tuple(folders) or public
    return known if len(known) == card.num_classes else tuple(map(str, range(card.num_classes)))


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CARDS: dict[str, DatasetCard] = {
    card.name: card
    for card in (
        DatasetCard("digits", 1, 16, 16, 10, (0.3051,), (0.3188,), flip=False),
        DatasetCard("mnist", 1, 28, 28, 10, (0.1307,), (0.3081,), flip=False),
        DatasetCard("fashion_mnist", 1, 28, 28, 10, (0.2860,), (0.3530,)),
        DatasetCard("svhn", 3, 32, 32, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), flip=False),
        DatasetCard("cifar10", 3, 32, 32, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        DatasetCard("cifar100", 3, 32, 32, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        DatasetCard("tiny_imagenet", 3, 64, 64, 200, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
        DatasetCard("imagenet", 3, 224, 224, 1000, IMAGENET_MEAN, IMAGENET_STD),
    )
}
