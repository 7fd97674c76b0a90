"""Every option of the programs, typed, with one sentence each.

The name of a field is the name of its flag (``--g_steps 400``), and CMI's and
RGAL's published flags are kept. Fields are grouped into sections for YAML files
and for ``--help``; a name occurs once in a program, so the short flag and the
dotted one (``--schedule.g_steps 400``) mean the same. ``datafree/cli.py`` fills
these classes from method files, YAML files and flags and checks every value.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import ClassVar, Literal


def option(default, help, **metadata):
    """A dataclass field with its sentence of help.

    Metadata: ``flags`` (further spellings, such as ``-j``), ``low`` and ``high``
    (inclusive bounds of a number), ``idle`` (a case, or a tuple of cases, of other
    options and values: while all of a case have such a value, or are idle
    themselves, nothing reads this one), ``own`` (beside the choices, path/to/file.py:Class may be given).
    """
    if isinstance(metadata.get("idle"), dict):
        metadata["idle"] = (metadata["idle"],)
    return field(default=default, metadata={"help": help, **metadata})


# Options that say where and how a run happens, or name a file of which the contents matter and not the name.
SURROUNDINGS = {
    "save_dir",
    "log_tag",
    "device",
    "threads",
    "deterministic",
    "resume",
    "evaluate_only",
    "print_freq",
    "eval_every",
    "grid_every",
    "workers",
    "data_root",
    "card",
    "eval",
    "download",
    "teacher_weights",
    "student_weights",
    "weights",
    "teacher_acc",
    "view_cache",
    "compile",
}
# Sources that make no images; those that keep none in a pool; those without a generator, or without one for a round.
CONTROL = {"source": ("noise", "real")}
NO_POOL = {"source": ("generator", "noise", "real")}
NO_GENERATOR = {"source": ("pixels", "noise", "real")}
NO_ROUNDS = {"source": ("pixels", "generator", "noise", "real")}
NO_TRIPLETS = {"triplet": (0,), "striplet": (0,)}
STAGES = {"triplet": (0,), "striplet_feature": ("global", "logits")}


@dataclass
class Run:
    """Where and how the program runs, and what it leaves behind."""

    save_dir: str = option("runs", "Folder under which every run gets a folder of its own.")
    log_tag: str = option("", "Name of this run's folder; seed<seed> when empty.")
    seed: int = option(0, "Seed of python, numpy and torch.", low=0)
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda or cuda:N; --gpu N is short for cuda:N.")
    precision: Literal["none", "bf16", "fp16"] = option("none", "Number format of the forward passes; none is fp32.")
    compile: Literal["off", "default", "reduce-overhead"] = option(
        "off", "torch.compile of the networks, by its mode: minutes once, then faster steps; the last is for a GPU."
    )
    threads: int = option(0, "CPU threads; 0 leaves torch's own choice.", low=0)
    deterministic: bool = option(False, "Only deterministic kernels on the GPU; the CPU always repeats exactly.")
    resume: str = option(
        "none",
        "none, auto (this run's last checkpoint if there is one) or a checkpoint's path.",
        idle={"evaluate_only": (True,)},
    )
    evaluate_only: bool = option(False, "Load, evaluate on the test set, print and stop.")
    print_freq: int = option(
        0, "Optimiser steps between two log lines within an epoch; 0 logs once an epoch.", flags=("-p",), low=0
    )
    eval_every: int = option(
        1,
        "Epochs between two evaluations on the test set; the last epoch always has one.",
        low=1,
        idle={"eval": ("none",)},
    )
    grid_every: int = option(10, "Epochs between two image grids; the first and the last epoch always draw one.", low=1)
    workers: int = option(2, "Processes that decode images of data sets too large for memory.", flags=("-j",), low=0)


@dataclass
class Data:
    """Which images the networks are for; distillation reads the test set at most."""

    dataset: str = option("cifar10", "Name of a registered data set, or of a folder under data_root.")
    data_root: str = option("data", "Folder that holds, or will hold, the data sets.")
    card: str = option("", "YAML file with shape, classes, mean and std, for data without files on this machine.")
    eval: Literal["test", "none"] = option("test", "What the student is evaluated on; none needs no data at all.")
    crop_padding: int = option(4, "Pixels of zero padding before the random crop; 0 does not crop.", low=0)
    flip: Literal["card", "on", "off"] = option(
        "card", "Mirror images at random; card: where the data set's card allows it, which that of digits does not."
    )
    download: bool = option(True, "Download a registered data set that is missing, where that is possible.")


@dataclass
class Teacher:
    """The frozen network whose knowledge is transferred."""

    teacher: str = option("wrn40_2", "Registered model, torchvision model, path/to/file.py:factory or package:factory.")
    teacher_weights: str = option("", "Its weights; checkpoints/pretrained/<dataset>_<teacher>.pth when empty.")
    teacher_mean: tuple[float, ...] = option(
        (), "Its input mean per channel, in [0, 1]; when empty what its file states, else the card's.", low=0, high=1
    )
    teacher_std: tuple[float, ...] = option(
        (), "Its input standard deviation per channel, found in the same way.", low=1e-6, high=1
    )
    teacher_acc: float = option(
        0.0,
        "Top-1 (%) it should reach; one point less is called out. 0: unknown.",
        low=0,
        high=100,
        idle={"eval": ("none",)},
    )


@dataclass
class Student:
    """The network that learns."""

    student: str = option("wrn16_1", "Named as the teacher is.")
    student_weights: str = option("", "Weights to start from (or to evaluate); random when empty.")


@dataclass
class Schedule:
    """How synthesis and student training alternate."""

    epochs: int = option(
        200, "Epochs; the student's learning rate follows a cosine to 0 over them.", flags=("--epoch",), low=1
    )
    ep_steps: int = option(400, "Student steps of an epoch; a multiple of kd_steps.", low=1)
    kd_steps: int = option(400, "Student steps of a round.", low=1)
    g_steps: int = option(400, "Synthesis steps of a round.", low=1, idle=CONTROL)
    warmup: int = option(
        0, "First epochs that only make images, without the terms that look at the student.", low=0, idle=CONTROL
    )


@dataclass
class Synthesis:
    """Phase 1: images are made by inverting the teacher. Weights of 0 cost nothing."""

    IDLE: ClassVar = (CONTROL,)  # of every option here but the source that names no other

    source: Literal["inversion", "pixels", "generator", "noise", "real"] = option(
        "inversion",
        "Where images come from: a generator trained for each round, pixels that are trained themselves, "
        "one generator all along whose images are not kept, noise, the training set, or a class of yours.",
        own=True,
    )
    synthesis_batch_size: int = option(256, "Images of a synthesis step; those of a round enter the pool.", low=1)
    pool_size: int = option(
        0, "Images that the pool holds before it forgets the oldest; 0 holds all.", low=0, idle=NO_POOL
    )
    nz: int = option(256, "Dimension of the generator's noise.", low=1, idle=NO_GENERATOR)
    ngf: int = option(64, "Width of the generator.", low=1, idle=NO_GENERATOR)
    lr_g: float = option(1e-3, "Adam's learning rate for the generator, or for the pixels.", low=0)
    lr_z: float = option(
        None, "The same for the noise, lr_g when empty; 0 keeps the noise fixed.", low=0, idle=NO_ROUNDS
    )
    generator_init: Literal["random", "reptile", "maml"] = option(
        "random",
        "Weights a round starts from: new random ones, or a start that learns from the rounds.",
        idle=NO_ROUNDS,
    )
    meta_rate: float = option(
        1.0,
        "Step of the learned start: reptile's share of the way to a round's last weights "
        "(1 carries on from them), maml's Adam rate in units of lr_g x g_steps.",
        low=0,
        high=1,
        idle={"generator_init": ("random",)},
    )
    reset_epoch: int = option(
        0,
        "Epoch in which the learned start's first layer is drawn anew, once; 0 never.",
        low=0,
        idle={"generator_init": ("random",)},
    )
    class_noise: float = option(
        0.0, "Distance from 0 of each class's own centre of the noise; 0 draws all alike.", low=0, idle=NO_ROUNDS
    )
    keep: Literal["best", "last"] = option(
        "best", "The step of a round whose batch is kept: lowest loss, or last.", idle=NO_POOL
    )
    bn: float = option(0.0, "Weight of the distance to the teacher's BatchNorm statistics.", low=0)
    bn_reduction: Literal["norm", "mse", "gaussian"] = option(
        "norm",
        "Distance of statistics per layer: sum of L2 norms, mean squares, or KL of Gaussians.",
        idle={"bn": (0,)},
    )
    bn_momentum: float = option(
        0.0, "Share of the rounds before in the statistics that are compared.", low=0, high=0.999, idle={"bn": (0,)}
    )
    oh: float = option(0.0, "Weight of the teacher's cross entropy.", low=0)
    oh_target: Literal["asked", "answered"] = option(
        "asked",
        "The class of that cross entropy: the one asked for, or the teacher's own answer (DAFL).",
        idle={"oh": (0,)},
    )
    adv: float = option(0.0, "Weight of the student's disagreement with the teacher.", low=0)
    adv_distance: Literal["kl", "js", "l1"] = option(
        "kl", "Its distance: KL divergence, Jensen-Shannon (ADI), or L1 of the logits (DFAD).", idle={"adv": (0,)}
    )
    adv_T: float = option(
        1.0, "Temperature of the divergences.", low=1e-6, idle=({"adv": (0,)}, {"adv_distance": ("l1",)})
    )
    adv_where: Literal["agree", "all"] = option(
        "agree",
        "Images that it looks at: those of which both name the same class (RGAL, CMI), or all.",
        idle={"adv": (0,)},
    )
    act: float = option(0.0, "Weight of the teacher's activation strength (DAFL).", low=0)
    balance: float = option(0.0, "Weight of the class balance over the batch (DAFL).", low=0)
    cr: float = option(0.0, "Weight of the contrast with earlier images (CMI).", low=0)
    cr_T: float = option(0.2, "Temperature of that contrast.", low=1e-6, idle={"cr": (0,)})
    tv: float = option(0.0, "Weight of the images' total variation.", low=0)
    l2: float = option(0.0, "Weight of the images' L2 norm.", low=0)


@dataclass
class Relation:
    """RGAL's triplets: confuse in synthesis, separate in the student."""

    triplet: float = option(0.0, "Weight of the triplets in synthesis.", low=0, idle=({"relation": ("off",)}, CONTROL))
    relation: Literal["paper", "release", "off"] = option(
        "paper",
        "Their direction in synthesis: the paper's (spread classes, mix them), the released code's, or none.",
        idle=({"triplet": (0,)}, CONTROL),
    )
    triplet_target: Literal["student", "teacher"] = option(
        "student", "Whose features the synthesis triplets look at.", idle={"triplet": (0,)}
    )
    start_layer: int = option(2, "First stage that is looked at, counted from 0 (negative: from the end).", idle=STAGES)
    end_layer: int = option(4, "Stage before which the look ends.", idle=STAGES)
    margin: float = option(0.2, "Margin of both triplet losses.", low=0, idle=NO_TRIPLETS)
    sampling: Literal["focal", "distance", "uniform"] = option(
        "focal",
        "How synthesis draws the other-class sample: a band, distance weighted, or evenly.",
        idle={"triplet": (0,)},
    )
    sampling_space: Literal["embedding", "logits"] = option(
        "embedding",
        "Distances for drawing: the teacher's embedding, or logits (the teacher's, then the student's).",
        idle=NO_TRIPLETS,
    )
    striplet: float = option(0.0, "Weight of the triplets in student training.", low=0)
    striplet_feature: Literal["global", "features", "logits"] = option(
        "global",
        "What they look at: the penultimate feature, the chosen stages, or the logits.",
        idle={"striplet": (0,)},
    )
    striplet_sampling: Literal["focal", "distance", "uniform"] = option(
        "distance", "How student training draws the other-class sample.", idle={"striplet": (0,)}
    )


