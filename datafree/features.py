"""Features of any ``nn.Module``, by hooks: logits, embedding and stage maps of one forward pass.

No model has to return its features, so torchvision's, timm's and user-defined networks
are teachers and students as they are.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datafree.batchnorm import LayerStatistics, combined_statistics
from datafree.errors import InputError
from datafree.outputs import Output, raw_logits
from datafree.stages import Stage, Trace, find_head, find_stages, first_tensor
from datafree.trial import input_dtype


def pooled(x: Tensor) -> Tensor:
    """Global average pooling, (N, C, H, W) -> (N, C) in fp32; a matrix is returned unchanged."""
    return x.mean((2, 3), dtype=torch.float32) if x.dim() == 4 else x


FIELDS = ("logits", "embed", "stages", "pooled", "batch_norm")


class _Once:
    """A property that is computed when it is first read; ``functools.cached_property`` takes a lock before
    Python 3.12, where torch.compile would break the graph."""

    def __init__(self, compute: Callable[[Any], Any]):
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, features: Any, owner: type) -> Any:
        if features is None:
            return self
        found = features.__dict__[self.name] = self.compute(features)
        return found


class Features:
    """What one forward pass gives: the fields below, of which any may be absent.

    Reading an absent field raises an InputError that names it, so that a loss term which reads what it does not
    declare fails wherever it runs, and not only where features come from a cache.

    gather: makes the rows of all processes of those of this one, when a field is first read (:mod:`datafree.shares`).
    """

    def __init__(
        self,
        logits: Tensor | None = None,
        embed: Tensor | None = None,
        stages: list[Tensor] | None = None,
        pooled: Sequence[Tensor] | None = None,
        batch_norm: list[LayerStatistics] | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ):
        self._logits, self._embed, self._stages, self._pooled = logits, embed, stages, pooled
        self._batch_norm, self._gather = batch_norm, gather

    @_Once
    def logits(self) -> Tensor:
        """(N, classes)."""
        return self._whole(self._present(self._logits, "logits"))

    @_Once
    def embed(self) -> Tensor:
        """(N, D), what the classification head is given."""
        return self._whole(self._present(self._embed, "embed"))

    @_Once
    def stages(self) -> list[Tensor]:
        """[(N, C_l, H_l, W_l)], one map for each stage of the trunk."""
        stages = self._present(self._stages, "stages")
        return list(map(self._gather, stages)) if self._gather else stages

    @_Once
    def pooled(self) -> Sequence[Tensor]:
        """[(N, C_l)], the stages averaged over space, in fp32; each is computed when it is read."""
        if self._pooled is None and self._stages is not None:
            return _Pooled(self._stages, self._gather)
        return self._present(self._pooled, "pooled")

    @property
    def batch_norm(self) -> list[LayerStatistics]:
        """Batch and running statistics of each BatchNorm layer, if they were collected."""
        return self._present(self._batch_norm, "batch_norm")

    def with_batch_norm(self, statistics: list[LayerStatistics]) -> "Features":
        """These features with the statistics that a :class:`datafree.batchnorm.BatchNormTap` collected."""
        return Features(self._logits, self._embed, self._stages, self._pooled, statistics, self._gather)

    def gathered(self, gather: Callable[[Tensor], Tensor]) -> "Features":
        """These features, of this process's share of a batch, as those of the whole batch."""
        return Features(self._logits, self._embed, self._stages, self._pooled, self._batch_norm, gather)

    def computed(self, with_maps: bool) -> "Features":
        """These features as plain tensors, computed and gathered; without whole maps if they are not wanted."""
        stages = self.stages if with_maps else None
        return Features(self.logits, self.embed, stages, list(self.pooled), self._batch_norm)

    @classmethod
    def joined(cls, parts: Sequence["Features"], places: Tensor | None = None) -> "Features":
        """The features of several batches as those of one; places: (N,), where each of its rows is among theirs."""
        sizes = [len(part._present(part._logits, "logits")) for part in parts]

        def rows_of(values: Sequence[Any]) -> Any:
            """The rows of all parts, of tensors or of lists of tensors; None if a part has none."""
            if any(value is None for value in values):
                return None
            if not torch.is_tensor(values[0]):
                return [rows_of(layer) for layer in zip(*values)]
            return torch.cat(values) if places is None else torch.cat(values)[places]  # type: ignore[arg-type]

        def gather(rows: Tensor) -> Tensor:
            return torch.cat([part._whole(piece) for part, piece in zip(parts, rows.split(sizes))])

        some_are_pooled = any(part._pooled is not None for part in parts)
        return cls(
            rows_of([part._logits for part in parts]),
            rows_of([part._embed for part in parts]),
            rows_of([part._stages for part in parts]),
            rows_of([list(part.pooled) for part in parts]) if some_are_pooled else None,
            combined_statistics([part._batch_norm or [] for part in parts], sizes) or None,
            gather if any(part._gather for part in parts) else None,
        )

    def _whole(self, rows: Tensor) -> Tensor:
        return self._gather(rows) if self._gather else rows

    def only(self, fields: Iterable[str]) -> "Features":
        """These features without the fields that are not named."""
        if unknown := set(fields) - set(FIELDS):
            raise InputError(f"features have no field '{unknown.pop()}', only {', '.join(FIELDS)}")
        return Features(**{name: getattr(self, name) for name in fields})

    @staticmethod
    def _present(value: Any, name: str) -> Any:
        if value is None:
            raise InputError(
                f"a loss term reads '{name}' of a network's features, which it does not declare or which is not "
                f"computed here; add '{name}' to the fields of its Term"
            )
        return value


