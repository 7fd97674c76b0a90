"""What comes from others: names that become folders, text files, and YAML, bounded before they are used.

Nothing here imports torch. How a value from outside is shown in a message is in ``errors.py``.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import yaml

MOST_TEXT = 2**20  # bytes of a YAML file, room for tens of thousands of names of classes
MOST_DEPTH = 50  # levels of YAML within one another
MOST_VALUES, LONG_VALUE = 100_000, 100  # of a YAML file when each alias is written out; letters that count as one
LONGEST_FILE_NAME = 255  # bytes, on nearly all file systems
LONGEST_NAME = 100  # bytes of a name; that of a run's folder has up to four


def is_name(text: str) -> bool:
    """Whether ``text`` can be a part of the name of a file or folder: one component of a path, and printable."""
    inside = text not in ("", ".", "..") and text.isprintable() and not set(text) & {"/", "\\"}
    return inside and len(text.encode()) <= LONGEST_NAME


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """The UTF-8 text of a file of at most ``most`` bytes; raises UnicodeDecodeError, and as :func:`read_bytes`."""
    return read_bytes(path, most).decode()


def read_bytes(path: str | Path, most: int) -> bytes:
    """The contents of a file of at most ``most`` bytes.

    Raises OSError, also for a device or a pipe, which might never end.
    """
    try:
        kind = os.stat(path).st_mode
    except ValueError as error:  # a NUL, or half a surrogate pair, in the path
        raise OSError(errno.EINVAL, "not a possible path") from error
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise OSError(errno.EINVAL, "a device or a pipe, not a file")
    with open(path, "rb") as file:  # of a folder, this is the error
        contents = file.read(most + 1)
    if len(contents) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes")
    return contents


class Bounded:
    """Goes before a Loader of PyYAML among the bases of a class: refuses what is nested deeply, or what aliases make
    large or endless, before any of it is walked through. The error is a MarkedYAMLError."""

    def __init__(self, stream: str):
        super().__init__(stream)  # type: ignore[call-arg]
        self._depth = self._values = 0
        self._sizes: dict[str, int] = {}  # anchor -> values below it

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node; called for each in turn."""
        event, before = self.peek_event(), self._values  # type: ignore[attr-defined]
        self._values += 1 + len(getattr(event, "value", "")) // LONG_VALUE
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.anchors:  # type: ignore[attr-defined]
            if event.anchor not in self._sizes:
                raise yaml.MarkedYAMLError(problem=f"*{event.anchor} contains itself", problem_mark=event.start_mark)
            self._values += self._sizes[event.anchor]
        self._depth += 1
        for count, most, what in ((self._depth, MOST_DEPTH, "levels"), (self._values, MOST_VALUES, "values")):
            if count > most:
                raise yaml.MarkedYAMLError(problem=f"more than {most:,} {what}", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)  # type: ignore[misc]
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[event.anchor] = self._values - before
        return node


class TextLoader(Bounded, yaml.BaseLoader):
    """Reads every scalar as the text that is written, within bounds."""
