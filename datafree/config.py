"""Every option of the programs, typed, with one sentence each.

The name of a field is the name of its flag (``--g_steps 400``), and CMI's and
RGAL's published flags are kept. Fields are grouped into sections for YAML files
and for ``--help``; a name occurs once in a program, so the short flag and the
dotted one (``--schedule.g_steps 400``) mean the same. ``datafree/cli.py`` fills
these classes from method files, YAML files and flags and checks every value.
Nothing here imports torch, so that mistakes in options are reported at once.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from datafree.budget import seconds_of
from datafree.errors import OptionError, short
from datafree.launch import command
from datafree.learners import LearnersOfOtherOptions
from datafree.schedule import Schedule
from datafree.synthesis import SourcesWith, SourcesWithout
from datafree.untrusted import LONGEST_FILE_NAME

Condition = Mapping[str, Any]
LARGEST = 1e9  # of any number: beyond it there is no use, but overflow in torch and in float32


def option(
    default: Any,
    help: str,
    *,
    flags: Collection[str] = (),
    low: float | None = None,
    high: float | None = None,
    unused_when: Condition | tuple[Condition, ...] = (),
    custom: bool = False,
    is_name: bool = False,
    affects_result: bool = True,
    also_in: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field with its sentence of help.

    flags: further spellings, such as ``-j``. low, high: inclusive bounds of a number, by default
    -LARGEST and LARGEST.
    unused_when: conditions {option: values}, under any of which nothing reads this option; a condition holds while each
    of its options has one of the values, or is itself unused.
    custom: path/to/file.py:Class is accepted beside the choices.
    is_name: the text names a folder, so that it may not lead out of the one that it is in.
    affects_result: False for an option that says where and how a run happens, or names a file whose contents matter and
    not its name.
    also_in: sections of the program in which YAML files may set it, too. So a method file, which may have sections of
    several programs, can give each its own value; and files of earlier versions keep working.
    aliases: former names of choices.
    """
    metadata = {
        "help": help,
        "flags": tuple(flags),
        "unused_when": unused_when if isinstance(unused_when, tuple) else (unused_when,),
        "custom": custom,
        "is_name": is_name,
        "affects_result": affects_result,
        "also_in": also_in,
        "aliases": dict(aliases or {}),
    }
    bounds = {name: value for name, value in (("low", low), ("high", high)) if value is not None}
    return field(default=default, metadata={**metadata, **bounds})


class AnyBut:
    """All values but those given, as a container."""

    def __init__(self, *values: Any):
        self.values = values

    def __contains__(self, value: object) -> bool:
        return value not in self.values


CONTROL = {"source": SourcesWithout("synthesises")}
NO_POOL = {"source": SourcesWithout("keeps_pool")}
NO_GENERATOR = {"source": SourcesWithout("has_generator")}
NO_ROUNDS = {"source": SourcesWithout("has_rounds")}
NOISY_LAYER, NO_NOISY_LAYER = ({"source": kind("has_noisy_layer")} for kind in (SourcesWith, SourcesWithout))
OTHER_LEARNER = {"learner": LearnersOfOtherOptions()}
NO_EPOCHS = {"epochs": (0,)}  # of quantization, which then observes ranges and trains nothing
NO_TRIPLETS = {"triplet": (0,), "striplet": (0,)}
NO_WEIGHTING = {"sampling": ("uniform",), "striplet_sampling": ("uniform",)}
NO_STAGES = {"triplet": (0,), "striplet_feature": ("global", "logits")}


@dataclass
class Run:
    """Where and how the program runs, and what it leaves behind."""

    save_dir: str = option("runs", "Folder in which each run gets its own folder.", affects_result=False)
    log_tag: str = option("", "Name of this run's folder; seed<seed> if empty.", is_name=True, affects_result=False)
    seed: int = option(0, "Seed of python, numpy and torch.", low=0, high=2**63 - 1)
    device: str = option(
        "auto", "auto (a GPU if there is one), cpu, cuda or cuda:N; --gpu N is short for cuda:N.", affects_result=False
    )
    precision: Literal["none", "bf16", "fp16"] = option(
        "none",
        "Number format of the forward passes; none is fp32, in which a GPU's convolutions use TF32, as torch has it.",
    )
    compile: Literal["off", "default", "reduce-overhead"] = option(
        "off",
        "Mode of torch.compile for the networks: minutes to compile, then faster steps; reduce-overhead needs a GPU.",
        affects_result=False,
    )
    micro_batch: int = option(
        0,
        "Images at most that go through a network at once: a larger batch is computed in parts, twice where it has "
        "gradients, so that a step takes their memory; the losses are those of the whole batch, but BatchNorm in "
        "training mode, of student and generator, normalises by its part. 0 sets no limit.",
        low=0,
    )
    threads: int = option(
        0,
        "CPU threads; 0 leaves torch's default. Only runs with the same number are identical to the bit.",
        low=0,
        high=1024,
        affects_result=False,
    )
    deterministic: bool = option(
        False,
        "Use deterministic GPU kernels only; CPU runs are reproducible if they have the same number of threads.",
        affects_result=False,
    )
    resume: str = option(
        "none",
        "none, auto (this run's last checkpoint if there is one) or the path of a checkpoint.",
        unused_when={"evaluate_only": (True,)},
        affects_result=False,
    )
    evaluate_only: bool = option(False, "Load, evaluate on the test set, print and exit.", affects_result=False)
    print_freq: int = option(
        0,
        "Optimiser steps between two log lines within an epoch; 0 logs once per epoch.",
        flags=("-p",),
        low=0,
        affects_result=False,
    )
    eval_every: int = option(
        1,
        "Epochs between two evaluations of the trained network; the last epoch is always evaluated.",
        low=1,
        unused_when={"eval": ("none",), "held_out": ("",)},
        affects_result=False,
    )
    grid_every: int = option(
        10, "Epochs between two image grids; the first and the last epoch always have one.", low=1, affects_result=False
    )
    on_alarm: Literal["warn", "stop"] = option(
        "warn",
        "What an alarm does, about images, a weak teacher or a weak first task: a line in the log, or the run is saved "
        "and stops with exit code 3.",
        affects_result=False,
    )
    workers: int = option(
        2,
        "Processes that decode images of data sets too large for memory.",
        flags=("-j",),
        low=0,
        high=256,
        affects_result=False,
    )

    def validate(self) -> None:
        """Raise an OptionError for a folder that cannot be made, and for batches in parts by compiled networks."""
        if any(len(os.fsencode(name)) > LONGEST_FILE_NAME for name in self.save_dir.split(os.sep)):
            raise OptionError(
                f"--save_dir {short(self.save_dir)} has a name of more than {LONGEST_FILE_NAME} bytes, which file "
                "systems do not take; give a shorter one"
            )
        if self.micro_batch and self.compile != "off":
            raise OptionError(
                f"--micro_batch {self.micro_batch} does not go with --compile {self.compile}, because compiled code "
                "cannot compute a part again in the backward pass; remove one of them"
            )


