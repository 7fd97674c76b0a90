"""What every program does around its loop: device, networks, run folder, resume, summary."""

import hashlib
import inspect
from pathlib import Path

import torch

from datafree import checkpoint
from datafree.augment import CropFlip
from datafree.cli import to_yaml
from datafree.config import settings
from datafree.datasets.loading import load_split, resolve_card
from datafree.errors import InputError
from datafree.evaluators import evaluate
from datafree.logger import RunFolder, table
from datafree.models.custom import build_model
from datafree.network import Network
from datafree.runtime import (
    autocast,
    choose_device,
    environment,
    peak_memory,
    require_compiler,
    seed_everything,
    set_threads,
)


class Session:
    """The surroundings of one run: device, data card, augmentation, test split.

    config: DistillConfig or ScratchConfig. derive_card: whether the training images may be opened
    to find out what an unknown data set looks like. write: whether files may be written: a card that was
    derived, a data set that is downloaded.
    """

    def __init__(self, config, derive_card=False, write=True):
        self.config, self.run, self.data, self.write = config, config.run, config.data, write
        self.inputs = {}  # option -> digest of what its file holds
        self.device = choose_device(self.run.device)
        autocast(self.device, self.run.precision)  # refuses a precision that the device lacks
        if self.run.compile != "off":
            require_compiler(self.device)
        if self.run.resume not in ("none", "auto") and not Path(self.run.resume).is_file():
            raise InputError(f"--resume {self.run.resume}: there is no such file; give a checkpoint's path, or auto")
        set_threads(self.run.threads)
        seed_everything(self.run.seed, self.run.deterministic)
        self.card = resolve_card(self.data.dataset, self.data.data_root, self.data.card, derive_card, write)
        self.inputs["card"] = digest(repr(self.card).encode())
        flip = self.card.flip if self.data.flip == "card" else self.data.flip == "on"
        self.augment = CropFlip(self.data.crop_padding, flip)
        self.test = self.split("test") if self.data.eval == "test" else None

    def split(self, name):
        """The ``train`` or ``test`` split of the data set, on the device."""
        return load_split(
            self.card, self.data.data_root, name, self.data.download and self.write, self.device, self.run.workers
        )

    def network(self, role, model, weights="", mean=(), std=()):
        """Build ``model`` and fill it from ``weights``, if given -> :class:`Network` on the device.

        Without ``mean`` and ``std`` those that are stored beside the weights hold, or else the card's.
        """
        card = self.card
        module = build_model(model, card.num_classes, card.channels)
        stored = self._load(module, role, weights) if weights else {}
        mean = self._normalisation(role, "mean", mean or stored.get("mean"), low=0)
        std = self._normalisation(role, "std", std or stored.get("std"), low=1e-6)
        network = Network(module, card.shape, mean, std, f"{role} {short(model)}", stored)
        if network.num_classes != card.num_classes:
            raise InputError(
                f"the {role} {model} answers {network.num_classes} classes but {card.name} has "
                f"{card.num_classes}; build it with the right head, or name the right data set"
            )
        network.to(self.device)
        return network if self.run.compile == "off" else network.compiled(self.run.compile)

    def _load(self, module, role, weights):
        stored = checkpoint.load_weights(module, weights)
        tensors = (tensor.contiguous().numpy().tobytes() for tensor in module.state_dict().values())
        self.inputs["weights" if role == "model" else f"{role}_weights"] = digest(*tensors)
        return stored

    def count_code(self, name, made):
        """Let a source of one's own, called ``name``, count by what its file holds, not by where it is."""
        told = f"{short(name)}:{digest(Path(inspect.getsourcefile(made)).read_bytes())}"
        values = {"method": self.config.method, "source": self.config.synthesis.source}
        self.inputs.update({option: told for option, value in values.items() if value == name})

    def _normalisation(self, role, key, values, low):
        """``values``, one per channel, or the card's where there are none."""
        if not values:
            return getattr(self.card, key)
        numbers = isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values)
        if not numbers or len(values) != self.card.channels or not all(low <= v <= 1 for v in values):
            raise InputError(
                f"the {role}'s {key} is {values}, not one number in [0, 1] for each of the "
                f"{self.card.channels} channels of {self.card.name}; correct --{role}_{key}, or the file "
                "of its weights, that says so"
            )
        return tuple(values)

    @torch.no_grad()
    def score(self, network):
        """acc1, acc5 (%) and loss of ``network`` on the test split; without one only a check on noise -> None."""
        network.eval()
        if self.test:
            return evaluate(network, self.test, name=network.name)
        if not network(torch.rand(8, *self.card.shape, device=self.device)).isfinite().all():
            raise InputError(f"the {network.name} gives non-finite logits; check its weights")
        return None

    def evaluate_only(self, network, option, weights):
        """Print the test accuracy of ``network``, whose ``weights`` were given by ``option``."""
        if self.test is None:
            raise InputError("--evaluate_only needs a test set; leave --eval test and give its folder by --data_root")
        if not weights:
            raise InputError(f"--evaluate_only has nothing to evaluate; name the weights by {option}")
        scores = self.score(network)
        print(
            f"[Eval] {network.name} on {self.card.name}: Acc@1={scores['acc1']:.4f} "
            f"Acc@5={scores['acc5']:.4f} Loss={scores['loss']:.4f}"
        )

    def open_folder(self, *parts):
        """The run's folder ``save_dir/<dataset>_<parts>/<tag>``."""
        name = "_".join([self.card.name, *map(short, parts)])
        tag = self.run.log_tag or f"seed{self.run.seed}"
        root = Path(self.run.save_dir) / name / tag
        # A checkpoint of another folder begins a run here, so it must not overwrite one that is here.
        resume = self.run.resume
        own = resume == "auto" or (resume != "none" and Path(resume).resolve().is_relative_to(root.resolve()))
        return RunFolder(root, name, resume=own)

    def facts(self, network, model):
        """What is written beside the weights of ``network``: plain values, enough to build and judge it."""
        return {
            "model": model,
            "dataset": self.card.name,
            "num_classes": self.card.num_classes,
            "shape": list(self.card.shape),
            "mean": network.mean.flatten().tolist(),
            "std": network.std.flatten().tolist(),
            "settings": self.settings(),
            "config": to_yaml(self.config),
            "commit": environment(self.device)["commit"] or "",
        }

    def settings(self):
        """What a result depends on: option -> value, or the digest of the contents where the value is a path."""
        return {**settings(self.config), **self.inputs}

    def train(self, engine, **columns):
        """Resume if asked, run the loop, then write summary.json and print the table.

        columns: further numbers of the summary, such as the teacher's accuracy.
        """
        folder, last = engine.folder, engine.folder.checkpoints / "last.pth"
        if self.run.resume == "auto" and not last.is_file():
            folder.truncate_metrics(0)
            folder.log("Nothing to resume yet: the run starts from the beginning.")
        elif self.run.resume != "none":
            engine.load(last if self.run.resume == "auto" else Path(self.run.resume))
        folder.record(to_yaml(self.config), self.device)
        result = engine.train()
        summary = {
            "run": folder.name,
            "seed": self.run.seed,
            **columns,
            "last_acc1": result.get("acc1"),
            "best_acc1": result.get("best_acc1"),
            "images": engine.source.images_made,
            **{f"{phase}_s": round(seconds, 1) for phase, seconds in engine.seconds.items()},
            "memory_MB": peak_memory(self.device),
        }
        folder.summary({**summary, "settings": self.settings(), "environment": environment(self.device)})
        if result.get("acc1") is not None:
            folder.log(f"Last: {result['acc1']:.4f}")
            folder.log(f"Best: {result['best_acc1']:.4f} (chosen on the test set)")
        folder.log(f"Everything is in {folder.root}\n" + table([summary]))


def teacher_place(dataset, model):
    """Where train_scratch.py leaves a teacher's weights and datafree_kd.py looks for them."""
    return Path("checkpoints/pretrained") / f"{dataset}_{short(model)}.pth"


def digest(*parts):
    """Eight letters that tell one sequence of bytes from another."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:8]


def short(name):
    """The part of a model's name that can stand in a folder's name: nets-small for path/to/nets.py:small."""
    source, _, factory = name.rpartition(":")
    source = Path(source).stem if source.endswith(".py") else source.rpartition(".")[2]
    return "-".join(part for part in (source, factory) if part)
