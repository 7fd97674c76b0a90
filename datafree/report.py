"""Tabulate finished runs:
python -m datafree.report FOLDER... [--of NAME] [--against OPTION=VALUE...] [--effect OPTION...] [--format FORMAT]
                                    [--html FILE]

Reads every summary.json below the folders. Runs with the same name and options share a row, whatever their seed; if
the options of a name differ, the column ``options`` shows those that do.
--against  selects a baseline row by its options, or one per run name. The other rows (of its name) are compared with
           it: gain is the mean difference over the seeds that both have, ci95 half the width of its 95 % confidence
           interval.
--effect   adds a table for each option: the gain from changing that option alone. Two runs are a pair if they have the
           same seed and agree in all other options that both have; gains are averaged within a seed, then over seeds.
Runs of versions that wrote "settings" to summary.json list unused options, too: tabulate runs of one version.
--of       a metric of metrics.jsonl to report instead of acc1, such as images/distance_within_class.
--format   text, md (Markdown), latex, or csv, whose numbers have all their digits.
--html     also writes a page to show to others: the table with intervals, curves, images over the epochs, alarms,
           options and provenance, in one file that refers to no other.
"""

import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from datafree.arguments import read_arguments, usage
from datafree.errors import InputError, OptionError, exit_on_input_error, printable, short
from datafree.intervals import mean_with_interval
from datafree.page import write_page
from datafree.results import read_rows, read_summary
from datafree.tables import FORMATS, REMARKS

Summary = dict[str, Any]  # of one run: its summary.json, with "options", "value" and "folder"
Options = tuple[tuple[str, str], ...]  # sorted (option, value as text) pairs
Seed = int | tuple[int, int] | None  # of a run, with that of its order of the classes if it has one
Seeds = dict[Seed, Summary]  # the runs of a row
Rows = dict[tuple[str, Options], Seeds]

WEIGHTS = ("teacher_weights", "student_weights", "weights")
SEEDS = ("seed", "class_seed")
HEADER = (
    "last, std: {} after the last epoch; best: highest top-1 of all epochs, chosen on the test set; "
    "s: mean seconds per run"
)
OF_ONE, OF_SEVERAL = ("--of", "--format", "--html"), ("--against", "--effect")  # flags, by their number of values


def read_summaries(folders: Iterable[str | Path], of: str = "acc1") -> list[Summary]:
    """The summaries below ``folders``, in the order of the folders, then of time; duplicates are dropped.

    The ``value`` of each is the metric ``of`` after its last epoch, or None. Raises InputError for a folder that is
    missing or holds no finished run, for a damaged file, and if no run has the metric.
    """
    found: dict[Path, Summary] = {}
    for folder in map(Path, folders):
        if not os.path.isdir(folder):
            raise InputError(f"there is no folder {folder}; give folders of runs, or folders that contain them")
        summaries = {path.resolve(): _read(path, of) for path in sorted(folder.rglob("summary.json"))}
        summaries = {path: summary for path, summary in summaries.items() if "task" not in summary}  # parts of a run
        if not summaries:
            raise InputError(f"{folder} holds no finished run (no summary.json); give another folder")
        started = {path: s.get("environment", {}).get("time", "") for path, s in summaries.items()}
        found.update({path: found.get(path, summaries[path]) for path in sorted(summaries, key=started.__getitem__)})
    if of != "acc1" and all(summary["value"] is None for summary in found.values()):
        raise InputError(f"no run has the metric {of} in the last line of its metrics.jsonl; name one that is there")
    return list(found.values())


def _read(path: Path, of: str) -> Summary:
    summary = read_summary(path)
    summary["value"] = summary.get("last_acc1") if of == "acc1" else _last_metric(path.parent / "metrics.jsonl", of)
    summary["folder"] = path.parent
    return summary


def _last_metric(path: Path, of: str) -> float | None:
    rows = read_rows(path, [of])
    if not rows:
        raise InputError(f"cannot read {path} (no whole line); repeat the run, or leave it out")
    return rows[-1].get(of)


def group(summaries: Iterable[Summary]) -> Rows:
    """(name, options) -> {seed: summary}, one entry per row. Of runs that do not differ, the last one counts."""
    rows: Rows = {}
    for summary in summaries:
        _row_of(summary, rows)[_seed(summary)] = summary
    return rows


