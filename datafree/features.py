"""Features of any ``nn.Module``, by hooks: logits, embedding and stage maps of one forward pass.

No model has to return its features, so torchvision's, timm's and user-defined networks
are teachers and students as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datafree.batchnorm import LayerStatistics
from datafree.errors import InputError


def pooled(x: Tensor) -> Tensor:
    """Global average pooling, (N, C, H, W) -> (N, C) in fp32; a matrix is returned unchanged."""
    return x.mean((2, 3), dtype=torch.float32) if x.dim() == 4 else x


FIELDS = ("logits", "embed", "stages", "pooled", "batch_norm")


class Features:
    """What one forward pass gives: the fields below, of which any may be absent.

    Reading an absent field raises an InputError that names it, so that a loss term which reads what it does not
    declare fails wherever it runs, and not only where features come from a cache.
    """

    def __init__(
        self,
        logits: Tensor | None = None,
        embed: Tensor | None = None,
        stages: list[Tensor] | None = None,
        pooled: list[Tensor] | None = None,
        batch_norm: list[LayerStatistics] | None = None,
    ):
        self._logits, self._embed, self._stages, self._pooled = logits, embed, stages, pooled
        self._batch_norm = batch_norm

    @property
    def logits(self) -> Tensor:
        """(N, classes)."""
        return self._present(self._logits, "logits")

    @property
    def embed(self) -> Tensor:
        """(N, D), what the classification head is given."""
        return self._present(self._embed, "embed")

    @property
    def stages(self) -> list[Tensor]:
        """[(N, C_l, H_l, W_l)], one map for each stage of the trunk."""
        return self._present(self._stages, "stages")

    @property
    def pooled(self) -> list[Tensor]:
        """[(N, C_l)], the stages averaged over space, in fp32."""
        if self._pooled is None and self._stages is not None:
            self._pooled = [pooled(stage) for stage in self._stages]
        return self._present(self._pooled, "pooled")

    @property
    def batch_norm(self) -> list[LayerStatistics]:
        """Batch and running statistics of each BatchNorm layer, if they were collected."""
        return self._present(self._batch_norm, "batch_norm")

    def with_batch_norm(self, statistics: list[LayerStatistics]) -> "Features":
        """These features with the statistics that a :class:`datafree.batchnorm.BatchNormTap` collected."""
        return Features(self._logits, self._embed, self._stages, self._pooled, statistics)

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


class FeatureTap:
    """Takes the stage outputs and the embedding out of ``model``.

    A *stage* is the output of the last block of the trunk at one spatial size: of the last
    module with children there, or of the last layer where there is none. The *embedding* is
    the input of the head, pooled if it is a map; the head is the last ``nn.Linear``, or a
    convolution if that is the last layer with parameters. Without a head the embedding is the last stage, pooled.
    One forward pass on zeros of ``shape`` (C, H, W) finds them; then a few hooks are left,
    which keep nothing outside a call of the tap. A copy of the model by ``copy.deepcopy`` of both has hooks of its own.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...]):
        self.model = model
        self._taken: dict[Any, Tensor] | None = None
        self._calls: dict[int, int] = {}
        calls, logits = _trace(model, shape)
        self.num_classes = logits.shape[1]
        head = _find_head(calls, self.num_classes)
        chosen = _choose_stages(calls[: calls.index(head)] if head else calls, _trunk(model, calls))
        self.stage_channels = [call.output[1] for call in chosen]
        self.stage_sizes = [call.output[2:] for call in chosen]
        for index, module in enumerate({id(call.module): call.module for call in chosen}.values()):
            stage_of = {call.number: chosen.index(call) for call in chosen if call.module is module}
            # Bound methods and no closures, which copy.deepcopy would leave with the first tap.
            module.register_forward_hook(partial(self._take_stage, index, stage_of))
        if head:
            head.module.register_forward_pre_hook(self._take_embed)
        elif not chosen:
            raise InputError(
                "the network has neither convolution maps nor a linear head, so it has no features to "
                "compare; use a network with a trunk of nn.Modules"
            )
        self.embed_dim = head.input[1] if head else self.stage_channels[-1]

    def __call__(self, inputs: Tensor) -> Features:
        """Forward pass of normalised ``inputs`` (N, C, H, W) -> :class:`Features`."""
        self._taken, self._calls = {}, {}
        try:
            logits = self.model(inputs)
            taken = self._taken
        finally:
            self._taken = None
        stages = [taken[i] for i in range(len(self.stage_channels))]
        return Features(logits, taken["embed"] if "embed" in taken else pooled(stages[-1]), stages)

    def _take_stage(self, index: int, stage_of: dict[int, int], module: nn.Module, args: Any, output: Tensor) -> None:
        """Hook of the ``index``-th module with stages; stage_of: which stage each of its calls gives."""
        if self._taken is not None:
            number = self._calls[index] = self._calls.get(index, -1) + 1
            if number in stage_of:
                self._taken[stage_of[number]] = output

    def _take_embed(self, module: nn.Module, args: Any) -> None:
        if self._taken is not None:
            self._taken["embed"] = pooled(args[0])


