"""Checkpoints: written whole or not at all, read without running code, weights in any usual wrapping."""

import argparse
import codecs
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datafree.errors import InputError

WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net")  # where a checkpoint may keep its weights
WRAPPERS = ("module.", "_orig_mod.")  # put before every name by DataParallel and by torch.compile
LAST_WEIGHTS = ("model_last.pth", "student_last.pth")  # of a run, and of one of an earlier version
PLAIN = (int, float, str, list, tuple)
# Plain values that training programs often save beside the weights: numpy's numbers, parsed options. Building them
# runs no code of the file's. numpy 1 and 2 name the same function differently.
_NUMBER = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    codecs.encode,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllFloat"]},
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"]},
    np.dtypes.BoolDType,
    (_NUMBER, "numpy.core.multiarray.scalar"),
    (_NUMBER, "numpy._core.multiarray.scalar"),
]


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write ``state`` beside ``path``, then put it in its place: ``path`` is always whole, old or new."""
    with _replacing(path) as beside, open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def link(source: str | Path, path: str | Path) -> None:
    """Let ``path`` hold what ``source`` holds now, as a hard link where the file system has them."""
    with _replacing(path) as beside:
        try:
            os.link(source, beside)  # safe, because save() replaces files and never writes into one
        except OSError:
            shutil.copyfile(source, beside)


def load(path: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint file, on the CPU; no code in the file is ever run. Raises InputError."""
    _check_readable(path)
    try:
        with torch.serialization.safe_globals(HARMLESS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of arbitrary bytes fails in arbitrary ways
        code = re.search(r"GLOBAL (\w[\w.]*\w)", str(error))
        if code:
            raise InputError(
                f"{path} contains a pickled {code[1]}; refused, nothing was executed: "
                "save it again as a dict of tensors, numbers and strings"
            ) from error
        size = f"{os.path.getsize(path):,} bytes"
        raise InputError(f"{path} is truncated or no torch checkpoint ({size}); copy or download it again") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}; a checkpoint or state_dict is a dict")
    return state


def require(state: dict[str, Any], *keys: str, path: str | Path) -> None:
    """Raise an InputError that names the first of ``keys`` which the checkpoint from ``path`` lacks."""
    for key in keys:
        if key not in state:
            raise InputError(
                f"checkpoint {path} has no '{key}' (found: {_few(state)}); "
                "it was not written by this program, or by another version"
            )


def weights_file(path: str | Path) -> Path:
    """The file of weights that ``path`` names: itself, or the last weights in the folder of a run.

    Raises InputError for a folder without one. Runs of earlier versions call the file student_last.pth.
    """
    if not Path(path).is_dir():
        return Path(path)
    for name in LAST_WEIGHTS:
        for found in (Path(path) / "checkpoints" / name, Path(path) / name):
            if found.is_file():
                return found
    inside = next(Path(path).glob(f"**/{LAST_WEIGHTS[0]}"), None)
    hint = f", such as {inside.parent.parent}" if inside else ""
    raise InputError(
        f"{path} is a folder without checkpoints/{LAST_WEIGHTS[0]}; name a file of weights or the folder of a run{hint}"
    )


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict in the file ``path``, and the plain values beside it (acc1, dataset, ...).

    The file is a state_dict, a checkpoint that holds one under a key of WEIGHT_KEYS, or safetensors; or the folder of
    a run is given. Raises InputError if it cannot be read or holds no weights.
    """
    path = weights_file(path)
    return _split(_load_safetensors(path) if path.suffix == ".safetensors" else load(path), path)


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load ``weights``, read from ``path``, into ``model``.

    The model changes only if every tensor fits and is finite; otherwise an InputError names what does not.
    """
    own = model.state_dict()
    while not weights.keys() & own.keys() and all(name.startswith(WRAPPERS) for name in weights):
        weights = {name.partition(".")[2]: tensor for name, tensor in weights.items()}
    _check_names(weights, own, path)
    _check_shapes(weights, own, path)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} is not finite (NaN or infinity); give other weights")
    model.load_state_dict(dict(weights))  # without its record of versions, torch fills absent counters


def stored_accuracy(path: str | Path, model: str) -> float | None:
    """The top-1 (%) that a file of weights of ``model`` states; None if it does not or cannot be read."""
    try:
        stored = load(path)
    except InputError:
        return None
    accuracy = stored.get("acc1") if stored.get("model") == model else None
    return accuracy if isinstance(accuracy, (int, float)) else None


@contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    """A path to write beside ``path``, which takes its place if the block succeeds and is removed if not."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)  # left by a killed run, perhaps as a link to a good file
        yield beside
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        # torch's own zip writer reports a write that fell short as a RuntimeError from inline_container.cc
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise InputError(
            f"could not write {path} ({getattr(error, 'strerror', None) or 'short write'}; "
            "disk full?); the previous checkpoint is untouched"
        ) from error
    finally:
        if beside.is_file():
            beside.unlink()


def _check_readable(path: str | Path) -> None:
    if not Path(path).is_file():
        renamed = Path(path).with_name(Path(path).name.replace("student_", "model_"))
        hint = f"it is called {renamed} now" if renamed.is_file() else "check the path"
        raise InputError(f"there is no file {path}; {hint}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; change its permissions")


def _load_safetensors(path: Path) -> dict[str, Any]:
    _check_readable(path)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:
        raise InputError(f"{path} is truncated or no safetensors file; copy or download it again") from error


def _split(contents: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict in a checkpoint, and the plain values (numbers, strings, lists) beside it."""
    if _is_state_dict(contents):
        return contents, {}
    for key in WEIGHT_KEYS:
        if _is_state_dict(contents.get(key)):
            return contents[key], {n: v for n, v in contents.items() if isinstance(v, PLAIN)}
    raise InputError(
        f"{path} holds no weights (found: {_few(contents)}); give a state_dict, bare or under "
        f"{', '.join(WEIGHT_KEYS)}, such as a run's model_last.pth"
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in value.items())
    )


def _check_names(weights: dict[str, Tensor], own: dict[str, Tensor], path: str | Path) -> None:
    # a batch counter that decides nothing, absent from files older than torch 0.4.1
    missing = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in weights if n not in own]
    if missing or unexpected:
        raise InputError(
            f"{path} does not fit the model: {len(missing)} tensors missing ({_few(missing)}), "
            f"{len(unexpected)} unexpected ({_few(unexpected)}); weights of another model?"
        )


def _check_shapes(weights: dict[str, Tensor], own: dict[str, Tensor], path: str | Path) -> None:
    wrong = {n: (tuple(t.shape), tuple(own[n].shape)) for n, t in weights.items() if t.shape != own[n].shape}
    if not wrong:
        return
    name, (theirs, ours) = next(iter(wrong.items()))
    # If one module alone differs, and in its outputs alone, nothing follows it: it is the classifier.
    one_module = len({n.rpartition(".")[0] for n in wrong}) == 1
    if one_module and all(len(a) == len(b) > 0 and a[1:] == b[1:] for a, b in wrong.values()):
        raise InputError(
            f"{path} has {theirs[0]} classes ({name}), the model {ours[0]}; "
            "give the data set of these weights, or other weights"
        )
    raise InputError(
        f"{path}: {name} is {theirs}, the model's is {ours} ({len(wrong)} tensors differ); "
        "weights of another architecture?"
    )


def _few(names: Iterable[Any]) -> str:
    texts = list(map(str, names))
    return (", ".join(texts[:3]) or "none") + (", ..." if len(texts) > 3 else "")
