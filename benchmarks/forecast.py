"""Is the forecast of a dry run right? python -m benchmarks.forecast [RUN ...]

For each of some runs on the digits, what --dry_run measures is compared with the run itself, each in a fresh process
with one thread: seconds of the processor from the plan to the end; the floating point operations (GFLOP) of one more
run, which other programs on the machine cannot change; the peak of the process's memory; and the size of the files, of
which the forecast is the most that there may be. A dry run's own seconds are given, too.
"""

import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
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
    "rgal_reptile": (datafree_kd, "rgal_reptile_resnet20_resnet8"),
    "rgal": (datafree_kd, "rgal_resnet20_resnet8"),
    "deepinv": (datafree_kd, "deepinv_resnet20_resnet8"),
    "dfq": (datafree_kd, "dfq_resnet20_resnet8"),
    "real": (datafree_kd, "real_resnet20_resnet8"),
    "quantize": (datafree_quantize, "quantize_resnet8"),
    "incremental": (datafree_incremental, "incremental_inversion"),
}


def forecast(name, words):
    """What a dry run says, in a fresh process: seconds, GFLOP, MB, MB on the disk; and the seconds that it took."""
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
    flop, disk = sum(one.flop for one in found) / 1e9, sum(one.disk for one in found) / 1e6
    return seconds, flop, max(one.memory for one in found) / 1e6, disk, own


def make(name, words):
    """The run itself, in a fresh process: seconds, MB, MB on the disk."""
    import torch

    from datafree.runtime import peak_memory

    seconds = []

    @contextmanager
    def timed():
        started = time.process_time()
        yield
        seconds.append(time.process_time() - started)

    train(name, words, timed)
    files = [path.stat() for path in Path("runs").rglob("*") if path.is_file()]
    size = sum({file.st_ino: file.st_size for file in files}.values())  # best.pth is often a link
    shutil.rmtree("runs")
    return sum(seconds), peak_memory(torch.device("cpu")), size / 1e6


def count(name, words):
    """The run once more, in a fresh process, for counting takes time: GFLOP."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):  # without the sums by module of FlopCounterMode, which keeps tensors for them
        flop = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            result = operation(*args, **kwargs)
            if formula := flop_registry.get(operation._overloadpacket):
                self.flop += formula(*args, **kwargs, out_val=result)
            return result

    counter = Counter()
    train(name, words, lambda: counter)
    shutil.rmtree("runs")
    return counter.flop / 1e9


def train(name, words, measured):
    """Make a run, whose training is within the context ``measured()``."""
    from datafree import training

    run = training.run_training

    def within(*given):
        with measured():
            run(*given)

    with mock.patch.object(training, "run_training", within):
        quietly(RUNS[name][0], *words)


def quietly(program, *words):
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        call(program, *words)


def apart(function, *given):
    """The result of ``function`` in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def row(name, *options):
    """A row (dict) of the table; teachers are in this folder. options: for the run and its forecast."""
    words = ("--config", DIGITS / f"{RUNS[name][1]}.yaml", "--save_dir", "runs", *options)
    *expected, own = apart(forecast, name, words)
    seconds, *sizes = apart(make, name, words)
    found = (seconds, apart(count, name, words), *sizes)
    pairs = dict(zip(("seconds", "GFLOP", "MB", "disk MB"), zip(expected, found)))
    return {
        "run": name,
        "dry run s": own,
        **{f"{kind}{what}": value for kind, pair in pairs.items() for what, value in zip((" forecast", ""), pair)},
        **{f"{kind} off %": 100 * (pair[0] / pair[1] - 1) for kind, pair in pairs.items() if kind != "disk MB"},
    }


def rows(names, *options):
    """The rows of ``names``, made in a folder of their own that is the current one and then removed."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for model in ("resnet20", "resnet8"):
                apart(make, "teacher", ("--config", DIGITS / "teacher_resnet20.yaml", "--model", model, "--epochs", 4))
            return [row(name, *options) for name in names]
        finally:
            os.chdir(here)


def main():
    usage(__doc__, at_least=0)
    names = sys.argv[1:] or list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        raise InputError(f"there is no run {unknown[0]}; the runs are {', '.join(RUNS)}")
    print(table(rows(names)))


if __name__ == "__main__":
    exit_on_input_error(main)
