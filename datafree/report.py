"""One table of finished runs: python -m datafree.report FOLDER...

Every summary.json below the folders is read. Runs of one name and one set of options share a row, whatever their
seed; where the options of a name differ, the column ``options`` says in what.
"""
import json
import statistics
import sys
from pathlib import Path

from datafree.errors import InputError, exit_on_input_error
from datafree.logger import table

HEADER = "last, std: % after the last epoch; best: over epochs, chosen on the test set; s: mean seconds"


def read_summaries(folders):
    """The summaries below ``folders``, in the order given, then of time; one that is met twice counts once.

    Raises InputError for a folder that is missing or holds no finished run, and for a damaged summary.
    """
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; give folders of runs, or folders above them")
        summaries = {path.resolve(): _read(path) for path in sorted(folder.rglob("summary.json"))}
        if not summaries:
            raise InputError(f"{folder} holds no finished run (no summary.json); give another")
        started = {path: s.get("environment", {}).get("time", "") for path, s in summaries.items()}
        found.update({path: found.get(path, summaries[path]) for path in sorted(summaries, key=started.get)})
    return list(found.values())


def report(summaries):
    """A row (dict) per run: n seeds, mean accuracies (%), standard deviation, images made, seconds.

    Of runs that differ in nothing, not even the seed, the last one counts.
    """
    runs = {}
    for summary in summaries:
        runs.setdefault((summary["run"], _options(summary)), {})[summary.get("seed")] = summary
    differing = {name: _differing([options for other, options in runs if other == name]) for name, _ in runs}
    rows = [_row(name, [o for o in options if o[0] in differing[name]], list(seeds.values()))
            for (name, options), seeds in runs.items()]
    return rows if any(differing.values()) else [{k: v for k, v in row.items() if k != "options"} for row in rows]


def _options(summary):
    """What makes the run's row: (option, value as text) pairs, the seed apart."""
    return tuple(sorted((name, str(value)) for name, value in summary.get("settings", {}).items() if name != "seed"))


def _differing(groups):
    """Names of the options in which the groups of one name differ."""
    pairs = [set(options) for options in groups]
    return {name for name, _ in set().union(*pairs) - set.intersection(*pairs)}


def _row(name, options, runs):
    last, seconds = _values(runs, "last_acc1"), [_seconds(run) for run in runs]
    return {"run": name, "options": " ".join(f"{option}={value}" for option, value in options), "n": len(runs),
            "teacher": _mean(_values(runs, "teacher_acc1")), "last": _mean(last),
            "std": statistics.stdev(last) if len(last) > 1 else None,
            "best": _mean(_values(runs, "best_acc1")),
            "images": round(_mean(_values(runs, "images")) or 0), "s": round(statistics.fmean(seconds))}


def _seconds(run):
    return sum(value for key, value in run.items() if key.endswith("_s"))


def _values(runs, key):
    return [float(run[key]) for run in runs if run.get(key) is not None]


def _mean(values):
    return statistics.fmean(values) if values else None


def _read(path):
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary["run"], str):
            raise TypeError("run is no name")
        return summary
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no summary of a run ({error}); remove it, or run it again") from None


def main():
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        return
    print(table(report(read_summaries(sys.argv[1:]))), HEADER, sep="\n")


if __name__ == "__main__":
    exit_on_input_error(main)
