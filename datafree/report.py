"""Tables of finished runs:
python -m datafree.report FOLDER... [--of NAME] [--against OPTION=VALUE...] [--effect OPTION...]

Every summary.json below the folders is read. Runs of one name and one set of options share a row, whatever their
seed; where the options of a name differ, the column ``options`` says in what.
--against  names a row by its options, or one of each name. The others (of its name) are compared with it: gain is the
           mean difference over the seeds that both have, ci95 half the width of its 95 % confidence interval.
--effect   one more table, for each option: what changing it alone gains. Two runs are a pair if they have one seed
           and agree in all other options that both of them read; gains are averaged within a seed, then over seeds.
--of       a number of metrics.jsonl that takes the place of acc1, such as images/distance_within_class.
"""

import json
import statistics
import sys
from itertools import combinations
from pathlib import Path

from datafree.cli import active
from datafree.config import DistillConfig
from datafree.errors import InputError, OptionError, exit_on_input_error, usage
from datafree.logger import table, whole_lines

WEIGHTS = ("teacher_weights", "student_weights", "weights")
HEADER = "last, std: {} after the last epoch; best: top-1 over epochs, chosen on the test set; s: mean seconds"
FLAGS = ("--of", "--against", "--effect")


def read_summaries(folders, of="acc1"):
    """The summaries below ``folders``, in the order given, then of time; one that is met twice counts once.

    ``value`` in each is the number ``of`` of its last epoch (None where it has none). Raises InputError for a folder
    that is missing or holds no finished run, for a damaged file, and where no run has such a number.
    """
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; give folders of runs, or folders above them")
        summaries = {path.resolve(): _read(path, of) for path in sorted(folder.rglob("summary.json"))}
        if not summaries:
            raise InputError(f"{folder} holds no finished run (no summary.json); give another")
        started = {path: s.get("environment", {}).get("time", "") for path, s in summaries.items()}
        found.update({path: found.get(path, summaries[path]) for path in sorted(summaries, key=started.get)})
    if of != "acc1" and all(summary["value"] is None for summary in found.values()):
        raise InputError(f"no run has a number {of} in the last line of its metrics.jsonl; name one that is there")
    return list(found.values())


def _read(path, of):
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary["run"], str):
            raise TypeError("run is no name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no summary of a run ({error}); remove it, or run it again") from None
    summary["settings"] = active(DistillConfig, summary.get("settings", {}))
    summary["value"] = summary.get("last_acc1") if of == "acc1" else _last_numbers(path.parent).get(of)
    return summary


def _last_numbers(folder):
    try:
        return json.loads(whole_lines(folder / "metrics.jsonl")[-1])
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"cannot read {folder / 'metrics.jsonl'} ({error}); run it again, or leave it out") from None


def group(summaries):
    """(name, options) -> {seed: summary}, a row each. Of runs that differ in nothing, the last one counts."""
    rows = {}
    for summary in summaries:
        _row_of(summary, rows)[summary.get("seed")] = summary
    return rows


def _row_of(summary, rows):
    """The row's runs by seed. Weights part rows only where one seed has several: a teacher may go with its seed."""
    for apart in (("seed", *WEIGHTS), ("seed",)):
        row = rows.setdefault((summary["run"], _options(summary, apart)), {})
        same = row.get(summary.get("seed"), summary)
        if all(same["settings"].get(key) == summary["settings"].get(key) for key in WEIGHTS):
            break
    return row


def _options(summary, apart=()):
    """What makes a row: (option, value as text) pairs."""
    texts = {
        name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in summary["settings"].items()
    }
    return tuple(sorted((name, text) for name, text in texts.items() if name not in apart))


def report(rows, against=()):
    """A line (dict) per row of :func:`group`: n seeds, mean accuracies (%), standard deviation, images, seconds.

    against: "option=value" words that one row fits, or one of each name; the others (of its name) then say how much
    better (+) they are on the seeds that both have, and the half width of the 95 % confidence interval of that
    (Student's t). Raises InputError if ``against`` fits no row, or several of a name.
    """
    differing = {name: _differing([options for other, options in rows if other == name]) for name, _ in rows}
    bases = _baselines(rows, against) if against else None
    lines = []
    for (name, options), seeds in rows.items():
        told = " ".join(f"{option}={value}" for option, value in options if option in differing[name])
        lines.append(
            {
                "run": name,
                **({"options": told} if any(differing.values()) else {}),
                **_numbers(list(seeds.values())),
                **(_gain(seeds, bases.get(name, {})) if bases else {}),
            }
        )
    return lines


