"""The folder of a run: its options, log, metrics, grids and checkpoints. Importing it does not import torch."""

import io
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datafree.errors import InputError
from datafree.files import append, fcntl, remove_left_over, replacing, write_text, writing
from datafree.screen import show
from datafree.tags import description, end_of, tag_of

if TYPE_CHECKING:
    from PIL.Image import Image


TEST_PICTURE = "grids/test.png"
SUMMARY = "summary.json"
FINISHED = "The run is finished already; its results stay as they are."


class RunFolder(AbstractContextManager):
    """The folder ``root`` of a run called ``name``, held by this process until :meth:`close`.

    Files: config.yaml and env.json (see :meth:`record`), log.txt, metrics.jsonl, tb/,
    checkpoints/, grids/, summary.json. Raises InputError if the folder cannot be written, is held by a living
    process, or holds a run and ``resume`` is false; so does a method whose write fails.
    """

    def __init__(self, root: str | Path, name: str, resume: bool = False):
        self.root, self.name = Path(root), name
        self.checkpoints, self.grids = self.root / "checkpoints", self.root / "grids"
        self._rows: list[str] = []
        self._points: Points | None = None
        self._first_epoch = self._last_epoch = 0
        self._options: Mapping[str, Any] = {}
        self._description: tuple[str, Mapping[str, Any]] | None = None
        with writing(self.root, "choose another --save_dir or --log_tag"):
            for folder in (self.checkpoints, self.grids, self.root / "tb"):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.root / ".lock", "a")
        try:
            self._hold()
            if not resume and self._holds_results():
                raise InputError(
                    f"{self.root} already holds a run; give this one a name of its own by "
                    "--log_tag NEW, or continue that one by --resume auto"
                )
            for folder in (self.root, self.checkpoints, self.grids):
                remove_left_over(folder)
        except BaseException:
            self.close()
            raise

    def _holds_results(self) -> bool:
        """Whether an epoch was finished or a checkpoint written here, or in the folder of a task below.

        A run that failed earlier may be repeated.
        """
        metrics = self.root / "metrics.jsonl"
        checkpoints = [*self.checkpoints.glob("last.pth"), *self.root.glob("*/checkpoints/last.pth")]
        return bool(checkpoints) or (metrics.exists() and metrics.stat().st_size > 0)

    def record(
        self, config_yaml: str, environment: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        """Write config.yaml and env.json (see :func:`datafree.runtime.environment`), and both for TensorBoard.

        options: those on which the result depends, for its table of hyperparameters.
        """
        self._replace("env.json", json.dumps(environment, indent=2) + "\n")
        self._replace("config.yaml", config_yaml)
        # Written with the first points, which begin where a resumed run does.
        self._options, self._description = options or {}, (config_yaml, environment)

    def log(self, message: str) -> None:
        """Print a dated line, above any progress bar, and add it to log.txt."""
        line = f"[{datetime.now():%m/%d %H:%M:%S} {self.name}]: {message}"
        show(line)
        with writing(self.root / "log.txt"), open(self.root / "log.txt", "a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def metrics(self, epoch: int, mapping: Mapping[str, Any]) -> None:
        """Add a row {"epoch": epoch, **mapping} to metrics.jsonl, and its finite numbers to TensorBoard."""
        row = plain({"epoch": epoch, **mapping})
        self._rows.append(json.dumps(row))
        self._write_rows()
        from torch.utils.tensorboard.summary import scalar

        numbers = {key: value for key, value in row.items() if key != "epoch" and type(value) in (int, float)}
        self._add_points(epoch, [scalar(tag_of(key), value) for key, value in numbers.items()])

    def truncate_metrics(self, epoch: int) -> None:
        """Before a resumed run continues at ``epoch``: drop the rows and TensorBoard points from there on.

        Rows of earlier epochs that are not there are named in the log; a file with damaged rows is kept beside.
        """
        path, self._first_epoch, self._last_epoch = self.root / "metrics.jsonl", epoch, epoch
        rows, damaged = rows_before(path, epoch)
        if damaged:
            aside = _set_aside(path, "damaged")
            self.log(
                f"[Alarm] {path.name} has damaged rows; it is {aside.name} now, and its whole rows are taken over."
            )
        self._rows = list(rows.values())
        self._write_rows()
        if missing := [number for number in range(epoch) if number not in rows]:
            self.log(
                f"[Alarm] {path.name} has no rows of {ranges(missing)}, which were lost, or are in the folder of the "
                "run that this one continues; the weights do not depend on them."
            )

    def grid(self, epoch: int, picture: "Image", narrow: "Image | None" = None) -> None:
        """Save a picture as grids/epoch_0040.png and in TensorBoard, there the ``narrow`` one if it is given."""
        self._save_and_show(f"grids/epoch_{epoch:04d}.png", "grids/epoch", epoch, picture, narrow)

    def _save_and_show(self, file: str, tag: str, epoch: int, picture: "Image", narrow: "Image | None") -> None:
        import numpy as np
        from torch.utils.tensorboard.summary import image

        self.picture(file, picture)
        self._add_points(epoch, [image(tag, np.asarray(narrow or picture), dataformats="HWC")])

    @property
    def has_test_picture(self) -> bool:
        return (self.root / TEST_PICTURE).exists()

    def test_picture(self, epoch: int, picture: "Image", narrow: "Image | None" = None) -> None:
        """Save a picture of test images, as those of the grids."""
        self._save_and_show(TEST_PICTURE, "grids/test", epoch, picture, narrow)

    def summary(self, mapping: Mapping[str, Any]) -> None:
        """Write summary.json at the end of the run; numbers that are not finite become null."""
        self.write_json(SUMMARY, mapping)
        self._add_points(self._last_epoch, end_of(self._options))

    @property
    def has_summary(self) -> bool:
        """Whether the run was finished, which it is no longer if it is made longer."""
        return (self.root / SUMMARY).is_file()

    def set_summary_aside(self) -> None:
        """Rename the summary of a run that goes on, so that nobody takes it for finished."""
        if self.has_summary:
            aside = _set_aside(self.root / SUMMARY, "before")
            self.log(f"The run goes on beyond its end; the results until then are in {aside.name}.")

    def require_no_results(self) -> None:
        """Raise InputError if a run has left results but no checkpoint: a new one would replace them."""
        results = [self.checkpoints / name for name in ("best.pth", "model_best.pth", "model_last.pth")]
        if found := [path for path in (*results, self.root / SUMMARY) if path.is_file()]:
            best = f"give --resume {found[0]}, or " * (found[0].name == "best.pth")
            raise InputError(
                f"{self.root} has no checkpoints/last.pth to resume from, but holds {found[0].name} of a run, which a "
                f"new one would replace; {best}start a new run by --log_tag NEW"
            )

    def write_json(self, file: str, mapping: Mapping[str, Any]) -> None:
        """Write a file of that name; numbers that are not finite become null."""
        self._replace(file, json.dumps(plain(mapping), indent=2) + "\n")

    def picture(self, file: str, picture: "Image") -> None:
        """Save a picture under that name."""
        with replacing(self.root / file) as beside:
            picture.save(beside, format="PNG")

    def close(self) -> None:
        """Release the folder; a second call does nothing."""
        if fcntl and not self._lock.closed:
            with suppress(OSError):  # closing the file alone would leave the lock with forked workers
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _hold(self) -> None:
        """Take the lock, which the system releases when this process ends, however it ends."""
        try:
            if fcntl:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{self.root} is in use by a running process; wait for it, or give this run "
                "a name of its own by --log_tag NEW"
            ) from error
        except OSError:
            pass  # a file system without locks: as where fcntl is missing

    def _write_rows(self) -> None:
        """Write metrics.jsonl anew, so that a row is there whole or not at all, and none that was there is missing."""
        self._replace("metrics.jsonl", "".join(f"{row}\n" for row in self._rows))

    def require_own(self) -> None:
        """Raise InputError if the folder was moved or removed, and another run has one of its name now."""
        with suppress(OSError):  # of a folder that is not there, which is found when it is written to
            held, there = os.fstat(self._lock.fileno()), os.stat(self.root / ".lock")
            if not os.path.samestat(held, there):
                raise InputError(
                    f"{self.root} is another run's now: the folder of this one was moved or removed; start it again "
                    "under another name by --log_tag NEW"
                )

    def _replace(self, file: str, text: str) -> None:
        self.require_own()
        write_text(self.root / file, text)

    def _add_points(self, epoch: int, summaries: Sequence[Any]) -> None:
        with writing(self.root / "tb"):
            self._points = self._points or Points(self.root / "tb", self._first_epoch)
            described = description(*self._description, self._options) if self._description else []
            self._points.add(epoch, [*described, *summaries])
            self._description = None
            self._last_epoch = epoch


def _set_aside(path: Path, why: str) -> Path:
    """Rename the file ``path`` -> its path now, with the reason and the time in its name."""
    aside = path.with_name(f"{path.stem}.{why}-{datetime.now():%Y%m%d-%H%M%S}{path.suffix}")
    with writing(path):
        path.rename(aside)
    return aside


class ReadOnlyFolder(RunFolder):
    """The folder of a run as its processes beside the first one have it: they hold and write nothing."""

    def __init__(self, root: str | Path, name: str):
        self.root, self.name = Path(root), name
        self.checkpoints, self.grids = self.root / "checkpoints", self.root / "grids"

    def _write_nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = log = metrics = truncate_metrics = grid = test_picture = summary = _write_nothing
    write_json = picture = close = require_own = set_summary_aside = _write_nothing


class Points:
    """A new event file of TensorBoard in ``folder``, which replaces all points from ``first`` on of the earlier files.

    It is written at once, and not by a thread as torch's SummaryWriter does, whose errors nobody could catch.
    TensorBoard reads the files in the order of their names, which begin with a time; here this is later than that of
    any file there, whatever the clock says.
    """

    def __init__(self, folder: Path, first: int):
        folder.mkdir(exist_ok=True)
        stamps = [re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in folder.iterdir()]
        stamp = max([int(time.time()), *(int(found[1]) + 1 for found in stamps if found)])
        self.path, self.first = folder / f"events.out.tfevents.{stamp:010d}.{os.getpid()}", first

    def add(self, epoch: int, summaries: Sequence[Any]) -> None:
        """Add torch's or TensorBoard's ``summaries`` at ``epoch``."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = [Event(step=epoch, summary=summary) for summary in summaries]
        if not self.path.exists():  # at first, or because somebody has removed it
            self.path.parent.mkdir(exist_ok=True)
            events[:0] = [
                Event(file_version="brain.Event:2"),
                Event(step=self.first, session_log=SessionLog(status=SessionLog.START)),
            ]
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        append(self.path, records.getvalue())


def rows_before(path: Path, epoch: int) -> tuple[dict[int, str], bool]:
    """The rows of a metrics.jsonl of the epochs before ``epoch``, by epoch in their order; and whether any is damaged.

    The last line may be unfinished, as earlier versions left it when they were killed.
    """
    if not path.exists():
        return {}, False
    if not path.is_file():
        return {}, True
    with writing(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {row["epoch"]: line for line in lines if (row := _row(line)) and 0 <= row["epoch"] < epoch}
    damaged = any(_row(line) is None for line in lines[:-1]) or "\ufffd" in "".join(lines[:-1])
    return dict(sorted(found.items())), damaged


def _row(line: str) -> dict[str, Any] | None:
    """The row of that line; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("epoch")) is int else None