@dataclass
class Data:
    """The images that the networks are for; distillation reads the test set at most."""

    dataset: str = option("cifar10", "Name of a registered data set, or of a folder in data_root; a card has its own.")
    data_root: str = option("data", "Folder that contains the data sets, or into which they go.", affects_result=False)
    card: str = option(
        "", "YAML file with shape, classes, mean and std, for data without files on this machine.", affects_result=False
    )
    eval: Literal["test", "none"] = option(
        "test", "Images for evaluation; none needs no data at all.", affects_result=False
    )
    image_size: int | None = option(
        None,
        "Height and width in pixels, instead of the data card's; files in class folders are resized.",
        low=1,
        high=4096,
    )
    crop_padding: int = option(4, "Pixels of zero padding before the random crop; 0 does not crop.", low=0, high=4096)
    flip: Literal["card", "on", "off"] = option(
        "card", "Random horizontal flip; card: if the data set's card allows it, which that of digits does not."
    )
    download: bool = option(
        True,
        "Download a registered data set that is missing, if possible; CIFAR's archive holds its training images too.",
        affects_result=False,
    )


@dataclass
class Teacher:
    """The frozen network whose knowledge is transferred."""

    teacher: str = option(
        "wrn40_2", "Registered model, torchvision:NAME, timm:NAME, path/to/file.py:factory or package:factory."
    )
    teacher_weights: str = option(
        "",
        "File of its weights, or folder of the run that trained it; own: those that the model brings; "
        "checkpoints/pretrained/<dataset>_<teacher>.pth if empty.",
        affects_result=False,
    )
    teacher_weights_key: str = option(
        "",
        "Key of its weights in that file, such as state_dict_ema for averaged ones, or prefix of their names; the "
        "usual ones if empty.",
        unused_when={"teacher_weights": ("own",)},
        affects_result=False,
    )
    teacher_mean: tuple[float, ...] = option(
        (),
        "Its input mean per channel, in [0, 1]; if empty, the one stored with its weights, or else the one that the "
        "model itself states, or else the data card's.",
        low=0,
        high=1,
    )
    teacher_std: tuple[float, ...] = option(
        (), "Its input standard deviation per channel; defaults like the mean.", low=1e-6, high=1
    )
    teacher_stages: str = option(
        "",
        "Modules whose outputs are its stages, such as layer2,layer3; found by themselves if empty: the last block of "
        "the trunk at each resolution.",
    )
    teacher_acc: float = option(
        0.0,
        "Expected teacher top-1 (%); a warning is logged if it is more than one point lower. 0: no check.",
        low=0,
        high=100,
        unused_when={"eval": ("none",)},
        affects_result=False,
    )
    held_out: str = option(
        "",
        "Folder of images that the student is not trained on, or of an earlier run, for its pool: each evaluation "
        "states to how many of them student and teacher give the same class. Chooses settings without a test set.",
        affects_result=False,
    )


@dataclass
class Student:
    """The network that is trained."""

    student: str = option("wrn16_1", "Model, named like the teacher.")
    student_weights: str = option(
        "",
        "File or run folder of weights to start from, or to evaluate; own: those that the model brings; randomly "
        "initialised if empty.",
        affects_result=False,
    )
    student_weights_key: str = option(
        "",
        "Key of its weights in that file, like the teacher's.",
        unused_when={"student_weights": ("", "own")},
        affects_result=False,
    )


def budget_option(more: str = "") -> Any:
    """The option that gives a run its length; more: what else it decides."""
    return option(
        None,
        "Wall-clock time of the run in place of epochs, such as 900s, 30m or 1.5h: its length, and that of the cosine, "
        f"follow from the measured time of its steps{more}. Empty: epochs.",
        unused_when=NO_EPOCHS,
    )


@dataclass
class StepOptions:
    """How synthesis and student training alternate."""

    warmup_is_extra: ClassVar[bool] = False

    epochs: int = option(
        200, "Epochs; the student's learning rate follows a cosine to 0 over them.", flags=("--epoch",), low=1
    )
    ep_steps: int = option(400, "Student steps of an epoch; a multiple of kd_steps.", low=1)
    kd_steps: int = option(400, "Student steps of a round.", low=1)
    g_steps: int = option(
        400, "Synthesis steps of a batch, of which a round has one or more.", low=1, unused_when=CONTROL
    )
    round_batches: int = option(
        1,
        "Batches that are synthesised in a round, one after another; all enter the pool.",
        low=1,
        unused_when=(CONTROL, NO_POOL, NO_ROUNDS),
    )
    warmup_batches: int | None = option(
        None,
        "Batches of a round of the warm-up; as many as of any other round if empty.",
        low=1,
        unused_when=(CONTROL, NO_POOL, NO_ROUNDS, {"warmup": (0,)}),
    )
    warmup: int = option(
        0,
        "First epochs that only synthesise images, without the terms that use the student.",
        low=0,
        unused_when=CONTROL,
    )
    synthesis_rounds: int | None = option(
        None,
        "First rounds of the run that synthesise; in later ones the student trains on the pool as it is. Empty: all.",
        low=1,
        unused_when=(CONTROL, NO_POOL),
    )


@dataclass
class ScheduleOptions(StepOptions):
    __doc__ = StepOptions.__doc__

    budget: str | None = budget_option(
        "; warm-up, synthesis_rounds and reset_epoch keep their shares of the epochs of the recipe"
    )


