"""Which tensors of a file belong to which of a network: prefixes, names that changed, and what is left over."""

import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from datafree.errors import InputError

# Put before the names of the network itself by wrappers: of two sets that fit, one of these is the network's own.
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
# Names by wrappers in the middle, and those that their owner translates elsewhere than in load_state_dict:
# (what was done, pattern, replacement).
FORMER_NAMES = (
    (
        "the wrappers within the names of its weights were taken off",
        r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.",
        "",
    ),
    # torchvision renames these when it downloads a file, with the same pattern
    ("DenseNet's former names were translated", r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$", r"\1\2"),
    # torch translates from the old weight_norm to the new one itself
    ("the names of torch's newer weight_norm were translated", r"parametrizations\.(\w+)\.original0$", r"\1_g"),
    ("the names of torch's newer weight_norm were translated", r"parametrizations\.(\w+)\.original1$", r"\1_v"),
)


@dataclass
class Fit:
    """One way to give the tensors of a file the names of a network.

    tensors: by the network's names, those that it does not have among them. outside: names in the file that do not
    have the prefix. prefix: taken off the file's names. notes: what was done.
    """

    tensors: dict[str, Tensor]
    outside: list[str] = field(default_factory=list)
    prefix: str = ""
    notes: list[str] = field(default_factory=list)

    def missing(self, own: dict[str, Tensor]) -> list[str]:
        return [name for name in own if name not in self.tensors and not is_counter(name)]

    def extra(self, own: dict[str, Tensor]) -> list[str]:
        return [name for name in self.tensors if name not in own]

    def is_whole(self, own: dict[str, Tensor]) -> bool:
        """Whether each tensor of the network is there, in its shape."""
        return not self.missing(own) and not self.wrong_shapes(own)

    def wrong_shapes(self, own: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Name -> (shape in the file, shape in the network) where they differ."""
        return {
            name: (tuple(self.tensors[name].shape), tuple(tensor.shape))
            for name, tensor in own.items()
            if name in self.tensors and not nn.parameter.is_lazy(tensor) and self.tensors[name].shape != tensor.shape
        }


def is_counter(name: str) -> bool:
    """Whether it is a batch counter, which decides nothing and is absent from files older than torch 0.4.1."""
    return name.endswith("num_batches_tracked")


def find_fits(weights: dict[str, Tensor], model: nn.Module, own: dict[str, Tensor]) -> tuple[list[Fit], list[Fit]]:
    """The ways in which all of ``own``, the tensors of ``model``, are there; and those tried without translation.

    A way whose further tensors tell of another network is among the first only if no translation is better.
    """
    tried = list(_moved(weights, own))
    whole = [fit for fit in tried if fit.is_whole(own)]
    if not whole or any(changes_the_network(fit, own) for fit in whole):
        translated = [new for fit in whole or tried for new in _translated(fit, model)]
        whole = [fit for fit in translated if fit.is_whole(own) and not changes_the_network(fit, own)] or whole
    return whole or [fit for fit in _partly_prefixed(weights, own) if fit.is_whole(own)], tried


def load(model: nn.Module, fit: Fit, own: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Load the tensors of ``fit``; load_state_dict lets each module translate names of its earlier versions.

    -> names of the network that got no tensor, and names in the file that none got. Raises InputError if it fails.
    """
    tensors = OrderedDict(fit.tensors)
    record = getattr(fit.tensors, "_metadata", None)
    if record is None and not fit.missing(own):  # the names are the present ones, so the present version is right
        record = getattr(model.state_dict(), "_metadata", None)
    if record is not None:
        tensors._metadata = record  # type: ignore[attr-defined]
    try:
        result = model.load_state_dict(tensors, strict=False)
    except Exception as error:  # a module may translate its names by any code
        raise InputError(" ".join(str(error).split()) or type(error).__name__) from error
    return [name for name in result.missing_keys if name in own and not is_counter(name)], list(result.unexpected_keys)


def names_in_file(names: Iterable[str], fit: Fit, weights: dict[str, Tensor]) -> list[str]:
    """What the file with ``weights`` calls these tensors of ``fit``; their own name where another tensor was made."""
    by_tensor = {id(tensor): name for name, tensor in weights.items()}
    return [by_tensor.get(id(fit.tensors.get(name)), name) for name in names]


@contextmanager
def restored_on_error(own: dict[str, Tensor]) -> Iterator[None]:
    """The tensors of a network have their values again if the block raises an exception."""
    before = {name: tensor.clone() for name, tensor in own.items() if not nn.parameter.is_lazy(tensor)}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in before.items():
                own[name].copy_(tensor)
        raise


def changes_the_network(fit: Fit, own: dict[str, Tensor], extra: list[str] | None = None) -> list[str]:
    """Those of the names ``extra``, or of all that the network lacks, that tell of another network than this one.

    A tensor within one of its modules takes part in that module's computation, and the next of a numbered series
    (layer1.2 where there are layer1.0 and layer1.1) makes it deeper. Others do not: heads beside the network, counters.
    """
    children: dict[str, set[str]] = {}
    for name in own:
        parts = name.split(".")
        for i, part in enumerate(parts):
            children.setdefault(".".join(parts[:i]), set()).add(part)
    root = _common(own)
    names = [name for name in (fit.extra(own) if extra is None else extra) if name in fit.tensors]
    return [name for name in names if _is_inside(name, fit.tensors[name], children, root)]


def _is_inside(name: str, tensor: Tensor, children: dict[str, set[str]], root: str) -> bool:
    """children: module -> what it contains. root: the prefix that all names of the network share."""
    parts = name.split(".")
    known = (parts[i] in children.get(".".join(parts[:i]), ()) for i in range(len(parts)))
    depth = next((i for i, there in enumerate(known) if not there), len(parts) - 1)
    parent, part = ".".join(parts[:depth]), parts[depth]
    if re.search(r"\d", part) and any(_series(part) == _series(other) for other in children.get(parent, ())):
        return True
    if tensor.numel() <= 1 or not tensor.is_floating_point():
        return False
    return parent != "" and not root.startswith(f"{parent}.")


def _series(part: str) -> str:
    """The name without its number: equal for conv1 and conv2, and not for conv."""
    return re.sub(r"\d+", "0", part)


def _moved(weights: dict[str, Tensor], own: dict[str, Tensor]) -> Iterator[Fit]:
    """The file's tensors as they are, then with prefixes taken off, put before, or exchanged."""
    needed = sum(not is_counter(name) for name in own)
    common = _common(own)
    added = ["", *(common[: m.end()] for m in re.finditer(r"\.", common))]
    counts = _prefix_counts(weights)
    # A translation may change the number of tensors a little; what has far fewer is no candidate.
    taken = ["", *(prefix for prefix, count in counts.items() if count >= 0.9 * needed)]
    for off in taken:
        for on in added:
            if off and on and (off.endswith(on) or on.endswith(off)):
                continue  # the same as a shorter pair
            fit = Fit(_renamed(weights, off, on), [name for name in weights if not name.startswith(off)], off)
            if off:
                fit.notes.append(f"the prefix {off} was taken off the names of its weights")
            if on:
                fit.notes.append(f"the prefix {on} was put before the names of its weights")
            yield fit


def _partly_prefixed(weights: dict[str, Tensor], own: dict[str, Tensor]) -> Iterator[Fit]:
    """The file's tensors with a prefix taken off the names that have it, which are most of them."""
    counts = _prefix_counts(weights)
    for off in (prefix for prefix, count in counts.items() if 2 * count >= len(own) and count < len(weights)):
        names = {name: name.removeprefix(off) for name in weights}
        if len(set(names.values())) == len(names):
            note = f"the prefix {off} was taken off those of its weights' names that have it"
            yield Fit(OrderedDict((names[name], tensor) for name, tensor in weights.items()), [], off, [note])


def _translated(fit: Fit, model: nn.Module) -> Iterator[Fit]:
    """The tensors of ``fit`` by the names that former names stand for now."""
    for words in dict.fromkeys(words for words, _, _ in FORMER_NAMES):
        names = {name: name for name in fit.tensors}
        for pattern, new in ((p, n) for w, p, n in FORMER_NAMES if w == words):
            names = {name: re.sub(pattern, new, now) for name, now in names.items()}
        if any(name != now for name, now in names.items()) and len(set(names.values())) == len(names):
            tensors = {now: fit.tensors[name] for name, now in names.items()}
            yield Fit(tensors, fit.outside, fit.prefix, [*fit.notes, words])
    # torch.nn.utils.prune keeps a weight and what is left of it.
    pruned = [name.removesuffix("_mask") for name in fit.tensors if name.endswith("_mask")]
    if pruned and all(f"{name}_orig" in fit.tensors for name in pruned):
        tensors = dict(fit.tensors)
        for name in pruned:
            tensors[name] = tensors.pop(f"{name}_orig") * tensors.pop(f"{name}_mask")
        yield Fit(tensors, fit.outside, fit.prefix, [*fit.notes, "its pruned weights were masked"])
    # timm's networks have a function beside their class that translates the files of their authors.
    owner = type(model).__module__
    translate: Any = getattr(sys.modules.get(owner), "checkpoint_filter_fn", None)
    if translate is not None:
        try:
            tensors = dict(translate(dict(fit.tensors), model))
        except Exception:  # made for other files
            return
        resized = [n for n, t in tensors.items() if n in fit.tensors and t.shape != fit.tensors[n].shape]
        dropped = [n for n in fit.tensors if n not in tensors] if tensors.keys() <= fit.tensors.keys() else []
        note = f"{owner} translated its weights" + f", and resized {', '.join(resized)}" * bool(resized)
        yield Fit(tensors, [*fit.outside, *dropped], fit.prefix, [*fit.notes, note])


def _renamed(weights: dict[str, Tensor], off: str, on: str) -> dict[str, Tensor]:
    """The tensors with the prefix ``off``, under ``on`` instead; the record of versions moves with them."""
    moved = OrderedDict((on + name[len(off) :], t) for name, t in weights.items() if name.startswith(off))
    record = getattr(weights, "_metadata", None)
    if record is not None:
        modules = {f"{module}." if module else "": versions for module, versions in record.items()}
        moved._metadata = OrderedDict(  # type: ignore[attr-defined]
            ((on + module[len(off) :]).removesuffix("."), v) for module, v in modules.items() if module.startswith(off)
        )
    return moved


def _prefix_counts(weights: Iterable[str]) -> Counter[str]:
    """How many names, but those of counters, have each prefix."""
    return Counter(prefix for name in weights if not is_counter(name) for prefix in _prefixes(name))


def _prefixes(name: str) -> Iterator[str]:
    return (name[: m.end()] for m in re.finditer(r"\.", name))


def _common(names: Iterable[str]) -> str:
    """The longest prefix of whole words that all ``names`` share."""
    shared: set[str] | None = None
    for name in names:
        found = set(_prefixes(name))
        shared = found if shared is None else shared & found
    return max(shared or {""}, key=len)
