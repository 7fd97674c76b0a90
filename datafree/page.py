"""Finished runs as one HTML file that refers to no other, for readers who have not read the paper."""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from datafree import __version__
from datafree.curves import PANELS
from datafree.errors import InputError, OptionError, printable, short
from datafree.files import write_text
from datafree.intervals import Mean, mean_with_interval
from datafree.logger import columns
from datafree.results import read_rows, state_of_code
from datafree.untrusted import read_bytes, read_text

Run = Mapping[str, Any]  # a summary, with the keys of report.read_summaries
Line = Mapping[str, Any]  # of a table, as of report.report

MOST_PICTURES, MOST_FRAMES = 24 * 2**20, 12  # bytes of all pictures of a page, in text; pictures of a run
MOST_LOG = 2**26  # bytes
MOST_TITLES, LONGEST_VALUE = 3, 25  # names in the title; characters of a value in the table of options
PNG = b"\x89PNG\r\n\x1a\n"
ALARM = re.compile(r"\[(\d\d/\d\d \d\d:\d\d:\d\d) .*?\]: \[Alarm\] (.*)")

# What the runs of a program are, told to somebody who sees them for the first time; by an option that only it has.
KINDS = {
    "student": """<b>Distillation.</b> A network, the <i>teacher</i>, was trained before, on images that are not used
        here. A second network, the <i>student</i>, is trained on images that are synthesised from the teacher alone, to
        give the teacher's answers, and is then tested on real images.""",
    "w_bits": """<b>Quantization.</b> A trained network is rounded to a few bits per number. What the rounding has to
        know, and the training that makes up for it, come from images that are synthesised from the network alone. The
        result is tested on real images.""",
    "init_cls": """<b>Class-incremental learning.</b> A network learns classes that arrive in tasks. The images of the
        earlier classes are gone by then; images that are synthesised from the network as it was before the task stand
        in for them. The result is tested on real images of all classes.""",
    "": "<b>Training on real images</b>: a teacher, or the bound for what is possible without them.",
}
CONTROLS = {
    "noise": "<b>Control: noise.</b> Rows with source=noise use plain noise in place of synthesised images.",
    "real": "<b>Control: real images.</b> Rows with source=real use the real training images, as a bound.",
}


class _Page(Template):
    delimiter = "@@"  # because $ is a letter of JavaScript


class _Row:
    """A row of the table, its options, and its runs in the order of their seeds."""

    def __init__(self, number: int, line: Line, options: Mapping[str, str], runs: Iterable[Run]):
        self.title = printable(line["run"])
        self.name = f"{number}: {self.title} {printable(line.get('options', ''))}".strip()
        self.line, self.options, self.runs = line, options, sorted(runs, key=lambda run: run.get("seed") or 0)
        self.values = [float(run["value"]) for run in self.runs if run["value"] is not None]
        self.mean = mean_with_interval(self.values)

    @property
    def source(self) -> str:
        return self.options.get("source", "")


