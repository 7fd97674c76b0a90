"""Whether two states of the code train the same weights to the last bit: python -m benchmarks.same_bits REVISION [--quickstart]

Trains a teacher on the digits, a student by every method of configs/methods/, straight and stopped by a signal and
resumed, once with the code of the git revision and once with that of the working tree, and compares the weights of the
last epoch. --quickstart adds the quickstart's teacher and three students (seed 0). For refactoring: whatever claims to
change no result passes. Exits with 1 if a weight differs.
"""

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DIGITS = "--threads 1 --dataset digits --crop_padding 1".split()
STUDENT = "--teacher resnet8 --student resnet8 --epochs 4 --ep_steps 6 --kd_steps 3 --batch_size 16".split()
SYNTHESIS = "--g_steps 3 --synthesis_batch_size 16".split()
GENERATOR = "--nz 16 --ngf 4".split()
MORE = {  # beside the method files, options that they leave alone
    "cached": "--cd_loss 0.5 --striplet 0.1 --pair_sample true --view_cache 20",
    "terms": "--act 0.1 --balance 1 --tv 1e-4 --l2 1e-4 --cr 0.5 --gram_loss 0.1 --at_loss 1 --custom_steps 0.6",
    "relation": "--triplet 1 --relation release --triplet_target teacher --sampling_space logits --striplet 1"
    " --striplet_feature features",
    "ring": "--pool_size 24 --balanced_sampling --warmup 1 --precision bf16",
}


def runs():
    """Name -> words of datafree_kd.py, for each run of the comparison."""
    for path in sorted((ROOT / "configs" / "methods").glob("*.yaml")):
        method = path.stem
        words = ["--method", method, *STUDENT]
        if method not in ("noise", "real"):
            words += SYNTHESIS + (GENERATOR if method != "deepinv" else [])
        words += ["--warmup", "0"] if method in ("fast", "rgal_fast") else []
        yield method, words + (["--reset_epoch", "2"] if method == "fast" else [])
    for name, words in MORE.items():
        yield name, ["--method", "rgal", *STUDENT, *SYNTHESIS, *GENERATOR, *words.split()]


def call(program, *words):
    """What typing ``python <program> <words>`` does, in this process."""
    sys.argv = [f"{program.__name__}.py", *map(str, words)]
    program.main()


def stopped(number, program, *words):
    """As :func:`call`, but before its ``number``-th step SGD receives a stop signal."""
    step, calls = torch.optim.SGD.step, []

    def stopping_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    torch.optim.SGD.step = stopping_step
    try:
        call(program, *words)
    except SystemExit:
        return
    finally:
        torch.optim.SGD.step = step
    raise RuntimeError("the run was not stopped")


def train(quickstart):
    """Every run of the comparison with the code of the working folder's tree; to be called in a process of its own."""
    sys.path[:0] = [os.environ["TREE"]]
    import datafree_kd
    import train_scratch

    call(train_scratch, *DIGITS, "--model", "resnet8", "--epochs", 2, "--log_tag", "straight")
    teacher = ("--teacher_weights", next(Path("runs").glob("digits_scratch_resnet8/straight/checkpoints/*_last.pth")))
    for name, words in runs():
        words = (*DIGITS, *words, *teacher, "--save_dir", f"runs/{name}", "--log_tag")
        call(datafree_kd, *words, "straight")
        stopped(15, datafree_kd, *words, "resumed")
        call(datafree_kd, *words, "resumed", "--resume", "auto")
    if quickstart:
        configs, words = Path(os.environ["TREE"]) / "configs" / "digits", ("--save_dir", "runs/quickstart", "--config")
        call(train_scratch, *words, configs / "teacher_resnet20.yaml")
        [weights] = Path("runs/quickstart").glob("digits_scratch_resnet20/seed0/checkpoints/*_last.pth")
        for method in ("rgal", "noise", "real"):
            config = configs / f"{method}_resnet20_resnet8.yaml"
            call(datafree_kd, *words, config, "--teacher_weights", weights)


def weights_of(folder):
    """Name of the run -> its last weights."""
    files = sorted(Path(folder, "runs").rglob("checkpoints/*_last.pth"))
    return {
        str(path.relative_to(folder).parents[1]): torch.load(path, weights_only=True)["state_dict"] for path in files
    }


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main():
    revision, *flags = sys.argv[1:] or sys.exit(__doc__.strip())
    with tempfile.TemporaryDirectory() as folder:
        old, found = Path(folder, "old"), {}
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(old, filter="data")
        for tree in (old, ROOT):
            work = Path(folder, f"work-{tree.name}")
            work.mkdir()
            print(f"training with {revision if tree == old else 'the working tree'} ...", flush=True)
            done = subprocess.run(
                [sys.executable, __file__, "--train", *flags],
                cwd=work,
                text=True,
                env={**os.environ, "TREE": str(tree)},
                capture_output=True,
            )
            if done.returncode:
                sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
            found[tree] = weights_of(work)
    names = sorted(found[old].keys() | found[ROOT].keys())
    same = {name: equal(found[old].get(name, {}), found[ROOT].get(name, {})) for name in names}
    for name, verdict in same.items():
        print(f"{'same     ' if verdict else 'DIFFERENT'}  {name}")
    print(f"{sum(same.values())} of {len(same)} runs end with the same bits")
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train("--quickstart" in sys.argv)
    else:
        main()
