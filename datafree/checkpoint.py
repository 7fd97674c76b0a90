"""Checkpoints: written whole or not at all, read without running code, weights in any usual wrapping."""

import argparse
import codecs
import errno
import json
import os
import re
import shutil
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datafree import distributed, fitting
from datafree.errors import InputError, MissingError, is_out_of_memory, short, shown
from datafree.files import replacing
from datafree.formats import entry_with, fault_in, is_safetensors, other_kind

WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net")  # where a checkpoint may keep its weights
# Where it may keep their average over the training: timm, torchvision's reference training, others.
AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "model_state_dict_ema", "ema_model", "net_ema", "ema")
KEY_OPTION = "--weights_key"
FACTS = "datafree"  # in the header of safetensors: what this program's files state beside the weights, as JSON
LAST = "last.pth"  # the one file that a run is resumed from; the others in its folder follow from it
LAST_WEIGHTS = ("model_last.pth", "student_last.pth")  # of a run, and of one of an earlier version
LONGEST_FACT = 100_000  # letters of a text beside the weights, or entries of a list
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
    """Write ``state`` beside ``path``, then put it in its place: ``path`` is always whole, old or new.

    Its folder is created, but not the one above it, which a run whose folder has vanished would else make anew. Of
    several processes the first one writes.
    """
    if distributed.rank():
        return
    with replacing(path) as beside, _short_writes(beside):
        beside.parent.mkdir(exist_ok=True)
        with open(beside, "xb") as file:
            torch.save(state, file)


def link(source: str | Path, path: str | Path) -> None:
    """Let ``path`` hold what ``source`` holds now, as a hard link where the file system has them.

    Of several processes the first one does this.
    """
    if distributed.rank():
        return
    with replacing(path) as beside:
        try:
            os.link(source, beside)  # safe, because save() replaces files and never writes into one
        except OSError:
            shutil.copyfile(source, beside)


