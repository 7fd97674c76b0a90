"""Data-free knowledge distillation: a student from a trained teacher, without the teacher's training data."""

import sys
from pathlib import Path
from types import SimpleNamespace

import registry
from datafree import cli, diagnostics
from datafree.config import DistillConfig
from datafree.engine import Engine
from datafree.errors import InputError, OptionError, exit_on_input_error
from datafree.hooks import sees_images_alone
from datafree.learners.distill import DistillLearner
from datafree.pool import ImagePool
from datafree.relation import triplet_stages
from datafree.runtime import free_memory
from datafree.session import Session, teacher_place
from datafree.synthesis.build import build_source
from datafree.synthesis.optimised import OptimisedSynthesis
from datafree.view_cache import ViewCache

EXAMPLES = """
python datafree_kd.py --method rgal --teacher wrn40_2 --student wrn16_1
python datafree_kd.py --config configs/cifar10/rgal_wrn40_2_wrn16_1.yaml --seed 1
python datafree_kd.py --dataset digits --teacher resnet20 --student resnet8 --epochs 10
"""


def main():
    config, call = cli.parse(
        DistillConfig, sys.argv[1:], description=__doc__, method_files=registry.METHODS, examples=EXAMPLES
    )
    if call.print_config:
        print(cli.to_yaml(config), end="")
        return
    schedule = plan_schedule(config)
    session = Session(config, write=not call.dry_run)
    student = session.network("student", config.student.student, config.student.student_weights)
    if config.run.evaluate_only:
        session.evaluate_only(student, "--student_weights", config.student.student_weights)
        return
    teacher = load_teacher(session)
    source = build_source(session, teacher, student)
    learner = DistillLearner(
        student,
        teacher,
        session.augment,
        config.distill,
        config.relation,
        (schedule.epochs - schedule.warmup) * schedule.rounds * schedule.kd_steps,
        config.run.precision,
        build_cache(session, teacher, source),
    )
    plan = describe_plan(session, schedule, teacher, source, learner.cache)
    if call.dry_run:
        print("\n".join(plan))
        return
    with session.open_folder(config.method, config.teacher.teacher, config.student.student) as folder:
        for line in plan:
            folder.log(line)
        columns = check_teacher(session, teacher, folder)
        facts = session.facts(student, config.student.student)
        engine = Engine(
            learner,
            source,
            schedule,
            folder,
            config.run,
            facts=facts,
            evaluate=(lambda: session.score(student)) if session.test else None,
            describe=diagnostics.Watch(source, teacher, student, drawing_space(config.relation)),
        )
        session.train(engine, **columns)


def load_teacher(session):
    """The teacher with its weights, frozen."""
    options = session.config.teacher
    weights = options.teacher_weights or teacher_place(session.card.name, options.teacher)
    try:
        return session.network("teacher", options.teacher, weights, options.teacher_mean, options.teacher_std).freeze()
    except InputError as error:
        if options.teacher_weights or Path(weights).exists() or isinstance(error, OptionError):
            raise
        raise InputError(
            f"{error} (train it by: python train_scratch.py --dataset {session.card.name} "
            f"--model {options.teacher}; or give --teacher_weights)"
        ) from None


def plan_schedule(config):
    """The counts that the engine runs by; options that do not go together raise an InputError."""
    s = config.schedule
    if s.kd_steps > s.ep_steps:
        raise InputError(
            f"kd_steps {s.kd_steps} is more than ep_steps {s.ep_steps}, so an epoch would have no round; "
            "lower --kd_steps or raise --ep_steps"
        )
    if left := s.ep_steps % s.kd_steps:
        raise InputError(
            f"ep_steps {s.ep_steps} is no whole number of rounds of kd_steps {s.kd_steps}; "
            f"give --ep_steps {s.ep_steps - left} or {s.ep_steps - left + s.kd_steps}"
        )
    if config.distill.view_cache and not config.distill.views_recur:
        raise OptionError(
            "--view_cache has no use with --mixup, whose views hardly occur twice, nor with --gram_loss "
            "and --at_loss, which need whole maps; leave it out, or those"
        )
    if s.warmup >= s.epochs:
        raise InputError(
            f"warmup {s.warmup} leaves none of {s.epochs} epochs for the student; lower --warmup or raise --epochs"
        )
    start, end = config.relation.start_layer, config.relation.end_layer
    if 0 < end <= start:
        raise OptionError(
            f"start_layer {start} is not before end_layer {end}, so no stage is looked at; lower --start_layer"
        )
    return SimpleNamespace(
        epochs=s.epochs,
        rounds=s.ep_steps // s.kd_steps,
        kd_steps=s.kd_steps,
        warmup=s.warmup,
        batch_size=config.distill.batch_size,
    )


