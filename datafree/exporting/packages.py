"""The packages that the formats need."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec

from datafree.errors import InputError

PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),  # torch's own
    "safetensors": ("safetensors",),
}


def require_packages(formats: Iterable[str] = ("onnx",)) -> None:
    """Raise InputError if a package is missing that one of ``formats`` needs."""
    for kind in formats:
        if missing := [name for name in PACKAGES[kind] if find_spec(name) is None]:
            raise InputError(
                f"{kind} files need {', '.join(missing)}; run {sys.executable} -m pip install {' '.join(missing)}"
            )
