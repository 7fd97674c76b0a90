"""User-defined classes and functions, named ``path/to/file.py:name`` or ``package.module:name``; their code is run."""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from datafree import launch
from datafree.errors import InputError, cut, printable, short, shown
from datafree.untrusted import LONGEST_NAME, is_name

T = TypeVar("T")
# What a user's code may raise where it is called: also an attempt to end the program, perhaps with exit code 0.
FAILURES = (Exception, SystemExit, GeneratorExit)
LONGEST_LINE = 300  # characters of the line of an exception
_announced: set[str] = set()  # files and packages whose execution was announced
# Folder of files that were executed -> the modules in it that those in another folder have taken the names of.
_set_aside: dict[Path, dict[str, ModuleType]] = {}
CODE = "_code"  # ends the names of the digests of networks' code
MARK = re.compile(r"@[0-9a-f]{8}\b")  # on the name of a package that a user's file is in, see _import_in_package


def is_custom(name: str) -> bool:
    """Whether ``name`` is a user-defined object rather than a registered name."""
    return ":" in name


def load_object(name: str) -> Callable[..., Any]:
    """The function or class called ``name``.

    Raises InputError if the file or package cannot be imported, or does not define it.
    """
    source, _, attribute = name.rpartition(":")
    is_package = all(map(str.isidentifier, source.split(".")))
    if not attribute.isidentifier() or not (is_package or source.endswith(".py")):
        raise InputError(f"'{short(name)}' names no object; write path/to/file.py:name or package.module:name")
    if is_package and source.partition(".")[0] in sys.stdlib_module_names:
        raise InputError(
            f"'{short(name)}' is in Python's standard library, which has nothing of this kind and could end this "
            "program; a module of your own with that name is named by its file, path/to/file.py:name"
        )
    found = getattr(_import(source), attribute, None)
    if not callable(found):
        raise InputError(
            f"'{short(source)}' has no function or class '{short(attribute)}'; check the part of '{short(name)}' "
            "after the colon"
        )
    return found


def load_custom(name: str) -> Callable[..., Any]:
    """:func:`load_object` of a name that an option, a file of options or a data card gives.

    What the command line itself does not name was named in a file, perhaps by somebody else: this is said on stderr
    before the code is executed.
    """
    source = name.rpartition(":")[0]
    if source not in _announced and not any(word.endswith(name) for word in sys.argv):
        _announced.add(source)
        if launch.local_rank() == 0:
            print(f"Code of {short(source)} is executed: a file names it, the command line does not.", file=sys.stderr)
    return load_object(name)


def named_by_caller(name: str) -> None:
    """Let :func:`load_custom` execute the code of ``name`` without a word, as that of a name on the command line."""
    _announced.add(name.rpartition(":")[0])


def construct(name: str, built_in: Mapping[str, str], base: type[T], **parts: Any) -> T:
    """The object of the class called ``name``: one of ``built_in`` (name -> module:class), or a user-defined one.

    Raises InputError if a user-defined class cannot be loaded or constructed, or is not a subclass of ``base``.
    """
    made_by = load_object(built_in[name]) if name in built_in else load_custom(name)
    if isinstance(made_by, type) and not issubclass(made_by, base):
        raise InputError(f"{name} is not a subclass of {base.__name__}; name another class, or by another option")
    try:
        made = made_by(**parts)
    except InputError:
        raise
    except FAILURES as error:
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
    """The part of a name that can be part of a folder's name: nets-small for path/to/nets.py:small.

    Raises InputError if there is none.
    """
    source, _, attribute = name.rpartition(":")
    source = Path(source).stem if source.endswith(".py") else source.rpartition(".")[2]
    part = "-".join(part for part in (source, attribute) if part)
    if not is_name(part):
        raise InputError(
            f"{shown(name)} cannot be a part of the name of a folder, which takes up to {LONGEST_NAME} bytes without "
            "slashes and control characters; rename it"
        )
    return part