@dataclass
class Synthesis:
    """Phase 1: images are synthesised by inverting the teacher. A term of weight 0 is not computed."""

    # Of every option here that states no condition of its own, except the source.
    UNUSED_WHEN: ClassVar[tuple[Condition, ...]] = (CONTROL,)

    source: Literal["inversion", "pixels", "noisy_layer", "generator", "noise", "real", "folder"] = option(
        "inversion",
        "Source of images: a generator optimised in each round, pixels optimised directly, a generator fed with "
        "class embeddings through noisy layers (NAYER), one generator trained throughout whose images are not kept, "
        "noise, the training set, the images of pool_images alone, or a user-defined class.",
        custom=True,
    )
    synthesis_batch_size: int = option(256, "Images of a synthesis step; those of a round enter the pool.", low=1)
    pool_size: int = option(
        0,
        "Capacity of the image pool, which drops the oldest images; 0 keeps all. Those of pool_images come on top.",
        low=0,
        unused_when=(CONTROL, NO_POOL),
    )
    pool_images: str = option(
        "",
        "Folder of images with which the pool begins and which stay in it, in class folders or not; or the folder of "
        "an earlier run, for the images of its pool.",
        unused_when=NO_POOL,
        affects_result=False,
    )
    balanced_sampling: bool = option(
        False,
        "Sample every student batch from the pool with equal numbers of each target class.",
        unused_when=NO_POOL,
        also_in=("distill",),
    )
    pool_order: Literal["passes", "draws"] = option(
        "passes",
        "Order of the pool's images in training: shuffled passes, begun again in each round (the released code), or "
        "every batch drawn anew.",
        unused_when=(NO_POOL, {"balanced_sampling": (True,)}),
    )
    nz: int = option(256, "Dimension of the generator's latent z.", low=1, high=65536, unused_when=NO_GENERATOR)
    ngf: int = option(64, "Width of the generator.", low=1, high=4096, unused_when=NO_GENERATOR)
    lr_g: float = option(1e-3, "Adam's learning rate for the generator, or for the pixels.", low=0)
    lr_z: float | None = option(
        None,
        "Adam's learning rate for the latents, or for the noisy layers; lr_g if empty, 0 keeps them fixed.",
        low=0,
        unused_when=(NO_ROUNDS, NO_GENERATOR),
    )
    generator_init: Literal["random", "reptile", "maml"] = option(
        "random",
        "Generator weights at the start of a round: re-initialised, or a meta-learned initialisation.",
        unused_when=(NO_ROUNDS, NO_GENERATOR, NOISY_LAYER),
    )
    meta_rate: float = option(
        1.0,
        "Outer step size. reptile: interpolation from the round's initial to its final weights (1: keep the final). "
        "maml: outer Adam rate as a multiple of lr_g * g_steps.",
        low=0,
        high=1,
        unused_when={"generator_init": ("random",)},
    )
    reset_epoch: int = option(
        0,
        "Epoch at which the first layer of the meta-learned initialisation is re-initialised, once; 0: never.",
        low=0,
        unused_when={"generator_init": ("random",)},
    )
    class_embedding: bool = option(
        False,
        "Multiply the latents z by a learned embedding of the target class (GDFQ); False: z does not depend on it.",
        unused_when=(NO_GENERATOR, {"source": SourcesWith("has_rounds")}),
    )
    class_noise: float = option(
        0.0,
        "Norm of a class-specific mean added to the latent z; 0: z does not depend on the class.",
        low=0,
        unused_when=(NO_ROUNDS, NO_GENERATOR, NOISY_LAYER),
    )
    class_embeddings: str = option(
        "",
        "File of one embedding for each class, (classes, D), by torch.save or numpy.save; random ones if empty.",
        unused_when=NO_NOISY_LAYER,
        affects_result=False,
    )
    generator_life: int = option(
        10, "Rounds that a generator lives before it is re-initialised.", low=1, unused_when=NO_NOISY_LAYER
    )
    keep: Literal["best", "last"] = option(
        "best",
        "Step of which the batch enters the pool: the one of lowest loss, or the last.",
        unused_when=(CONTROL, NO_POOL),
    )
    bn: float = option(0.0, "Weight of the distance to the teacher's BatchNorm statistics.", low=0)
    bn_reduction: Literal["norm", "mse", "gaussian"] = option(
        "norm",
        "Distance of the statistics of a layer: sum of L2 norms, mean squared error, or KL divergence of Gaussians.",
        unused_when={"bn": (0,)},
    )
    bn_momentum: float = option(
        0.0,
        "Weight of earlier rounds in the batch statistics, as an exponential moving average.",
        low=0,
        high=0.999,
        unused_when={"bn": (0,)},
    )
    oh: float = option(0.0, "Weight of the teacher's cross-entropy.", low=0)
    oh_T: float = option(1.0, "Temperature of that cross-entropy.", low=1e-6, unused_when={"oh": (0,)})
    oh_target: Literal["target", "predicted"] = option(
        "target",
        "Class in that cross-entropy: the target class, or the teacher's own prediction (DAFL).",
        unused_when={"oh": (0,)},
        aliases={"asked": "target", "answered": "predicted"},
    )
    adv: float = option(
        0.0,
        "Weight of the adversarial term, the disagreement of student and teacher.",
        low=0,
        unused_when=(CONTROL, NO_EPOCHS),
    )
    adv_distance: Literal["kl", "js", "l1"] = option(
        "kl",
        "Its distance: KL divergence, Jensen-Shannon divergence (ADI), or L1 of the logits (DFAD).",
        unused_when={"adv": (0,)},
    )
    adv_T: float = option(
        1.0, "Temperature of its divergences.", low=1e-6, unused_when=({"adv": (0,)}, {"adv_distance": ("l1",)})
    )
    adv_where: Literal["agree", "all"] = option(
        "agree",
        "Images that it applies to: those on which student and teacher predict the same class (RGAL, CMI), or all.",
        unused_when={"adv": (0,)},
    )
    act: float = option(0.0, "Weight of the teacher's activation strength (DAFL).", low=0)
    balance: float = option(0.0, "Weight of the class balance over the batch (DAFL).", low=0)
    cr: float = option(0.0, "Weight of the contrast with earlier images (CMI).", low=0)
    cr_T: float = option(0.2, "Temperature of that contrast.", low=1e-6, unused_when={"cr": (0,)})
    tv: float = option(0.0, "Weight of the images' total variation.", low=0)
    l2: float = option(0.0, "Weight of the images' L2 norm.", low=0)


