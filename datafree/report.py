"""One table of finished runs: python -m datafree.report FOLDER... [--against OPTION=VALUE...]

Every summary.json below the folders is read. Runs of one name and one set of options share a row, whatever their
seed; where the options of a name differ, the column ``options`` says in what. With --against, which names one row
by its options, the others are compared with it: gain is the mean difference over the seeds that both have, ci95 half
the width of its 95 % confidence interval.
"""
import json
import statistics
import sys
from pathlib import Path

from datafree.errors import InputError, exit_on_input_error, usage
from datafree.logger import table

WEIGHTS = ("teacher_weights", "student_weights", "weights")
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


def report(summaries, against=()):
    """A row (dict) per run: n seeds, mean accuracies (%), standard deviation, images made, seconds.

    Of runs that differ in nothing, not even the seed, the last one counts. against: "option=value" words that one
    row fits; the others then say how much better (+) they are on the seeds that both have, and the half width of
    the 95 % confidence interval of that (Student's t). Raises InputError if ``against`` fits no row, or several.
    """
    runs = {}
    for summary in summaries:
        _row_of(summary, runs)[summary.get("seed")] = summary
    differing = {name: _differing([options for other, options in runs if other == name]) for name, _ in runs}
    base = _baseline(runs, against) if against else None
    rows = []
    for (name, options), seeds in runs.items():
        told = " ".join(f"{option}={value}" for option, value in options if option in differing[name])
        rows.append({"run": name, **({"options": told} if any(differing.values()) else {}),
                     **_numbers(list(seeds.values())), **(_gain(seeds, base) if base else {})})
    return rows


def _row_of(summary, runs):
    """The row's runs by seed. Weights part rows only where one seed has several: a teacher may go with its seed."""
    for apart in (("seed", *WEIGHTS), ("seed",)):
        row = runs.setdefault((summary["run"], _options(summary, apart)), {})
        same = row.get(summary.get("seed"), summary)
        if all(same.get("settings", {}).get(key) == summary.get("settings", {}).get(key) for key in WEIGHTS):
            break
    return row


def _options(summary, apart):
    """What makes a row: (option, value as text) pairs."""
    texts = {name: f"{value:g}" if isinstance(value, float) else str(value)
             for name, value in summary.get("settings", {}).items()}
    return tuple(sorted((name, text) for name, text in texts.items() if name not in apart))


def _differing(groups):
    """Names of the options in which the groups of one name differ."""
    pairs = [set(options) for options in groups]
    return {name for name, _ in set().union(*pairs) - set.intersection(*pairs)}


def _baseline(runs, against):
    wanted = {tuple(word.split("=", 1)) for word in against}
    found = [seeds for (_, options), seeds in runs.items() if wanted <= set(options)]
    if len(found) != 1:
        raise InputError(f"--against {' '.join(against)} fits {len(found)} rows, not one; "
                         "name options as the table does")
    return found[0]


def _gain(seeds, base):
    pairs = [(seeds[seed].get("last_acc1"), base[seed].get("last_acc1")) for seed in seeds if seed in base]
    gains = [ours - theirs for ours, theirs in pairs if None not in (ours, theirs)]
    if seeds is base or not gains:
        return {"gain": None, "ci95": None}
    interval = statistics.stdev(gains) / len(gains)**0.5 * t_quantile(len(gains) - 1) if len(gains) > 1 else None
    return {"gain": statistics.fmean(gains), "ci95": interval}


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t (Cornish-Fisher about the normal one; a table for few degrees of freedom)."""
    few = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
    if freedom <= len(few):
        return few[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _numbers(runs):
    last, seconds = _values(runs, "last_acc1"), [_seconds(run) for run in runs]
    return {"n": len(runs), "teacher": _mean(_values(runs, "teacher_acc1")), "last": _mean(last),
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
    usage(__doc__, at_least=1)
    words = sys.argv[1:]
    split = words.index("--against") if "--against" in words else len(words)
    summaries = read_summaries(words[:split])
    rows = report(summaries, words[split + 1:])
    print(table(rows), HEADER, sep="\n")
    left = len(summaries) - sum(row["n"] for row in rows)
    if left:
        print(f"{left} older runs of the same options and seed are left out")


if __name__ == "__main__":
    exit_on_input_error(main)
