"""Class-incremental learning: the order of the classes, the tasks, and what a run knows after each of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from datafree import checkpoint, distributed
from datafree.class_order import seen_classes, stated_order
from datafree.cli import to_yaml
from datafree.config import Incremental
from datafree.datasets.cards import DatasetCard, names_of
from datafree.datasets.splits import Split
from datafree.engine import Monitor, obey_alarms, require_same_options
from datafree.errors import InputError, out_of_memory_in
from datafree.grids import draw_matrix
from datafree.learners.base import Learner
from datafree.learners.incremental import class_means
from datafree.logger import FINISHED, RunFolder, plain, table
from datafree.network import Network
from datafree.options import default_options, result_options
from datafree.plan import describe_task, least_useful
from datafree.results import read_matrix, read_summary, require_rows
from datafree.runtime import environment, seed_everything
from datafree.schedule import Schedule
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.controls import RealSource
from datafree.training import Training

if TYPE_CHECKING:
    from datafree.session import Session

SEEDS_PER_RUN = 1000  # so that no task of a run has the seed of another run's
RESULTS, PICTURE, MEANS = "matrix.json", "matrix.png", "class_means.pth"


@dataclass(frozen=True)
class Tasks:
    """Which classes arrive when.

    order: all classes of the data card, in the order in which they arrive; the network's outputs are in this order.
    ends: how many of them are known after each task. names: of the classes, in the card's order.
    """

    order: tuple[int, ...]
    ends: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, options: Incremental, card: DatasetCard) -> "Tasks":
        """The tasks that the options make of the classes of ``card``; raises InputError if they make none."""
        classes, first, step = card.num_classes, options.init_cls, options.increment
        if first >= classes:
            raise InputError(
                f"{card.name} has {classes} classes, of which the first task would take {first}, which leaves none for "
                "a second one; lower --init_cls"
            )
        if (classes - first) % step:
            raise InputError(
                f"{card.name} has {classes} classes; after --init_cls {first} the other {classes - first} are no whole "
                f"number of tasks of {step}; give an --increment that divides {classes - first}, such as "
                f"{next(n for n in range(min(step, classes - first), 0, -1) if (classes - first) % n == 0)}"
            )
        if step == 1 and (options.learner == "lwf" or options.learner == "replay" and not options.hce):
            raise InputError(
                "--increment 1: the cross-entropy over the new classes alone (--lce) teaches nothing if there is one; "
                "give --increment 2 or more" + ", or --hce 1" * (options.learner == "replay")
            )
        tasks = cls(cls._order(options, card), tuple(range(first, classes + 1, step)), names_of(card))
        if options.learner == "replay":
            tasks._require_partners(options)
        return tasks

    def _require_partners(self, options: Incremental) -> None:
        """Raise InputError if a batch has one image of each of its classes, so that no anchor has a partner."""
        few, old, new = options.classes_per_batch, self.ends[-2], len(self.outputs(1))
        for option, classes in (("replay_batch_size", old), ("batch_size", new)):
            count = getattr(options, option)
            if few and min(few, classes) > count // 2:
                raise InputError(
                    f"--classes_per_batch {few} leaves the triplets' anchors without partners: --{option} {count} has "
                    f"fewer than two images for each of {min(few, classes)} classes; lower it to {max(1, count // 2)}, "
                    f"or raise --{option}"
                )

    @staticmethod
    def _order(options: Incremental, card: DatasetCard) -> tuple[int, ...]:
        if not options.class_order:  # the custom of the field: NumPy's permutation, of seed 1993
            return tuple(np.random.RandomState(options.class_seed).permutation(card.num_classes).tolist())
        if sorted(options.class_order) != list(range(card.num_classes)):
            raise InputError(
                f"--class_order {','.join(f'{k:g}' for k in options.class_order)} is not an order of the classes of "
                f"{card.name}; name each of 0 to {card.num_classes - 1} once"
            )
        return tuple(map(int, options.class_order))

    def __len__(self) -> int:
        return len(self.ends)

    def outputs(self, task: int) -> range:
        """The network's outputs that are the classes of ``task``, counted from 0."""
        return range(self.ends[task - 1] if task else 0, self.ends[task])

    def classes(self, outputs: range) -> tuple[int, ...]:
        """The card's classes that these outputs stand for."""
        return self.order[outputs.start : outputs.stop]

    def split_of(self, split: Split, outputs: range) -> Split:
        """The images of ``split``, labelled by the card's classes, that these outputs stand for, labelled by them."""
        return split.of_classes(self.classes(outputs), outputs, outputs.stop)

    def named(self, task: int) -> str:
        """The names of the classes of ``task``, for the log."""
        return ", ".join(self.names[k] for k in self.classes(self.outputs(task)))