@dataclass
class Distill:
    """Phase 2: the student learns the teacher's answers on the images."""

    batch_size: int = option(128, "Pool images of a student step.", low=1)
    pair_sample: bool = option(False, "Show every image under two augmentations, which doubles the batch.")
    balanced_sampling: bool = option(False, "Draw every batch evenly over the classes asked for.", idle=NO_POOL)
    view_cache: int = option(
        None,
        "Most megabytes for the teacher's answers to views, so that it is not asked twice. "
        "Empty: a quarter of the free memory on the CPU, none on a GPU. Not for mixup, "
        "gram_loss and at_loss.",
        low=0,
        idle=NO_POOL,
    )
    mixup: float = option(0.0, "Share of the views that are blended with another one of the batch.", low=0, high=1)
    lr: float = option(0.1, "SGD's learning rate at the start.", low=0)
    momentum: float = option(0.9, "SGD's momentum.", low=0, high=1)
    weight_decay: float = option(1e-4, "SGD's weight decay.", flags=("--wd",), low=0)
    T: float = option(
        20.0, "Temperature of the KL divergence.", low=1e-6, idle=({"kd": (0,)}, {"kd_distance": ("l1",)})
    )
    kd: float = option(1.0, "Weight of the distance from the teacher's answers.", low=0)
    kd_distance: Literal["kl", "l1"] = option(
        "kl", "That distance: KL divergence, or L1 of the logits (DFAD).", idle={"kd": (0,)}
    )
    cd_loss: float = option(0.0, "Weight of the channel term: pooled stages, projected to the teacher's width.", low=0)
    gram_loss: float = option(
        0.0, "Weight of the pixel-wise term, channels weighted by the teacher's Gram matrix.", low=0
    )
    at_loss: float = option(0.0, "Weight of the distance of attention maps (ZSKT).", low=0)
    custom_steps: float = option(
        1.0,
        "Share of the run in which the channel, gram, attention and triplet terms act.",
        low=0,
        high=1,
        idle={"cd_loss": (0,), "gram_loss": (0,), "at_loss": (0,), "striplet": (0,)},
    )

    @property
    def views_recur(self):
        """Whether a view is shown as it is and met again, and pooled answers to it suffice: the view cache's case."""
        return not (self.mixup or self.gram_loss or self.at_loss)


