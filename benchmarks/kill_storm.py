"""Kill runs at random moments and compare how they end: python -m benchmarks.kill_storm [--kills 100] [--seed 0]

On the digits, with tiny schedules, every method of distillation, of quantization and of class-incremental learning is
run, and train_scratch.py. Each is run straight, and again as a process that is killed by SIGKILL at a random moment,
goes on by --resume auto, and is killed again; and as one that SIGTERM and one that Ctrl-C asks to end. A moment is a
step of an optimiser, or an operation on a file of the run: opening, writing to the disk, renaming, linking, removing.
The runs must end alike to the last bit: weights, whole checkpoints, metrics.jsonl, TensorBoard's points, summary and
published teacher, all without wall-clock times. The exit code is 1 if anything differs.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import datafree_incremental
import datafree_kd
import datafree_quantize
import registry
import train_scratch
from benchmarks.same_bits import DIGITS, GENERATOR, PIXELS, call
from benchmarks.same_bits import runs as distillations
from datafree.errors import exit_on_input_error
from datafree.runtime import environment

ASKED = (signal.SIGTERM, signal.SIGINT)  # signals by which a run of each kind is asked to end
QUANTIZATION = "--teacher resnet8 --w_bits 3 --a_bits 3 --calibration 2 --epochs 2 --warmup 2 --ep_steps 6 --kd_steps 3"
POOL = {"pixels": f"{PIXELS} --synthesis_rounds 6", "noise": "", "real": ""}  # what is no generator in quantization
INCREMENTAL = "--model resnet8 --init_cls 4 --increment 3 --epochs 2 --ep_steps 4 --kd_steps 2 --batch_size 24"
REPLAY = "--replay_batch_size 12"
WITHOUT_REPLAY = ("finetune", "joint", "lwf", "fetril")
OF_THE_CLOCK = ("seconds", "paces", "metadata", "environment", "memory_MB", "synthesis_s", "student_s", "evaluation_s")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def all_runs(teacher):
    """Name of each run -> its program and arguments. teacher: weights of a resnet8."""
    found = {"scratch": (train_scratch, "--model resnet8 --epochs 3 --batch_size 256".split())}
    for name, words in distillations().items():
        found[name] = (datafree_kd, [*words, "--teacher_weights", teacher])
    for name in registry.QUANTIZATION_METHODS:
        words = f"--method {name} {QUANTIZATION} --batch_size 16 {POOL.get(name, GENERATOR)}"
        found[f"quantize {name}"] = (datafree_quantize, [*words.split(), "--teacher_weights", teacher])
    for name in registry.INCREMENTAL_METHODS:
        words = f"--method {name} {INCREMENTAL}" + f" {REPLAY} {GENERATOR}" * (name not in WITHOUT_REPLAY)
        found[f"incremental {name}"] = (datafree_incremental, words.split())
    return found


class Moments:
    """Counts the moments of this process by kind, and sends it a signal at one of them.

    root: folder whose files count. at: kind, number and signal; None for none.
    """

    def __init__(self, root, at=None):
        self.root, self.at, self.counts = os.path.abspath(root) + os.sep, at, Counter()
        register_optimizer_step_pre_hook(lambda *_: self.count("step"))
        sys.addaudithook(self.watch)
        fsync = os.fsync
        os.fsync = lambda number: self.count("file") or fsync(number)

    def watch(self, event, given):
        if event in ("os.rename", "os.link", "os.remove", "os.mkdir") or (event == "open" and given[2] & WRITING):
            if isinstance(given[0], (str, Path)) and os.path.abspath(given[0]).startswith(self.root):
                self.count("file")

    def count(self, kind):
        self.counts[kind] += 1
        if self.at and (kind, self.counts[kind]) == self.at[:2]:
            os.kill(os.getpid(), self.at[2])


def in_fork(program, words, folder, at=None):
    """Run a program in a forked copy of this process, in ``folder`` -> its exit code (negative for a signal that killed
    it), and its moments by kind."""
    counts = folder / "moments.json"
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            moments = Moments(".", at)
            exit_on_input_error(lambda: call(program, *words))
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            try:
                moments.at = None
                counts.write_text(json.dumps(moments.counts))
            finally:
                os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, json.loads(counts.read_text()) if counts.exists() else {}


def outcome(folder):
    """What the runs below ``folder`` ended with, by file, without what a clock measured."""
    found = {}
    for path in sorted(folder.rglob("*.pth")):
        found[path.relative_to(folder)] = without_clock(torch.load(path, weights_only=True))
    for path in sorted(folder.rglob("metrics.jsonl")):
        found[path.relative_to(folder)] = [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
    for path in sorted([*folder.rglob("summary.json"), *folder.rglob("matrix.json")]):
        found[path.relative_to(folder)] = without_clock(json.loads(path.read_text()))
    for path in sorted(folder.rglob("tb")):
        found[path.relative_to(folder)] = points(path)
    return found


def without_clock(value):
    """``value`` without what depends on the time that a run took, at any depth; the commit's state may differ, too."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in OF_THE_CLOCK and not str(k).startswith("seconds/")}
        return {key: without_clock(entry) for key, entry in kept.items()}
    return [without_clock(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def points(folder):
    """TensorBoard's points by tag, as it shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    shown.Reload()
    tags = shown.Tags()
    found = {tag: [(p.step, p.value) for p in shown.Scalars(tag)] for tag in tags["scalars"]}
    found |= {tag: [(p.step, p.encoded_image_string) for p in shown.Images(tag)] for tag in tags["images"]}
    return {tag: shown for tag, shown in found.items() if not tag.startswith("seconds/")}


def same(a, b):
    """Whether two nested values are equal to the last bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def differences(one, other):
    """Files of two outcomes that differ."""
    return [str(path) for path in sorted({**one, **other}) if not same(one.get(path), other.get(path))]


class Storm:
    """The runs of one program: straight, killed, asked to end. work: an empty folder. draw: its random numbers."""

    def __init__(self, program, words, work, draw):
        self.program, self.words, self.work, self.draw, self.kinds = program, words, work, draw, Counter()
        self.number, self.wrong = 0, []
        code, self.moments = self.run(self.new_folder())
        assert code == 0, f"the straight run ended with {code}; see {self.folder / 'output.txt'}"
        self.straight = outcome(self.folder)

    def new_folder(self):
        self.number += 1
        self.folder = self.work / str(self.number)
        self.folder.mkdir()
        return self.folder

    def run(self, folder, at=None):
        words = [*DIGITS, *self.words, "--log_tag", "run", "--resume", "auto"]
        return in_fork(self.program, words, folder, at)

    def moment(self, number):
        kind = self.draw.choice(sorted(self.moments))
        return kind, self.draw.randint(1, self.moments[kind]), number

    def kill(self, times):
        """Kill runs ``times`` times in all; a run that ends is compared, and the next one begins."""
        self.new_folder()
        while times:
            at = self.moment(signal.SIGKILL)
            code, _ = self.run(self.folder, at)
            if code == -signal.SIGKILL:
                times -= 1
                self.kinds[at[0]] += 1
            else:
                self.compare(code, f"killed, last asked at {at[:2]}")
                self.new_folder()
        self.compare(self.run(self.folder)[0], "killed")

    def ask(self, number):
        """Ask a run to end by a signal; its exit code is 128 + the signal's number, unless it was ending anyway."""
        self.new_folder()
        at = self.moment(number)
        code, _ = self.run(self.folder, at)
        if code != 128 + number and not (code == 0 and at[0] == "file"):
            self.wrong.append(f"{signal.Signals(number).name} at {at[:2]}: exit code {code}")
        if "Traceback" in (self.folder / "output.txt").read_text():
            self.wrong.append(f"{signal.Signals(number).name} at {at[:2]}: traceback")
        self.compare(self.run(self.folder)[0], f"{signal.Signals(number).name} at {at[:2]}")

    def compare(self, code, what):
        differ = differences(self.straight, outcome(self.folder)) if code == 0 else [f"exit code {code}"]
        left = [str(path) for path in self.folder.rglob("*.tmp")]
        self.wrong += [f"{what}: {name}" for name in (*differ, *left)]
        if not differ:
            shutil.rmtree(self.folder)


def main():
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_storm", description=__doc__, formatter_class=plain)
    parser.add_argument("--kills", type=int, default=100, help="by SIGKILL, of all runs together (100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--only", default="", help="part of the names of the runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # or it mentions each point that a resumed run replaced
    here, began, found = environment(torch.device("cpu")), time.time(), []
    print(f"seed {args.seed}, commit {here['commit']}, Python {here['python']}, torch {here['torch']}, CPU", flush=True)
    work = Path(tempfile.mkdtemp(prefix="kill_storm_"))
    (work / "teacher").mkdir()
    in_fork(train_scratch, [*DIGITS, "--model", "resnet8", "--epochs", "2", "--log_tag", "run"], work / "teacher")
    teacher = work / "teacher" / "checkpoints" / "pretrained" / "digits_resnet8.pth"
    chosen = {name: run for name, run in all_runs(teacher).items() if args.only in name}
    for number, (name, (program, words)) in enumerate(chosen.items()):
        place = work / name.replace(" ", "_")
        place.mkdir()
        kills = args.kills // len(chosen) + (number < args.kills % len(chosen))
        storm = Storm(program, words, place, random.Random(f"{args.seed} {name}"))
        storm.kill(kills)
        for asked in ASKED:
            storm.ask(asked)
        found.append((kills, storm))
        at = ", ".join(f"{count} at a {kind}" for kind, count in sorted(storm.kinds.items()))
        print(f"{'same     ' if not storm.wrong else 'DIFFERENT'}  {name}: killed {kills} times ({at})", flush=True)
        print("".join(f"    {line}\n" for line in storm.wrong), end="", flush=True)
    wrong = sum(bool(storm.wrong) for _, storm in found)
    print(
        f"{sum(kills for kills, _ in found)} kills and {len(found) * len(ASKED)} other signals in {len(found)} runs: "
        f"{len(found) - wrong} end as the straight run, {wrong} do not; {time.time() - began:.0f} s"
    )
    if wrong:
        print(f"what differs is kept in {work}")
    else:
        shutil.rmtree(work)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
