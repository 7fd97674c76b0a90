"""Peak memory of a step of each phase: python -m benchmarks.memory [SETTING ...]

A setting is TEACHER>STUDENT,PIXELS,CLASSES,NGF,BATCH. Each phase takes two steps in a separate process, on a batch of
images (synthesis) or on as many views of half as many images (student); its peak is given above the memory in use
before them, when networks and generator exist already. The pool is one of 51,200 images, the view cache one of a
million views. On the CPU the peak is known on Linux alone.
"""

import subprocess
import sys

import torch

from benchmarks.step import Ours
from datafree.arguments import usage
from datafree.errors import InputError, exit_on_input_error
from datafree.logger import table
from datafree.runtime import choose_device, peak_memory, reset_peak, seed_everything

SETTINGS = (
    "resnet20>resnet8,16,10,16,64",
    "wrn40_2>wrn16_1,32,10,64,64",
    "wrn40_2>wrn16_1,32,10,64,256",
    "resnet34>resnet18,32,10,64,64",
    "resnet34>resnet18,32,10,64,256",
    "torchvision.models:resnet50>torchvision.models:resnet18,224,1000,64,16",
)
PHASES = ("synthesis", "student")


def measure(setting, phase):
    """Print the peak (MB) of two steps of a phase above the memory in use before them; for a fresh process."""
    seed_everything(0, False)  # which lets cuDNN choose its kernels as in a run
    ours = build(setting)
    pool, device = ours.source.pool, ours.source.device
    before = reset_peak(device)
    if phase == "student":
        images = torch.rand(2 * ours.n, *pool.shape, device=device)
        pool.add(images, torch.zeros(2 * ours.n, dtype=torch.long, device=device))
    for _ in range(2):
        ours.synthesis_step() if phase == "synthesis" else ours.student_step()
    print(round(peak_memory(device) - before))


def build(setting):
    try:
        pair, pixels, classes, ngf, n = setting.split(",")
        return Ours(pair, (3, int(pixels), int(pixels)), int(ngf), int(n), choose_device("auto"), "none", int(classes))
    except ValueError:
        raise InputError(f"{setting} is not TEACHER>STUDENT,PIXELS,CLASSES,NGF,BATCH; give a setting as that") from None


def row(setting):
    """A row (dict) of the table."""
    cache = build(setting).cache
    peaks = {
        phase: int(
            subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", "--one", setting, phase],
                text=True,
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
        )
        for phase in PHASES
    }
    pair, pixels, classes, ngf, n = setting.split(",")
    return {
        "networks": pair,
        "pixels": int(pixels),
        "classes": int(classes),
        "ngf": int(ngf),
        "batch": int(n),
        **{f"{phase} MB": peak for phase, peak in peaks.items()},
        "pool MB": round(51200 * 3 * int(pixels) ** 2 / 1e6),
        "view cache MB": cache.bytes_per_view,
    }


def main():
    usage(__doc__, at_least=0)
    if sys.argv[1:2] == ["--one"]:
        measure(*sys.argv[2:])
    else:
        print(table([row(setting) for setting in sys.argv[1:] or SETTINGS]))


if __name__ == "__main__":
    exit_on_input_error(main)
