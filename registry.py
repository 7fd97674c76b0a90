"""The tables of names: models, data sets, methods. Add yours here, or by the decorators."""
from pathlib import Path

from datafree.datasets.cards import CARDS as DATASETS
from datafree.models import MODELS

ROOT = Path(__file__).resolve().parent
METHODS = {path.stem: path for path in sorted((ROOT / "configs" / "methods").glob("*.yaml"))}