def code_digest(name: str) -> str:
    """Identifies a user-defined object by its short name and the hash of its file, wherever the file is."""
    found: Any = load_object(name)
    while isinstance(found, partial):
        found = found.func
    try:
        file = inspect.getsourcefile(found)
    except TypeError:
        raise InputError(f"'{short(name)}' is not written in Python; name a class or function that is") from None
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
    """Type and first line of an exception, cut, for a message of one sentence."""
    return cut(printable(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"), LONGEST_LINE)


def _import(source: str) -> ModuleType:
    """The module in a ``.py`` file, or of a package; a file is executed once."""
    is_file = source.endswith(".py")
    if is_file and not os.path.isfile(source):
        raise InputError(f"there is no file '{short(source)}'; check the path before the colon")
    try:
        return _import_file(Path(source).resolve()) if is_file else importlib.import_module(source)
    except FAILURES as error:
        # The mark is no part of what the user wrote.
        raise InputError(f"'{short(source)}' cannot be imported: {MARK.sub('', first_line(error))}") from error


def _import_file(path: Path) -> ModuleType:
    # The module's name is the full path: a file called random.py must not replace Python's own random.
    # Its state when it was read is part of the name, so that a file that changed since is read again.
    contents = path.read_bytes()
    dots = max((n.level for n in ast.walk(ast.parse(contents)) if isinstance(n, ast.ImportFrom)), default=0)
    _make_way_for(path.parent)
    with _on_path([str(path.parent)]):  # the file may import its neighbours
        if dots:
            return _import_in_package(path, _package_root(path, dots), digest(str(path).encode(), contents))
        name = f"{path}@{digest(contents)}"
        return sys.modules[name] if name in sys.modules else _execute(path, name)


@contextmanager
def beside(name: str) -> Iterator[None]:
    """Inside, code called ``name`` may import its neighbours, as it may where its file is executed."""
    source = name.rpartition(":")[0]
    with _on_path([str(Path(source).resolve().parent)] if source.endswith(".py") else []):
        yield


def _make_way_for(folder: Path) -> None:
    """Let a file in ``folder`` import its own neighbours, and not those of equal names that one elsewhere imported."""
    own = _set_aside.pop(folder, {})
    for top in [name for name in sys.modules if name.isidentifier()]:
        file = getattr(sys.modules[top], "__file__", None)
        root = Path(file).parent if file else folder
        root = root.parent if file and Path(file).name == "__init__.py" else root
        is_here = (folder / f"{top}.py").is_file() or (folder / top).is_dir()
        if is_here and root != folder and root in _set_aside:
            for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
                _set_aside[root][name] = sys.modules.pop(name)
    sys.modules.update(own)
    _set_aside[folder] = {}


@contextmanager
def _on_path(folders: list[str]) -> Iterator[None]:
    """Modules are found in ``folders``, too, while the block runs, and leave no bytecode there.

    Python takes bytecode to be that of a file whose size and second of change are the same, which may be another text.
    """
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path[:0] = folders
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        for folder in folders:
            sys.path.remove(folder)


def _package_root(path: Path, dots: int) -> Path:
    """The folder of the outermost package that ``path`` is in: which has __init__.py, or which its dots lead to."""
    root = path.parent
    while dots > 1 or (root.parent / "__init__.py").is_file():
        root, dots = root.parent, dots - 1
    return root


def _import_in_package(path: Path, root: Path, mark: str) -> ModuleType:
    """The module in ``path``, which imports others by dots, as a part of the package in the folder ``root``.

    The package has ``mark`` in its name, so that packages of equal names do not replace one another.
    """
    package = f"{root.name.replace('.', '_')}@{mark}"
    with _on_path([str(root.parent)]):
        if package not in sys.modules:
            if (root / "__init__.py").is_file():
                _execute(root / "__init__.py", package, [str(root)])
            else:
                sys.modules[package] = ModuleType(package)
                sys.modules[package].__path__ = [str(root)]
        return importlib.import_module(".".join([package, *path.relative_to(root).with_suffix("").parts]))


def _execute(path: Path, name: str, search: list[str] | None = None) -> ModuleType:
    """Execute the file ``path`` as the module ``name``. search: folders of its submodules, if it is a package."""
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=search)
    assert spec and spec.loader  # of a .py file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    words, sys.argv = sys.argv, sys.argv[:1]  # which are no options of a file that reads the command line
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.argv = words
    return module