class _Pooled(Sequence[Tensor]):
    """The means over space of ``stages``, each computed, and gathered, when it is read.

    It does not know its Features, or these, with their maps and graph, would be there until the garbage collector came.
    """

    def __init__(self, stages: Sequence[Tensor], gather: Callable[[Tensor], Tensor] | None):
        self.stages, self.gather = stages, gather

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, index: Any) -> Any:
        rows = pooled(self.stages[index])
        return self.gather(rows) if self.gather else rows


class FeatureRows:
    """Some fields of Features as one matrix in fp32, with a row for each view, and back.

    tap: of the network. fields: of "logits", "embed" and "pooled".
    """

    def __init__(self, tap: "FeatureTap", fields: Collection[str]):
        widths = {"logits": [tap.num_classes], "embed": [tap.embed_dim], "pooled": tap.stage_channels}
        if unknown := set(fields) - widths.keys():
            raise ValueError(f"cannot keep {', '.join(sorted(unknown))}, only {', '.join(widths)}")
        self.widths = {name: widths[name] for name in widths if name in fields}
        self.width = sum(map(sum, self.widths.values()))

    def pack(self, features: Features) -> Tensor:
        """(N, width)."""
        found = (getattr(features, name) for name in self.widths)
        layers = [layer for field in found for layer in ([field] if torch.is_tensor(field) else field)]
        return torch.cat([layer.float() for layer in layers], 1)

    def unpack(self, rows: Tensor) -> Features:
        """The Features of rows (N, width), with these fields alone."""
        parts = iter(rows.split([width for widths in self.widths.values() for width in widths], 1))
        found = {name: [next(parts) for _ in widths] for name, widths in self.widths.items()}
        logits, embed = (found[name][0] if name in found else None for name in ("logits", "embed"))
        return Features(logits, embed, pooled=found.get("pooled"))


class FeatureTap:
    """Takes the stage outputs and the embedding out of ``model``.

    A *stage* is the output of the last block of the trunk at one spatial size, whether as maps (N, C, H, W), as maps
    with the channels last, or as tokens: see :mod:`datafree.stages`, or the modules called ``stages``. The *embedding*
    is the input of the head, pooled if it is a map; the head is the layer whose output is the logits. Without a head
    the embedding is the last stage, pooled.
    One forward pass on images of ``shape`` (C, H, W) finds them; then a few hooks are left,
    which keep nothing outside a call of the tap. A copy of the model by ``copy.deepcopy`` of both has hooks of its own.

    dtype: of the images; that of the weights if it is not given. output: what the network returns. notes: what was left
    out, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        stages: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        output: Output | None = None,
    ):
        self.model, self.notes = model, list[str]()
        self._taken: dict[Any, Tensor] | None = None
        self._calls: dict[int, int] = {}
        trace = Trace(model, shape, dtype or input_dtype(model))
        self.num_classes = trace.raw.shape[1]
        head = find_head(trace, output or Output())
        self.stages = find_stages(trace, head, stages, self.notes)
        if not self.stages and not head:
            raise InputError(
                "the network has neither convolution maps nor a linear head, so it has no features to "
                "compare; use a network with a trunk of nn.Modules"
            )
        self.stage_channels = [stage.layout.channels for stage in self.stages]
        self.stage_sizes = [stage.layout.size for stage in self.stages]
        self.stage_names = [stage.name for stage in self.stages]
        # Bound methods and no closures, which copy.deepcopy would leave with the first tap.
        for index, (module, stage_of) in enumerate(_by_module(self.stages).items()):
            module.register_forward_hook(partial(self._take_stage, index, stage_of))
        self.head = head.module if head else None
        if head:
            head.module.register_forward_pre_hook(self._take_embed, with_kwargs=True)
        self.embed_dim = head.input[1] if head else self.stage_channels[-1]
        trace.forget()

    def __call__(self, inputs: Tensor) -> Features:
        """Forward pass of normalised ``inputs`` (N, C, H, W) -> :class:`Features`."""
        self._taken, self._calls = {}, {}
        try:
            logits = raw_logits(self.model(inputs), self.model)
            taken = self._taken
        finally:
            self._taken = None
        missing = [self.stage_names[i] for i in range(len(self.stages)) if i not in taken]
        if missing or (self.head is not None and "embed" not in taken):
            raise InputError(
                f"the network {type(self.model).__name__} did not compute {', '.join(missing) or 'its head'} in this "
                "pass, as a network does that drops layers at random or has other layers in training; make it compute "
                "all of its stages and its head in every pass, or name stages by --teacher_stages"
            )
        stages = [taken[i] for i in range(len(self.stages))]
        return Features(logits, pooled(stages[-1]) if self.head is None else taken["embed"], stages)

    def _take_stage(self, index: int, stage_of: dict[int, int], module: nn.Module, args: Any, output: Any) -> None:
        """Hook of the ``index``-th module with stages; stage_of: which stage each of its calls gives."""
        if self._taken is not None:
            number = self._calls[index] = self._calls.get(index, -1) + 1
            if number in stage_of:
                layout, x = self.stages[stage_of[number]].layout, first_tensor(output)
                assert x is not None  # as in the trace
                self._taken[stage_of[number]] = layout.read(x)

    def _take_embed(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._taken is not None:
            x = first_tensor([*args, *kwargs.values()])
            assert x is not None  # as in the trace
            self._taken["embed"] = pooled(x)


def _by_module(stages: Sequence[Stage]) -> dict[nn.Module, dict[int, int]]:
    """Module -> which stage each of its calls gives; of several calls for a stage the last one counts."""
    found: dict[nn.Module, dict[int, int]] = {}
    for index, stage in enumerate(stages):
        for module, number in stage.calls:
            found.setdefault(module, {})[number] = index
    return found