def load(path: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint file, on the CPU; no code in the file is ever run. Raises InputError."""
    state = _load(path)
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}; save a dict instead, such as network.state_dict()")
    return state


def read_array(path: str | Path) -> Tensor:
    """The one array of numbers in a file of numpy.save, torch.save or safetensors, on the CPU. Raises InputError."""
    require_file(path)
    with open(path, "rb") as file:
        is_numpy = file.read(6) == b"\x93NUMPY"
    found = _load_numpy(path) if is_numpy else _load(path)
    if isinstance(found, dict) and len(found) == 1:
        found = next(iter(found.values()))
    if not torch.is_tensor(found) or is_odd(found):
        raise InputError(f"{path} holds no single dense array of real numbers; save one by numpy.save or torch.save")
    return found


def _load_numpy(path: str | Path) -> Any:
    """The tensor in a file of numpy.save; its array, if torch has no such numbers."""
    try:
        # Mapped, the file must be as long as its header states before anything is allocated.
        found = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # a file of arbitrary bytes
        _require_memory(error, path)
        raise InputError(f"{path} is no whole array of numbers, as numpy.save writes one; save it again") from error
    native = found.astype(found.dtype.newbyteorder("="))
    return torch.from_numpy(native) if native.dtype.kind in "fiub" and native.dtype.itemsize <= 8 else native


def _require_memory(error: Exception, path: str | Path) -> None:
    """Raise InputError if what failed was not the file ``path`` but the memory, or the number of files, to read it."""
    if is_out_of_memory(error):
        raise InputError(
            f"out of memory while {path} was read; end other programs, or raise the limit (ulimit -v); the file is "
            "untouched"
        ) from error
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EIO):
        raise InputError(f"cannot read {path} ({error.strerror}); the file is untouched") from error


def _load(path: str | Path) -> Any:
    """What a file of torch.save or safetensors holds, on the CPU; no code in the file is ever run."""
    require_file(path)
    if Path(path).suffix == ".safetensors" or is_safetensors(path):
        return _load_safetensors(path)
    if kind := other_kind(path):
        raise InputError(f"{path} is {kind}")
    try:
        fault = fault_in(path)
    except Exception as error:
        _require_memory(error, path)
        raise InputError(f"{path} {_broken(path)}") from error
    if fault:
        raise InputError(f"{path} {fault}; copy or download it again")
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about types of storage that are deprecated
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of arbitrary bytes fails in arbitrary ways
        _require_memory(error, path)
        code = re.search(r"GLOBAL (\w[\w.]*\w)", str(error))
        if code:
            entry = entry_with(path, code[1])
            where = f" in its entry {entry}" if entry else ""
            raise InputError(
                f"{path} contains a pickled {code[1]}{where}; refused, nothing was executed: save it again as a dict "
                "of tensors, numbers and strings; the weights alone are torch.save(network.state_dict(), FILE)"
            ) from error
        raise InputError(f"{path} {_broken(path)}") from error


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

    Raises MissingError for a folder without one. Runs of earlier versions call the file student_last.pth.
    """
    if not os.path.isdir(path):
        return Path(path)
    for name in LAST_WEIGHTS:
        for found in (Path(path) / "checkpoints" / name, Path(path) / name):
            if found.is_file():
                return found
    inside = next(Path(path).glob(f"**/{LAST_WEIGHTS[0]}"), None)
    hint = f", such as {inside.parent.parent}" if inside else ""
    raise MissingError(
        f"{path} is a folder without checkpoints/{LAST_WEIGHTS[0]}; name a file of weights or the folder of a run{hint}"
    )


def read_weights(
    path: str | Path, key: str = "", notes: list[str] | None = None, key_option: str = KEY_OPTION
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict in the file ``path``, and the plain values beside it (acc1, dataset, options, ...).

    The file is a state_dict, a checkpoint that holds one under a key of WEIGHT_KEYS or else of AVERAGED_KEYS, or
    safetensors; or the folder of a run is given. key: of the state_dict instead, with dots where it is nested, or a
    prefix of names in it. notes: gets a sentence if the file has several sets of weights, or more than tensors.
    key_option: the option that gives the key, for these sentences.
    Raises InputError if the file cannot be read or holds no weights.
    """
    path = weights_file(path)
    if (shard := re.search(r"-\d{5}-of-(\d{5})\.", path.name)) and int(shard[1]) > 1:
        raise InputError(f"{path} is one of {int(shard[1])} files that hold a set of weights; join them in one file")
    contents, notes = load(path), [] if notes is None else notes
    metadata = {} if _is_state_dict(contents) else {n: v for n, v in contents.items() if _is_fact(v)}
    if _are_facts(options := contents.get("options")):
        metadata["options"] = options
    return _tensors(_chosen(contents, key, path, notes, key_option), path, notes), metadata


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | Path, key_option: str = KEY_OPTION
) -> list[str]:
    """Load ``weights``, read from ``path``, into ``model`` -> what was done to their names, and what was left out.

    The model changes only if it gets every tensor, and only finite ones; otherwise an InputError names what does not
    fit. Names may have a prefix, or be those of an earlier version that their owner translates. Tensors that the model
    does not need are left out, unless they tell of another network.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    whole, tried = fitting.find_fits(weights, model, own)
    fit = _only_one(whole, path, key_option) if whole else min(tried, key=lambda fit: len(fit.missing(own)))

    def called(names: Iterable[str]) -> list[str]:
        return fitting.names_in_file(names, fit, weights)

    _check_types(fit, own, path)
    with fitting.restored_on_error(own):
        try:
            missing, extra = fitting.load(model, fit, own)
        except InputError as error:
            missing, wrong = fit.missing(own), fit.wrong_shapes(own)
            _check_names(missing, called(fit.extra(own) if missing else fitting.changes_the_network(fit, own)), path)
            _check_shapes(dict(zip(called(wrong), wrong.values())), path)
            raise InputError(f"{path} cannot be loaded into the model: {error}") from error
        _check_names(missing, called(extra if missing else fitting.changes_the_network(fit, own, extra)), path)
        for name, value in model.state_dict().items():
            if torch.is_tensor(value) and value.is_floating_point() and not torch.isfinite(value).all():
                raise InputError(f"{path}: {called([name])[0]} is not finite (NaN or infinity); give other weights")
    left_out = [*called(extra), *fit.outside]
    return fit.notes + [f"{len(left_out)} of its file's tensors left out: {_few(left_out)}"] * bool(left_out)


def stored_accuracy(path: str | Path, model: str) -> float | None:
    """The top-1 (%) that a file of weights of ``model`` states; None if it does not or cannot be read."""
    try:
        stored = load(path)
    except InputError:
        return None
    accuracy = stored.get("acc1") if stored.get("model") == model else None
    return accuracy if isinstance(accuracy, (int, float)) else None


def require_file(path: str | Path) -> None:
    """Raise InputError unless ``path`` is a file that may be read; MissingError if there is none."""
    if not os.path.isfile(path):
        renamed = Path(path).with_name(Path(path).name.replace("student_", "model_"))
        hint = f"it is called {renamed} now" if os.path.isfile(renamed) else "check the path"
        raise MissingError(f"there is no file {path}; {hint}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; change its permissions")


@contextmanager
def _short_writes(path: Path) -> Iterator[None]:
    """Turn the error of torch's zip writer for a write to ``path`` that fell short into one of the system."""
    try:
        yield
    except RuntimeError as error:  # from inline_container.cc, without the cause
        if "inline_container" not in str(error):
            raise
        with open(path, "ab", buffering=0) as file:
            file.write(bytes(1))  # which fails for that cause
        raise OSError(errno.ENOSPC, "short write") from error


def _broken(path: str | Path) -> str:
    """Why a file is none that torch wrote, or not all of it, and the way."""
    with open(path, "rb") as file:
        head = file.read(64)
    pointer = " (it is a pointer of Git LFS: git lfs pull)" * head.startswith(b"version https://git-lfs")
    size = f"{os.path.getsize(path):,} bytes"
    return f"is truncated or no torch checkpoint ({size}); copy or download it again{pointer}"


def _load_safetensors(path: str | Path) -> dict[str, Any]:
    try:
        from safetensors import safe_open
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        weights = load_file(path)
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(FACTS)
    except Exception as error:
        raise InputError(f"{path} is truncated or no safetensors file; copy or download it again") from error
    if stated is None:
        return weights
    try:
        return {**dict(json.loads(stated)), "state_dict": weights}
    except Exception as error:  # of whatever stands there
        raise InputError(f"the header of {path} states what this version does not know ({error})") from error


def _chosen(contents: dict[str, Any], key: str, path: Path, notes: list[str], key_option: str) -> dict[str, Any]:
    """The state_dict under ``key``, or under a usual one, or the whole of the file's ``contents``."""
    if unnamed := [name for name in contents if not isinstance(name, str)]:
        contents = {name: value for name, value in contents.items() if isinstance(name, str)}
        notes.append(f"{len(unnamed)} of its file's entries left out, whose keys are no names: {shown(unnamed[0])}")
    if key:
        return _named(contents, key, path, key_option)
    if _is_state_dict(contents):
        return contents
    found = [k for k in (*WEIGHT_KEYS, *AVERAGED_KEYS) if _is_state_dict(contents.get(k))]
    if not found and 2 * sum(map(torch.is_tensor, contents.values())) > len(contents):
        return contents  # with numbers among the tensors
    if not found:
        raise InputError(
            f"{path} holds no weights (found: {_few(contents)}); give a state_dict, bare or under "
            f"{', '.join(WEIGHT_KEYS)}, such as a run's model_last.pth, or name their key by {key_option}"
        )
    taken, shapes = contents[found[0]], _shapes(contents[found[0]])
    sets = {k: v for k, v in contents.items() if k != found[0] and isinstance(v, dict)}
    sets |= {f"{k}.{inner}": v for k in sets for inner, v in sets[k].items() if isinstance(v, dict)}
    others = [k for k, v in sets.items() if _is_state_dict(v) and not shapes - _shapes(v)]
    if others:
        averaged = [k for k in others if k.partition(".")[0] in AVERAGED_KEYS]
        which = "averages over the training" if averaged else "others of the same shapes"
        if "steps" in contents.get("ema_state_dict", ()):  # which swaps the two when it saves
            which, averaged = "if mmengine wrote it, these are the averages, and the weights that were averaged", []
        notes.append(
            f"its weights are those under {found[0]} in its file; {which} are under {', '.join(averaged or others)}, "
            f"which {key_option} can name"
        )
    elif found[0] in AVERAGED_KEYS:
        notes.append(f"its weights are those under {found[0]}, an average over the training, as its file has no others")
    return taken


def _named(contents: dict[str, Any], key: str, path: Path, key_option: str) -> dict[str, Any]:
    """What is at ``key`` in the contents: a dict there, with dots for what is nested, or names with that prefix."""
    value: Any = contents
    for part in [key] if key in contents else key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if _is_state_dict(value):
        return value
    for weights in (contents, *(contents.get(k) for k in (*WEIGHT_KEYS, *AVERAGED_KEYS))):
        if weights is not None and _is_state_dict(weights):
            start = key.removesuffix(".") + "."
            named = {name[len(start) :]: tensor for name, tensor in weights.items() if name.startswith(start)}
            if named:
                return named
    raise InputError(f"{path} holds no weights under {key} (found: {_few(contents)}); correct {key_option}")


def _tensors(weights: dict[str, Any], path: Path, notes: list[str]) -> dict[str, Tensor]:
    """``weights`` without entries that are no tensors; raises InputError if they are a quantised network's."""
    others = [name for name, value in weights.items() if not torch.is_tensor(value)]
    quantised = [name for name in others if "_packed_params" in name]
    quantised += [name for name, value in weights.items() if torch.is_tensor(value) and value.is_quantized]
    if quantised:
        raise InputError(
            f"{path} holds the weights of a quantised network ({_few(quantised)}), which has no gradients; give those "
            "that it had before its quantisation"
        )
    odd = [name for name, value in weights.items() if torch.is_tensor(value) and is_odd(value)]
    if odd:
        raise InputError(
            f"{path} holds tensors that are sparse, complex or without values ({_few(odd)}); save them as dense ones"
        )
    if others:
        notes.append(f"{len(others)} of its file's entries left out, which are no tensors: {_few(others)}")
        kept = OrderedDict((name, value) for name, value in weights.items() if torch.is_tensor(value))
        kept._metadata = getattr(weights, "_metadata", None)  # type: ignore[attr-defined]
        return kept
    return weights


def is_odd(tensor: Tensor) -> bool:
    """Whether no parameter can have its values: they are not dense, not there, not real or quantised."""
    return tensor.layout is not torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized


def has_odd_tensors(state: Any) -> bool:
    """Whether a tensor at any depth of dicts, lists and tuples is odd."""
    parts = [state]
    while parts:
        part = parts.pop()
        if torch.is_tensor(part) and is_odd(part):
            return True
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
    return False


def is_plain(value: Any) -> bool:
    """Whether it is a value of an option: nothing, a number, a text, or some of these."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return all(part is None or isinstance(part, (bool, int, float, str)) for part in parts)


def _is_fact(value: Any) -> bool:
    """Whether it is a number, a text or a list of these, of bounded size, which that of nested lists is not."""
    if isinstance(value, (list, tuple)):
        return len(value) <= LONGEST_FACT and not any(isinstance(v, (list, tuple)) or not _is_fact(v) for v in value)
    if isinstance(value, str):
        return len(value) <= LONGEST_FACT
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _are_facts(value: Any) -> bool:
    """Whether it is a dict of such values by name, as the options of a run are."""
    return (
        isinstance(value, dict)
        and len(value) <= LONGEST_FACT
        and all(isinstance(name, str) and (fact is None or _is_fact(fact)) for name, fact in value.items())
    )


def _is_state_dict(value: Any) -> bool:
    """Whether it is a dict of tensors by name; quantised networks and some layers have other entries, too."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    tensors = sum(torch.is_tensor(entry) for entry in value.values())
    return tensors > 0 and all(
        torch.is_tensor(entry) or "_packed_params" in name or name.endswith(("_extra_state", "zero_point", "scale"))
        for name, entry in value.items()
    )


def _shapes(weights: dict[str, Any]) -> Counter[tuple[int, ...]]:
    """How often each shape occurs, but those of counters."""
    return Counter(tuple(t.shape) for t in weights.values() if torch.is_tensor(t) and t.dim())


def _only_one(fits: list[fitting.Fit], path: str | Path, key_option: str) -> fitting.Fit:
    """The one of ``fits`` that is the network's own: without a prefix, or behind that of a wrapper."""
    plain = [fit for fit in fits if not fit.prefix] or [fit for fit in fits if fit.prefix in fitting.WRAPPERS]
    if len(plain) != 1 and len({fit.prefix for fit in fits}) > 1:
        raise InputError(
            f"{path} holds several sets of weights that fit, under {', '.join(fit.prefix for fit in fits)}; "
            f"name one of them by {key_option}"
        )
    fit = (plain or fits)[0]
    others = [other.prefix for other in fits if other.prefix and other.prefix != fit.prefix]
    if others:
        fit.notes.append(f"weights that fit as well are under {', '.join(others)}, which {key_option} can name")
    return fit


def _check_types(fit: fitting.Fit, own: dict[str, Tensor], path: str | Path) -> None:
    """Raise InputError for whole numbers, or numbers of 8 bits, in place of weights: their scales are elsewhere."""
    for name, tensor in fit.tensors.items():
        is_weight = name in own and own[name].is_floating_point() and own[name].dim() > 0
        if is_weight and (not tensor.is_floating_point() or tensor.dtype.itemsize == 1):
            raise InputError(
                f"{path} holds {name} as {str(tensor.dtype)[6:]}, as the weights of a quantised network, whose scales "
                "are apart; give those in floating point"
            )


def _check_names(missing: list[str], extra: list[str], path: str | Path) -> None:
    if missing or extra:
        raise InputError(
            f"{path} does not fit the model: {len(missing)} tensors missing ({_few(missing)}), "
            f"{len(extra)} unexpected ({_few(extra)}); weights of another model?"
        )


def _check_shapes(wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], path: str | Path) -> None:
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
    texts = [short(str(name)) for name in names]
    return (", ".join(texts[:3]) or "none") + (", ..." if len(texts) > 3 else "")
