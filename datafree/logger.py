"""What a run leaves behind: one folder with its settings, log, numbers, pictures and checkpoints."""

import json
import math
import re
import sys
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate, pad
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from datafree.errors import InputError
from datafree.runtime import environment

try:
    import fcntl
except ImportError:  # not on Windows; runs are then not kept apart
    fcntl = None

GAP, CAPTION = 2, 15  # pixels around an image of a grid, and below one that has a caption


class RunFolder(AbstractContextManager):
    """The folder ``root`` of a run called ``name``, held by this process until :meth:`close`.

    Files: config.yaml and env.json (see :meth:`record`), log.txt, metrics.jsonl, tb/,
    checkpoints/, grids/, summary.json. Raises InputError if the folder cannot be written, is held by a living
    process, or holds a run and ``resume`` is false; so does a method whose write fails.
    """

    def __init__(self, root, name, resume=False):
        self.root, self.name = Path(root), name
        self.checkpoints, self.grids = self.root / "checkpoints", self.root / "grids"
        self._writer, self._purge_step = None, None
        with _writing(self.root, "choose another --save_dir or --log_tag"):
            for folder in (self.checkpoints, self.grids, self.root / "tb"):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.root / ".lock", "a")
        try:
            self._hold()
            if not resume and self._holds_results():
                raise InputError(
                    f"{self.root} already holds a run; give this one a name of its own by "
                    "--log_tag NEW, or go on with that one by --resume auto"
                )
        except BaseException:
            self.close()
            raise

    def _holds_results(self):
        """Whether an epoch was finished or a checkpoint written here; what failed before may be tried again."""
        metrics = self.root / "metrics.jsonl"
        return (self.checkpoints / "last.pth").exists() or (metrics.exists() and metrics.stat().st_size > 0)

    def record(self, config_yaml, device=None):
        """Write config.yaml and env.json (of ``device``)."""
        self._replace("env.json", json.dumps(environment(device), indent=2) + "\n")
        self._replace("config.yaml", config_yaml)

    def log(self, message):
        """Print a dated line, above any progress bar, and add it to log.txt."""
        line = f"[{datetime.now():%m/%d %H:%M:%S} {self.name}]: {message}"
        tqdm.write(line)
        sys.stdout.flush()
        self._append("log.txt", line)

    def metrics(self, epoch, mapping):
        """Add a row {"epoch": epoch, **mapping} to metrics.jsonl, and its finite numbers to TensorBoard."""
        row = _plain({"epoch": epoch, **mapping})
        self._append("metrics.jsonl", json.dumps(row))
        with self._tensorboard() as writer:
            for key, value in row.items():
                if key != "epoch" and type(value) in (int, float):
                    writer.add_scalar(key, value, epoch)

    def truncate_metrics(self, epoch):
        """Before a resumed run goes on at ``epoch``: forget the rows and TensorBoard points from there on."""
        path, self._purge_step = self.root / "metrics.jsonl", epoch
        whole = whole_lines(path) if path.exists() else []
        self._replace("metrics.jsonl", "".join(f"{x}\n" for x in whole if json.loads(x)["epoch"] < epoch))

    def grid(self, name, images, labels=None, columns=8):
        """Save :func:`draw_grid` as grids/<name>.png; TensorBoard's step is the number in epoch_0040."""
        picture, path = draw_grid(images, labels, columns), self.grids / f"{name}.png"
        with _writing(path):
            picture.save(path)
        tag, number = re.fullmatch(r"(.*?)_?(\d*)", name).groups()
        with self._tensorboard() as writer:
            writer.add_image(f"grids/{tag}", np.asarray(picture), int(number or 0), dataformats="HWC")

    def summary(self, mapping):
        """Write summary.json; numbers that are not finite become null."""
        self._replace("summary.json", json.dumps(_plain(mapping), indent=2) + "\n")

    def close(self):
        """Finish TensorBoard's file and let go of the folder; a second call does nothing."""
        try:
            if self._writer:
                with _writing(self.root / "tb"):
                    self._writer.close()
        finally:
            if fcntl and not self._lock.closed:
                with suppress(OSError):  # closing the file alone would leave the lock with forked workers
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()

    def __exit__(self, *exception):
        self.close()

    def _hold(self):
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

    def _append(self, file, line):
        with _writing(self.root / file), open(self.root / file, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def _replace(self, file, text):
        with _writing(self.root / file):
            beside = self.root / f"{file}.tmp"
            beside.write_text(text, encoding="utf-8")
            beside.replace(self.root / file)

    @contextmanager
    def _tensorboard(self):
        with _writing(self.root / "tb"):
            self._writer = self._writer or SummaryWriter(self.root / "tb", purge_step=self._purge_step)
            yield self._writer
            self._writer.flush()


def whole_lines(path):
    """The lines of a metrics.jsonl without a last one that a killed run cut short, or a living one has just begun."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def draw_grid(images, labels=None, columns=8):
    """PIL image of ``images`` (N,C,H,W in [0,1]), each enlarged by a whole factor to at least 64 pixels.

    ``labels``: a string per image, or per row of the grid, written below it (below its first image).
    """
    images = images.detach().float().cpu().nan_to_num(0).clamp(0, 1)
    images = interpolate(images, scale_factor=max(1, math.ceil(64 / min(images.shape[-2:]))), mode="nearest")
    (count, _, height, width), labels, columns = images.shape, labels or [], min(columns, len(images))
    step = 1 if len(labels) == count else columns
    if labels and len(labels) != math.ceil(count / step):
        raise ValueError(f"{len(labels)} labels for {count} images in rows of {columns}")
    font = ImageFont.load_default()
    widest = max(map(font.getlength, labels), default=0)
    right = GAP + max(0, math.ceil(widest / step) - width)
    tiles = pad(images, (GAP, right, GAP, CAPTION if labels else GAP), value=1)
    grid = make_grid(tiles, nrow=columns, padding=0)
    picture = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    for i, label in enumerate(labels):
        row, column = divmod(i * step, columns)
        corner = column * tiles.shape[-1] + GAP, row * tiles.shape[-2] + GAP + height
        ImageDraw.Draw(picture).text(corner, label, fill="black", font=font)
    return picture


def table(rows, decimals=2):
    """Plain text of ``rows`` (dicts), aligned; numbers to the right, None as -."""
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        cells = ["-" if v is None else f"{v:.{decimals}f}" if isinstance(v, float) else str(v) for v in values]
        width = max(map(len, [name, *cells]))
        align = str.rjust if any(isinstance(v, (int, float)) for v in values) else str.ljust
        columns.append([align(cell, width) for cell in (name, "-" * width, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


def _plain(value):
    """JSON types alone: tensors as numbers, floats to six digits, None for one that is not finite."""
    text = json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    return json.loads(text, parse_float=lambda t: float(f"{float(t):.6g}"), parse_constant=lambda _: None)


@contextmanager
def _writing(path, remedy="make room, then go on with --resume auto"):
    try:
        yield
    except OSError as error:
        raise InputError(f"could not write {path} ({error.strerror or error}); {remedy}") from error
