"""One table of finished runs: python -m datafree.report FOLDER...

Every summary.json below the folders is read; runs of one name that differ in their seed share a row.
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
    """A row (dict) per run name: n runs, mean accuracies (%), standard deviation, images made, seconds."""
    runs = {}
    for summary in summaries:
        runs.setdefault(summary["run"], []).append(summary)
    return [_row(name, same) for name, same in runs.items()]


def _row(name, runs):
    last, seconds = _values(runs, "last_acc1"), [_seconds(run) for run in runs]
    return {"run": name, "n": len(runs), "teacher": _mean(_values(runs, "teacher_acc1")), "last": _mean(last),
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