def _differing(groups):
    """Names of the options of which the groups have several values; where those do not part all, of what some lack."""
    names = [name for name, _ in set().union(*groups)]
    several = {name for name in names if names.count(name) > 1}
    if len({tuple(pair for pair in options if pair[0] in several) for options in groups}) == len(groups):
        return several
    return {name for name, _ in set().union(*groups) - set.intersection(*map(set, groups))}


def _baselines(rows, against):
    """Name -> the runs by seed that its rows are compared with."""
    wanted = {tuple(word.split("=", 1)) for word in against}
    found = [(name, seeds) for (name, options), seeds in rows.items() if wanted <= set(options)]
    if not found or len(dict(found)) < len(found):
        raise InputError(
            f"--against {' '.join(against)} fits {len(found)} rows, not one or one of each name; "
            "name options as the table does"
        )
    return dict(found) if len(found) > 1 else {name: found[0][1] for name, _ in rows}


def _gain(seeds, base):
    pairs = [(seeds[seed]["value"], base[seed]["value"]) for seed in seeds if seed in base and seeds is not base]
    return mean_gain([ours - theirs for ours, theirs in pairs if None not in (ours, theirs)])


def effects(rows, option):
    """A line per two values of ``option``: what the second gains over the first, all else alike.

    Pairs of one seed share its teacher and more, so a seed counts once, by the mean of its pairs.
    """
    gains = {}
    runs = [
        (name, seed, dict(_options(run)), run["value"])
        for (name, _), seeds in rows.items()
        for seed, run in seeds.items()
        if option in run["settings"] and run["value"] is not None
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
            **mean_gain([statistics.fmean(pairs) for pairs in seeds.values()]),
        }
        for (old, new), seeds in gains.items()
    ]


def _in_order(text):
    try:
        return 0, float(text), ""
    except ValueError:
        return 1, 0.0, text


def _differ_in(ours, theirs):
    """Options that both read, with different values."""
    return {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}


def mean_gain(gains):
    """Their mean, and half the width of its 95 % confidence interval (None of fewer than two)."""
    if not gains:
        return {"gain": None, "ci95": None}
    interval = statistics.stdev(gains) / len(gains) ** 0.5 * t_quantile(len(gains) - 1) if len(gains) > 1 else None
    return {"gain": statistics.fmean(gains), "ci95": interval}


def t_quantile(freedom):
    """The 97.5 % quantile of Student's t (Cornish-Fisher about the normal one; a table for few degrees of freedom)."""
    few = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
    if freedom <= len(few):
        return few[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _numbers(runs):
    last, seconds = _values(runs, "value"), [_seconds(run) for run in runs]
    return {
        "n": len(runs),
        "teacher": _mean(_values(runs, "teacher_acc1")),
        "last": _mean(last),
        "std": statistics.stdev(last) if len(last) > 1 else None,
        "best": _mean(_values(runs, "best_acc1")),
        "images": round(_mean(_values(runs, "images")) or 0),
        "s": round(statistics.fmean(seconds)),
    }


def _seconds(run):
    return sum(value for key, value in run.items() if key.endswith("_s"))


def _values(runs, key):
    return [float(run[key]) for run in runs if run.get(key) is not None]


def _mean(values):
    return statistics.fmean(values) if values else None


def main():
    usage(__doc__, at_least=1)
    words = {"": []}  # flag -> the words after it
    for word in sys.argv[1:]:
        if word in FLAGS:
            given = words.setdefault(word, [])
        elif word.startswith("--"):
            raise OptionError(f"unknown option {word}; there are {', '.join(FLAGS)}")
        else:
            (given if len(words) > 1 else words[""]).append(word)
    for flag, given in words.items():
        if not given:
            raise OptionError(f"{flag} needs a word after it" if flag else "give folders of runs before the flags")
    of = " ".join(words.get("--of", ["acc1"]))
    told, decimals = ("%", 2) if of == "acc1" else (of, 4)
    summaries = read_summaries(words[""], of)
    rows = group(summaries)
    print(table(report(rows, words.get("--against", ())), decimals), HEADER.format(told), sep="\n")
    left = len(summaries) - sum(map(len, rows.values()))
    if left:
        print(f"{left} older runs of the same options and seed are left out")
    for option in words.get("--effect", ()):
        found = effects(rows, option)
        if option not in {name for summary in summaries for name in summary["settings"]}:
            raise OptionError(f"--effect {option}: no run reads such an option; name it as config.yaml does")
        print("", table(found, decimals) if found else f"no two runs of one seed differ in {option} alone", sep="\n")


if __name__ == "__main__":
    exit_on_input_error(main)
