"""Reads what a run wrote, or somebody else: summary.json, metrics.jsonl and matrix.json.

Raises InputError for a damaged file."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datafree.errors import InputError, short, shown
from datafree.untrusted import read_text

MOST_METRICS = 2**28  # bytes of a metrics.jsonl
MOST = 1e15  # of a number in it, so that sums and squares of it are finite
NUMBERS = ("last_acc1", "best_acc1", "teacher_acc1", "images", "epochs", "student_steps")


def read_summary(path: Path) -> dict[str, Any]:
    """The contents of a summary.json, with ``options``; a number, seed or text of another type is an error."""
    try:
        summary = json.loads(read_text(path))
        summary.setdefault("options", summary.get("settings", {}))  # the key of earlier versions
        of_run = {"run": summary["run"], "time": summary.get("environment", {}).get("time", "")}
        seeds = {"seed": summary.get("seed"), "class_seed": summary["options"].get("class_seed")}
        stated = {key: value for key, value in summary.items() if value is not None or key not in NUMBERS}
        numbers = {key: value for key, value in stated.items() if key in NUMBERS or key.endswith("_s")}
    except Exception as error:  # of arbitrary bytes
        raise _damaged(path, f"no {error}" if isinstance(error, KeyError) else str(error)) from None
    wrong = [item for item in of_run.items() if not (isinstance(item[1], str) and item[1].isprintable())]
    wrong += [item for item in seeds.items() if item[1] is not None and type(item[1]) is not int]
    wrong += [item for item in numbers.items() if not is_number(item[1])]
    if wrong:
        raise _damaged(path, f"its {short(wrong[0][0])} is {shown(wrong[0][1])}")
    return summary


def read_matrix(path: Path) -> dict[str, Any]:
    """The contents of a matrix.json: the number of ``finished`` tasks, their ``accuracy``, ``options``."""
    try:
        found = json.loads(read_text(path))
        finished, rows, options = found["finished"], found["accuracy"], found["options"]
        wrong = "" if isinstance(options, dict) else f"its options are {shown(options)}"
        if type(finished) is not int or finished < 0:
            wrong = f"it states {shown(finished)} finished tasks"
        elif not isinstance(rows, list):
            wrong = f"its accuracy is {shown(rows)}"
    except Exception as error:  # of arbitrary bytes
        wrong = f"no {error}" if isinstance(error, KeyError) else str(error)
    if wrong:
        raise _no_matrix(path, wrong)
    return found


def require_rows(path: Path, found: Mapping[str, Any], tasks: int, tested: bool) -> None:
    """Raise InputError unless each finished task of the matrix ``found`` has its accuracies, or none if not ``tested``.

    tasks: of the run whose options the matrix has.
    """
    finished, rows = found["finished"], found["accuracy"]
    if finished > tasks:
        raise _no_matrix(path, f"it states {finished} finished tasks of {tasks}")
    if len(rows) not in (0, finished) or not all(map(_is_row, rows, range(1, finished + 1))):
        raise _no_matrix(path, "its accuracies are not those of its finished tasks")
    if finished and bool(rows) != tested:
        resume = "resume with --eval none" if tested else "resume without --eval none"
        raise InputError(
            f"{path}: the finished tasks were {'not ' * tested}tested; {resume}, or start a new run by --log_tag NEW"
        )


def _is_row(row: Any, task: int) -> bool:
    """Whether it is the accuracies (%) of so many tasks."""
    return isinstance(row, list) and len(row) == task and all(is_number(value) and 0 <= value <= 100 for value in row)


def _no_matrix(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} is not the matrix of this run ({short(why)}); remove it, and finished tasks are evaluated again"
    )


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not the summary of a run ({short(why)}); remove it, or repeat the run")


def read_rows(path: Path, keys: Iterable[str], required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a killed or running process may have left the last one unfinished.

    Of the entries ``keys`` those that are there must be numbers or null, and the ``required`` ones must be there.
    """
    keys = [*keys, *required]
    try:
        rows = [json.loads(line) for line in read_text(path, MOST_METRICS).splitlines() if line.endswith("}")]
    except Exception as error:  # of arbitrary bytes
        raise _unread(path, str(error)) from None
    for row in rows:
        for key in keys:
            if row.get(key) is None and key in required or not is_number(row.get(key, 0)) and row[key] is not None:
                raise _unread(path, f"a {short(key)} is {shown(row.get(key))}")
    return rows


def _unread(path: Path, why: str) -> InputError:
    return InputError(f"cannot read {path} ({short(why)}); remove it, or repeat its run")


def state_of_code(environment: Mapping[str, Any]) -> str:
    """The commit of a run's ``environment``; of an installed package, which has none, its version."""
    commit, version = environment.get("commit"), environment.get("version")
    if not commit:
        return f"version {short(str(version))}" if version else "unknown"
    return short(str(commit)[:9]) + " with changes" * (environment.get("dirty") is True)


def is_number(value: Any) -> bool:
    """Whether it is a number to compute with."""
    return type(value) in (int, float) and abs(value) <= MOST  # not NaN
