"""The teacher's answers to views of pool images, kept: what it said of a view once it need not say again.

A frozen teacher in evaluation mode answers a view alike whatever else the batch holds, and padded crops with mirroring
give an image only 2 (2 padding + 1)^2 views. So the answers are right up to rounding, and to the bit on the CPU as far
as tried, unlike one answer per image for all its views.
"""

import torch

from datafree.hooks import Features, pooled

PASS = 32  # A pass has a multiple of it: few shapes, and none so small that other kernels do it, which round otherwise.


class ViewCache:
    """Asks the teacher about new views only; memory is bounded, and a view that meets a full place takes it.

    teacher: a frozen Network. wanted: which of "logits", "embed", "stages" are needed (stages are kept pooled, as
    matrices). possible: how many views there are at a time. megabytes: bound of the memory, which the CPU gives as it
    fills, and a GPU at once.
    """

    def __init__(self, teacher, wanted, possible, megabytes):
        self.teacher, self.possible = teacher, possible
        tap, device = teacher.tap, teacher.mean.device
        widths = {"logits": [tap.num_classes], "embed": [tap.embed_dim], "stages": tap.stage_channels}
        self.wanted = {name: widths[name] for name in widths if name in wanted}
        width = sum(map(sum, self.wanted.values()))
        self.bytes_per_view = 4 * width + 8
        self.places = max(1, min(possible, megabytes * 10**6 // self.bytes_per_view))
        self.values = torch.empty(self.places + 1, width, device=device)  # the last row is for what nobody keeps
        self.keys = torch.full((self.places,), -1, device=device)
        self._known, self._drawn = torch.zeros((), dtype=torch.long, device=device), 0

    def __len__(self):
        return self.places

    @torch.no_grad()
    def features(self, views, keys):
        """Views (N, C, H, W) with their keys (N,), the same key for the same view alone -> :class:`Features`.

        What is not wanted is None; stages are (N, C_l).
        """
        places = keys % self.places
        known = self.keys[places] == keys
        values, new = self.values[places], (~known).nonzero().flatten()
        if len(new):
            values[new] = fresh = self._ask(views, new)
            self._keep(places[new], keys[new], fresh)
        self._known += known.sum()
        self._drawn += len(keys)
        return self._unpack(values)

    def hit_rate(self):
        """Share of the views that were known, since the last call of this; None if there were no views."""
        rate = self._known.item() / self._drawn if self._drawn else None
        self._known.zero_()
        self._drawn = 0
        return rate

    def _ask(self, views, new):
        filled = new[torch.arange(-(-len(new) // PASS) * PASS, device=new.device) % len(new)]
        answer = self.teacher.features(views[filled])
        parts = {"logits": [answer.logits], "embed": [answer.embed], "stages": map(pooled, answer.stages)}
        return torch.cat([part.float() for name in self.wanted for part in parts[name]], 1)[: len(new)]

    def _keep(self, places, keys, values):
        self.keys[places] = keys
        # Of two new views with one place one has it now; the other is written where nothing is read.
        self.values[torch.where(self.keys[places] == keys, places, self.places)] = values

    def _unpack(self, values):
        widths = [width for name in self.wanted for width in self.wanted[name]]
        parts = iter(values.split(widths, 1))
        found = {name: [next(parts) for _ in self.wanted[name]] for name in self.wanted}
        logits, embed = (found[name][0] if name in found else None for name in ("logits", "embed"))
        return Features(logits, embed, found.get("stages", []))