@dataclass
class Relation:
    """RGAL's triplet losses: confuse classes in synthesis, separate them in the student."""

    triplet: float = option(
        0.0,
        "Weight of the triplet loss in synthesis.",
        low=0,
        unused_when=({"relation": ("off",)}, CONTROL, {**NO_EPOCHS, "triplet_target": ("student",)}),
    )
    triplet_unit: Literal["loss", "gradient"] = option(
        "loss",
        "Unit of that weight: of the loss, as published; or of the gradient with respect to the images, whose norm for "
        "the triplet loss is then so many times that for all other terms together, in each step.",
        unused_when={"triplet": (0,)},
    )
    relation: Literal["paper", "release", "off"] = option(
        "paper",
        "Its direction: the paper's (spread classes, mix them), the released code's, or no triplet loss.",
        unused_when=({"triplet": (0,)}, CONTROL),
    )
    triplet_target: Literal["student", "teacher"] = option(
        "student", "Network whose features it uses.", unused_when={"triplet": (0,)}
    )
    start_layer: int = option(
        2,
        "First stage that the triplet losses use, counted from 0 among the last four (negative: from the end of all).",
        unused_when=NO_STAGES,
    )
    end_layer: int = option(4, "Stage after the last one that they use.", unused_when=NO_STAGES)
    margin: float = option(0.2, "Margin of both triplet losses.", low=0, unused_when=NO_TRIPLETS)
    sampling: Literal["focal", "distance", "uniform"] = option(
        "focal",
        "Negative sampling in synthesis: within a band of distances, distance-weighted, or uniform.",
        unused_when={"triplet": (0,)},
    )
    sampling_space: Literal["embedding", "logits"] = option(
        "embedding",
        "Distances for negative sampling: of the teacher's embeddings, or of logits (in synthesis the teacher's, in "
        "student training the student's).",
        unused_when=NO_TRIPLETS,
    )
    sampling_dim: str = option(
        "intrinsic",
        "Dimension d of the density whose inverse, r^(2 - d), weights negatives: intrinsic (estimated from each "
        "batch), nominal (of the space, as in the released code; if it is large, the nearest candidate takes almost "
        "all), or a number.",
        unused_when=(NO_TRIPLETS, NO_WEIGHTING),
    )
    sampling_cap: float | None = option(
        None,
        "Largest weight of a negative, as a multiple of the median of the anchor's candidates. Empty: no limit.",
        low=1,
        unused_when=(NO_TRIPLETS, NO_WEIGHTING),
    )
    striplet: float = option(
        0.0, "Weight of the triplet loss in student training.", low=0, unused_when=(OTHER_LEARNER, NO_EPOCHS)
    )
    striplet_feature: Literal["global", "features", "logits"] = option(
        "global",
        "Features that it uses: the embedding, the chosen stages, or the logits.",
        unused_when={"striplet": (0,)},
    )
    striplet_sampling: Literal["focal", "distance", "uniform"] = option(
        "distance", "Negative sampling in student training.", unused_when={"striplet": (0,)}
    )

    def validate(self) -> None:
        """Raise an OptionError if the stages are none, or for an unknown dimension."""
        if self.sampling_dim not in ("nominal", "intrinsic") and not re.fullmatch(r"\d+(\.\d+)?", self.sampling_dim):
            raise OptionError(
                f"--sampling_dim cannot be {self.sampling_dim!r}; it takes nominal, intrinsic or a number"
            )
        if 0 < self.end_layer <= self.start_layer:
            raise OptionError(
                f"start_layer {self.start_layer} is not before end_layer {self.end_layer}, so no stage is used; "
                "lower --start_layer"
            )


@dataclass
class Distill:
    """Phase 2: the student matches the teacher's outputs on the images."""

    learner: Literal["distill"] = option(
        "distill", "How the student is trained: by the terms below, or by a user-defined class.", custom=True
    )
    batch_size: int = option(128, "Images of a student step.", low=1)
    pair_sample: bool = option(
        False, "Show every image under two augmentations, which doubles the batch.", unused_when=OTHER_LEARNER
    )
    view_cache: int | None = option(
        None,
        "Memory limit in MB of the cache of teacher outputs per view. Empty: a quarter of the free memory on the CPU, "
        "none on a GPU. Not with mixup, gram_loss and at_loss.",
        low=0,
        unused_when=(NO_POOL, OTHER_LEARNER),
        affects_result=False,
    )
    mixup: float = option(
        0.0,
        "Fraction of the views that are blended with another view of the batch.",
        low=0,
        high=1,
        unused_when=OTHER_LEARNER,
    )
    T: float = option(
        20.0, "Temperature of the KL divergence.", low=1e-6, unused_when=({"kd": (0,)}, {"kd_distance": ("l1",)})
    )
    kd: float = option(1.0, "Weight of the distance to the teacher's logits.", low=0, unused_when=OTHER_LEARNER)
    kd_distance: Literal["kl", "l1"] = option(
        "kl", "That distance: KL divergence, or L1 of the logits (DFAD).", unused_when={"kd": (0,)}
    )
    cd_loss: float = option(
        0.0,
        "Weight of the channel term: pooled stages, projected to the teacher's width.",
        low=0,
        unused_when=OTHER_LEARNER,
    )
    gram_loss: float = option(
        0.0,
        "Weight of the pixel-wise term, channels weighted by the teacher's Gram matrix.",
        low=0,
        unused_when=OTHER_LEARNER,
    )
    at_loss: float = option(0.0, "Weight of the distance of attention maps (ZSKT).", low=0, unused_when=OTHER_LEARNER)
    custom_steps: float = option(
        1.0,
        "Fraction of the run in which the channel, Gram, attention and triplet terms are active.",
        low=0,
        high=1,
        unused_when={"cd_loss": (0,), "gram_loss": (0,), "at_loss": (0,), "striplet": (0,)},
    )


@dataclass
class Sgd:
    """The optimiser of the network that is trained: SGD, whose learning rate follows a cosine to 0."""

    UNUSED_WHEN: ClassVar[tuple[Condition, ...]] = (NO_EPOCHS,)

    lr: float = option(0.1, "Initial learning rate.", low=0, also_in=("distill", "training"))
    momentum: float = option(0.9, "Momentum.", low=0, high=1, also_in=("distill", "training"))
    weight_decay: float = option(1e-4, "Weight decay.", flags=("--wd",), low=0, also_in=("distill", "training"))
    nesterov: bool = option(
        False, "Nesterov's momentum.", unused_when=({"momentum": (0,)}, NO_EPOCHS), also_in=("distill", "training")
    )
    clip_grad: float = option(
        0.0, "Largest norm of the gradient of a step; a larger one is scaled down. 0: none.", low=0
    )