def ranges(numbers: Sequence[int]) -> str:
    """Increasing whole numbers in few words: epochs 0, 3 to 7."""
    starts = [n for n in numbers if n - 1 not in set(numbers)]
    ends = [n for n in numbers if n + 1 not in set(numbers)]
    parts = [f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends)]
    return f"epoch{'s' * (len(numbers) > 1)} " + ", ".join(parts)


def table(rows: Sequence[Mapping[str, Any]], decimals: int = 2) -> str:
    """Plain text of ``rows``, aligned; numbers to the right, None as -."""
    aligned = []
    for name, cells, is_number in columns(rows, decimals):
        width = max(map(len, [name, *cells]))
        align = str.rjust if is_number else str.ljust
        aligned.append([align(cell, width) for cell in (name, "-" * width, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned))


class Column(NamedTuple):
    """A column of a table, its cells as text."""

    name: str
    cells: list[str]
    is_number: bool


def columns(rows: Sequence[Mapping[str, Any]], decimals: int = 2) -> list[Column]:
    """The columns of ``rows``, each of which may lack some; None as -."""
    found = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        cells = ["-" if v is None else f"{v:.{decimals}f}" if isinstance(v, float) else str(v) for v in values]
        found.append(Column(name, cells, any(isinstance(v, (int, float)) for v in values)))
    return found


def plain(value: Any) -> Any:
    """JSON types alone: tensors as numbers, floats to six digits, None for one that is not finite."""
    text = json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    return json.loads(text, parse_float=lambda t: float(f"{float(t):.6g}"), parse_constant=lambda _: None)
