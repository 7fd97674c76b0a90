"""What a file of weights is, from its first bytes, and where it holds what torch.load refuses; nothing is executed.

A file that torch.load cannot read need not be broken.
"""

import os
import pickle
import zipfile
from collections import deque
from pathlib import Path
from typing import Any

from datafree.errors import short

SAVE_STATE_DICT = "save the state_dict of the network that it was made from by torch.save(network.state_dict(), FILE)"
ZIPPED = {  # an entry that only such an archive has -> what it is and the way
    "constants.pkl": "a TorchScript archive, whose code cannot be hooked: give the Python class of the network, and "
    "save torch.jit.load(FILE).state_dict() by torch.save",
    "serialized_exported_program.json": "a program of torch.export: give the Python class of the network, and save "
    "torch.export.load(FILE).state_dict by torch.save",
    "model.weights.h5": f"a Keras model: {SAVE_STATE_DICT}, in PyTorch",
}
WEB_PAGE = "a web page: download the file itself, by its own link or in a browser"
TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # of torch.save before 1.6
MAGIC = {  # (offset, bytes) -> what it is and the way
    (0, b"\x89HDF\r\n"): "an HDF5 file, as Keras writes them: convert it to a state_dict of PyTorch",
    (0, b"{"): "a JSON text, such as the index of weights in several files: save them as one by torch.save",
    (4, b"TFL3"): f"a TensorFlow Lite model: {SAVE_STATE_DICT}, in PyTorch",
    (0, b"GGUF"): f"a GGUF file: {SAVE_STATE_DICT}, in PyTorch",
    (0, b"\x93NUMPY"): "an array of NumPy: save a dict of tensors by torch.save",
    (0, b"\x1f\x8b"): "compressed by gzip: unpack it",
    (0, b"\xfd7zXZ"): "compressed by xz: unpack it",
    (0, b"BZh"): "compressed by bzip2: unpack it",
    (0, b"\x28\xb5\x2f\xfd"): "compressed by zstd: unpack it",
    (0, b"Rar!"): "a RAR archive: unpack it",
    (0, b"MATLAB 5.0"): "a MATLAB file: save a dict of tensors by torch.save",
    (0, b"<!DOCTYPE"): WEB_PAGE,
    (0, b"<!doctype"): WEB_PAGE,
    (0, b"<html"): WEB_PAGE,
    (0, b"7z\xbc\xaf\x27\x1c"): "a 7z archive: unpack it",
    (257, b"ustar"): "a tar archive: unpack it, and save it again by torch.save if it is one of torch before 0.2",
}


def is_safetensors(path: str | Path) -> bool:
    """Whether the file is safetensors, whatever its name: the length of a JSON header, and its first letters."""
    with open(path, "rb") as file:
        head = file.read(9)
    size = Path(path).stat().st_size
    return head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def other_kind(path: str | Path) -> str | None:
    """What a whole file of another kind than torch.save's is, and the way from there; None if it is none known."""
    if zipfile.is_zipfile(path):
        return _zipped(path)
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(-1, os.SEEK_END) if head else None
        last = file.read(1)
    for (offset, magic), words in MAGIC.items():
        if head[offset : offset + len(magic)] == magic:
            return words
    # ModelProto: field 1, the version as one byte; then field 2 or 8, texts: the producer, the operator sets.
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42"):
        return f"an ONNX model, which has no PyTorch modules: {SAVE_STATE_DICT}"
    if head[:1] == b"\x80" and TORCH_MAGIC not in head and last == b".":
        return "a pickle that torch.save did not write: save a dict of tensors by torch.save"
    return None


def fault_in(path: str | Path) -> str | None:
    """What is wrong with a file of torch.save before torch reads it, as a clause; None if nothing is, or none is known.

    Raises an exception of any kind for an archive that is not whole.
    """
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    fault = _fault_in_archive(path) if is_archive else None  # files of torch before 1.6 have no checksums
    return fault or _refused_in(path)