@dataclass
class Training:
    """Supervised training on real images."""

    model: str = option("wrn40_2", "Registered model, torchvision model, path/to/file.py:factory or package:factory.")
    weights: str = option("", "Weights to start from (or to evaluate); random when empty.")
    epochs: int = option(200, "Epochs; the learning rate follows a cosine to 0 over them.", flags=("--epoch",), low=1)
    batch_size: int = option(128, "Images of a step.", low=1)
    lr: float = option(0.1, "SGD's learning rate at the start.", low=0)
    momentum: float = option(0.9, "SGD's momentum.", low=0, high=1)
    weight_decay: float = option(5e-4, "SGD's weight decay.", flags=("--wd",), low=0)


@dataclass
class DistillConfig:
    """Options of datafree_kd.py."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    schedule: Schedule = field(default_factory=Schedule)
    synthesis: Synthesis = field(default_factory=Synthesis)
    relation: Relation = field(default_factory=Relation)
    distill: Distill = field(default_factory=Distill)
    method: str = option(
        "rgal",
        "Name of a file in configs/methods/, whose settings come before yours, or a source of images of your own.",
        own=True,
    )


@dataclass
class ScratchConfig:
    """Options of train_scratch.py."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)


def settings(config):
    """A configuration as one dict, option -> value, without SURROUNDINGS."""
    flat = {}
    for name, value in reversed(asdict(config).items()):  # what stands outside the sections comes last, and leads
        flat.update(value if isinstance(value, dict) else {name: value})
    return {name: value for name, value in flat.items() if name not in SURROUNDINGS}


def sections(config_class):
    """Name -> class of the sections of a program's options, in the order of ``--help``."""
    return {f.name: f.default_factory for f in fields(config_class) if isinstance(f.default_factory, type)}