@dataclass
class Optim(Sgd):
    """The optimiser of the network that is trained; its learning rates follow a cosine to 0."""

    optimizer: Literal["sgd", "muon"] = option(
        "sgd",
        "sgd, or muon, which suits short runs: convolution filters step along their orthogonalised momentum and keep "
        "their norm, without weight decay; everything else is trained by SGD.",
        also_in=("distill", "training"),
    )
    filter_lr: float = option(
        0.03,
        "Initial learning rate of the filters with muon: the length of a step relative to the norm of a layer's "
        "filters.",
        low=0,
        unused_when={"optimizer": ("sgd",)},
        also_in=("distill", "training"),
    )


@dataclass
class ScratchOptim(Optim):
    __doc__ = Optim.__doc__

    weight_decay: float = option(5e-4, "Weight decay.", flags=("--wd",), low=0, also_in=("distill", "training"))


@dataclass
class TrainingOptions:
    """Supervised training on real images."""

    model: str = option(
        "wrn40_2", "Registered model, torchvision:NAME, timm:NAME, path/to/file.py:factory or package:factory."
    )
    weights: str = option(
        "",
        "File or run folder of weights to start from, or to evaluate; own: those that the model brings; randomly "
        "initialised if empty.",
        affects_result=False,
    )
    weights_key: str = option(
        "",
        "Key of the weights in that file, such as state_dict_ema for averaged ones, or prefix of their names; the "
        "usual ones if empty.",
        unused_when={"weights": ("", "own")},
        affects_result=False,
    )
    mean: tuple[float, ...] | None = option(
        None,
        "The network's input mean per channel, in [0, 1]; if empty, the one stored with its weights, or else the one "
        "that the model itself states, or else the data card's.",
        low=0,
        high=1,
    )
    std: tuple[float, ...] | None = option(
        None, "Its input standard deviation per channel; defaults like the mean.", low=1e-6, high=1
    )
    epochs: int = option(200, "Epochs; the learning rate follows a cosine to 0 over them.", flags=("--epoch",), low=1)
    budget: str | None = budget_option()
    batch_size: int = option(128, "Images of a step.", low=1)


@dataclass
class QuantizedStudent:
    """The quantised network, which is made of the teacher."""

    student_weights: str = option(
        "",
        "File or run folder of a quantised network, for --evaluate_only.",
        unused_when={"evaluate_only": (False,)},
        affects_result=False,
    )


@dataclass
class QuantizeSchedule(ScheduleOptions):
    """How synthesis and training alternate, after a warm-up in which only images are synthesised."""

    warmup_is_extra: ClassVar[bool] = True

    epochs: int = option(
        396,
        "Epochs after the warm-up, in which the network is trained; 0: its ranges are observed, and that is all.",
        flags=("--epoch",),
        low=0,
    )
    warmup: int = option(
        4, "Epochs before, in which images are synthesised; ranges are observed at the end of each.", low=1
    )


@dataclass
class Finetune:
    """How the quantised network is trained: it matches the teacher's outputs on the images."""

    batch_size: int = option(200, "Images of a step, and of a batch on which ranges are observed.", low=1)
    kd: float | None = option(
        None,
        "Weight of the KL divergence to the teacher at temperature T, times T^2, averaged over the batch. Empty: 1 / "
        "classes (GDFQ averages over the classes, too).",
        low=0,
        unused_when=NO_EPOCHS,
    )
    T: float = option(20.0, "Temperature of that divergence.", low=1e-6, unused_when=({"kd": (0,)}, NO_EPOCHS))
    ce: float = option(
        1.0,
        "Weight of the cross-entropy with the target class, or if there is none the teacher's.",
        low=0,
        unused_when=NO_EPOCHS,
    )
    feature: float = option(
        0.0, "Weight of the mean squared distance of the two embeddings.", low=0, unused_when=NO_EPOCHS
    )
    view_cache: int | None = option(
        None,
        "Memory limit in MB of the cache of teacher outputs per view. Empty: a quarter of the free memory on the CPU, "
        "none on a GPU.",
        low=0,
        unused_when=(NO_POOL, NO_EPOCHS),
        affects_result=False,
    )


@dataclass
class QuantizeOptim(Sgd):
    __doc__ = Sgd.__doc__

    lr: float = option(1e-4, "Initial learning rate.", low=0)
    nesterov: bool = option(True, "Nesterov's momentum.", unused_when=({"momentum": (0,)}, NO_EPOCHS))


RANGES_BY_BITS = {"w_bits": (32,), "a_bits": (32,)}


