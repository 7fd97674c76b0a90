"""What every program does around its loop: device, networks, run folder, resume, summary."""
from pathlib import Path

import torch

from datafree import checkpoint
from datafree.augment import CropFlip
from datafree.cli import to_yaml
from datafree.datasets.loading import load_split, resolve_card
from datafree.errors import InputError
from datafree.evaluators import evaluate
from datafree.logger import RunFolder, table
from datafree.models.custom import build_model
from datafree.network import Network
from datafree.runtime import autocast, choose_device, environment, seed_everything, set_threads


class Session:
    """The surroundings of one run: device, data card, augmentation, test split.

    config: DistillConfig or ScratchConfig. derive_card: whether the training images may be opened
    to find out what an unknown data set looks like. write: whether what is found out is written down.
    """

    def __init__(self, config, derive_card=False, write=True):
        self.config, self.run, self.data = config, config.run, config.data
        self.device = choose_device(self.run.device)
        autocast(self.device, self.run.precision)  # refuses a precision that the device lacks
        if self.run.resume not in ("none", "auto") and not Path(self.run.resume).is_file():
            raise InputError(f"--resume {self.run.resume}: there is no such file; give a checkpoint's path, or auto")
        set_threads(self.run.threads)
        seed_everything(self.run.seed, self.run.deterministic)
        self.card = resolve_card(self.data.dataset, self.data.data_root, self.data.card, derive_card, write)
        self.augment = CropFlip(self.data.crop_padding, self.data.flip)
        self.test = self.split("test") if self.data.eval == "test" else None

    def split(self, name):
        """The ``train`` or ``test`` split of the data set, on the device."""
        return load_split(self.card, self.data.data_root, name, self.data.download, self.device, self.run.workers)

    def network(self, role, model, weights="", mean=(), std=()):
        """Build ``model`` and fill it from ``weights``, if given -> :class:`Network` on the device."""
        card = self.card
        module = build_model(model, card.num_classes, card.channels)
        for name, values in (("mean", mean), ("std", std)):
            if values and len(values) != card.channels:
                raise InputError(f"--{role}_{name} has {len(values)} numbers but the images of {card.name} have "
                                 f"{card.channels} channels; give one per channel")
        network = Network(module, card.shape, mean or card.mean, std or card.std, name=f"{role} {short(model)}")
        if network.num_classes != card.num_classes:
            raise InputError(f"the {role} {model} answers {network.num_classes} classes but {card.name} has "
                             f"{card.num_classes}; build it with the right head, or name the right data set")
        if weights:
            checkpoint.load_weights(module, weights)
        return network.to(self.device)

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
        print(f"[Eval] {network.name} on {self.card.name}: Acc@1={scores['acc1']:.4f} "
              f"Acc@5={scores['acc5']:.4f} Loss={scores['loss']:.4f}")

    def open_folder(self, *parts):
        """The run's folder ``save_dir/<dataset>_<parts>/<tag>``."""
        name = "_".join([self.card.name, *map(short, parts)])
        tag = self.run.log_tag or f"seed{self.run.seed}"
        return RunFolder(Path(self.run.save_dir) / name / tag, name, to_yaml(self.config),
                         resume=self.run.resume != "none", device=self.device)

    def facts(self, model, **origin):
        """What is written beside a network's weights: plain values, enough to build and judge it.

        origin: the method, and what else of the run must be the same when it is resumed.
        """
        return {"model": model, **origin, "dataset": self.card.name, "num_classes": self.card.num_classes,
                "shape": list(self.card.shape), "mean": list(self.card.mean), "std": list(self.card.std),
                "config": to_yaml(self.config), "commit": environment(self.device)["commit"] or ""}

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
        result = engine.train()
        summary = {"run": folder.name, "seed": self.run.seed, **columns, "last_acc1": result.get("acc1"),
                   "best_acc1": result.get("best_acc1"), "images": engine.source.images_made,
                   **{f"{phase}_s": round(seconds, 1) for phase, seconds in engine.seconds.items()}}
        folder.summary({**summary, "epochs": engine.schedule.epochs, "environment": environment(self.device)})
        if result.get("acc1") is not None:
            folder.log(f"Last: {result['acc1']:.4f}")
            folder.log(f"Best: {result['best_acc1']:.4f} (chosen on the test set)")
        folder.log(f"Everything is in {folder.root}\n" + table([summary]))


def short(name):
    """The part of a model's name that can stand in a folder's name."""
    return name.rpartition(":")[2].replace("/", "-")
