"""Cost of a step of each phase, beside the plain pipeline: python -m benchmarks.step [--pairs ...] [--batch ...]

Both pipelines take turns within this process. The reported ratio is the median over the turns, with its quartiles, so
that a busy machine cannot favour one of them. Times are CPU seconds of all threads; on a GPU they are wall-clock
seconds, and the host waits after every part, so that the parts add up but the whole is slower than in a run. FLOP are
counted by torch, two per multiplication; the peak is the best of a few convolutions, timed in the same turns. Weights
are random. --json writes all of it to a file, too.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import plain
from datafree.augment import CropFlip, shift_flip
from datafree.config import Distill, DistillConfig, Relation, Run, ScheduleOptions, Synthesis
from datafree.datasets.cards import DatasetCard
from datafree.errors import exit_on_input_error
from datafree.learners.distill import DistillLearner
from datafree.logger import table
from datafree.models.factory import build_model
from datafree.muon import Muon
from datafree.network import Network
from datafree.pool import ImagePool
from datafree.runtime import autocast, choose_device, environment, seed_everything, set_threads
from datafree.synthesis.inversion import InversionSynthesis
from datafree.view_cache import ViewCache

PAIRS = {"wrn40_2>wrn16_1": (32, 64), "resnet34>resnet18": (32, 64), "resnet20>resnet8": (16, 16)}  # pixels, ngf
CASES = (
    "plain synthesis",
    "synthesis",
    "plain student",
    "student",
    "student, all views new",
    "student, all views known",
    "student, Muon",
)
CACHED = ("plain student", "student", "student, all views new", "student, all views known")
PARTS = ("generator", "augmentation", "teacher", "student", "backward", "optimiser", "rest")


class Clock:
    """Seconds of named parts; those of a nested part are not counted for the outer one."""

    def __init__(self, device):
        self.device, self.seconds, self.inner = device, Counter(), 0.0

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def run(self, part, call, *args, **kwargs):
        outer, self.inner, start = self.inner, 0.0, self.now()
        result = call(*args, **kwargs)
        whole = self.now() - start
        self.seconds[part] += whole - self.inner
        self.inner = outer + whole
        return result

    @contextmanager
    def timed(self, parts):
        """A context in which the methods given as (owner, name, part) are timed."""
        with ExitStack() as stack:
            for owner, name, part in parts:
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), part)))
            yield

    def _timed(self, call, part):
        return lambda *args, **kwargs: self.run(part, call, *args, **kwargs)

    def take(self):
        """The seconds since the last call, by part."""
        taken, self.seconds = self.seconds, Counter()
        return taken


class Ours:
    """Both phases as the programs run them, with n images per synthesis step and n views per student step."""

    def __init__(self, pair, shape, ngf, n, device, precision, classes=10):
        config = DistillConfig(
            run=Run(precision=precision),
            schedule=ScheduleOptions(g_steps=1),
            synthesis=Synthesis(synthesis_batch_size=n, pool_size=4 * n, ngf=ngf, bn=1, oh=1, adv=1),
            relation=Relation(triplet=0.1, striplet=0.1),
            distill=Distill(pair_sample=True, cd_loss=0.1),
        )
        card, crop = DatasetCard("random", *shape, classes, (0.5,) * 3, (0.25,) * 3), CropFlip(4, True)
        self.teacher, self.student = (Network.build(name, card).to(device) for name in pair.split(">"))
        self.source = InversionSynthesis(self.teacher.freeze(), self.student, crop, card, config, device)
        self.learner = DistillLearner(self.student, self.teacher, crop, config, 10**6)
        self.cache, self.n = ViewCache(self.teacher, self.learner.cached_fields, 2 * n, 10**3), n
        self.muon = Muon(self.student, self.learner.lr)

    def synthesis_step(self):
        self.source.synthesize()

    def student_step(self):
        self.learner.cache = None
        self.learner.step(self.source.sample(self.n // 2))

    def cached_step(self, known):
        """A student step with the view cache, of whose views all are cached, or none."""
        features, keys = self.cache.features, torch.arange(self.n, device=self.source.device)
        if not known:
            self.cache.keys.fill_(-1)
        self.learner.cache = self.cache
        with mock.patch.object(self.cache, "features", lambda views, _: features(views, keys)):
            self.learner.step(self.source.sample(self.n // 2))

    def muon_step(self):
        with mock.patch.object(self.learner, "optimizer", self.muon):
            self.student_step()


def convolution_peak(device, precision, channels=(64, 128, 256)):
    """The best FLOP/s of a few 3x3 convolutions in channels_last."""
    clock, best, repeats = Clock(device), 0.0, 4 if device.type == "cpu" else 400  # far longer than a synchronisation
    with torch.no_grad(), autocast(device, precision):
        for width in channels:
            x = torch.rand(64, width, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
            weight = torch.rand(width, width, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
            F.conv2d(x, weight, padding=1)
            start = clock.now()
            for _ in range(repeats):
                F.conv2d(x, weight, padding=1)
            best = max(best, repeats * 2 * 9 * width**2 * 64 * 256 / (clock.now() - start))
    return best


def count_flop(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def compare(pair, n, args, device):
    """Rows (dict) of one pair of networks and batch size: one for each of CASES, and one for each size of the cache."""
    size, ngf = PAIRS[pair]
    ours = Ours(pair, (3, size, size), ngf, n, device, args.precision)
    theirs = plain.Plain(*(build_model(name, 10, 3) for name in pair.split(">")), (3, size, size), ngf, n, device)
    views, labels = torch.rand(n, 3, size, size, device=device), torch.randint(10, (n,), device=device)
    calls = dict(
        zip(
            CASES,
            (
                lambda: theirs.synthesis_round(1),
                ours.synthesis_step,
                lambda: theirs.student_step(views, labels),
                ours.student_step,
                lambda: ours.cached_step(known=False),
                lambda: ours.cached_step(known=True),
                ours.muon_step,
            ),
        )
    )
    ours.synthesis_step()  # the pool must not be empty
    flop = {case: count_flop(call) for case, call in calls.items()}
    if args.compile != "off":
        ours.teacher.compiled(args.compile), ours.student.compiled(args.compile)
        for _ in range(2):
            for call in calls.values():
                call()
    clock, turns, peaks = Clock(device), defaultdict(list), defaultdict(list)
    with clock.timed(timed_methods(ours, theirs)):
        for _ in tqdm(range(args.turns), desc=f"{pair}, batch {n}", leave=False):
            for precision in {"none", args.precision}:
                peaks[precision].append(convolution_peak(device, precision))
            for case, call in calls.items():
                clock.run("rest", call)
                turns[case].append(clock.take())
    floors = {
        case: flop[case] / statistics.median(peaks["none" if "plain" in case else args.precision]) for case in CASES
    }
    steps = [summarise(pair, n, case, turns, floors[case]) for case in CASES]
    caches = [average(turns, megabytes, ours.cache.bytes_per_view, n // 2) for megabytes in args.cache]
    return steps, [{"networks": pair, "batch": n, **row} for row in caches]


def timed_methods(ours, theirs):
    """(owner, name, part) of the methods that are timed separately; everything else is the rest."""
    return [
        (ours.source.generator, "forward", "generator"),
        (theirs, "generate", "generator"),
        (ours.source, "augment", "augmentation"),
        (ours.learner, "_views", "augmentation"),
        (theirs, "augment", "augmentation"),
        (ours.teacher, "features", "teacher"),
        (theirs, "run_teacher", "teacher"),
        (ours.student, "features", "student"),
        (theirs, "run_student", "student"),
        (torch.Tensor, "backward", "backward"),
        (ours.learner.optimizer, "step", "optimiser"),
        (ours.muon, "step", "optimiser"),
        (theirs.sgd, "step", "optimiser"),
        (torch.optim.Adam, "step", "optimiser"),
    ]


def summarise(pair, n, case, turns, floor):
    """A row: milliseconds of the median turn, the speedup over the plain step, the share of the peak, and the parts.

    floor: seconds that the step would take at the peak.
    """
    seconds = [sum(turn.values()) for turn in turns[case]]
    plainly = [sum(turn.values()) for turn in turns["plain " + case.partition(",")[0].removeprefix("plain ")]]
    low, ratio, high = quartiles([theirs / ours for theirs, ours in zip(plainly, seconds)])
    median = statistics.median(seconds)
    return {
        "networks": pair,
        "batch": n,
        "step": case,
        "ms": 1000 * median,
        "faster": ratio,
        "from": low,
        "to": high,
        "% of peak": 100 * floor / median,
        **{f"{part} ms": 1000 * statistics.median(turn[part] for turn in turns[case]) for part in PARTS},
    }


def quartiles(values):
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def compare_data(images, args, size=32, n=128):
    """A row: CPU seconds to load the views of ``--data-steps`` student steps from a pool of ``images`` images."""
    pool = ImagePool(images, (3, size, size), 10, torch.device("cpu"))
    pool.add(torch.rand(images, 3, size, size), torch.zeros(images, dtype=torch.long))
    crop = CropFlip(4, True)
    with tempfile.TemporaryDirectory() as root:
        for number, image in enumerate(pool.images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{root}/{number:06d}.png")
        plainly, ours = [], []
        for _ in range(args.data_turns):
            start = sum(os.times()[:4])
            for _ in plain.batches(root, size, n, args.data_steps):
                pass
            plainly.append(sum(os.times()[:4]) - start)  # of this process and of its finished workers
            start = time.process_time()
            for _ in range(args.data_steps):
                shift_flip(pool.sample(n)[0], *crop.draw(2 * n, pool.device))
            ours.append(time.process_time() - start)
    low, ratio, high = quartiles([a / b for a, b in zip(plainly, ours)])
    return {
        "pool": images,
        "steps": args.data_steps,
        "plain s": statistics.median(plainly),
        "s": statistics.median(ours),
        "faster": ratio,
        "from": low,
        "to": high,
    }


def average(turns, megabytes, bytes_per_view, images):
    """A row: the mean student step of the published schedule with a view cache of so many megabytes."""
    share = expected_hit_rate(megabytes * 10**6 // bytes_per_view, n=images)
    plainly, without, new, known = ([sum(turn.values()) for turn in turns[case]] for case in CACHED)
    mean = [share * k + (1 - share) * n for n, k in zip(new, known)]
    low, ratio, high = quartiles([a / b for a, b in zip(plainly, mean)])
    return {
        "cache MB": megabytes,
        "known %": 100 * share,
        "than without": statistics.median(a / b for a, b in zip(without, mean)),
        "than plain": ratio,
        "from": low,
        "to": high,
    }


@cache
def expected_hit_rate(places, epochs=200, steps=400, images=256, views=162, n=128):
    """The hit rate of a view cache with ``places`` places over the published schedule, by simulating its samples."""
    rng, known = np.random.default_rng(0), 0
    held = np.full(min(places, epochs * images * views), -1)
    for epoch in range(1, epochs + 1):
        for _ in range(steps):
            shown = np.tile(rng.choice(epoch * images, n, replace=False, shuffle=False), 2)
            keys = shown * views + rng.integers(views, size=2 * n)
            known += (held[keys % len(held)] == keys).sum()
            held[keys % len(held)] = keys
    return known / (epochs * steps * 2 * n)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="*", choices=PAIRS, default=list(PAIRS), help="teacher>student")
    parser.add_argument("--batch", nargs="*", type=int, default=[64, 256], help="images, or views, of a step")
    parser.add_argument("--turns", type=int, default=5, help="turns for each pair and batch size")
    parser.add_argument("--cache", nargs="*", type=int, default=[1000, 4000, 16000], help="sizes of the cache in MB")
    parser.add_argument(
        "--pool", nargs="*", type=int, default=[1000, 10000, 50000], help="images of the pools that data is loaded from"
    )
    parser.add_argument("--data-steps", type=int, default=400, help="student steps whose views are loaded")
    parser.add_argument("--data-turns", type=int, default=3, help="turns of this part")
    parser.add_argument("--precision", choices=["none", "bf16", "fp16"], default="none", help="of our networks")
    parser.add_argument(
        "--compile", choices=["off", "default", "reduce-overhead"], default="off", help="of our networks"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; times with several are noisy")
    parser.add_argument("--json", default="", help="file to which the same numbers are written")
    args = parser.parse_args()
    if min(args.pool, default=128) < 128:
        parser.error("--pool: a batch takes 128 images; give at least as many")
    set_threads(args.threads)
    seed_everything(0, False)  # which lets cuDNN choose its kernels by timing them, as in a run
    device = choose_device(args.device)
    found = {"steps": [], "view cache": [], "data": []}
    for pair, n in product(args.pairs, args.batch):
        for part, rows in zip(found, compare(pair, n, args, device)):
            found[part] += rows
    found["data"] = [compare_data(images, args) for images in args.pool]
    for rows in found.values():
        print(table(rows), "", sep="\n")
    if args.json:
        Path(args.json).write_text(
            json.dumps({"options": vars(args), "environment": environment(device), **found}, indent=2) + "\n"
        )


if __name__ == "__main__":
    exit_on_input_error(main)