def write_page(
    file: str | Path,
    table: Sequence[tuple[Line, Mapping[str, str], Iterable[Run]]],
    changes: Mapping[str, Sequence[Line]],
    remarks: Sequence[str],
    decimals: int,
) -> list[str]:
    """Write the page -> sentences about it, with what was left out.

    table: its lines (see :func:`datafree.report.report`), each with the options and the runs that it stands for.
    changes: option -> the lines of its effects. remarks: sentences below the table. Raises OptionError for another kind
    of file, and InputError if it cannot be written.
    """
    if Path(file).suffix not in (".html", ".htm"):
        raise OptionError(f"--html {short(str(file))} is not the name of a page; end it in .html")
    rows = [_Row(number, *part) for number, part in enumerate(table, 1)]
    pictures, left_out = _pictures(rows)
    data = {"panels": PANELS, "rows": list(map(_curves, rows)), "pictures": pictures}
    page = _Page(read_text(Path(__file__).with_name("page.html"))).substitute(
        title=escape(_title(rows)),
        intro="\n".join(f"<p>{text}</p>" for text in _kinds(rows)),
        table=_results(rows, decimals),
        remarks="".join(f'<p class="remark">{escape(text)}.</p>' for text in [*remarks, *left_out]),
        effects="\n".join(_effect(option, found, decimals) for option, found in changes.items()),
        alarms=_alarms(rows),
        options=_options(rows),
        provenance=_provenance(rows),
        written=f"Written by datafree {__version__} on {datetime.now():%Y-%m-%d %H:%M}.",
        # Within a script element "<" could end it.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )
    if not Path(file).parent.is_dir():
        raise InputError(f"there is no folder {Path(file).parent} for {file}; make it first")
    write_text(file, page, after="")
    return [f"Wrote {file}, {len(page.encode()) / 1e6:.1f} MB", *left_out]


def _title(rows: Sequence[_Row]) -> str:
    runs, names = sum(len(row.runs) for row in rows), list(dict.fromkeys(row.title for row in rows))
    more = f" and {len(names) - MOST_TITLES} more" * (len(names) > MOST_TITLES)
    return f"{runs} run{'s' * (runs > 1)}: {', '.join(names[:MOST_TITLES])}{more}"


def _kinds(rows: Sequence[_Row]) -> list[str]:
    """What the runs are, in words."""
    kinds = {next(key for key in KINDS if not key or key in row.options) for row in rows}
    sources = {row.source for row in rows}
    return [KINDS[key] for key in KINDS if key in kinds] + [CONTROLS[key] for key in CONTROLS if key in sources]


def _seed(run: Run) -> str:
    order = run["options"].get("class_seed")
    return f"seed {run.get('seed')}" + (f", order {order}" if order is not None else "")


# Tables, whose cells are HTML already.


def _table(parts: Mapping[str, Iterable[str]], to_the_right: Sequence[str] = ()) -> str:
    """Header -> cells of a column; the columns of numbers stand to the right."""
    kinds = [' class="number"' * (name in to_the_right) for name in parts]
    head = "".join(f"<th{kind}>{name}</th>" for kind, name in zip(kinds, parts))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, line)) + "</tr>"
        for line in zip(*parts.values())
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _text(value: Any) -> str:
    return "-" if value is None else escape(printable(str(value)))


def _results(rows: Sequence[_Row], decimals: int) -> str:
    """The table of the report, with the interval of each mean and a picture of it."""
    single = [value for row in rows for value in row.values] or [0.0]
    margin = 0.05 * (max(single) - min(single)) or 1
    low, high = min(single) - margin, max(single) + margin
    of = {part.name: list(map(escape, part.cells)) for part in columns([row.line for row in rows], decimals)}
    halves = [row.mean.half for row in rows]
    shown = {
        "": [str(number) for number in range(1, len(rows) + 1)],
        **{name: of.pop(name) for name in ("run", "options", "n", "last") if name in of},
        "95 % interval": ["-" if half is None else f"± {half:.{decimals}f}" for half in halves],
        "of the mean": [_interval(row.values, row.mean, low, high) for row in rows],
        **{name: of.pop(name) for name in ("gain", "ci95") if name in of},
        **of,
    }
    return _table(shown, [name for name in shown if name not in ("run", "options")])


def _interval(values: Sequence[float], mean: Mean, low: float, high: float) -> str:
    """A picture of single runs (rings), their mean (disc) and its interval (line) between ``low`` and ``high``."""
    if mean.value is None:
        return ""

    def x(value: float) -> float:
        return round(4 + 172 * (min(max(value, low), high) - low) / (high - low), 1)

    text = f"mean {mean.value:.4g}"
    marks = [f'<circle cx="{x(value)}" cy="9" r="3" class="one"/>' for value in values]
    marks.append(f'<circle cx="{x(mean.value)}" cy="9" r="2.5"/>')
    if mean.half is not None:
        ends = mean.value - mean.half, mean.value + mean.half
        text += f", 95 % interval {ends[0]:.4g} to {ends[1]:.4g}"
        marks.insert(0, f'<line x1="{x(ends[0])}" x2="{x(ends[1])}" y1="9" y2="9"/>')
    inside = f"<title>{text}</title>{''.join(marks)}"
    return f'<svg class="interval" width="180" height="18" role="img" aria-label="{text}">{inside}</svg>'


