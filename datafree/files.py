"""Files that are written whole or not at all, and what to do where they cannot be. No torch is imported."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datafree.errors import InputError

try:
    import fcntl
except ImportError:  # not on Windows; processes are then not kept apart
    fcntl = None  # type: ignore[assignment]

CONTINUE = ", then continue by --resume auto"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.EFBIG: "raise the limit of the size of files (ulimit -f)",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make its folder writable"),
    errno.ENOENT: "its folder has vanished: put it back",
    errno.EISDIR: "move the folder of that name away",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "move the file away that stands where its folder belongs"),
    errno.ENOTEMPTY: "move the folder of that name away",
}


@contextmanager
def writing(path: str | Path, remedy: str = "", after: str = CONTINUE) -> Iterator[None]:
    """Turn a failure of the block to write ``path`` into one sentence with its cause, and the remedy of that cause.

    remedy: instead, where it is the same for all causes. after: what to do then.
    """
    try:
        yield
    except OSError as error:
        what = remedy or REMEDIES.get(error.errno or 0, "check the disk") + after
        raise InputError(f"could not write {path} ({error.strerror or error}); {what}") from error


@contextmanager
def replacing(path: str | Path, after: str = CONTINUE) -> Iterator[Path]:
    """A path to write beside ``path``, which takes its place if the block succeeds and is removed if not.

    ``path`` is always whole, old or new, whatever ends this process or the machine. The name beside is new in each
    call, so that several processes may write one path. A write that fails is an InputError; see :func:`writing`.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(path, after=f"{after}; the previous file is untouched"):
            yield beside
            _flush(beside)
            os.replace(beside, path)
            with suppress(OSError):  # some network file systems cannot; the file is whole, if perhaps the old one
                _flush(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, after: str = CONTINUE) -> None:
    """Write ``text`` beside ``path``, then put it in its place."""
    with replacing(path, after) as beside:
        beside.write_text(text, encoding="utf-8")


def append(path: str | Path, content: bytes) -> None:
    """Add ``content`` to the end of a file, and wait until it is on the disk."""
    with open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def remove_left_over(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left beside the files ``name`` of ``folder``; to be called where nobody writes."""
    for path in folder.glob(f"{name}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError):
            path.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for this lock file, which is created; the system releases it.

    Where there are no locks, as on some network file systems, the block is entered at once.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a")
    with lock:
        if fcntl:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
