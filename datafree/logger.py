"""The folder of a run: its options, log, metrics, grids and checkpoints. Importing it does not import torch."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from datafree.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

try:
    import fcntl
except ImportError:  # not on Windows; runs are then not kept apart
    fcntl = None  # type: ignore[assignment]


class RunFolder(AbstractContextManager):
    """The folder ``root`` of a run called ``name``, held by this process until :meth:`close`.

    Files: config.yaml and env.json (see :meth:`record`), log.txt, metrics.jsonl, tb/,
    checkpoints/, grids/, summary.json. Raises InputError if the folder cannot be written, is held by a living
    process, or holds a run and ``resume`` is false; so does a method whose write fails.
    """

    def __init__(self, root: str | Path, name: str, resume: bool = False):
        self.root, self.name = Path(root), name
        self.checkpoints, self.grids = self.root / "checkpoints", self.root / "grids"
        self._writer: Any = None
        self._purge_step: int | None = None
        with _writing(self.root, "choose another --save_dir or --log_tag"):
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

    def record(self, config_yaml: str, environment: Mapping[str, Any]) -> None:
        """Write config.yaml and env.json (see :func:`datafree.runtime.environment`)."""
        self._replace("env.json", json.dumps(environment, indent=2) + "\n")
        self._replace("config.yaml", config_yaml)

    def log(self, message: str) -> None:
        """Print a dated line, above any progress bar, and add it to log.txt."""
        line = f"[{datetime.now():%m/%d %H:%M:%S} {self.name}]: {message}"
        tqdm.write(line)
        sys.stdout.flush()
        self._append("log.txt", line)

    def metrics(self, epoch: int, mapping: Mapping[str, Any]) -> None:
        """Add a row {"epoch": epoch, **mapping} to metrics.jsonl, and its finite numbers to TensorBoard."""
        row = plain({"epoch": epoch, **mapping})
        self._append("metrics.jsonl", json.dumps(row))
        with self._tensorboard() as writer:
            for key, value in row.items():
                if key != "epoch" and type(value) in (int, float):
                    writer.add_scalar(key, value, epoch)

    def truncate_metrics(self, epoch: int) -> None:
        """Before a resumed run continues at ``epoch``: drop the rows and TensorBoard points from there on."""
        path, self._purge_step = self.root / "metrics.jsonl", epoch
        whole = whole_lines(path) if path.exists() else []
        self._replace("metrics.jsonl", "".join(f"{x}\n" for x in whole if json.loads(x)["epoch"] < epoch))

    def grid(self, epoch: int, picture: "Image") -> None:
        """Save a picture as grids/epoch_0040.png and in TensorBoard."""
        import numpy as np

        path = self.grids / f"epoch_{epoch:04d}.png"
        with _writing(path):
            picture.save(path)
        with self._tensorboard() as writer:
            writer.add_image("grids/epoch", np.asarray(picture), epoch, dataformats="HWC")

    def summary(self, mapping: Mapping[str, Any]) -> None:
        """Write summary.json; numbers that are not finite become null."""
        self.write_json("summary.json", mapping)

    def write_json(self, file: str, mapping: Mapping[str, Any]) -> None:
        """Write a file of that name; numbers that are not finite become null."""
        self._replace(file, json.dumps(plain(mapping), indent=2) + "\n")

    def picture(self, file: str, picture: "Image") -> None:
        """Save a picture under that name."""
        with _writing(self.root / file):
            picture.save(self.root / file)

    def close(self) -> None:
        """Finish TensorBoard's file and release the folder; a second call does nothing."""
        try:
            if self._writer:
                with _writing(self.root / "tb"):
                    self._writer.close()
        finally:
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

    def _append(self, file: str, line: str) -> None:
        with _writing(self.root / file), open(self.root / file, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def _replace(self, file: str, text: str) -> None:
        with _writing(self.root / file):
            beside = self.root / f"{file}.tmp"
            beside.write_text(text, encoding="utf-8")
            beside.replace(self.root / file)

    @contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        from torch.utils.tensorboard import SummaryWriter

        with _writing(self.root / "tb"):
            self._writer = self._writer or SummaryWriter(self.root / "tb", purge_step=self._purge_step)
            yield self._writer
            self._writer.flush()


def whole_lines(path: Path) -> list[str]:
    """The complete lines of a metrics.jsonl, whose last one a killed or running process may have left unfinished."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def table(rows: Sequence[Mapping[str, Any]], decimals: int = 2) -> str:
    """Plain text of ``rows``, aligned; numbers to the right, None as -."""
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        cells = ["-" if v is None else f"{v:.{decimals}f}" if isinstance(v, float) else str(v) for v in values]
        width = max(map(len, [name, *cells]))
        align = str.rjust if any(isinstance(v, (int, float)) for v in values) else str.ljust
        columns.append([align(cell, width) for cell in (name, "-" * width, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def plain(value: Any) -> Any:
    """JSON types alone: tensors as numbers, floats to six digits, None for one that is not finite."""
    text = json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    return json.loads(text, parse_float=lambda t: float(f"{float(t):.6g}"), parse_constant=lambda _: None)


@contextmanager
def _writing(path: Path, remedy: str = "make room, then continue by --resume auto") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"could not write {path} ({error.strerror or error}); {remedy}") from error
