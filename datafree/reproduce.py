"""Run an experiment again and compare it with what its YAML file expects:
python -m datafree.reproduce FILE [--seeds 0,1,2] [--save_dir FOLDER] [--OPTION VALUE...]
python -m datafree.reproduce --ledger

Runs the program that the file's block ``expect`` names, once for each seed, with the options of the block, and judges
the mean of the last top-1 by the 95 % confidence interval of its difference from the expected mean: as expected, better
or worse. Finished runs are not repeated. Where the block names a teacher, that is trained first, for each seed.
--seeds     those of the block, or else 0 to n - 1, as many as were measured.
--save_dir  runs/reproduce if it is not given.
--ledger    prints the page docs/results/ledger.md: what is published and measured of all experiments.
Further options go to the program. They may say where and how it runs (--data_root, --threads, --teacher_weights), but
may not change what it computes, which would be another experiment.
The exit code is 0, and 1 if the result is worse than expected.
"""

import importlib
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datafree.__main__ import PROGRAMS
from datafree.arguments import usage
from datafree.errors import InputError, OptionError, exit_on_input_error, short
from datafree.intervals import t_quantile
from datafree.ledger import Cell, Measured, ledger, read_cell
from datafree.logger import table
from datafree.options import result_options
from datafree.program import Program
from datafree.results import read_summary, state_of_code

ROUNDING = 0.005  # of a mean that is stated with two decimals


class Verdict(NamedTuple):
    """word: as expected, better, worse, not judged. difference: of the means; half: of its 95 % interval, or None."""

    word: str
    difference: float
    half: float | None


def judge(expected: Measured, values: Sequence[float]) -> Verdict:
    """Compare ``values``, one for each seed, with the expected mean by the interval of Student's two-sample t test.

    Its pooled standard deviation serves where one of the two is a single run; of two single runs nothing is known.
    """
    n, m = expected.n, len(values)
    difference, freedom = statistics.fmean(values) - expected.mean, n + m - 2
    if freedom == 0:
        return Verdict("not judged", difference, None)
    squares = (n - 1) * (expected.std or 0) ** 2 + sum((value - statistics.fmean(values)) ** 2 for value in values)
    half = t_quantile(freedom) * (squares / freedom * (1 / n + 1 / m)) ** 0.5
    word = "better" if difference > 0 else "worse"
    return Verdict("as expected" if abs(difference) <= half + ROUNDING else word, difference, half)


def reproduce(cell: Cell, seeds: Sequence[int], save_dir: Path, further: Sequence[str]) -> list[dict[str, Any]]:
    """Run the experiment for each seed -> the summaries of the runs."""
    options = cell.ours.options if cell.ours else ""
    own = {seed: shlex.split(options.replace("{seed}", str(seed))) for seed in seeds}
    for words in own.values():
        _require_same_experiment(cell, words, further)
    return [_run(cell, seed, save_dir, words, further) for seed, words in own.items()]


def read_options(cell: Cell, words: Sequence[str]) -> Any:
    """The configuration of the experiment's program with these further options."""
    program: Program = importlib.import_module(PROGRAMS[cell.program][0]).PROGRAM
    return program.parse(["--config", str(cell.path), *words])[0]


def _require_same_experiment(cell: Cell, own: Sequence[str], further: Sequence[str]) -> None:
    """Raise OptionError for options that would change the result."""
    before, after = (result_options(read_options(cell, words)) for words in (own, [*own, *further]))
    if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
        raise OptionError(
            f"--{changed[0]} would change what {cell.path} computes, which would be another experiment; leave it out, "
            f"or run datafree-{cell.program} itself"
        )


def _run(cell: Cell, seed: int, save_dir: Path, own: Sequence[str], further: Sequence[str]) -> dict[str, Any]:
    """Train the teacher, if the block names one, then run the program -> the summary."""
    given = ["--seed", str(seed), "--save_dir", str(save_dir), "--resume", "auto"]
    teacher = shlex.split(cell.ours.teacher) if cell.ours else []
    if teacher and "--teacher_weights" not in further:
        tag = f"{Path(teacher[0]).stem}-seed{seed}"
        words = ["--config", str(cell.path.parent / teacher[0]), *teacher[1:], *given, "--log_tag", tag]
        further = [*further, "--teacher_weights", str(_finished("train", words, save_dir, tag).parent)]
    tag = f"{cell.path.stem}-seed{seed}"
    words = ["--config", str(cell.path), *own, *further, *given, "--log_tag", tag]
    return read_summary(_finished(cell.program, words, save_dir, tag))


