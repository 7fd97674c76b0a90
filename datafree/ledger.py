"""What is expected of an experiment: the block ``expect`` of its YAML file, and the ledger of all of them.

expect:
  program: kd                       # datafree-kd; or quantize, incremental, train
  published: {RGAL: 91.11}          # top-1 (%) of the last epoch, as its papers state it; or unknown
  source: where it is published
  ours: not run yet                 # or what was measured here, see Measured
"""

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from datafree.__main__ import TRAINING
from datafree.errors import InputError, shown
from datafree.registry import CONFIGS, shipped
from datafree.untrusted import TextLoader, read_text

PAGE = Path("docs/results/ledger.md")
NOT_RUN, UNKNOWN = "not run yet", "unknown"
NO_CELLS = ("methods", "quantization", "incremental")  # folders of methods
KEYS = ("program", "published", "source", "ours")
INTRO = """# Ledger of the experiments

Generated from the blocks `expect` of the files in `configs/` by `python -m datafree.reproduce --ledger`, which a test
compares with this page. Published is what papers state, ours the top-1 (%) on the test set after the last epoch (of
incremental learning: after the last task), mean and standard deviation over n seeds. A dash: no figure is known.
`python -m datafree.reproduce FILE` runs an experiment again and judges it.
"""


@dataclass(frozen=True)
class Measured:
    """Runs of an experiment that differ in their seed alone.

    mean, std: of the top-1 (%) after the last epoch. n: runs. device: in words. commit: of the code. runs: their
    results, in the order of their seeds. seeds: 0, 1, ... if they are not given. images: synthesised ones of a run.
    seconds: of synthesis and training, mean of a run. options: which the runs had besides those of the file; {seed}
    stands for their seed. teacher: the options of datafree-train that trained the teacher of each seed, a file beside
    this one first. page: where more is said.
    """

    mean: float
    n: int
    device: str
    commit: str
    std: float | None = None
    runs: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    images: int | None = None
    seconds: float | None = None
    torch: str = ""
    options: str = ""
    teacher: str = ""
    page: str = ""

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread} (n = {self.n})"


@dataclass(frozen=True)
class Cell:
    """An experiment. published: name -> top-1 (%); empty if no figure is known. ours: None if it was not run."""

    path: Path
    program: str
    published: Mapping[str, float]
    source: str
    ours: Measured | None


def read_cell(path: str | Path) -> Cell:
    """The block ``expect`` of a YAML file. Raises InputError for a file that cannot be read or whose block is wrong."""
    path = shipped(path)
    try:
        expect = yaml.load(read_text(path), TextLoader)["expect"]
    except (KeyError, TypeError):
        raise InputError(f"{path} has no block expect; state what is expected of it, or at least: {NOT_RUN}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path} ({error}); give the YAML file of an experiment") from None
    if not isinstance(expect, dict) or set(expect) - set(KEYS) or expect.get("program") not in TRAINING:
        raise InputError(f"{path}: expect has the keys {', '.join(KEYS)}, and program is one of {', '.join(TRAINING)}")
    published, ours = expect.get("published", UNKNOWN), expect.get("ours", NOT_RUN)
    try:
        figures = {} if published == UNKNOWN else {name: float(figure) for name, figure in published.items()}
        measured = None if ours == NOT_RUN else _measured(ours)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expect cannot be {shown(expect)} ({error}); see datafree/ledger.py") from None
    return Cell(Path(path), expect["program"], figures, expect.get("source", ""), measured)


def _measured(given: Mapping[str, Any]) -> Measured:
    """From texts; raises TypeError or ValueError for what is missing, unknown or no number."""
    kinds = {"n": int, "images": int, "mean": float, "std": float, "seconds": float}
    values = {key: kinds.get(key, lambda text: text)(value) for key, value in given.items()}
    for key, kind in (("runs", float), ("seeds", int)):
        values[key] = tuple(map(kind, given.get(key, ())))
    if missing := [f.name for f in fields(Measured) if f.default is MISSING and f.name not in values]:
        raise ValueError(f"ours lacks {', '.join(missing)}")
    measured = Measured(**values)
    if any(len(known) not in (0, measured.n) for known in (measured.runs, measured.seeds)):
        raise ValueError(f"n is {measured.n}, but there are {len(measured.runs)} runs and {len(measured.seeds)} seeds")
    if (measured.std is None) != (measured.n == 1):
        raise ValueError("std belongs to more than one run")
    shlex.split(measured.options + measured.teacher)
    return measured


def cells(root: Path = CONFIGS) -> Iterator[Cell]:
    """The experiments below the folder of all YAML files: all but methods, and but those that others are based on."""
    paths = [path for path in sorted(root.glob("*/*.yaml")) if path.parent.name not in NO_CELLS]
    bases = {path.parent / based for path in paths if (based := _base_of(path))}
    yield from (read_cell(path) for path in paths if path not in bases)


def _base_of(path: Path) -> str:
    return (yaml.load(read_text(path), TextLoader) or {}).get("base", "")


def ledger(root: Path = CONFIGS) -> str:
    """The page that lists all experiments."""
    found = list(cells(root))
    measured = sum(cell.ours is not None for cell in found)
    lines = [INTRO, f"{len(found)} experiments, of which {measured} were run here and {len(found) - measured} not yet."]
    for folder in dict.fromkeys(cell.path.parent for cell in found):
        lines += ["", f"## {folder.name}", "", "| file | published | ours | images | device | commit | more |"]
        lines += ["|---|---|---|---:|---|---|---|", *(_line(cell) for cell in found if cell.path.parent == folder)]
    notes = [f"- `{cell.path.parent.name}/{cell.path.name}`: {cell.source}." for cell in found if cell.source]
    return "\n".join([*lines, "", "## Sources of the published figures", "", *notes]) + "\n"


def _line(cell: Cell) -> str:
    published, ours = ", ".join(f"{name} {figure:.2f}" for name, figure in cell.published.items()), cell.ours
    measured: tuple[str, ...] = (NOT_RUN, "", "", "", "")
    if ours:
        options = f", with `{ours.options}`" if ours.options else ""
        images = "" if ours.images is None else f"{ours.images:,}"
        page = f"[{Path(ours.page).name}]({os.path.relpath(ours.page, PAGE.parent)})" if ours.page else ""
        measured = (f"{ours}{options}", images, ours.device, ours.commit, page)
    return f"| `{cell.path.name}` | {' | '.join((published or '-', *measured))} |"
