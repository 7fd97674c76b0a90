"""The models, data sets and methods that the programs know by name.

To register another one, add a line to ``registry.py`` at the top of the repository: ``MODELS["mynet"] = mynet`` with a
factory ``mynet(num_classes, in_channels=3)``, or a card with a function that loads its images:
``DATASETS["mine"] = DatasetCard("mine", 3, 32, 32, 10, mean, std, loader="path/to/file.py:load")``.
A method is a YAML file named after it: of distillation in ``configs/methods/``, of quantization in
``configs/quantization/``, of incremental learning in ``configs/incremental/``.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from datafree.datasets.cards import CARDS as DATASETS
from datafree.models import MODELS

if TYPE_CHECKING:
    from torch import nn

    from datafree.datasets.splits import LazySplit, TensorSplit

__all__ = ["DATASETS", "INCREMENTAL_METHODS", "METHODS", "MODELS", "QUANTIZATION_METHODS", "get_dataset", "get_model"]

HERE = Path(__file__).resolve().parent
CONFIGS = next(path for path in (HERE.parent / "configs", HERE / "configs") if (path / "methods").is_dir())  # installed
METHODS, QUANTIZATION_METHODS, INCREMENTAL_METHODS = (
    {path.stem: path for path in sorted((CONFIGS / folder).glob("*.yaml"))}
    for folder in ("methods", "quantization", "incremental")
)


def shipped(path: str | Path) -> str | Path:
    """``path``; or, if no such file is here, the one of the package that has this name in a checkout (configs/...)."""
    first, *rest = Path(path).parts or ("",)
    ours = CONFIGS.joinpath(*rest)
    return ours if first == CONFIGS.name and rest and not Path(path).exists() and ours.is_file() else path


def get_model(name: str, num_classes: int, pretrained: bool = False, *, in_channels: int = 3) -> "nn.Module":
    """The network called ``name``, as ``--teacher`` and ``--student`` name it, randomly initialised.

    It takes normalised images and returns logits (N, num_classes). pretrained: with the weights that its library
    brings; a registered network has none (``datafree.load`` reads those of a run). Raises OptionError for an unknown
    name and InputError for weights that cannot be had: see :func:`datafree.models.factory.build_model`.
    """
    from datafree.models.factory import build_model

    return build_model(name, num_classes, in_channels, pretrained)


def get_dataset(
    name: str, data_root: str | Path = "data"
) -> "tuple[int, TensorSplit | LazySplit, TensorSplit | LazySplit]":
    """Number of classes, training split and test split of the data set called ``name``, as ``--dataset`` names it.

    ``split.batches(n)`` yields images (n, C, H, W) in [0, 1] and labels (n,); ``split.sample(n)`` gives random ones.
    Raises InputError if there is no such data set.
    """
    from datafree.datasets.loading import load_split, resolve_card

    card = resolve_card(name, data_root, may_derive=True)
    return card.num_classes, load_split(card, data_root, "train"), load_split(card, data_root, "test")