def _effect(option: str, found: Sequence[Line], decimals: int) -> str:
    title = f"<h3>The effect of {escape(option)} alone</h3>"
    if not found:
        return f"{title}<p>No two runs with the same seed differ in it alone.</p>"
    parts = columns(found, decimals)
    table = {part.name: list(map(escape, part.cells)) for part in parts}
    return title + _table(table, [part.name for part in parts if part.is_number])


def _options(rows: Sequence[_Row]) -> str:
    """The options that differ between the rows that have them, then those that some rows do not use, and the others."""
    values: dict[str, list[str]] = {}
    for row in rows:
        for key, value in row.options.items():
            values.setdefault(key, []).append(value)
    differing = {key for key, found in values.items() if len(set(found)) > 1}
    everywhere = {key for key, found in values.items() if len(found) == len(rows)} - differing
    html = []
    for what, keys in (
        ("differ", differing),
        ("are used by some rows alone", values.keys() - differing - everywhere),
        ("are the same in all rows", everywhere),
    ):
        names = sorted(keys)
        table = {"": list(map(escape, names))}
        for row in rows:
            table[escape(row.name)] = [_value(row.options.get(name)) for name in names]
        opened = " open" * (what == "differ")
        html.append(f"<details{opened}><summary>{len(names)} options {what}</summary>{_table(table)}</details>")
    return "\n".join(html)


def _value(text: str | None) -> str:
    if text is None:
        return "<i>not used</i>"
    shortened = text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
    return f'<span title="{escape(text)}">{escape(shortened)}</span>'


def _provenance(rows: Sequence[_Row]) -> str:
    """Where each run comes from, and a warning if they are not of one commit."""
    lines = [_origin(row, run) for row in rows for run in row.runs]
    commits = sorted({line["commit"] for line in lines})
    several = f'<p class="notice">The runs are of {len(commits)} states of the code: compare with care.</p>'
    summary = f"{len(lines)} runs; commit {', '.join(commits)}"
    table = _table({name: [line[name] for line in lines] for name in lines[0]})
    return f"{several * (len(commits) > 1)}<details><summary>{summary}</summary>{table}</details>"


def _origin(row: _Row, run: Run) -> dict[str, str]:
    given = run.get("environment")
    here: Mapping[str, Any] = given if isinstance(given, dict) else {}
    facts = {
        "row": row.name,
        "seed": _seed(run),
        "commit": state_of_code(here),
        **{name: here.get(name) for name in ("torch", "python")},
        "device": here.get("cpu") if here.get("device") == "cpu" else here.get("device"),
        "threads": here.get("threads"),
        "begun": here.get("time"),
        "seconds": round(sum(value for key, value in run.items() if key.endswith("_s"))),
        "folder": run["folder"],
        "command": here.get("command"),
    }
    return {name: _text(value) for name, value in facts.items()}


def _alarms(rows: Sequence[_Row]) -> str:
    """What the logs warned of: each warning of a run once, however often it came."""
    told = [(row, run, alarm) for row in rows for run in row.runs for alarm in _alarms_of(run["folder"])]
    runs, loud = sum(len(row.runs) for row in rows), len({id(run) for _, run, _ in told})
    quiet = f"<p>{runs - loud} of {runs} runs logged no alarm.</p>"
    if not told:
        return quiet
    names = ("times", "first", "last", "alarm, as it came last")
    return quiet + _table(
        {
            "row": [escape(row.name) for row, _, _ in told],
            "seed": [escape(_seed(run)) for _, run, _ in told],
            **{name: [_text(alarm[i]) for _, _, alarm in told] for i, name in enumerate(names)},
        }
    )