def _fault_in_archive(path: str | Path) -> str | None:
    """torch checks no checksum, and would inflate what torch.save never deflates, however large it becomes."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            return "is compressed, which torch.save does not do: unpack it, and save it again by torch.save"
        if sum(member.file_size for member in members) > os.path.getsize(path):
            return "states more bytes than it has"
        # All are 0 if torch was told not to compute them, by set_crc32_options.
        damaged = archive.testzip() if any(member.CRC for member in members) else None
    return damaged and f"is damaged: the checksum of its part {short(damaged)} is not that of its bytes"


def _zipped(path: str | Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except Exception:  # of arbitrary bytes
        return None
    names = {entry.rpartition("/")[2] for entry in entries}
    for entry, words in ZIPPED.items():
        if entry in names:
            return words
    if any(entry.endswith("archive_format") for entry in entries):
        return ZIPPED["serialized_exported_program.json"]
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays: save a dict of tensors by torch.save"
    return None if "data.pkl" in names else "a zip archive of other files: unpack it"


class _Inert:
    """Stands for an object of any class, and for the class, while a pickle is looked through: it does nothing."""

    origin = ""
    parts: list[Any]

    def __new__(cls, *parts: Any) -> "_Inert":
        made = super().__new__(cls)
        made.parts = list(parts)
        return made

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.append({key: value})

    def append(self, part: Any) -> None:
        self.parts.append(part)


class _Entries(dict[Any, Any]):
    """Stands for an OrderedDict, whose attributes do not matter."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Refused(Exception):
    """Of what a pickle asks for and torch would do; the message says what that is."""


def _encode(text: str, encoding: str = "") -> bytes:
    if encoding not in ("latin1", "latin-1"):  # punycode and idna hang on long texts
        raise _Refused("has a text encoded by another codec than NumPy's latin1")
    return text.encode("latin1")


def _bytes(*given: Any) -> None:
    if any(isinstance(part, int) for part in given):
        raise _Refused("asks for memory by a number of bytes")


class _Reader(pickle._Unpickler):  # in Python: the one in C fills memory up to the largest number of an entry
    """Reads a pickle without importing or calling what it names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        if (module, name) in (("builtins", "bytearray"), ("__builtin__", "bytearray")):
            return _bytes
        return _Entries if name == "OrderedDict" else type("_Inert", (_Inert,), {"origin": f"{module}.{name}"})

    def persistent_load(self, storage: Any) -> None:
        pass


def _contents(path: str | Path) -> Any:
    """What torch.save wrote, with objects that do nothing in place of others; any exception if that fails."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = next(entry for entry in archive.namelist() if entry.rpartition("/")[2] == "data.pkl")
            return _Reader(archive.open(pickled)).load()
    with open(path, "rb") as file:
        reader = _Reader(file)
        return [reader.load() for _ in range(4)][-1]  # magic number, protocol, machine, contents


def _refused_in(path: str | Path) -> str | None:
    """What the pickle in a file of torch.save asks for without need, of what torch allows: codecs.encode, which NumPy's
    bytes need, with any encoding, and bytearray, with any number. None if it does not."""
    try:
        _contents(path)
    except _Refused as refused:
        return f"{refused}; refused, nothing was executed"
    except Exception:  # of arbitrary bytes, which torch.load refuses, too
        return None
    return None


def entry_with(path: str | Path, name: str) -> str:
    """The entry of the dict in a file of torch.save, with dots if it is nested, which has to do with what is called
    ``name`` (module.class); empty if that cannot be found out. Nothing that the file names is imported or executed."""
    try:
        contents = _contents(path)
    except Exception:  # of arbitrary bytes
        return ""
    places, seen = deque([("", contents)]), set()
    while places:
        place, value = places.popleft()
        if getattr(value, "origin", "") == name:
            return place
        if id(value) not in seen:
            seen.add(id(value))
            places.extend(_inside(place, value))
    return ""


def _inside(place: str, value: Any) -> list[tuple[str, Any]]:
    """The parts of a value with their places; those of an object or a list have its place."""
    if isinstance(value, dict):
        named = [(f"{place}.{key}".lstrip(".") if isinstance(key, str) else place, part) for key, part in value.items()]
        return named + [(place, key) for key in value]
    parts = vars(value).get("parts", ()) if isinstance(value, _Inert) else value
    return [(place, part) for part in parts] if isinstance(parts, (list, tuple, set, frozenset)) else []
