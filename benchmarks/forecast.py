"""Is the forecast of a dry run right? python -m benchmarks.forecast [RUN ...]

For each of some runs on the digits, what --dry_run measures is compared with the run itself, each in a fresh process
with one thread: seconds from the plan to the end, of the processor, so that a busy machine does not matter; the peak of
the process's memory; and the size of the files, of which the forecast is the most that there may be. A dry run's own
seconds are given, too.
"""

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import datafree_incremental
import datafree_kd
import datafree_quantize
import train_scratch
from benchmarks.same_bits import call
from datafree.arguments import usage
from datafree.errors import InputError, exit_on_input_error
from datafree.logger import table

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "configs" / "digits"
RUNS = {
    "teacher": (train_scratch, "teacher_resnet20"),
    "rgal_fast": (datafree_kd, "rgal_fast_resnet20_resnet8"),
    "rgal": (datafree_kd, "rgal_resnet20_resnet8"),
    "deepinv": (datafree_kd, "deepinv_resnet20_resnet8"),
    "dfq": (datafree_kd, "dfq_resnet20_resnet8"),
    "real": (datafree_kd, "real_resnet20_resnet8"),
    "quantize": (datafree_quantize, "quantize_resnet8"),
    "incremental": (datafree_incremental, "incremental_inversion"),
}


def forecast(name, words):
    """What a dry run says, in a fresh process: seconds, MB, MB on the disk; and the seconds that it took."""
    from datafree import cost, plan

    found = []
    with (
        mock.patch.object(cost, "now", lambda device: time.process_time()),
        mock.patch.object(plan, "describe_costs", lambda costs, *more: found.extend(costs) or []),
    ):
        started = time.process_time()
        quietly(RUNS[name][0], *words, "--dry_run")
        own = time.process_time() - started
    seconds = sum(sum(one.seconds.values()) for one in found)
    return seconds, max(one.memory for one in found) / 1e6, sum(one.disk for one in found) / 1e6, own


def make(name, words):
    """The run itself, in a fresh process: seconds, MB, MB on the disk."""
    import torch

    from datafree import training
    from datafree.runtime import peak_memory

    run, seconds = training.run_training, []

    def timed(*given):
        started = time.process_time()
        run(*given)
        seconds.append(time.process_time() - started)

    with mock.patch.object(training, "run_training", timed):
        quietly(RUNS[name][0], *words)
    files = [path.stat() for path in Path("runs").rglob("*") if path.is_file()]
    size = sum({file.st_ino: file.st_size for file in files}.values())  # best.pth is often a link
    return sum(seconds), peak_memory(torch.device("cpu")), size / 1e6


def quietly(program, *words):
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        call(program, *words)


def apart(function, *given):
    """The result of ``function`` in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def row(name):
    """A row (dict) of the table; teachers are in this folder."""
    words = ("--config", DIGITS / f"{RUNS[name][1]}.yaml", "--save_dir", "runs")
    expected, found = apart(forecast, name, words), apart(make, name, words)
    shutil.rmtree("runs")
    kinds = ("seconds", "MB", "disk MB")
    pairs = {kind: pair for kind, pair in zip(kinds, zip(expected, found))}
    return {
        "run": name,
        "dry run s": expected[3],
        **{f"{kind}{what}": value for kind, pair in pairs.items() for what, value in zip((" forecast", ""), pair)},
        **{f"{kind} off %": 100 * (pair[0] / pair[1] - 1) for kind, pair in pairs.items() if kind != "disk MB"},
    }


def main():
    usage(__doc__, at_least=0)
    names = sys.argv[1:] or list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        raise InputError(f"there is no run {unknown[0]}; the runs are {', '.join(RUNS)}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for model in ("resnet20", "resnet8"):
            words = ("--config", DIGITS / "teacher_resnet20.yaml", "--model", model, "--epochs", 4)
            apart(make, "teacher", words)
        shutil.rmtree("runs")
        print(table([row(name) for name in names]))
        os.chdir("/")


if __name__ == "__main__":
    exit_on_input_error(main)