class TaskImages(RealSource):
    """The real images of a task; none of them is drawn into a grid, which would keep them after its end."""

    def latest(self) -> tuple[Tensor, Tensor | None]:
        return torch.empty(0, 1, 1, 1), None


@dataclass
class Results:
    """Test accuracies (%): ``matrix[t][k]``, that of the classes of task k after task t, among all classes known then.

    images: test images of each task. Rows are added as tasks end; there are none without a test set.
    """

    images: Sequence[int]
    matrix: list[list[float]] = field(default_factory=list)

    def seen(self) -> list[float]:
        """After each task, the accuracy (%) on the test images of all classes known then."""
        return [sum(a * n for a, n in zip(row, self.images)) / sum(self.images[: len(row)]) for row in self.matrix]

    def average(self) -> float:
        """Average incremental accuracy (%): the mean of :meth:`seen`, the base included."""
        return fmean(self.seen())

    def forgetting(self) -> float:
        """Mean over the tasks before the last one of the best accuracy (%) before it minus the last (Chaudhry et al.
        2018); 0 after the first task."""
        *earlier, last = self.matrix
        lost = [max(row[k] for row in earlier[k:]) - last[k] for k in range(len(earlier))]
        return fmean(lost) if lost else 0.0

    def numbers(self) -> dict[str, float]:
        """All of these after the last task so far, for metrics and summary; none without a test set."""
        if not self.matrix:
            return {}
        return {"acc1": self.seen()[-1], "average_acc1": self.average(), "forgetting": self.forgetting()}


@torch.no_grad()
def task_accuracies(network: Network, test: Split, tasks: Tasks, task: int, batch_size: int) -> list[float]:
    """Accuracy (%) on the classes of each task up to ``task``; network and test have the classes known after it."""
    network.eval()
    hits, counts = torch.zeros(2, tasks.ends[task], device=network.device)
    with out_of_memory_in("evaluation", "--image_size"):
        for images, labels in test.batches(batch_size):
            counts.index_add_(0, labels, torch.ones(len(labels), device=network.device))
            hits.index_add_(0, labels, (network(images).argmax(1) == labels).float())
    parts = [slice(tasks.outputs(k).start, tasks.outputs(k).stop) for k in range(task + 1)]
    return [round(100 * (hits[part].sum() / counts[part].sum()).item(), 4) for part in parts]