def _alarms_of(folder: Path) -> list[tuple[int, str, str, str]]:
    """How often, when first, when last and what, of warnings that differ in more than their numbers."""
    found: dict[str, list[tuple[str, str]]] = {}
    for log in [folder / "log.txt", *sorted(folder.glob("task_*/log.txt"))]:
        try:
            text = read_text(log, MOST_LOG)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            found[str(log)] = [("", f"{log.name} cannot be read ({error})")]
            continue
        for time, message in ALARM.findall(text):
            found.setdefault(re.sub(r"\d+(\.\d+)?", "#", message), []).append((time, message))
    return [(len(times), times[0][0], *times[-1]) for times in found.values()]


# What the page's script draws.


def _curves(row: _Row) -> dict[str, Any]:
    """The metrics of the row's runs: panel -> [[epoch, value], ...]."""
    runs = [{"name": _seed(run), "lines": _points(run["folder"] / "metrics.jsonl")} for run in row.runs]
    return {"name": row.name, "runs": runs}


def _points(metrics: Path) -> dict[str, list[list[float]]]:
    rows = read_rows(metrics, PANELS, required=["epoch"]) if metrics.is_file() else []
    of_panel = {key: [[row["epoch"] + 1, row[key]] for row in rows if row.get(key) is not None] for key in PANELS}
    return {key: points for key, points in of_panel.items() if points}


def _pictures(rows: Sequence[_Row]) -> tuple[list[dict[str, Any]], list[str]]:
    """Image grids of the first run of each row that has any, and sentences about what is left out."""
    shown: list[dict[str, Any]] = []
    size, other_runs, other_epochs, too_large = 0, 0, 0, 0
    for row in rows:
        with_grids = [run for run in row.runs if _grids(run["folder"])]
        if not with_grids:
            continue
        run, grids = with_grids[0], _grids(with_grids[0]["folder"])
        last = len(grids) - 1
        chosen = [grids[i] for i in sorted({round(k * last / (MOST_FRAMES - 1)) for k in range(MOST_FRAMES)})]
        frames = [{"name": _moment(path), "image": _as_uri(path)} for path in chosen]
        beside = [{"name": path.stem, "image": _as_uri(path)} for path in _beside(run["folder"])]
        length = sum(len(picture["image"]) for picture in [*frames, *beside])
        if size + length > MOST_PICTURES:
            too_large += 1
            continue
        size += length
        other_runs += len(with_grids) - 1
        other_epochs += len(grids) - len(chosen)
        shown.append({"name": f"{row.name}, {_seed(run)}", "frames": frames, "beside": beside})
    without = f"{too_large} row{'s' * (too_large > 1)}"
    told = [
        (other_runs, f"it has images of each row's first seed, without {other_runs} other run{'s' * (other_runs > 1)}"),
        (other_epochs, f"it has at most {MOST_FRAMES} image grids of a run, without {other_epochs} in between"),
        (too_large, f"it has no images of {without}, because {MOST_PICTURES >> 20} MB is the most of a page"),
    ]
    return shown, [sentence for number, sentence in told if number]


def _grids(folder: Path) -> list[Path]:
    """The pictures of synthetic images of a run, in their order; of incremental learning those of each task."""
    return sorted(folder.glob("grids/epoch_*.png")) or sorted(folder.glob("task_*/grids/epoch_*.png"))


def _beside(folder: Path) -> list[Path]:
    """Pictures that do not change over the epochs: test images, and the accuracies of tasks."""
    tests = [folder / "grids" / "test.png", *sorted(folder.glob("task_*/grids/test.png"))]
    return [path for path in (*tests[-1:], folder / "matrix.png") if path.is_file()]


def _moment(path: Path) -> str:
    """When a picture was drawn: task_01/grids/epoch_0004.png is task 2, after epoch 5."""
    numbers = [int(number) + 1 for number in re.findall(r"(?:task|epoch)_(\d+)", "/".join(path.parts[-3:]))]
    return f"task {numbers[0]}, " * (len(numbers) > 1) + f"after epoch {numbers[-1]}"


def _as_uri(path: Path) -> str:
    """The picture as a text that a page can hold; empty if it is no picture."""
    try:
        contents = read_bytes(path, MOST_PICTURES)
    except OSError:
        return ""
    return f"data:image/png;base64,{base64.b64encode(contents).decode()}" if contents.startswith(PNG) else ""