@dataclass
class Quantizer:
    """The protocol of quantization: which numbers lie on which grid. Results of different protocols do not compare."""

    w_bits: int = option(4, "Bits of the weights of convolutions and linear layers, 2 to 16; 32 leaves them in float.")
    a_bits: int = option(
        4, "Bits of the activations, after each activation function, 2 to 16; 32 leaves them in float."
    )
    first_last_bits: int | None = option(
        None,
        "Bits of the weights of the first and the last layer, and of the last activations. Empty: like the others.",
        unused_when=RANGES_BY_BITS,
    )
    w_per: Literal["channel", "tensor"] = option(
        "channel", "A range of weights for each output channel, or for each layer.", unused_when={"w_bits": (32,)}
    )
    w_symmetric: bool = option(
        False, "A symmetric grid for the weights, as integer kernels need it.", unused_when={"w_bits": (32,)}
    )
    a_symmetric: bool = option(False, "A symmetric grid for the activations.", unused_when={"a_bits": (32,)})
    ranges: Literal["ema", "mse", "learned"] = option(
        "ema",
        "Ranges: minimum and maximum (of activations their moving average over the calibration), those of the least "
        "squared error, or steps learned with the network from these (LSQ).",
        unused_when=RANGES_BY_BITS,
    )
    range_momentum: float = option(
        0.9, "Weight of earlier batches in the ranges of activations.", low=0, high=0.999, unused_when={"a_bits": (32,)}
    )
    calibration: int = option(
        32, "Batches on which ranges are observed, after each epoch of warm-up.", low=1, unused_when=RANGES_BY_BITS
    )
    fold_bn: bool = option(
        False, "Fold BatchNorm into the weights before they are quantised.", unused_when={"w_bits": (32,)}
    )
    onnx: bool = option(
        False,
        "Write an integer network of 8 bits for onnxruntime, too, and compare it with the one in float32.",
        affects_result=False,
    )

    def validate(self) -> None:
        """Raise an OptionError for a number of bits that no grid has, or that no integer kernel has."""
        for name in ("w_bits", "a_bits", "first_last_bits"):
            bits = getattr(self, name)
            if bits is not None and not (2 <= bits <= 16 or bits == 32):
                raise OptionError(f"--{name} cannot be {bits}; it takes 2 to 16, or 32 for float")
        if self.onnx and (self.w_bits, self.a_bits, self.first_last_bits or 8) != (8, 8, 8):
            raise OptionError("--onnx needs --w_bits 8 --a_bits 8, for which there are integer kernels")

    @property
    def sentence(self) -> str:
        """The protocol in one line, as it stands beside every result."""
        symmetric = {True: "symmetric", False: "asymmetric"}
        rule = {"ema": "minimum and maximum", "mse": "least squared error", "learned": "learned steps"}[self.ranges]
        weights = f"weights {self.w_bits} bits per {self.w_per} {symmetric[self.w_symmetric]}"
        activations = f"activations {self.a_bits} bits per tensor {symmetric[self.a_symmetric]}"
        weights = weights if self.w_bits < 32 else "weights in float"
        activations = activations if self.a_bits < 32 else "activations in float"
        observed = f", observed on {self.calibration} batches (momentum {self.range_momentum:g})" * (self.a_bits < 32)
        outer = {None: "the same", 32: "in float"}.get(self.first_last_bits, f"{self.first_last_bits} bits")
        where = "first and last layer" if self.w_bits < 32 else "last activations"
        folded = "folded" if self.fold_bn else "not folded"
        return (
            f"W{self.w_bits}A{self.a_bits} simulated: {weights}, {activations}; ranges by {rule}{observed}; "
            f"{where} {outer}; BatchNorm {folded}"
        )

    @property
    def short(self) -> str:
        """The protocol as part of a run's name, such as w4a4 or w3a3-fl8-mse."""
        first_last = "" if self.first_last_bits is None else f"-fl{self.first_last_bits}"
        marks: dict[str, bool] = {
            "per-tensor": self.w_per == "tensor",
            "symmetric-w": self.w_symmetric,
            "symmetric-a": self.a_symmetric,
            self.ranges: self.ranges != "ema",
            "folded": self.fold_bn,
        }
        return f"w{self.w_bits}a{self.a_bits}{first_last}" + "".join(
            f"-{mark}" for mark, is_set in marks.items() if is_set
        )


def method_option(folder: str) -> Any:
    """The option that names a method: a file in configs/``folder``/."""
    return option(
        "rgal",
        f"Name of a file in configs/{folder}/, whose settings your own override, or a user-defined source of images.",
        custom=True,
    )


def _check_student_terms(config: Any, plan: Schedule) -> None:
    """Raise an OptionError if images are synthesised in the warm-up alone, but a term of theirs uses the student."""
    weights = {"adv": config.synthesis.adv, "triplet": config.relation.triplet}
    if config.relation.triplet_target == "teacher" or config.relation.relation == "off":
        del weights["triplet"]
    named = [f"--{name} {weight:g}" for name, weight in weights.items() if weight]
    warm = plan.warmup * plan.rounds
    if named and plan.synthesis_rounds is not None and plan.synthesis_rounds <= warm and plan.epochs > plan.warmup:
        raise OptionError(
            f"{' and '.join(named)} would have no effect, because all {plan.synthesis_rounds} rounds of synthesis are "
            f"in the warm-up, which has no terms that use the student; raise --synthesis_rounds above {warm}"
        )


@dataclass
class DistillConfig:
    """Options of datafree_kd.py."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    synthesis: Synthesis = field(default_factory=Synthesis)
    relation: Relation = field(default_factory=Relation)
    distill: Distill = field(default_factory=Distill)
    optim: Optim = field(default_factory=Optim)
    method: str = method_option("methods")

    def validate(self) -> None:
        """Raise an InputError for options that do not go together."""
        seconds_of(self.schedule.budget)
        _check_student_terms(self, Schedule.of(self.schedule, self.distill.batch_size))
        self.relation.validate()
        self.run.validate()
        _validate_evaluation(self.run, self.data, "--student_weights", self.student.student_weights)

    def networks(self) -> list[tuple[str, str]]:
        """(model, weights) of each network, as they were given."""
        teacher, student = self.teacher, self.student
        return [(teacher.teacher, teacher.teacher_weights), (student.student, student.student_weights)]


@dataclass
class ScratchConfig:
    """Options of train_scratch.py."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    optim: ScratchOptim = field(default_factory=ScratchOptim)

    def validate(self) -> None:
        """Raise an OptionError for options that do not go together."""
        seconds_of(self.training.budget)
        self.run.validate()
        _validate_evaluation(self.run, self.data, "--weights", self.training.weights)

    def networks(self) -> list[tuple[str, str]]:
        """(model, weights) of the network, as they were given."""
        return [(self.training.model, self.training.weights)]


def _validate_evaluation(run: Run, data: Data, option: str, weights: str) -> None:
    """Raise an OptionError if there is nothing to evaluate, or nothing to evaluate it on. option: gives ``weights``."""
    if run.evaluate_only and data.eval == "none":
        raise OptionError("--evaluate_only needs a test set; leave --eval test and give its folder by --data_root")
    if run.evaluate_only and not weights:
        raise OptionError(
            f"--evaluate_only has nothing to evaluate; name the weights by {option} (a teacher is evaluated by "
            f"{command('train')} --evaluate_only, with --model, --weights, --mean and --std)"
        )