def build_cache(session, teacher, source):
    """Where the teacher's answers to views are kept; None where there is no use in it."""
    settings, triplets = session.config.distill, session.config.relation
    pool, megabytes = getattr(source, "pool", None), settings.view_cache
    wanted = session.device.type == "cpu" if megabytes is None else megabytes
    if not wanted or not settings.views_recur or not isinstance(pool, ImagePool) or not sees_images_alone(teacher):
        return None
    free = max(0, free_memory(session.device) - pool.images.nbytes) // 10**6  # which the pool has not touched yet
    wanted = ["logits"] + ["stages"] * (settings.cd_loss > 0)
    wanted += ["embed"] * (triplets.striplet > 0 and triplets.sampling_space == "embedding")
    possible = pool.capacity * session.augment.count
    cache = ViewCache(teacher, wanted, possible, free // 4 if megabytes is None else min(megabytes, free))
    if megabytes and megabytes > free and len(cache) < possible:
        raise InputError(
            f"--view_cache {megabytes} does not fit beside the pool into the {free} MB that are free; lower it"
        )
    return cache


def drawing_space(triplets):
    """Where distances for drawing are measured; that of the default where nothing is drawn."""
    return triplets.sampling_space if triplets.triplet or triplets.striplet else "embedding"


def describe_plan(session, schedule, teacher, source, cache):
    """What will happen and what it costs, in words."""
    config, card, name = session.config, session.card, session.config.synthesis.source
    steps = (schedule.epochs - schedule.warmup) * schedule.rounds * schedule.kd_steps
    views = config.distill.batch_size * (2 if config.distill.pair_sample else 1)
    cost = f"{steps:,} student steps of {views} views"
    lines = [
        f"Plan: {config.teacher.teacher} is the frozen teacher; {config.student.student} learns its answers on "
        f"{card.name}-shaped images {'x'.join(map(str, card.shape))} in {card.num_classes} classes, on "
        f"{session.device}.",
        describe_teacher(teacher),
    ]
    kind = {"noise": "plain noise", "real": "the real training images: not data-free"}.get(name)
    made = f"by {name}" if ":" in name else f"from noise, guided by the {teacher.name}"
    lines.append(f"The images are {kind or f'made {made}; no training image is opened'}.")
    if isinstance(source, OptimisedSynthesis):
        lines += describe_triplets(source.objective)
    if source.g_steps:
        cost = f"{schedule.epochs * schedule.rounds:,} rounds of {source.g_steps} synthesis steps, and {cost}"
    pool = getattr(source, "pool", None)
    if isinstance(pool, ImagePool):
        images = schedule.epochs * schedule.rounds * config.synthesis.synthesis_batch_size
        cost += f"; {images:,} images, of which the pool keeps {pool.capacity:,} ({pool.images.nbytes / 1e6:.0f} MB)"
    if cache:
        lines.append(
            f"The teacher's answers are kept for {len(cache):,} of {cache.possible:,} views "
            f"({len(cache) * cache.bytes_per_view / 1e6:.0f} MB at most)."
        )
    return [*lines, f"Cost: {cost}."]


def describe_teacher(teacher):
    """What its file says of the teacher, and what it is shown."""
    said = ", ".join(f"{key} {teacher.origin[key]}" for key in ("dataset", "epoch", "acc1") if key in teacher.origin)
    mean, std = (",".join(f"{value:.4g}" for value in part.flatten().tolist()) for part in (teacher.mean, teacher.std))
    return f"The {teacher.name} ({said or 'its file says no more'}) sees images normalised by mean {mean}, std {std}."


def describe_triplets(objective):
    """Which stages the synthesis triplets look at."""
    if not objective.weights["triplet"]:
        return []
    channels, sizes = objective.scored.tap.stage_channels, objective.scored.tap.stage_sizes
    stages = triplet_stages(len(sizes), objective.triplets)
    chosen = [f"{i} ({channels[i]}x{'x'.join(map(str, sizes[i]))})" for i in stages]
    return [
        f"The synthesis triplets look at {'stages ' + ', '.join(chosen) if chosen else 'the embedding'} of the "
        f"{objective.scored.name}, counted from 0 to {len(sizes) - 1}."
    ]


def check_teacher(session, teacher, folder):
    """Evaluate the teacher and call a weak one out -> columns of the summary."""
    scores, expected = session.score(teacher), session.config.teacher.teacher_acc
    if scores is None:
        folder.log("No test set (--eval none): neither teacher nor student is evaluated.")
        return {}
    folder.log(f"[Eval] teacher Acc@1={scores['acc1']:.4f} Acc@5={scores['acc5']:.4f} Loss={scores['loss']:.4f}")
    if scores["acc1"] < max(expected - 1, 200 / session.card.num_classes):
        wanted = f"{expected:g} % was expected" if expected else "that is little more than chance"
        folder.log(
            f"[Alarm] the teacher reaches only {scores['acc1']:.2f} % ({wanted}); check --teacher_weights, "
            "--teacher_mean and --teacher_std, for a student is no better than its teacher"
        )
    return {"teacher_acc1": scores["acc1"]}


if __name__ == "__main__":
    exit_on_input_error(main)
