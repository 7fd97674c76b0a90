"""User-defined classes and functions, named ``path/to/file.py:name`` or ``package.module:name`` on a command line."""

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from datafree.errors import InputError

T = TypeVar("T")


def is_custom(name: str) -> bool:
    """Whether ``name`` is a user-defined object rather than a registered name."""
    return ":" in name


def load_object(name: str) -> Callable[..., Any]:
    """The function or class called ``name``.

    Raises InputError if the file or package cannot be imported, or does not define it.
    """
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise InputError(f"'{name}' names no object; write path/to/file.py:name or package.module:name")
    found = getattr(_import(source), attribute, None)
    if not callable(found):
        raise InputError(
            f"'{source}' has no function or class '{attribute}'; check the part of '{name}' after the colon"
        )
    return found


def construct(name: str, built_in: Mapping[str, str], base: type[T], **parts: Any) -> T:
    """The object of the class called ``name``: one of ``built_in`` (name -> module:class), or a user-defined one.

    Raises InputError if a user-defined class cannot be loaded or constructed, or is not a subclass of ``base``.
    """
    made_by = load_object(built_in.get(name, name))
    if isinstance(made_by, type) and not issubclass(made_by, base):
        raise InputError(f"{name} is not a subclass of {base.__name__}; name another class, or by another option")
    try:
        made = made_by(**parts)
    except InputError:
        raise
    except Exception as error:
        if name in built_in:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{name} could not be constructed: {first_line(error)} (line {where.lineno} of {where.filename})"
        ) from error
    if not isinstance(made, base):
        raise InputError(f"{name} made a {type(made).__name__}; it must be a subclass of {base.__name__}")
    return made


def short_name(name: str) -> str:
    """The part of a name that can be part of a folder's name: nets-small for path/to/nets.py:small."""
    source, _, attribute = name.rpartition(":")
    source = Path(source).stem if source.endswith(".py") else source.rpartition(".")[2]
    return "-".join(part for part in (source, attribute) if part)


def code_digest(name: str) -> str:
    """Identifies a user-defined object by its short name and the hash of its file, wherever the file is."""
    found: Any = load_object(name)
    while isinstance(found, partial):
        found = found.func
    file = inspect.getsourcefile(found)
    return f"{short_name(name)}:{digest(Path(file).read_bytes() if file else b'')}"


def is_same_code(one: Any, other: Any) -> bool:
    """Whether two different values are of :func:`code_digest` and differ in the hash alone."""
    names = [re.fullmatch(r"(.+):[0-9a-f]{8}", str(value)) for value in (one, other)]
    return all(names) and len({name[1] for name in names if name}) == 1


def digest(*parts: bytes) -> str:
    """First 8 hex digits of the SHA-256 of the concatenated ``parts``."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:8]


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, for a message of one sentence."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _import(source: str) -> ModuleType:
    """The module in a ``.py`` file, or of a package; a file is executed once."""
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise InputError(f"there is no file '{source}'; check the path before the colon")
    try:
        return _import_file(Path(source).resolve()) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise InputError(f"'{source}' cannot be imported: {first_line(error)}") from error


def _import_file(path: Path) -> ModuleType:
    # The module's name is the full path: a file called random.py must not replace Python's own random.
    # Its state when it was read is part of the name, so that a file that changed since is read again.
    name = f"{path}@{digest(path.read_bytes())}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader  # of a .py file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