@dataclass(eq=False)
class _Call:
    """One execution of a module in the tracing pass: shapes, and how often it had run before."""

    module: nn.Module
    number: int
    input: tuple[int, ...]
    output: tuple[int, ...]


@torch.no_grad()
def _trace(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[_Call], Tensor]:
    """Run ``model`` on zeros in eval mode; every module call in order of completion, and the logits."""
    calls: list[_Call] = []
    counts: dict[nn.Module, int] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if args and torch.is_tensor(args[0]) and torch.is_tensor(output):
            number = counts[module] = counts.get(module, -1) + 1
            calls.append(_Call(module, number, tuple(args[0].shape), tuple(output.shape)))

    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(record) for module in model.modules()]
    parameter = next(model.parameters(), torch.zeros(()))
    try:
        logits = model.eval()(torch.zeros(2, *shape, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:  # a user-defined network may raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"the network {type(model).__name__} cannot take images of {shape[0]} channels and "
            f"{shape[1]}x{shape[2]} pixels ({reason}); choose another network"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if not torch.is_tensor(logits) or logits.dim() != 2:
        raise InputError(
            f"the network {type(model).__name__} must return logits as one tensor (N, classes), "
            f"not {tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__}"
        )
    return calls, logits


def _trunk(module: nn.Module, calls: list[_Call]) -> list[nn.Module]:
    """Modules applied to the image one after the other: containers are opened, blocks are not.

    A module is opened if it is a plain container, if it does not map images to images, or if it
    downsamples by more than a factor of two, because then it holds several stages.
    """
    modules: list[nn.Module] = []
    for child in module.children():
        own = [call for call in calls if call.module is child]
        plain_container = type(child).forward is nn.Sequential.forward
        if own and not plain_container and all(_within_one_scale(call) for call in own):
            modules.append(child)
        else:
            modules += _trunk(child, calls)
    return modules


def _within_one_scale(call: _Call) -> bool:
    return len(call.input) == len(call.output) == 4 and call.input[2] <= 2 * call.output[2] + 1


def _choose_stages(calls: list[_Call], trunk: list[nn.Module]) -> list[_Call]:
    """The last call of the trunk at each spatial size; of blocks where there are any."""
    groups: dict[tuple[int, ...], list[_Call]] = {}
    members = {id(module) for module in trunk}
    for call in calls:
        if id(call.module) in members and len(call.output) == 4:
            groups.setdefault(call.output[2:], []).append(call)
    chosen = []
    for group in groups.values():
        blocks = [call for call in group if next(call.module.children(), None) is not None]
        learned = any(next(call.module.parameters(), None) is not None for call in group)
        if learned:
            chosen.append((blocks or group)[-1])
    return chosen


def _find_head(calls: list[_Call], num_classes: int) -> _Call | None:
    """The call that outputs the logits: of the last layer with parameters if a convolution, else of a linear one."""
    learned = [call for call in calls if next(call.module.parameters(recurse=False), None) is not None]
    outputs = [call for call in learned if call.output[1:2] == (num_classes,)]
    heads = [call for call in outputs if isinstance(call.module, nn.Linear) and len(call.input) == 2]
    if learned and learned[-1] in outputs and isinstance(learned[-1].module, nn.Conv2d):
        return learned[-1]
    return heads[-1] if heads else None