def _seed(summary: Summary) -> Seed:
    order = summary["options"].get("class_seed")
    return summary.get("seed") if order is None else (summary["seed"], order)


def _row_of(summary: Summary, rows: Rows) -> Seeds:
    """The row of ``summary``. Weights separate rows only if a seed has several: each seed may have its own teacher."""
    for ignored in ((*SEEDS, *WEIGHTS), SEEDS):
        row = rows.setdefault((summary["run"], _options(summary, ignored)), {})
        same = row.get(_seed(summary), summary)
        if all(same["options"].get(key) == summary["options"].get(key) for key in WEIGHTS):
            break
    return row


def _options(summary: Summary, ignored: Sequence[str] = ()) -> Options:
    """The options that identify a row, without those that are ``ignored``."""
    texts = {
        name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in summary["options"].items()
    }
    return tuple(sorted((printable(name), printable(text)) for name, text in texts.items() if name not in ignored))


def report(rows: Rows, against: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A line (dict) per row of :func:`group`: n seeds, mean accuracies (%), standard deviation, images, seconds.

    Rows of runs within a time budget have their mean student steps, too.

    against: "option=value" strings that match one row, or one per run name, as the baseline. The other rows (of its
    name) then have the gain over it on the seeds that both have, and half the width of its 95 % confidence interval
    (Student's t). Raises InputError if ``against`` matches no row, or several of a name.
    """
    differing = {name: _differing([options for other, options in rows if other == name]) for name, _ in rows}
    bases = _baselines(rows, against) if against else None
    lines = []
    for (name, options), seeds in rows.items():
        shown = " ".join(f"{option}={value}" for option, value in options if option in differing[name])
        lines.append(
            {
                "run": name,
                **({"options": shown} if any(differing.values()) else {}),
                **_columns(list(seeds.values())),
                **(_gain(seeds, bases.get(name, {})) if bases else {}),
            }
        )
    return lines


def _differing(groups: Sequence[Options]) -> set[str]:
    """Options whose values differ between rows; if these do not tell all apart, options that only some rows have."""
    names = [name for name, _ in set().union(*groups)]
    several = {name for name in names if names.count(name) > 1}
    if len({tuple(pair for pair in options if pair[0] in several) for options in groups}) == len(groups):
        return several
    shared = set.intersection(*map(set, groups))
    return {name for name, _ in set().union(*groups) - shared}


def _baselines(rows: Rows, against: Sequence[str]) -> dict[str, Seeds]:
    """Run name -> the row that those of this name are compared with."""
    wanted = {tuple(word.split("=", 1)) for word in against}
    found = [(name, seeds) for (name, options), seeds in rows.items() if wanted <= set(options)]
    if not found or len(dict(found)) < len(found):
        raise InputError(
            f"--against {' '.join(against)} matches {len(found)} rows; it must match one, or one per run name; "
            "write options as in the table"
        )
    return dict(found) if len(found) > 1 else {name: found[0][1] for name, _ in rows}


def _gain(seeds: Seeds, base: Seeds) -> dict[str, float | None]:
    """:func:`_gain_of` over the seeds that both rows have; None for the baseline itself."""
    pairs = [(seeds[seed]["value"], base[seed]["value"]) for seed in seeds if seed in base and seeds is not base]
    return _gain_of([ours - theirs for ours, theirs in pairs if None not in (ours, theirs)])


def effects(rows: Rows, option: str) -> list[dict[str, Any]]:
    """A line (dict) per two values of ``option``: the gain of the second over the first, all else being equal.

    Pairs with the same seed share its teacher and more, so each seed counts once, with the mean of its pairs.
    """
    gains: dict[tuple[str, str], dict[Seed, list[float]]] = {}
    runs = [
        (name, seed, dict(_options(run)), run["value"])
        for (name, _), seeds in rows.items()
        for seed, run in seeds.items()
        if option in run["options"] and run["value"] is not None
    ]
    for first, second in combinations(sorted(runs, key=lambda run: _in_order(run[2][option])), 2):
        values = first[2][option], second[2][option]
        if first[:2] == second[:2] and _differ_in(first[2], second[2]) == {option}:
            gains.setdefault(values, {}).setdefault(first[1], []).append(second[3] - first[3])
    return [
        {
            "option": option,
            "from": old,
            "to": new,
            "pairs": sum(map(len, seeds.values())),
            "seeds": len(seeds),
            **_gain_of([statistics.fmean(pairs) for pairs in seeds.values()]),
        }
        for (old, new), seeds in gains.items()
    ]


def _in_order(text: str) -> tuple[int, float, str]:
    """Sort key of option values: numbers in ascending order, then text in alphabetical order."""
    try:
        return 0, float(text), ""
    except ValueError:
        return 1, 0.0, text


def _differ_in(ours: Mapping[str, str], theirs: Mapping[str, str]) -> set[str]:
    """Options that both have, with different values."""
    return {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}


def _gain_of(gains: Sequence[float]) -> dict[str, float | None]:
    """``gain``: their mean; ``ci95``: half the width of its 95 % confidence interval; None where they are too few."""
    mean = mean_with_interval(gains)
    return {"gain": mean.value, "ci95": mean.half}


def _columns(runs: Sequence[Summary]) -> dict[str, float | None]:
    """The numbers of a row."""
    last, seconds = _values(runs, "value"), [_seconds(run) for run in runs]
    return {
        "n": len(runs),
        "teacher": _mean(_values(runs, "teacher_acc1")),
        "last": _mean(last),
        "std": statistics.stdev(last) if len(last) > 1 else None,
        "best": _mean(_values(runs, "best_acc1")),
        "images": round(_mean(_values(runs, "images")) or 0),
        **({"steps": round(statistics.fmean(steps))} if (steps := _values(runs, "student_steps")) else {}),
        "s": round(statistics.fmean(seconds)),
    }


def _seconds(run: Summary) -> float:
    return sum(value for key, value in run.items() if key.endswith("_s"))


def _values(runs: Sequence[Summary], key: str) -> list[float]:
    return [float(run[key]) for run in runs if run.get(key) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def main() -> None:
    usage(__doc__, at_least=1)
    words = read_arguments(sys.argv[1:], OF_ONE, OF_SEVERAL)
    [of], [form] = words.get("--of", ["acc1"]), words.get("--format", ["text"])
    if form not in FORMATS:
        raise OptionError(f"--format cannot be {short(form)}; it takes {', '.join(FORMATS)}")
    if form == "csv" and "--effect" in words:
        raise OptionError("--format csv is one table, and --effect adds others; give another format, or leave it out")
    unit, decimals = ("top-1 (%)", 2) if of == "acc1" else (of, 4)
    summaries = read_summaries(words[""], of)
    rows = group(summaries)
    lines = report(rows, words.get("--against", ()))
    remarks = [HEADER.format(unit)]
    if left := len(summaries) - sum(map(len, rows.values())):
        remarks.append(f"{left} older runs with the same options and seed are left out")
    changes = {option: effects(rows, option) for option in words.get("--effect", ())}
    known = {name for summary in summaries for name in summary["options"]}
    for option in changes:
        if option not in known:
            raise OptionError(f"--effect {option}: no run has such an option; write it as in config.yaml")
    _print(FORMATS[form](lines, decimals), remarks, form)
    for option, found in changes.items():
        nothing = f"no two runs with the same seed differ in {option} alone"
        print()
        _print(FORMATS[form](found, decimals) if found else "", [] if found else [nothing], form)
    if "--html" in words:
        table = [(line, dict(options), seeds.values()) for line, ((_, options), seeds) in zip(lines, rows.items())]
        for sentence in write_page(words["--html"][0], table, changes, remarks, decimals):
            print(sentence, file=sys.stderr)


def _print(table: str, remarks: Sequence[str], form: str) -> None:
    """A table, and the sentences below it; CSV has no room for these, so that they go to stderr."""
    if table:
        print(table)
    for sentence in remarks:
        print(REMARKS.get(form, "{}").format(sentence), file=sys.stdout if form in REMARKS else sys.stderr)


if __name__ == "__main__":
    exit_on_input_error(main)