def _finished(program: str, words: Sequence[str], save_dir: Path, tag: str) -> Path:
    """Run the program unless its run is finished -> the path of its summary."""
    pattern = f"*/{tag}/summary.json"
    if not list(save_dir.glob(pattern)):
        command = [sys.executable, "-m", "datafree", program, *words]
        print(f"datafree-{program} {shlex.join(words)}", flush=True)
        if code := subprocess.run(command).returncode:
            raise InputError(f"datafree-{program} ended with code {code}; the same command continues from there")
    return next(save_dir.glob(pattern))


def report(cell: Cell, seeds: Sequence[int], summaries: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """The result beside what is expected, as lines, and the verdict in a word."""
    values = [summary["last_acc1"] for summary in summaries]
    if None in values:
        raise InputError("the runs have no accuracy; run them with a test set")
    ours = cell.ours
    known = dict(zip(ours.seeds or range(ours.n), ours.runs)) if ours else {}
    rows = [
        {"seed": seed, "top-1": float(value), "expected": known.get(seed), "images": summary.get("images")}
        for seed, value, summary in zip(seeds, values, summaries)
    ]
    lines = [table(rows), f"measured: {_measured(values, [summary.get('environment', {}) for summary in summaries])}"]
    lines += [f"published: {name} {figure:.2f}" for name, figure in cell.published.items()]
    if not ours:
        return [*lines, f"verdict: not judged, because {cell.path} states no result of ours"], "not judged"
    lines.append(f"expected: {ours}, {ours.device}, torch {ours.torch or 'unknown'}, commit {ours.commit}")
    made = {summary.get("images") for summary in summaries}
    if ours.images is not None and made != {ours.images}:
        lines.append(f"the runs synthesised {', '.join(map(str, sorted(made, key=str)))} images, not {ours.images}")
    verdict = judge(ours, values)
    interval = "one run on either side has no interval" if verdict.half is None else f"± {verdict.half:.2f} (95 %)"
    lines.append(f"verdict: {verdict.word}; difference {verdict.difference:+.2f}, {interval}")
    return lines, verdict.word


def _measured(values: Sequence[float], environments: Sequence[dict[str, Any]]) -> str:
    """The result of the runs, in the words of :class:`Measured`."""

    def of_all(key: str) -> str:
        return ", ".join(sorted({str(here.get(key)) for here in environments}))

    mean, std = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    device = of_all("cpu" if of_all("device") == "cpu" else "device") + f", threads: {of_all('threads')}"
    commit = ", ".join(sorted(set(map(state_of_code, environments))))
    measured = Measured(mean, len(values), device, commit, std, torch=of_all("torch"))
    return f"{measured}, {measured.device}, torch {measured.torch}, commit {measured.commit}"


def main() -> None:
    usage(__doc__, at_least=1)
    words = sys.argv[1:]
    if words == ["--ledger"]:
        print(ledger(), end="")
        return
    if words[0].startswith("--"):
        raise OptionError(f"the first argument is the YAML file of an experiment, not {short(words[0])}")
    cell, further = read_cell(words[0]), words[1:]
    seeds, save_dir = _taken("--seeds", further), _taken("--save_dir", further)
    ours = cell.ours
    chosen = _seeds(seeds) if seeds else list((ours.seeds or range(ours.n)) if ours else range(3))
    summaries = reproduce(cell, chosen, Path(save_dir or "runs/reproduce"), further)
    lines, word = report(cell, chosen, summaries)
    print("\n".join(lines))
    sys.exit(1 if word == "worse" else 0)


def _taken(flag: str, words: list[str]) -> str:
    """The value of ``flag``, which is removed from ``words``; empty if it is not there."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            if not equals and len(words) == place + 1:
                raise OptionError(f"{flag} needs a value")
            taken = value if equals else words[place + 1]
            del words[place : place + (1 if equals else 2)]
            return taken
    return ""


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise OptionError(f"--seeds cannot be {short(text)}; it takes different whole numbers, such as 0,1,2")
    return seeds


if __name__ == "__main__":
    exit_on_input_error(main)
