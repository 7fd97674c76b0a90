"""Compare the weights that two revisions train, bit for bit: python -m benchmarks.same_bits REVISION [--quickstart]

A teacher is trained on the digits, and from it a student by every method of configs/methods/ and by a few more
combinations of options, once without interruption, and once stopped by a signal and resumed. This is done with the code
of the git revision and with that of the working tree, and the weights after the last epoch are compared. A refactoring,
which must not change any result, has to pass. The exit code is 1 if any weight differs. It takes one to two minutes.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

# No module of datafree may be imported here, because train() imports those of the tree that it is given.
ROOT = Path(__file__).resolve().parent.parent
DIGITS = "--threads 1 --dataset digits --crop_padding 1".split()
STUDENT = "--teacher resnet8 --student resnet8 --epochs 4 --ep_steps 6 --kd_steps 3 --batch_size 16"
PIXELS = "--g_steps 3 --synthesis_batch_size 16"
GENERATOR = f"{PIXELS} --nz 16 --ngf 4"
SYNTHESIS = {  # options of the methods that do not take just those of GENERATOR
    "noise": "",
    "real": "",
    "folder": f"--pool_images {ROOT / 'docs' / 'results'}",
    "deepinv": PIXELS,
    "fast": f"{GENERATOR} --warmup 0 --reset_epoch 2",
    "rgal_fast": f"{GENERATOR} --warmup 0",
    "rgal_reptile": f"{GENERATOR} --warmup 0",
    "nayer": f"{GENERATOR} --warmup 0 --generator_life 3",
}
MORE = {  # further runs of RGAL, and their options
    "cached": "--cd_loss 0.5 --striplet 0.1 --pair_sample true --view_cache 20",
    "terms": "--act 0.1 --balance 1 --tv 1e-4 --l2 1e-4 --cr 0.5 --gram_loss 0.1 --at_loss 1 --custom_steps 0.6",
    "relation": "--triplet 1 --relation release --triplet_target teacher --sampling_space logits --striplet 1"
    " --striplet_feature features",
    "ring": "--pool_size 24 --balanced_sampling --warmup 1 --precision bf16",
}
STOP_AT = 14  # of 24 student steps: within a round


def runs(tree=ROOT):
    """Name of each run -> arguments of datafree_kd.py; the methods are those of ``tree``."""
    methods = sorted(path.stem for path in Path(tree, "configs", "methods").glob("*.yaml"))
    words = {method: f"--method {method} {STUDENT} {SYNTHESIS.get(method, GENERATOR)}" for method in methods}
    words |= {name: f"--method rgal {STUDENT} {GENERATOR} {more}" for name, more in MORE.items()}
    return {name: text.split() for name, text in words.items()}


def call(program, *words):
    """Do in this process what ``python <program> <words>`` does."""
    with mock.patch.object(sys, "argv", [f"{program.__name__}.py", *map(str, words)]):
        program.main()


def call_and_stop(program, *words):
    """As :func:`call`, but SGD receives a stop signal before step ``STOP_AT``."""
    step, calls = torch.optim.SGD.step, []

    def stopping_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == STOP_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with mock.patch.object(torch.optim.SGD, "step", stopping_step):
        try:
            call(program, *words)
        except SystemExit:
            return
    raise RuntimeError("the run was not stopped")


def train(tree, work, quickstart):
    """Do every run in the folder ``work`` with the code of ``tree``; to be called in a fresh process."""
    os.chdir(work)
    sys.path.insert(0, str(tree))
    with open("log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
        train_comparison(tree)
        if quickstart:
            train_quickstart(tree)


def train_comparison(tree):
    import datafree_kd
    import train_scratch

    call(train_scratch, *DIGITS, "--model", "resnet8", "--epochs", 2, "--log_tag", "straight")
    [weights] = Path("runs").glob("digits_scratch_resnet8/straight/checkpoints/*_last.pth")
    for name, words in runs(tree).items():
        words = [*DIGITS, *words, "--teacher_weights", weights, "--save_dir", f"runs/{name}", "--log_tag"]
        call(datafree_kd, *words, "straight")
        call_and_stop(datafree_kd, *words, "resumed")
        call(datafree_kd, *words, "resumed", "--resume", "auto")


def train_quickstart(tree):
    import datafree_kd
    import train_scratch

    configs, words = tree / "configs" / "digits", ("--save_dir", "runs/quickstart", "--config")
    call(train_scratch, *words, configs / "teacher_resnet20.yaml")
    [weights] = Path("runs/quickstart").glob("digits_scratch_resnet20/seed0/checkpoints/*_last.pth")
    for method in ("rgal", "noise", "real"):
        call(datafree_kd, *words, configs / f"{method}_resnet20_resnet8.yaml", "--teacher_weights", weights)


def weights_of(folder):
    """Run below ``folder`` -> its state_dict after the last epoch."""
    files = sorted(Path(folder, "runs").rglob("checkpoints/*_last.pth"))
    return {
        str(path.relative_to(folder).parents[1]): torch.load(path, weights_only=True)["state_dict"] for path in files
    }


def equal(first, second):
    """Whether two state_dicts have the same names and, to the last bit, the same values."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_bits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="of git, such as HEAD~1")
    parser.add_argument("--quickstart", action="store_true", help="add the quickstart's teacher and students, seed 0")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive, trees = Path(folder, "revision.zip"), {args.revision: Path(folder, "tree"), "the working tree": ROOT}
        if subprocess.run(["git", "archive", "-o", archive, args.revision], cwd=ROOT).returncode:
            parser.error(f"git has no revision {args.revision}; name a commit, a branch or a tag")
        shutil.unpack_archive(archive, trees[args.revision])
        found = []
        for number, (name, tree) in enumerate(trees.items()):
            print(f"training with {name} ...", flush=True)
            work = Path(folder, f"work{number}")
            work.mkdir()
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                pool.submit(train, tree, work, args.quickstart).result()
            found.append(weights_of(work))
    old, new = found
    same = {name: equal(old.get(name, {}), new.get(name, {})) for name in sorted(old | new)}
    for name, verdict in same.items():
        print(f"{'same     ' if verdict else 'DIFFERENT'}  {name}")
    print(f"{sum(same.values())} of {len(same)} runs end with the same bits")
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
