"""The tables of names that the programs know: models, data sets, methods.

A name of yours is one line here, as ``MODELS["mynet"] = mynet`` with a factory
``mynet(num_classes, in_channels=3)``, or ``DATASETS["mine"] = DatasetCard("mine", 3, 32, 32, 10, mean, std)``.
A method is a YAML file in ``configs/methods/``: its name is the file's.
"""

from pathlib import Path

from datafree.datasets.cards import CARDS as DATASETS
from datafree.models import MODELS

__all__ = ["DATASETS", "METHODS", "MODELS"]

METHODS = {path.stem: path for path in sorted((Path(__file__).resolve().parent / "configs" / "methods").glob("*.yaml"))}