@dataclass
class QuantizeConfig:
    """Options of datafree_quantize.py."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    student: QuantizedStudent = field(default_factory=QuantizedStudent)
    quantizer: Quantizer = field(default_factory=Quantizer)
    schedule: QuantizeSchedule = field(default_factory=QuantizeSchedule)
    synthesis: Synthesis = field(default_factory=Synthesis)
    relation: Relation = field(default_factory=Relation)
    finetune: Finetune = field(default_factory=Finetune)
    optim: QuantizeOptim = field(default_factory=QuantizeOptim)
    method: str = method_option("quantization")

    def validate(self) -> None:
        """Raise an InputError for options that do not go together."""
        seconds_of(self.schedule.budget)
        _check_student_terms(self, Schedule.of(self.schedule, self.finetune.batch_size))
        self.relation.validate()
        self.quantizer.validate()
        self.run.validate()
        _validate_evaluation(self.run, self.data, "--student_weights", self.student.student_weights)
        for name, plain in (("precision", "none"), ("compile", "off")):
            if getattr(self.run, name) != plain:
                raise OptionError(
                    f"--{name} {getattr(self.run, name)} does not go with quantization, whose grids are computed in "
                    "fp32 by a network that runs as it is written; remove it"
                )

    def networks(self) -> list[tuple[str, str]]:
        """(model, weights) of each network, as they were given."""
        return [(self.teacher.teacher, self.student.student_weights or self.teacher.teacher_weights)]


# Learners of incremental learning that replay no images, and those that have no terms of their own.
NO_REPLAY = {"learner": ("lwf", "finetune", "joint", "fetril")}
NO_TERMS = {"learner": ("finetune", "joint", "fetril")}


@dataclass
class Incremental:
    """Classes that arrive in tasks, and how the network learns each task without the images of the earlier ones."""

    model: str = option(
        "cifar_resnet32", "Registered model, torchvision:NAME, timm:NAME, path/to/file.py:factory or package:factory."
    )
    weights: str = option(
        "",
        "File of a network that knows the first task already, or the folder of that task; it is trained if empty.",
        affects_result=False,
    )
    weights_key: str = option(
        "",
        "Key of the weights in that file, such as state_dict_ema for averaged ones, or prefix of their names; the "
        "usual ones if empty.",
        unused_when={"weights": ("",)},
        affects_result=False,
    )
    init_cls: int = option(10, "Classes of the first task, the base.", low=2)
    increment: int = option(10, "Classes of every later task.", low=1)
    class_seed: int = option(
        1993,
        "Seed of the order in which classes arrive.",
        low=0,
        high=2**32 - 1,
        unused_when={"class_order": AnyBut(())},
    )
    class_order: tuple[float, ...] = option(
        (), "That order, as a list of all classes counted from 0; by class_seed if empty.", low=0
    )
    base_acc: float = option(
        0.0,
        "Expected top-1 (%) after the first task; a warning is logged if it is lower. 0: no check.",
        low=0,
        high=100,
        unused_when={"eval": ("none",)},
        affects_result=False,
    )
    learner: Literal["replay", "lwf", "finetune", "joint", "fetril"] = option(
        "replay",
        "How a task is learnt: on real images of its classes and synthetic ones of the old classes; on its images with "
        "distillation (LwF); on its images alone; on the images of all classes so far, the upper bound; or with a "
        "frozen trunk and translated features (FeTrIL).",
    )
    batch_size: int = option(128, "Real images of a step.", low=1)
    replay_batch_size: int = option(128, "Synthetic images of a step.", low=1, unused_when=NO_REPLAY)
    classes_per_batch: int = option(
        0,
        "Classes of each half of a batch, real and synthetic, with as many images each as there are, so that the "
        "triplets' anchors have partners; 0: as they come.",
        low=0,
        unused_when=NO_REPLAY,
    )
    lce: float = option(
        1.0, "Weight of the cross-entropy over the new classes alone, of real images.", low=0, unused_when=NO_TERMS
    )
    hce: float = option(
        0.0,
        "Weight of the class-balanced cross-entropy over all classes, which trains the head alone.",
        low=0,
        unused_when=NO_REPLAY,
    )
    fkd: float = option(
        0.0,
        "Weight of the distance of the embeddings as the old head sees them, of all images (ABD).",
        low=0,
        unused_when=NO_REPLAY,
    )
    hkd: float = option(
        0.0, "Weight of the L1 distance of the old classes' logits, of synthetic images.", low=0, unused_when=NO_REPLAY
    )
    rkd: float = option(
        0.0,
        "Weight of the distance of the angles among embeddings of real images, through learned maps (R-DFCIL).",
        low=0,
        unused_when=NO_REPLAY,
    )
    kd: float = option(
        0.0, "Weight of the KL divergence of the old classes' logits, of all images (LwF).", low=0, unused_when=NO_TERMS
    )
    T: float = option(2.0, "Temperature of that divergence.", low=1e-6, unused_when={"kd": (0,)})
    scale: Literal["off", "share", "adaptive"] = option(
        "off",
        "Factors of the weights, from the numbers of old and new classes: share, lce by the new ones' share (ABD); "
        "adaptive, lce less, hkd and rkd more, the more old ones (R-DFCIL).",
        unused_when=NO_REPLAY,
    )
    passes: Literal["together", "apart"] = option(
        "together",
        "Whether real and synthetic images pass through the network in one batch, or in two with BatchNorm statistics "
        "of their own.",
        unused_when=NO_REPLAY,
    )
    head_share: float = option(
        0.0,
        "Share of a task's steps, the last ones, that train the head alone by hce and hkd; before them hce is inactive "
        "(R-DFCIL). 0: all terms act throughout.",
        low=0,
        high=0.9,
        unused_when=(NO_REPLAY, {"hce": (0,)}),
    )
    separate: Literal["apart", "together"] = option(
        "apart",
        "Images among which the student's triplets are formed: real and synthetic ones apart, or all together.",
        unused_when=(NO_REPLAY, {"striplet": (0,)}),
    )


@dataclass
class IncrementalSchedule(StepOptions):
    """Steps of a task, and how the source of replay is trained at its beginning."""

    warmup_is_extra: ClassVar[bool] = True

    epochs: int = option(
        250, "Epochs of a task; the learning rate follows a cosine to 0 over them.", flags=("--epoch",), low=1
    )
    warmup: int = option(
        0,
        "Epochs before these that only synthesise images, without the terms that use the student.",
        low=0,
        unused_when=CONTROL,
    )
    synthesis_rounds: int | None = option(
        None,
        "First rounds of a task that synthesise, by the old network; then the source is frozen. Empty: all.",
        low=1,
        unused_when=CONTROL,
    )
    base_epochs: int | None = option(
        None, "Epochs of the first task; as many as of the others if empty.", low=1, unused_when={"weights": AnyBut("")}
    )


@dataclass
class Replay(Synthesis):
    """The source of the old classes' images: synthesised by inverting the old network, the teacher."""

    source: Literal["inversion", "pixels", "noisy_layer", "generator", "noise"] = option(
        "generator",
        "Source of images: a generator optimised in each round, pixels optimised directly, a generator fed with "
        "class embeddings through noisy layers, one generator whose images are not kept, noise, or a user-defined "
        "class.",
        unused_when=NO_REPLAY,
        custom=True,
    )


