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

TORCH_OF_ONNX = "2.7"  # the exporter of 2.6 fails on BatchNorm with today's onnxscript


def require_packages(formats: Iterable[str] = ("onnx",)) -> None:
    """Raise InputError if a package is missing that one of ``formats`` needs, or too old."""
    import torch  # late, because it takes seconds

    for kind in formats:
        if missing := [name for name in PACKAGES[kind] if find_spec(name) is None]:
            raise InputError(
                f"{kind} files need {', '.join(missing)}; run {sys.executable} -m pip install {' '.join(missing)}"
            )
        if kind == "onnx" and torch.__version__ < TORCH_OF_ONNX:
            raise InputError(
                f"onnx files need torch {TORCH_OF_ONNX} or newer, and this is {torch.__version__}; upgrade torch, or "
                "leave this format out"
            )