class IncrementalRun:
    """A run of several tasks: its network, its folder, the real images of each task until its end, and the results.

    network: its logits are those of all classes, in the order of ``tasks``. folder: of the run, None in a dry run.
    A task that an earlier call finished is not repeated, and its images are not opened.
    """

    def __init__(self, session: "Session", tasks: Tasks, network: Network, folder: RunFolder | None):
        self.session, self.network, self.folder = session, network, folder
        self.tasks = replace(tasks, names=session.class_names)
        self.settings = session.config.incremental
        self.options = plain({**result_options(session.config), **session.digests})  # as they are read again
        self.finished = 0
        self.results = Results([self._count(task) for task in range(len(tasks))] if session.test else [])
        if self.settings.weights:
            self._require_base()
        if folder:
            self._resume(folder)
            distributed.require_same(self.finished, "sees other finished tasks; give a --save_dir that all share")
            if not self.is_finished:
                folder.record(to_yaml(session.config), environment(session.device), self.options)
                folder.write_json(RESULTS, self._record())
        self._images = self._load()

    @property
    def is_finished(self) -> bool:
        """Whether an earlier call has finished all tasks and summarised them."""
        return self.finished == len(self.tasks) and bool(self.folder and self.folder.has_summary)

    def remaining(self) -> Iterator[int]:
        """The numbers of the tasks that are still to be trained, in turn; a given base network is judged first."""
        if self.settings.weights and self.finished == 0:
            self._take_base()
        for task in range(self.finished, len(self.tasks)):
            # Of its own, so that a task does not depend on what was drawn in those before it.
            seed = (self.session.run.seed * SEEDS_PER_RUN + task) % 2**63
            seed_everything(seed, self.session.run.deterministic)
            yield task

    def train_images(self, task: int) -> Split:
        """The real images that ``task`` is trained on, which are handed out once, labelled by the network's outputs."""
        if self.settings.learner == "joint":
            end = self.tasks.ends[task]
            return self._images[0].of_classes(range(end), range(end), end)
        return self._images.pop(task)

    def test_images(self, task: int) -> Split | None:
        """The test images of all classes known after ``task``, labelled by the network's outputs."""
        test = self.session.test
        return self.tasks.split_of(test, range(self.tasks.ends[task])) if test else None

    def student(self, task: int) -> Network:
        """The network with the logits of all classes known after ``task``; those of later ones never win."""
        return self.network.restricted_to(range(self.tasks.ends[task]))

    def old_network(self, task: int) -> Network:
        """A frozen copy of what the network is before ``task``, with the logits of the classes known then."""
        return self.network.copy().freeze().restricted_to(range(self.tasks.ends[task - 1]))

    def old_means(self, task: int) -> Tensor:
        """Mean embeddings (classes, D) of the classes before ``task``, as they were when their images were there."""
        classes = self.tasks.ends[task - 1]
        if not self.folder:  # nothing was trained
            return torch.zeros(classes, self.network.tap.embed_dim, device=self.network.device)
        return checkpoint.load(self.folder.checkpoints / MEANS)["means"][:classes].to(self.network.device)

    def means_after(self, task: int, images: Split) -> Tensor:
        """Mean embeddings (classes, D) of the classes known after ``task``: its own by ``images``, others as kept."""
        means = class_means(self.student(task), images, self.session.evaluation_batch)
        if task:
            old = self.old_means(task)
            means[: len(old)] = old
        return means

    def training(
        self,
        task: int,
        learner: Learner,
        source: BaseSynthesis,
        schedule: Schedule,
        images: Split,
        replayed: int = 0,
        monitor: Monitor | None = None,
        judge: Network | None = None,
    ) -> Training:
        """What trains ``task`` in a folder of its own and then calls :meth:`finish`.

        images: the real ones. replayed: synthetic images of a step. judge: see :class:`Training`.
        """
        config, tasks, seen = self.session.config, self.tasks, self.tasks.ends[task]
        stored = {"task": task, "seen": seen, "class_order": list(tasks.order), "num_classes": tasks.ends[-1]}
        views = self.settings.batch_size + replayed
        return Training(
            learner,
            source,
            schedule,
            model=self.settings.model,
            name=(config.method, self.settings.model),
            plan=describe_task(
                task, tasks, config, self.session.card, len(images), schedule, self.student(task), source, views
            ),
            monitor=monitor,
            test=self.test_images(task),
            classes=[tasks.names[k] for k in tasks.order],
            judge=judge,
            task=folder_of(task),
            is_last=task + 1 == len(tasks),
            stored=stored,
            finish=lambda folder: self.finish(task, images),
        )

    def task_folder(self, task: int) -> Path:
        assert self.folder
        return self.folder.root / folder_of(task)

    def finish(self, task: int, images: Split) -> None:
        """Judge the network after ``task``, which was trained on ``images``, and record that this is finished."""
        folder, test, alarms = self.folder, self.test_images(task), list[str]()
        assert folder
        if self.settings.learner == "fetril":
            checkpoint.save(folder.checkpoints / MEANS, {"means": self.means_after(task, images).cpu()})
        if (weights := self.task_folder(task) / "checkpoints" / checkpoint.LAST_WEIGHTS[0]).is_file():
            checkpoint.link(weights, folder.checkpoints / checkpoint.LAST_WEIGHTS[0])
        if test:
            self.results.matrix.append(
                task_accuracies(self.student(task), test, self.tasks, task, self.session.evaluation_batch)
            )
            folder.picture(PICTURE, draw_matrix(self.results.matrix, "after task", "accuracy (%) on task"))
            alarms = self._alarms(task)
            for alarm in alarms:
                folder.log(alarm)
        numbers = self.results.numbers()
        folder.metrics(task, {"classes": self.tasks.ends[task], **numbers})
        self.finished = task + 1
        folder.write_json(RESULTS, self._record())  # last, for it says that the task is finished
        distributed.wait_for_all()  # the others read what the first process writes
        shown = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
        folder.log(f"Task {task + 1} of {len(self.tasks)} is finished: {shown or 'there is no test set'}.")
        obey_alarms(self.session.run, folder, alarms)

    def summarise(self) -> None:
        """Write the summary of a run all of whose tasks are finished, and log its results."""
        if not self.folder:
            return
        if self.is_finished:
            self.folder.log(FINISHED)
            return
        parts = [self._summary_of(task) for task in range(len(self.tasks))]
        numbers = self.results.numbers()
        sums = {
            key: round(sum(part.get(key) or 0 for part in parts), 1)
            for key in ("images", "synthesis_s", "student_s", "evaluation_s")
        }
        summary = {
            "run": self.folder.name,
            "seed": self.session.run.seed,
            "last_acc1": numbers.get("acc1"),
            **{name: value for name, value in numbers.items() if name != "acc1"},
            **sums,
        }
        self.folder.summary({**summary, "options": self.options, "environment": environment(self.session.device)})
        for task, row in enumerate(self.results.matrix):
            self.folder.log(f"After task {task + 1}: " + " ".join(f"{value:6.2f}" for value in row))
        self.folder.log(f"Everything is in {self.folder.root}\n" + table([summary]))

    def _count(self, task: int) -> int:
        """How many test images ``task`` has; InputError if there are none."""
        assert self.session.test
        labels, classes = self.session.test.labels, self.tasks.classes(self.tasks.outputs(task))
        count = sum(int((labels == k).sum()) for k in classes)
        if not count:
            raise InputError(
                f"{self.session.card.name} has no test image of the classes of task {task + 1} "
                f"({self.tasks.named(task)}); add some, or give --eval none"
            )
        return count

    def _load(self) -> dict[int, Split]:
        """The real images of each task that is still to be trained, or of all classes at once for joint training."""
        tasks, joint = self.tasks, self.settings.learner == "joint"
        first, last = (0 if joint else self.finished), len(tasks)
        if self.finished == last:
            return {}
        outputs = range(tasks.outputs(first).start, tasks.ends[-1])
        split = self.session.split("train", tasks.classes(outputs))
        absent = [k for k, n in enumerate(torch.bincount(split.labels, minlength=len(outputs)).tolist()) if not n]
        if absent:
            names = ", ".join(tasks.names[tasks.order[outputs[k]]] for k in absent)
            raise InputError(
                f"{self.session.card.name} has no training images of {names}; add some, or leave the classes out of "
                "the data card"
            )
        if joint:
            return {0: split}
        return {
            task: split.of_classes(
                [k - outputs.start for k in tasks.outputs(task)], tasks.outputs(task), tasks.ends[task]
            )
            for task in range(first, last)
        }

    def _resume(self, folder: RunFolder) -> None:
        """Take over the finished tasks of an earlier call, if --resume auto asks for it."""
        path, defaults = folder.root / RESULTS, default_options(self.session.config)
        if self.session.run.resume != "auto":
            return
        if not path.is_file():  # its first task may have been stopped, or it was removed
            for last in sorted(folder.root.glob(f"task_*/checkpoints/{checkpoint.LAST}"))[:1]:
                metadata = checkpoint.load(last).get("metadata")
                if isinstance(metadata, dict) and isinstance(metadata.get("options"), dict):
                    require_same_options(plain(metadata["options"]), self.options, last, defaults=defaults)
            return
        found = read_matrix(path)
        require_same_options(found["options"], self.options, path, defaults=defaults)
        require_rows(path, found, len(self.tasks), bool(self.session.test))
        self.finished, self.results.matrix = found["finished"], found["accuracy"]
        if self.finished > (1 if self.settings.weights else 0):
            weights = self.task_folder(self.finished - 1) / "checkpoints" / checkpoint.LAST_WEIGHTS[0]
            self.network.model.load_state_dict(checkpoint.load(weights)["state_dict"])
        folder.truncate_metrics(self.finished)
        folder.log(f"{self.finished} of {len(self.tasks)} tasks are finished and not repeated.")

    def _take_base(self) -> None:
        """Judge the network whose weights were given, instead of training the first task."""
        images = self.train_images(0)
        if self.folder:
            self.finish(0, images)
        self.finished = 1

    def _require_base(self) -> None:
        """Raise InputError unless the file of the given weights knows the classes of the first task and no others.

        One that a stranger wrote does not say what it knows, and is taken at its word.
        """
        weights, stated, first = self.settings.weights, self.network.metadata, self.tasks.ends[0]
        order = stated_order(self.network, len(self.tasks.order)) or ()
        if order and order[:first] != self.tasks.order[:first]:
            raise InputError(
                f"--weights {weights} knows the classes {list(order[:first])} first, not "
                f"{list(self.tasks.order[:first])}; give its --class_seed or --class_order"
            )
        ours = "num_classes" in stated and "options" in stated
        seen = seen_classes(self.network, len(self.tasks.order)) if ours else first
        if seen != first:
            raise InputError(
                f"--weights {weights} has learned {seen} classes, not the {first} of the first task alone (--init_cls "
                f"{first}); give the folder task_00 of a run of incremental learning"
            )
        if not order:
            self.session.notes.append(
                f"The file of --weights states no order of the classes: its first {first} outputs are taken for "
                f"{self.tasks.named(0)}, in this order."
            )

    def _alarms(self, task: int) -> list[str]:
        """Whether the base task is too weak for what follows."""
        accuracy, classes = self.results.matrix[-1][0], self.tasks.ends[0]
        if task > 0 or accuracy >= max(self.settings.base_acc, least_useful(classes)):
            return []
        wanted = (
            f"{self.settings.base_acc:g} % was expected"
            if accuracy < self.settings.base_acc
            else f"chance is {100 / classes:.2f} %"
        )
        return [
            f"[Alarm] the first task reaches only {accuracy:.2f} % ({wanted}), and later ones build on it; "
            + (
                "check --weights and the order of its classes"
                if self.settings.weights
                else "raise --base_epochs or change --lr"
            )
        ]

    def _record(self) -> dict[str, Any]:
        """What is known so far, with what it depends on."""
        tasks, results = self.tasks, self.results
        return {
            "finished": self.finished,
            "class_order": list(tasks.order),
            "classes": [tasks.names[k] for k in tasks.order],
            "tasks": [list(tasks.classes(tasks.outputs(task))) for task in range(len(tasks))],
            "test_images": list(results.images),
            "accuracy": results.matrix,
            "seen": results.seen(),
            **results.numbers(),
            "options": self.options,
        }

    def _summary_of(self, task: int) -> dict[str, Any]:
        path = self.task_folder(task) / "summary.json"
        return read_summary(path) if path.is_file() else {}


def folder_of(task: int) -> str:
    """The name of the folder of a task, below that of its run."""
    return f"task_{task:02d}"