@dataclass
class IncrementalRelation(Relation):
    __doc__ = Relation.__doc__

    triplet_target: Literal["student", "teacher"] = option(
        "teacher", "Network whose features it uses.", unused_when={"triplet": (0,)}
    )
    start_layer: int = option(
        -1,
        "First stage that the triplet losses use, counted from 0 among the last four (negative: from the end of all).",
        unused_when=NO_STAGES,
    )
    striplet: float = option(0.0, "Weight of the triplet loss in student training.", low=0, unused_when=NO_REPLAY)


@dataclass
class IncrementalOptim(Optim):
    __doc__ = Optim.__doc__

    weight_decay: float = option(5e-4, "Weight decay.", flags=("--wd",), low=0)


@dataclass
class IncrementalConfig:
    """Options of datafree_incremental.py."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    incremental: Incremental = field(default_factory=Incremental)
    schedule: IncrementalSchedule = field(default_factory=IncrementalSchedule)
    synthesis: Replay = field(default_factory=Replay)
    relation: IncrementalRelation = field(default_factory=IncrementalRelation)
    optim: IncrementalOptim = field(default_factory=IncrementalOptim)
    method: str = method_option("incremental")

    def validate(self) -> None:
        """Raise an InputError for options that do not go together."""
        _check_student_terms(self, Schedule.of(self.schedule, self.incremental.batch_size))
        self.relation.validate()
        self.run.validate()
        _validate_evaluation(self.run, self.data, "--weights", self.incremental.weights)
        for name in ("pool_images", "class_embeddings"):
            if getattr(self.synthesis, name):
                raise OptionError(
                    f"--{name} does not go with incremental learning, where the classes of a task are others than "
                    "those of the data set; remove it"
                )
        given = self.incremental
        if given.learner in ("lwf", "replay") and not given.lce and (given.learner == "lwf" or not given.hce):
            raise OptionError(
                "--lce 0 leaves no term that teaches the classes of a task; give it a weight"
                + ", or one to --hce" * (given.learner == "replay")
            )
        if self.run.resume not in ("none", "auto"):
            raise OptionError(
                f"--resume {self.run.resume}: a run of several tasks has a checkpoint for each; give --resume auto"
            )

    def networks(self) -> list[tuple[str, str]]:
        """(model, weights) of the network, as they were given."""
        return [(self.incremental.model, self.incremental.weights)]


@dataclass
class Trained:
    """The trained network. What its file states, as those of this program do, needs no option."""

    weights: str = option("", "Folder of its run, or file of its weights; as the first word it needs no --weights.")
    weights_key: str = option(
        "",
        "Key of the weights in that file, such as state_dict_ema for averaged ones, or prefix of their names; the "
        "usual ones if empty.",
    )
    model: str = option(
        "",
        "Registered model, torchvision:NAME, timm:NAME, path/to/file.py:factory or package:factory, if the file does "
        "not state it.",
    )
    dataset: str = option(
        "", "Name of a registered data set, or of a folder in data_root, if the file does not state it."
    )
    card: str = option(
        "", "YAML file with shape, classes, mean and std of its images, if the file does not state them."
    )
    mean: tuple[float, ...] = option(
        (),
        "Its input mean per channel, in [0, 1]; if empty, the one stored with its weights, or else the one that the "
        "model itself states, or else the data card's.",
        low=0,
        high=1,
    )
    std: tuple[float, ...] = option(
        (), "Its input standard deviation per channel; defaults like the mean.", low=1e-6, high=1
    )


@dataclass
class Files:
    """The files that are written."""

    format: tuple[Literal["onnx", "pt2", "safetensors"], ...] = option(
        ("onnx",),
        "onnx, for onnxruntime and others; pt2, a program of torch.export, for torch without this package; "
        "safetensors, the weights, for datafree.load. Several may follow.",
    )
    out: str = option(
        "", "Their folder; if empty, export in the folder of the run, or NAME_export beside the file NAME."
    )
    input: Literal["floats", "bytes"] = option(
        "floats",
        "What the network takes: images as float32 (N, C, H, W) in [0, 1], or as uint8 (N, H, W, C), as decoders and "
        "cameras give them.",
        unused_when={"format": (("safetensors",),)},
    )


@dataclass
class Comparison:
    """How a file is compared with the network in torch."""

    images: Literal["auto", "test", "pool", "noise"] = option(
        "auto",
        "Images: the test set; those of the run, from its pool or its generator; noise; or the first of these that "
        "there is.",
    )
    data_root: str = option("data", "Folder that contains the data sets.", unused_when={"images": ("pool", "noise")})
    tolerance: float | None = option(
        None,
        "Largest difference of a logit, relative to the largest one, with which the program does not fail. Empty: "
        "1e-4, and of an integer network 0.1.",
        low=0,
    )
    repeats: int = option(20, "Measurements of each latency, as far as half a minute allows.", low=1)
    threads: int = option(0, "CPU threads; 0 leaves torch's default.", low=0, high=1024)


@dataclass
class ExportConfig:
    """Options of datafree.export."""

    trained: Trained = field(default_factory=Trained)
    files: Files = field(default_factory=Files)
    comparison: Comparison = field(default_factory=Comparison)

    def validate(self) -> None:
        """Raise an OptionError if there is nothing to export."""
        if not self.trained.weights:
            raise OptionError("name the folder of a run, or a file of weights, before the options")
        if not self.files.format:
            raise OptionError("--format is empty; give one or more of onnx, pt2, safetensors")


CONFIGS = (
    DistillConfig,
    ScratchConfig,
    QuantizeConfig,
    IncrementalConfig,
)  # of all programs: a method file may have sections of any


def sections(config_class: type) -> dict[str, type]:
    """Name -> class of the sections of a program's options, in the order of ``--help``."""
    factories: dict[str, Any] = {f.name: f.default_factory for f in fields(config_class)}
    return {name: factory for name, factory in factories.items() if isinstance(factory, type)}
