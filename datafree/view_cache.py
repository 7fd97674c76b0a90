"""Cache of teacher outputs, one entry per augmented view of a pool image.

The output of a frozen teacher for a view does not depend on the rest of the batch, and padded crops with flipping
give an image only 2 (2 padding + 1)^2 views. So cached outputs are right up to rounding, and to the bit on the CPU as
far as tried, unlike one output per image for all of its views.
"""

import math
from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from datafree import distributed
from datafree.batchnorm import is_batch_independent
from datafree.errors import InputError, OptionError, out_of_memory_in
from datafree.features import FeatureRows, Features
from datafree.network import Network
from datafree.pool import ImagePool
from datafree.runtime import free_memory, unfilled
from datafree.schedule import Schedule

if TYPE_CHECKING:
    from datafree.learners.base import Learner
    from datafree.session import Session
    from datafree.synthesis.base import BaseSynthesis

# Misses are padded to a multiple of 32, so that the same kernels (and rounding) are used as for full batches; of
# several processes each has such a multiple. With a --micro_batch below that, they are padded to a multiple of it.
PAD_TO = 32
MOST_ROUNDS = 10_000  # that are reckoned one by one


class ViewCache:
    """Runs the teacher on new views only. Memory is bounded: a view overwrites another one with the same place.

    teacher: a frozen Network. fields: which of "logits", "embed" and "pooled" to keep. possible: how many views exist
    at a time. megabytes: limit of the memory, which the CPU allocates as it fills, and a GPU at once. lookups: views
    since the last call of :meth:`hit_rate`.
    """

    def __init__(self, teacher: Network, fields: Collection[str], possible: int, megabytes: int):
        self.teacher, self.possible = teacher, possible
        self.rows, self.megabytes = FeatureRows(teacher.tap, fields), megabytes
        self.bytes_per_view = 4 * self.rows.width + 8
        self._allocate()
        self._hits, self.lookups = torch.zeros((), dtype=torch.long, device=teacher.device), 0

    def places_for(self, possible: int) -> int:
        """How many of so many views have a place."""
        return max(1, min(possible, self.megabytes * 10**6 // self.bytes_per_view))

    def _allocate(self) -> None:
        device = self.teacher.device
        self.places = self.places_for(self.possible)
        with out_of_memory_in("allocation of the view cache", "--view_cache"):
            self.values = unfilled(self.places + 1, self.rows.width, device=device)  # the last row is never read
            self.keys = torch.full((self.places,), -1, device=device)

    def resize(self, possible: int) -> None:
        """Have room for so many views, within the same limit; if that changes its size, it forgets all."""
        self.possible = possible
        if self.places_for(possible) != self.places:
            self._allocate()

    def __len__(self) -> int:
        return self.places

    @torch.no_grad()
    def features(self, views: Tensor, keys: Tensor) -> Features:
        """The teacher's Features of ``views`` (N, C, H, W), of which equal ``keys`` (N,) are the same view."""
        places = keys % self.places
        known = self.keys[places] == keys
        values, new = self.values[places], (~known).nonzero().flatten()
        if len(new):
            values[new] = fresh = self._run_teacher(views, new)
            self._keep(places[new], keys[new], fresh)
        self._hits += known.sum()
        self.lookups += len(keys)
        return self.rows.unpack(values)

    def hit_rate(self) -> float | None:
        """Fraction of the views that were cached, since the last call; None if there were no views."""
        rate = self._hits.item() / self.lookups if self.lookups else None
        self._hits.zero_()
        self.lookups = 0
        return rate

    def forget(self) -> None:
        """Empty it, and count from 0."""
        self.keys.fill_(-1)
        self.hit_rate()

    def _run_teacher(self, views: Tensor, new: Tensor) -> Tensor:
        multiple, most = PAD_TO * distributed.count(), self.teacher.micro_batch
        multiple = min(multiple, most or multiple)
        padded = new[torch.arange(-(-len(new) // multiple) * multiple, device=new.device) % len(new)]
        parts = padded.split(most // multiple * multiple or len(padded))  # none is computed in parts of other sizes
        return torch.cat([self.rows.pack(self.teacher.features(views[part])) for part in parts])[: len(new)]

    def _keep(self, places: Tensor, keys: Tensor, values: Tensor) -> None:
        self.keys[places] = keys
        # Of two new views with the same place one has it now; the other is written to the row that is never read.
        self.values[torch.where(self.keys[places] == keys, places, self.places)] = values


def expected_new_views(
    schedule: Schedule, views: int, images: int, capacity: int, count: int, places: int, start: int = 0
) -> float:
    """How many views of a whole run a :class:`ViewCache` will not know, if all that exist are equally likely.

    views: of a student step. images: of a batch that synthesis adds to the pool. capacity: of the pool. count: views of
    an image. places: of the cache. start: images that are in the pool from the beginning to the end.
    """
    first, rounds = schedule.warmup * schedule.rounds, schedule.total_rounds
    chunk = -(-rounds // MOST_ROUNDS)
    held, unseen, faded, new = start, float(start * count), 0.0, 0.0
    parts: deque[tuple[int, float]] = deque()  # of the pool: images, and ``faded`` when they came
    for begun in range(first, rounds, chunk):
        done = min(begun + chunk, rounds)
        came = (schedule.batches_until(0, done) - schedule.batches_until(0, begun) * (begun > first)) * images
        parts.append((came, faded))
        held, unseen = held + came, unseen + came * count
        while held > capacity:
            size, then = parts.popleft()
            gone = min(size, held - capacity)
            held, unseen = held - gone, unseen - gone * count * math.exp(faded - then)
            if size > gone:
                parts.appendleft((size - gone, then))
        drawn, exist = views * schedule.kd_steps * (done - begun), held * count
        fresh = unseen * -math.expm1(-drawn / exist)  # the first draw of each view
        kept = min(1.0, places / max(exist - unseen, 1.0))  # of several views with one place the last one is there
        new += fresh * kept + drawn * (1 - kept)
        unseen, faded = unseen - fresh, faded - drawn / exist
    return new


def build_cache(
    session: "Session", teacher: Network, source: "BaseSynthesis", learner: "Learner", megabytes: int | None
) -> ViewCache | None:
    """A cache for what the learner reads of its teacher; None if it has no use.

    megabytes: its limit, None for the default of --view_cache. Raises OptionError if that requests one that has no
    use, and InputError if it does not fit.
    """
    fields = learner.cached_fields
    if megabytes and not fields:
        raise OptionError(
            "--view_cache has no effect, because views do not recur (--mixup), a term reads whole maps (--gram_loss, "
            "--at_loss), or the learner does not use one; remove it, or change that"
        )
    wanted = session.device.type == "cpu" if megabytes is None else megabytes > 0
    pool = getattr(source, "pool", None)
    repeatable = teacher.trial.repeatable and is_batch_independent(teacher)
    if not wanted or not fields or not isinstance(pool, ImagePool) or not repeatable:
        return None
    free = max(0, free_memory(session.device) - pool.images.nbytes) // 10**6  # which the pool has not touched yet
    free = distributed.least(free)  # so that all processes know the same views
    possible = pool.capacity * session.augment.count
    cache = ViewCache(teacher, fields, possible, free // 4 if megabytes is None else min(megabytes, free))
    if megabytes and megabytes > free and len(cache) < possible:
        raise InputError(
            f"--view_cache {megabytes} does not fit beside the pool into the {free} MB that are free; lower it"
        )
    return cache
