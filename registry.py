"""The models, data sets and methods that the programs know by name.

To register another one, add a line here: ``MODELS["mynet"] = mynet`` with a factory
``mynet(num_classes, in_channels=3)``, or a card with a function that loads its images:
``DATASETS["mine"] = DatasetCard("mine", 3, 32, 32, 10, mean, std, loader="path/to/file.py:load")``.
A method is a YAML file named after it: of distillation in ``configs/methods/``, of quantization in
``configs/quantization/``, of incremental learning in ``configs/incremental/``.
"""

from pathlib import Path

from datafree.datasets.cards import CARDS as DATASETS
from datafree.models import MODELS

__all__ = ["DATASETS", "INCREMENTAL_METHODS", "METHODS", "MODELS", "QUANTIZATION_METHODS"]

CONFIGS = Path(__file__).resolve().parent / "configs"
METHODS = {path.stem: path for path in sorted((CONFIGS / "methods").glob("*.yaml"))}
QUANTIZATION_METHODS = {path.stem: path for path in sorted((CONFIGS / "quantization").glob("*.yaml"))}
INCREMENTAL_METHODS = {path.stem: path for path in sorted((CONFIGS / "incremental").glob("*.yaml"))}
