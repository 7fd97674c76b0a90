"""A step by one process and by several, in turns: torchrun --standalone --nproc-per-node 2 -m benchmarks.scaling

In each turn the first process takes a step alone, while the others wait, and then all take the same step together. The
reported ratios are medians over the turns, with their quartiles: of the time on the clock, which other programs on the
machine lengthen, and of the processor time of the first process, which they lengthen less. With D for what is divided
and R for what every process repeats, a step costs R + D alone and R + D / N together, which gives R. Bytes are those of
the results of the collectives. Weights are random.
"""

import argparse
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from itertools import product
from unittest import mock

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.step import PAIRS, Ours, quartiles
from datafree import distributed, launch, shares
from datafree.config import Run
from datafree.errors import InputError, exit_on_input_error
from datafree.logger import table
from datafree.runtime import choose_device, same_rng, seed_everything, set_threads
from datafree.screen import show

STEPS = {"synthesis": Ours.synthesis_step, "student": Ours.student_step}


def seconds(step, ours, device):
    """Time on the clock and processor time of a step."""
    clock, processor = time.perf_counter(), time.process_time()
    step(ours)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - clock, time.process_time() - processor


def exchanged(step, ours):
    """How many collectives a step calls, and the bytes of their results."""
    found, original = Counter(), shares.call

    def counted(collective, *args, **kwargs):
        parts = args[0] if collective is dist.all_gather else args[:1]
        found.update(collectives=1, bytes=sum(part.nbytes for part in parts))
        return original(collective, *args, **kwargs)

    with mock.patch.object(shares, "call", counted):
        step(ours)
    return found


def compare(pair, n, turns, device):
    """Rows (dict) of one pair of networks and batch size: one for each of STEPS, in the first process."""
    size, ngf = PAIRS[pair]
    alone, together = (Ours(pair, (3, size, size), ngf, n, device, "none") for _ in range(2))
    together.synthesis_step()  # the pool must not be empty
    with distributed.apart():
        alone.synthesis_step()
    rows, first = [], distributed.rank() == 0
    for name, step in STEPS.items():
        found, times = exchanged(step, together), []
        for _ in tqdm(range(turns), desc=f"{pair}, batch {n}, {name}", leave=False, disable=not first):
            distributed.wait_for_all()
            with same_rng(), distributed.apart() if first else nullcontext():
                one = seconds(step, alone, device) if first else (0.0, 0.0)
            distributed.wait_for_all()
            times.append((one, seconds(step, together, device)))
        if first:
            rows.append(summarise(pair, n, name, times, found))
    return rows


def summarise(pair, n, name, times, found):
    """A row of the medians over the turns."""
    processes = distributed.count()
    low, ratio, high = quartiles([one[0] / many[0] for one, many in times])
    cpu_low, cpu_ratio, cpu_high = quartiles([one[1] / many[1] for one, many in times])
    return {
        "networks": pair,
        "batch": n,
        "step": name,
        "ms by 1": 1000 * statistics.median(one[0] for one, _ in times),
        f"by {processes}": 1000 * statistics.median(many[0] for _, many in times),
        "faster": ratio,
        "from": low,
        "to": high,
        "CPU ms by 1": 1000 * statistics.median(one[1] for one, _ in times),
        f"each of {processes}": 1000 * statistics.median(many[1] for _, many in times),
        "less": cpu_ratio,
        "from ": cpu_low,
        "to ": cpu_high,
        "repeated %": 100 * (processes / cpu_ratio - 1) / (processes - 1),
        "collectives": found["collectives"],
        "MB": found["bytes"] / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(
        prog="torchrun --standalone --nproc-per-node 2 -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", nargs="*", choices=PAIRS, default=list(PAIRS), help="teacher>student")
    parser.add_argument("--batch", nargs="*", type=int, default=[64, 256], help="images, or views, of a step of all")
    parser.add_argument("--turns", type=int, default=5, help="turns for each pair, batch size and step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    args = parser.parse_args()
    if launch.processes() == 1:
        raise InputError(f"there is nothing to compare with one process; start it by {parser.prog}")
    with distributed.one_run():
        device = choose_device(args.device)
        distributed.start(Run(), device, "")
        set_threads(args.threads)
        seed_everything(0, False)
        rows = [row for pair, n in product(args.pairs, args.batch) for row in compare(pair, n, args.turns, device)]
        if distributed.rank() == 0:
            show(table(rows))


if __name__ == "__main__":
    exit_on_input_error(main)
