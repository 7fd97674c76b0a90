"""The loop: an interrupted run ends as the uninterrupted one, and what does not fit is refused."""

import copy
import itertools
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import custom
import nets
import parts
import pytest
import torch
from conftest import forked, mostly_slow, rows, scratch
from resuming import Killed, assert_same_run, at_call, checkpoint_of, kill, same, stopped, terminate

import registry
from datafree import evaluators
from datafree.config import Run
from datafree.diagnostics import Watch
from datafree.engine import Engine, Means
from datafree.errors import InputError
from datafree.learners.base import Learner, cosine_to_zero
from datafree.logger import RunFolder
from datafree.network import Network
from datafree.progress import Progress
from datafree.schedule import Schedule
from datafree.session import Session
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.objective import SynthesisObjective

VARIANTS = {
    "random": (),
    "passes": ("--pool_order", "passes"),
    "meta": ("--generator_init", "reptile", "--meta_rate", 0.5, "--class_noise", 1),
    "contrast": ("--cr", 0.5, "--triplet_target", "teacher"),
    "muon": ("--optimizer", "muon", "--clip_grad", 5),
    "ring": ("--pool_size", 24, "--balanced_sampling", "--warmup", 1, "--gram_loss", 1, "--custom_steps", 0.6),
    "maml": ("--generator_init", "maml", "--bn_momentum", 0.5, "--reset_epoch", 2, "--at_loss", 1),
    "few synthesis rounds": ("--synthesis_rounds", 3, "--bn_momentum", 0.5),
    "several batches": ("--round_batches", 2, "--warmup", 1, "--warmup_batches", 3, "--cr", 0.5),
    "stream": ("--method", "dfq", "--triplet", 0.1, "--striplet", 0.1, "--cr", 0.5, "--bn_momentum", 0.5),
    "user-defined learner": ("--learner", custom.name("Averaged")),
    "learner with options": ("--learner", custom.name("Scaled"), "--factor", 0.5),
    "source with options": ("--source", custom.name("Grey"), "--level", 0.75, "--dither", 0.5),
    **{method: ("--method", method) for method in registry.METHODS},
}


@pytest.fixture
def interrupted(distil, monkeypatch):
    """Run, interrupted at a call, then resumed -> its folder."""

    def run(words, owner, method, number, act):
        with monkeypatch.context() as patch:
            at_call(patch, owner, method, number, act)
            with stopped(act):
                distil(*words, tag="interrupted")
        folder = distil(*words, "--resume", "auto", tag="interrupted")
        assert (folder / "summary.json").exists()
        return folder

    return run


@pytest.mark.parametrize(
    "variant, act",
    mostly_slow(
        itertools.product(VARIANTS, (kill, terminate)),
        [(name, kill) for name in ("rgal", "cmi", "maml", "several batches", "learner with options")]
        + [(name, terminate) for name in ("rgal_reptile", "ring", "stream", "source with options", "muon")],
    ),
)
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(variant, act, distil, interrupted):
    words = VARIANTS[variant]
    assert_same_run(distil(*words), interrupted(words, Learner, "step", 15, act))


@pytest.mark.parametrize(
    "owner, method, number",
    mostly_slow(
        [
            (SynthesisObjective, "__call__", 8),
            (SynthesisObjective, "__call__", 10),
            (SynthesisObjective, "__call__", 24),
            (Learner, "step", 1),
            (Learner, "step", 12),
            (Learner, "step", 24),
            (Session, "score", 3),
        ],
        [(SynthesisObjective, "__call__", 10), (Learner, "step", 24), (Session, "score", 3)],
    ),
)
def test_a_signal_may_come_at_any_moment(owner, method, number, distil, interrupted):
    """In the middle and at the end of either phase, of a round and of an epoch; while evaluating."""
    assert_same_run(distil(), interrupted((), owner, method, number, terminate))


@pytest.mark.parametrize(
    "variant", mostly_slow(["meta", "contrast", "ring", "maml", "stream", "deepinv"], ["maml", "deepinv"])
)
def test_a_signal_in_synthesis_stops_within_its_step_and_the_round_is_made_again(variant, distil, monkeypatch):
    words, calls = VARIANTS[variant], []
    if variant == "deepinv":
        words = (*words, "--adv", 1)
    straight = distil(*words)
    with monkeypatch.context() as patch:
        at_call(patch, SynthesisObjective, "__call__", 11, lambda: terminate() or calls.append("signal"))
        step = Learner.step
        patch.setattr(Learner, "step", lambda *given: calls.append("step") or step(*given))
        tick = Progress.advance
        patch.setattr(Progress, "advance", lambda *given, **more: calls.append("step") or tick(*given, **more))
        with stopped(terminate):
            distil(*words, tag="interrupted")
    assert calls[calls.index("signal") + 1 :] == ["step"]
    assert "Stopped by SIGTERM; everything is saved" in (straight.parent / "interrupted" / "log.txt").read_text()
    assert_same_run(straight, distil(*words, "--resume", "auto", tag="interrupted"))


@pytest.fixture
def small_batches(monkeypatch):
    """Evaluations take eight batches."""
    monkeypatch.setattr("datafree.session.PIXELS_AT_ONCE", 50 * 16 * 16)


@pytest.mark.parametrize("epoch, words", [(0, ()), (3, ()), (1, ("--method", "rgal_fast", "--warmup", 2))])
def test_a_signal_in_an_evaluation_stops_it_within_a_batch(epoch, words, distil, monkeypatch, small_batches):
    """The teacher's evaluation and those of earlier epochs take eight batches each; then comes the third one."""
    straight, batches = distil(*words), []
    with monkeypatch.context() as patch:
        sums = evaluators._sums
        patch.setattr(evaluators, "_sums", lambda *given: batches.append(1) or sums(*given))
        at_call(patch, Engine, "_evaluate", epoch + 1, lambda: patch.setattr(evaluators, "_sums", signalling))

        def signalling(*given):
            batches.append(1)
            if len(batches) == 8 + 8 * epoch + 3:
                terminate()
            return sums(*given)

        with stopped(terminate):
            distil(*words, tag="interrupted")
    folder = straight.parent / "interrupted"
    assert len(batches) == 8 + 8 * epoch + 3
    assert checkpoint_of(folder)["position"] == {"epoch": epoch, "round": 2, "step": 0}
    assert len(rows(folder)) == epoch if epoch else not (folder / "metrics.jsonl").exists()
    assert_same_run(straight, distil(*words, "--resume", "auto", tag="interrupted"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_every_signal_that_asks_to_end_saves_and_has_its_code(name, distil, monkeypatch, capfd):
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as end:
            distil()
    assert end.value.code == 128 + number and f"\n{name}: the run stops after this step" in capfd.readouterr().err
    [folder] = (Path.cwd() / "runs").glob("*/run")
    assert checkpoint_of(folder)["position"] == {"epoch": 0, "round": 1, "step": 2}


FILES = ("last.pth", "best.pth", "model_last.pth", "model_best.pth")


def kill_before_replacing(patch, name, number):
    """Kill the run just before the ``number``-th time that a file of this name takes its place."""
    replace, calls = os.replace, []

    def wrapped(old, new):
        calls.extend([1] * (os.path.basename(new) == name))
        if len(calls) == number and os.path.basename(new) == name:
            raise Killed
        return replace(old, new)

    patch.setattr(os, "replace", wrapped)


@pytest.mark.parametrize(
    "name, number",
    mostly_slow(
        [("model_last.pth", 1), ("model_last.pth", 4), ("best.pth", 1), ("model_best.pth", 1), ("metrics.jsonl", 3)],
        [("model_last.pth", 4), ("metrics.jsonl", 3)],
    ),
)
def test_a_kill_between_two_files_of_a_save_leaves_no_stale_one(name, number, distil, monkeypatch):
    straight = distil()
    with monkeypatch.context() as patch:
        kill_before_replacing(patch, name, number)
        with pytest.raises(Killed):
            distil(tag="killed")
    folder = distil("--resume", "auto", tag="killed")
    assert_same_run(straight, folder)
    for file in FILES[2:]:
        one, other = (torch.load(run / "checkpoints" / file, weights_only=True) for run in (straight, folder))
        assert one["epoch"] == other["epoch"] and same(one["state_dict"], other["state_dict"])
    assert sorted(os.listdir(folder / "checkpoints")) == sorted(FILES)


def test_a_teacher_is_published_as_its_run_ended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--model", nets.name("tiny"), "--epochs", 1, "--batch_size", 256, "--log_tag", "run")
    with monkeypatch.context() as patch:
        kill_before_replacing(patch, "model_last.pth", 1)
        with pytest.raises(Killed):
            scratch(*words)
    scratch(*words, "--resume", "auto")
    last = tmp_path / "runs" / "digits_scratch_nets-tiny" / "run" / "checkpoints" / "last.pth"
    published = torch.load(tmp_path / "checkpoints" / "pretrained" / "digits_nets-tiny.pth", weights_only=True)
    assert same(published["state_dict"], torch.load(last, weights_only=True)["learner"]["student"])


def test_a_run_from_a_checkpoint_of_another_folder_goes_on_from_there_after_a_kill(distil, monkeypatch):
    last = distil("--epochs", 2, tag="first") / "checkpoints" / "last.pth"
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", 2, kill)
        with pytest.raises(Killed):
            distil("--resume", last, tag="second")
    folder = distil("--resume", "auto", tag="second")
    assert [row["epoch"] for row in rows(folder)] == [2, 3]
    assert "metrics.jsonl has no rows of epochs 0 to 1, which were lost, or" in (folder / "log.txt").read_text()


DAMAGES = {
    "no position": lambda state: state.pop("position"),
    "position as text": lambda state: state["position"].update(step="2"),
    "a round that is none": lambda state: state["position"].update(round=99),
    "no seconds": lambda state: state["seconds"].pop("student"),
    "best is a list": lambda state: state.update(best=[1]),
    "means without counts": lambda state: state["means"].update(counts={}, sums={"student/kd": torch.ones(())}),
    "result is text": lambda state: state["result"].update(acc1="high"),
    "paces": lambda state: state["paces"].update(student=[1]),
    "no options": lambda state: state["metadata"].pop("options"),
    "monitor": lambda state: state["monitor"].update(first={"label_entropy": "low"}),
    "no random state": lambda state: state["rng"].pop("numpy"),
    "random state of floats": lambda state: state["rng"].update(torch=torch.rand(5056)),
    "an optimiser without a rate": lambda state: state["learner"]["optimizer"]["param_groups"][0].pop("lr"),
    "an optimiser's rate as text": lambda state: state["learner"]["optimizer"]["param_groups"][0].update(lr="x"),
    "momentum of other shapes": lambda state: state["learner"]["optimizer"]["state"][0].update(
        momentum_buffer=torch.ones(2)
    ),
    "momentum of some": lambda state: state["learner"]["optimizer"]["state"][1].clear(),
    "schedule": lambda state: state["learner"]["schedule"].update(last_epoch="3"),
    "no weights": lambda state: state["learner"].update(student={}),
    "a pool of text": lambda state: state["source"]["pool"].update(images="none"),
    "a pool of floats": lambda state: state["source"]["pool"].update(images=torch.ones(32, 1, 16, 16)),
    "no pool": lambda state: state["source"].pop("pool"),
}


def test_a_damaged_checkpoint_is_one_sentence_and_changes_nothing(distil, refused):
    folder = distil("--epochs", 1)
    last, lines = folder / "checkpoints" / "last.pth", (folder / "metrics.jsonl").read_bytes()
    whole = last.read_bytes()
    for name, damage in DAMAGES.items():
        state = torch.load(folder / "checkpoints" / "best.pth", weights_only=True)
        damage(state)
        torch.save(state, last.with_name("damaged.pth"))
        os.replace(last.with_name("damaged.pth"), last)
        line = refused(distil, "--epochs", 2, "--resume", "auto")
        assert "last.pth" in line and len(line) < 500, name
        assert (folder / "metrics.jsonl").read_bytes() == lines, name
    last.write_bytes(whole)
    assert len(rows(distil("--epochs", 2, "--resume", "auto"))) == 2


MORE_DAMAGES = {
    "format": lambda state: state.update(format=torch.ones(4, 4).to_sparse()),
    "an option of a tensor": lambda state: state["metadata"]["options"].update(lr=torch.ones(3)),
    "an option of nested lists": lambda state: state["metadata"]["options"].update(lr=[[torch.ones(3)]]),
    "sparse means": lambda state: state["means"].update(sums={"a": torch.ones(1).to_sparse()}, counts={"a": 1}),
    "paces of nothing": lambda state: state["paces"].update(student=[(1.0, 0)]),
    "paces without end": lambda state: state["paces"].update(student=[(10**400, 1)]),
    "seconds without end": lambda state: state["seconds"].update(student=10**400),
    "result is a tensor": lambda state: state["result"].update(acc1=torch.ones(2)),
    "monitor without a metric": lambda state: state["monitor"].update(first={"label_entropy": 1.0}),
    "a rate without end": lambda state: state["learner"]["optimizer"]["param_groups"][0].update(lr=10**400),
    "foreach as text": lambda state: state["learner"]["optimizer"]["param_groups"][0].update(foreach="x"),
    "momentum as text": lambda state: state["learner"]["optimizer"]["state"][0].update(momentum_buffer="x"),
    "sparse momentum": lambda state: state["learner"]["optimizer"]["state"][0].update(
        momentum_buffer=state["learner"]["optimizer"]["state"][0]["momentum_buffer"].to_sparse()
    ),
    "schedule's count": lambda state: state["learner"]["schedule"].update(_step_count="3"),
    "images made": lambda state: state["source"].update(images_made="3"),
    "centres": lambda state: state["source"].update(centres=torch.ones(2, 2)),
    "averages": lambda state: state["source"]["objective"].update(bn_average=[(torch.ones(2, 2), torch.ones(3))]),
}


@pytest.fixture(scope="module")
def whole_engine(tmp_path_factory):
    """An engine of real parts after an epoch, and its state."""
    given = parts.options(
        epochs=1, ep_steps=2, kd_steps=2, g_steps=1, synthesis_batch_size=8, nz=8, ngf=4, bn=1.0, oh=1.0
    )
    source = parts.make_source(given)
    learner = parts.make_learner(given, source.teacher, source.student)
    watch = Watch(source, source.teacher, source.student, given.relation)
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run", "run")
    metadata = {"options": {"lr": 0.1, "epochs": 1}}
    engine = Engine(
        learner, source, Schedule(1, 1, 2, 8, g_steps=1), folder, given.run, monitor=watch, metadata=metadata
    )
    engine.train()
    yield engine, torch.load(folder.checkpoints / "last.pth", weights_only=True)
    folder.close()


@pytest.mark.parametrize("name", MORE_DAMAGES)
def test_a_part_of_another_type_is_one_sentence_before_the_run_goes_on(name, whole_engine, tmp_path):
    engine, saved = whole_engine
    state = copy.deepcopy(saved)
    MORE_DAMAGES[name](state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match="damaged.pth (is damaged: its part|does not fit this run)"):
        engine.load(tmp_path / "damaged.pth")
    assert engine.position == {"epoch": 1, "round": 0, "step": 0}


@pytest.mark.parametrize(
    "entry, value", [("seed", "x"), ("seed", 10**400), ("seed", -1), ("drawn", 0.5), ("drawn", -1)]
)
def test_a_damaged_position_in_real_images_is_one_sentence(entry, value, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--model", nets.name("tiny"), "--batch_size", 512, "--log_tag", "run")
    scratch(*words, "--epochs", 1)
    last = tmp_path / "runs" / "digits_scratch_nets-tiny" / "run" / "checkpoints" / "last.pth"
    state = torch.load(last, weights_only=True)
    state["source"][entry] = value
    last.unlink()
    torch.save(state, last)
    assert "last.pth does not fit this run" in refused(scratch, *words, "--epochs", 2, "--resume", "auto")


def test_an_engine_is_as_before_if_a_checkpoint_does_not_fit(make_engine, tmp_path):
    engine = make_engine([])
    engine.train()
    path = tmp_path / "run" / "checkpoints" / "last.pth"
    state = torch.load(path, weights_only=True)
    state["source"] = {}
    torch.save(state, path)
    engine.position["round"] = 1
    before = copy.deepcopy(engine.state_dict())
    with torch.no_grad():
        for tensor in state["learner"]["student"].values():
            tensor += 1
    torch.save(state, path)
    with pytest.raises(InputError, match="last.pth does not fit this run .KeyError"):
        engine.load(path)
    assert same(before, engine.state_dict())


def test_checkpoints_from_before_the_paces_were_saved_are_read(distil):
    folder = distil("--epochs", 1)
    last = folder / "checkpoints" / "last.pth"
    state = torch.load(last, weights_only=True)
    del state["paces"]
    last.unlink()  # which best.pth is linked to
    torch.save(state, last)
    assert len(rows(distil("--epochs", 2, "--resume", "auto"))) == 2


def test_two_signals_in_one_epoch(distil, monkeypatch):
    for number in (2, 1):
        with monkeypatch.context() as patch:
            at_call(patch, Learner, "step", number, terminate)
            with stopped(terminate):
                distil("--resume", "auto", tag="twice")
    assert_same_run(distil(), distil("--resume", "auto", tag="twice"))


def test_kill_9(distil, monkeypatch):
    def run():
        at_call(monkeypatch, Learner, "step", 15, lambda: os.kill(os.getpid(), signal.SIGKILL))
        distil(tag="killed")

    assert forked(run) == -9
    assert_same_run(distil(), distil("--resume", "auto", tag="killed"))


@pytest.mark.parametrize("act", [kill, terminate])
def test_training_from_scratch_resumes_bit_for_bit(act, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--model", nets.name("tiny"), "--epochs", 4, "--batch_size", 256, "--log_tag")
    scratch(*words, "straight")
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", 13, act)
        with stopped(act):
            scratch(*words, "interrupted")
    scratch(*words, "interrupted", "--resume", "auto")
    runs = tmp_path / "runs" / "digits_scratch_nets-tiny"
    assert_same_run(runs / "straight", runs / "interrupted")


def test_a_finished_run_may_be_made_longer(distil):
    distil("--epochs", 2)
    folder = distil("--epochs", 4, "--resume", "auto")
    assert [row["epoch"] for row in rows(folder)] == [0, 1, 2, 3]
    assert json.loads((folder / "summary.json").read_text())["images"] == 4 * 2 * 16
    assert rows(folder)[2]["lr"] > rows(folder)[3]["lr"] == 0


def test_a_run_that_synthesises_in_its_first_rounds_only(distil):
    folder = distil("--synthesis_rounds", 3)
    assert json.loads((folder / "summary.json").read_text())["images"] == 3 * 16
    assert [row["images"] for row in rows(folder)] == [32, 48, 48, 48]
    assert [any(name.startswith("synthesis/") for name in row) for row in rows(folder)] == [True, True, False, False]
    assert all(row["student/kd"] > 0 for row in rows(folder))
    assert (
        "3 rounds of 3 synthesis steps, and 24 student steps of 32 views; 48 images" in (folder / "log.txt").read_text()
    )
    state = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)
    assert state["source"]["pool"]["added"] == len(state["source"]["pool"]["images"]) == 48


def test_resuming_a_finished_run_changes_nothing(distil, monkeypatch):
    folder = distil()
    files = [folder / name for name in ("summary.json", "env.json", "config.yaml", "metrics.jsonl")]
    before, contents, state = checkpoint_of(folder), [file.read_bytes() for file in files], weights_of(folder)
    monkeypatch.setattr("datafree.runtime._git", lambda *words: "0" * 40)
    assert same(before, checkpoint_of(distil("--resume", "auto")))
    assert contents == [file.read_bytes() for file in files] and same(state, weights_of(folder))
    assert "The run is finished already; its results stay as they are" in (folder / "log.txt").read_text()


def weights_of(folder):
    return torch.load(folder / "checkpoints" / "model_last.pth", weights_only=True)


def test_a_run_that_is_made_longer_is_not_finished_before_its_new_end(distil, monkeypatch):
    folder = distil("--epochs", 1)
    summary = (folder / "summary.json").read_bytes()
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", 3, terminate)
        with stopped(terminate):
            distil("--epochs", 3, "--resume", "auto")
    [aside] = folder.glob("summary*.json")
    assert aside.name.startswith("summary.before-") and aside.read_bytes() == summary
    distil("--epochs", 3, "--resume", "auto")
    assert (folder / "summary.json").exists()


def test_results_without_a_checkpoint_are_not_replaced_by_a_new_run(distil, refused):
    folder = distil("--epochs", 2)
    (folder / "checkpoints" / "last.pth").unlink()
    before = weights_of(folder)
    line = refused(distil, "--epochs", 2, "--resume", "auto", before_run=False)
    assert "has no checkpoints/last.pth to resume from, but holds best.pth" in line and "--log_tag NEW" in line
    assert same(before, weights_of(folder)) and len(rows(folder)) == 2
    distil("--epochs", 2, "--resume", folder / "checkpoints" / "best.pth")


@pytest.mark.parametrize("then", [terminate, lambda: None], ids=["a signal", "the end of the epoch"])
def test_weights_that_are_not_finite_are_never_saved(then, distil, refused, monkeypatch):
    """The last step of the second epoch, or the second one of a round, spoils a weight; its loss is finite."""
    step, calls = Learner.step, []

    def spoiling(learner, *given):
        terms = step(learner, *given)
        calls.append(1)
        if len(calls) == (8 if then is terminate else 12):
            with torch.no_grad():
                next(learner.network.model.parameters()).flatten()[0] = float("nan")
            then()
        return terms

    monkeypatch.setattr(Learner, "step", spoiling)
    line = refused(distil, "--eval", "none", before_run=False)
    assert "is not finite any more" in line and "the last epoch's checkpoint is kept" in line
    [folder] = (Path.cwd() / "runs").glob("*/run")
    last = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)
    assert last["position"]["epoch"] == 1 and len(rows(folder)) == 1
    assert all(tensor.isfinite().all() for tensor in last["learner"]["student"].values())


def test_code_of_a_network_that_changed_is_not_taken_over_in_silence(distil, refused, tmp_path):
    net = tmp_path / "net.py"
    net.write_text("import nets\n\ndef small(num_classes):\n    return nets.small(num_classes, 1)\n")
    distil("--epochs", 1, "--student", f"{net}:small")
    net.write_text(net.read_text() + "# another version\n")
    line = refused(distil, "--epochs", 2, "--student", f"{net}:small", "--resume", "auto")
    assert "the code of net-small has changed since it was written" in line


def test_memory_that_is_refused_is_not_called_damage(distil, refused, monkeypatch):
    folder = distil("--epochs", 1)

    def refuse(path, **options):
        if path.name == "last.pth":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return load(path, **options)

    load = torch.load
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", refuse)
        line = refused(distil, "--epochs", 2, "--resume", "auto", before_run=False)
    assert "out of memory while" in line and "last.pth was read" in line and "the file is untouched" in line
    assert len(rows(distil("--epochs", 2, "--resume", "auto"))) == 2 and folder.exists()


def test_resume_auto_of_nothing_starts_and_logs_so(distil):
    folder = distil("--resume", "auto")
    assert "Nothing to resume yet" in (folder / "log.txt").read_text()
    assert len(rows(folder)) == 4


def test_the_alarms_of_a_resumed_run_compare_with_its_first_epoch(distil):
    first = checkpoint_of(distil("--epochs", 1))["monitor"]["first"]
    folder = distil("--epochs", 3, "--resume", "auto")
    assert checkpoint_of(folder)["monitor"]["first"] == first
    assert first["pixel_distance"] == pytest.approx(rows(folder)[0]["images/pixel_distance"], abs=1e-6)


def test_a_wrong_path_to_resume_from_is_an_error(distil, refused, tmp_path):
    assert "no/such.pth" in refused(distil, "--resume", "no/such.pth")
    assert not (tmp_path / "runs").exists()
    weights = distil(tag="other") / "checkpoints" / "model_last.pth"
    assert "no 'learner'" in refused(distil, "--resume", weights)


@pytest.mark.parametrize(
    "words, named",
    [
        (("--lr", 0.01), "--lr"),
        (("--seed", 1), "--seed"),
        (("--bn", 2), "--bn"),
        (("--precision", "bf16"), "--precision"),
    ],
)
def test_an_option_that_changed_is_not_taken_over_in_silence(words, named, distil, refused):
    folder = distil("--epochs", 1)
    before = (folder / "config.yaml").read_bytes()
    line = refused(distil, "--epochs", 1, "--resume", "auto", *words)
    assert named in line and "last.pth" in line
    assert (folder / "config.yaml").read_bytes() == before


def test_another_teacher_under_the_same_name_is_noticed_at_resume(distil, teacher, tmp_path, refused):
    weights = tmp_path / "teacher.pth"
    shutil.copy(teacher, weights)
    distil("--epochs", 1, "--teacher_weights", weights)
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "acc1": 12.0}, weights)  # the same tensors in another file
    distil("--epochs", 2, "--teacher_weights", weights, "--resume", "auto")
    state["state_dict"]["4.bias"] += 1
    torch.save(state, weights)
    line = refused(distil, "--epochs", 3, "--teacher_weights", weights, "--resume", "auto")
    assert "--teacher_weights" in line


def test_a_version_that_lacked_an_option_wrote_with_its_default(distil, refused):
    last = distil("--epochs", 1) / "checkpoints" / "last.pth"
    state = torch.load(last, weights_only=True)
    assert state["metadata"]["options"].pop("micro_batch") == 0
    torch.save(state, last)
    words = ("--epochs", 2, "--resume", "auto")
    assert "written with --micro_batch 0, not 4" in refused(distil, *words, "--micro_batch", 4, before_run=False)
    assert len(rows(distil(*words))) == 2


def test_a_refused_checkpoint_leaves_the_folder_free(distil, refused):
    last = distil("--epochs", 1, tag="first") / "checkpoints" / "last.pth"
    new = partial(distil, tag="second")
    assert "--lr" in refused(new, "--epochs", 2, "--resume", last, "--lr", 0.01)
    assert len(rows(new("--epochs", 2, "--resume", last))) == 1  # the first epoch's row stays with the first run


def test_what_does_not_change_the_result_may_change_at_resume(distil):
    distil("--epochs", 1)
    folder = distil("--epochs", 2, "--resume", "auto", "--grid_every", 1, "--print_freq", 2, "--threads", 1)
    assert len(rows(folder)) == 2


def test_a_checkpoint_of_another_run_does_not_overwrite_the_run_that_is_here(distil, refused):
    last = distil("--epochs", 1, tag="first") / "checkpoints" / "last.pth"
    here = distil("--epochs", 1, tag="second") / "checkpoints" / "last.pth"
    before = here.read_bytes()
    distil_here = partial(distil, tag="second")
    assert "already holds a run" in refused(distil_here, "--epochs", 2, "--resume", last)
    assert here.read_bytes() == before
    assert len(rows(distil("--epochs", 2, "--resume", here, tag="second"))) == 2


def as_format_1(path):
    """Write the checkpoint of this path as revision 5c7f4c0 wrote it, which is called format 1."""
    state = torch.load(path, weights_only=True)
    del state["format"]
    stated = state.pop("metadata")
    torch.save({**state, "facts": {**stated, "settings": stated.pop("options")}}, path)


def test_a_checkpoint_of_another_format_is_refused_and_named(distil, refused, tmp_path):
    folder = distil("--epochs", 1)
    last = folder / "checkpoints" / "last.pth"
    state = torch.load(last, weights_only=True)
    for write, number in ((lambda: as_format_1(last), 1), (lambda: torch.save({**state, "format": 3}, last), 3)):
        write()
        before = last.read_bytes()
        line = refused(distil, "--epochs", 2, "--resume", "auto")
        assert f"last.pth has the checkpoint format {number} of another version, not 2" in line
        assert "env.json" in line and "--log_tag NEW" in line
        assert last.read_bytes() == before and len(rows(folder)) == 1
        assert f"format {number}" in refused(partial(distil, tag="new"), "--epochs", 2, "--resume", last)


def test_fewer_epochs_than_are_done(distil, refused):
    distil("--epochs", 3)
    line = refused(distil, "--epochs", 2, "--resume", "auto")
    assert "epoch 3" in line and "--epochs" in line


def test_fewer_epochs_than_are_begun(distil, refused, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "step", 9, terminate)  # in the second epoch
        with stopped(terminate):
            distil()
    line = refused(distil, "--epochs", 1, "--resume", "auto")
    assert "last.pth is at epoch 2 already; raise --epochs 1" in line


@pytest.mark.parametrize(
    "words, named",
    [
        (("--student", nets.name("tiny")), "student"),
        (("--method", "rgal_release"), "method"),
        (("--method", "noise"), "method"),
        (("--teacher", nets.name("small"), "--teacher_weights", "small.pth"), "teacher"),
    ],
)
def test_another_run_cannot_be_resumed(words, named, distil, refused, tmp_path):
    last = distil(tag="first") / "checkpoints" / "last.pth"
    torch.save(nets.small(10, 1).state_dict(), tmp_path / "small.pth")
    line = refused(distil, "--resume", last, *words)
    assert "last.pth" in line and named in line and "--log_tag" in line


@pytest.mark.parametrize("words", [("--cr", 1), ("--cd_loss", 0), ("--ngf", 8), ("--source", "noise")])
def test_other_options_that_do_not_fit_the_checkpoint(words, distil, refused):
    last = distil("--epochs", 2, tag="first") / "checkpoints" / "last.pth"
    line = refused(distil, "--resume", last, *words)
    assert "last.pth" in line and "options" in line


def test_a_ring_that_wrapped_cannot_be_enlarged(distil, refused):
    """The new slots would hold what happened to be in memory."""
    distil("--epochs", 2, "--pool_size", 24)
    assert "--pool_size" in refused(distil, "--pool_size", 40, "--resume", "auto")
    assert "--pool_size" in refused(distil, "--pool_size", 16, "--resume", "auto")


def test_an_option_of_an_earlier_version_is_no_matter_where_it_did_nothing(distil, refused):
    folder = distil()
    path = folder / "checkpoints" / "last.pth"
    for value in (1, 4):
        state = torch.load(path, weights_only=True)
        state["metadata"]["options"]["echo"] = value
        path.unlink()  # which best.pth is linked to
        torch.save(state, path)
        if value == 1:
            distil("--epochs", 5, "--resume", path)
    line = refused(distil, "--epochs", 6, "--resume", path)
    assert "was written with --echo 4, which this version no longer has; start a new run" in line


def test_a_random_student_cannot_resume_from_scratch_training(distil, refused, tmp_path):
    scratch("--model", nets.name("tiny"), "--epochs", 1, "--log_tag", "scratch")
    last = tmp_path / "runs" / "digits_scratch_nets-tiny" / "scratch" / "checkpoints" / "last.pth"
    assert "last.pth" in refused(distil, "--resume", last)


# The engine alone, with a source and a learner that record its calls.


class Recorder(BaseSynthesis):
    def __init__(self, events, term=1.0):
        super().__init__()
        self.events, self.term = events, term

    def synthesize(self):
        self.events.append("synthesis" if self.with_student else "synthesis without student")
        self.images_made += 4
        return {"bn": torch.tensor(self.term)}

    def sample(self, n):
        return torch.rand(n, 1, 8, 8), torch.arange(n) % 3


class Pupil(Learner):
    def __init__(self, events, term=1.0):
        network = Network(nets.tiny(3, 1), (1, 8, 8), (0.0,), (1.0,))
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        super().__init__(network, optimizer, cosine_to_zero(optimizer, 100))
        self.events, self.term = events, term

    def step(self, batch, progress=0.0):
        self.events.append(round(progress, 3))
        return {"kd": torch.tensor(self.term)}


@pytest.fixture
def make_engine(tmp_path):
    folders = []

    def make(events, synthesis_term=1.0, student_term=1.0, run=None, **counts):
        schedule = Schedule(**{"epochs": 2, "rounds": 2, "kd_steps": 2, "batch_size": 4, **counts})
        folders.append(RunFolder(tmp_path / "run", "run"))
        learner, source = Pupil(events, student_term), Recorder(events, synthesis_term)
        return Engine(learner, source, schedule, folders[-1], run or Run())

    yield make
    for folder in folders:
        folder.close()


def test_rounds_alternate_and_progress_runs_from_0_to_1(make_engine):
    events = []
    result = make_engine(events).train()
    assert events == [
        "synthesis",
        0.0,
        0.125,
        "synthesis",
        0.25,
        0.375,
        "synthesis",
        0.5,
        0.625,
        "synthesis",
        0.75,
        0.875,
    ]
    assert result["synthesis/bn"] == result["student/kd"] == 1 and result["images"] == 16


@pytest.mark.parametrize(
    "owner, method, message",
    [
        (Recorder, "synthesize", "synthesis; lower --synthesis_batch_size"),
        (Pupil, "step", "a training step; lower --batch_size"),
    ],
)
def test_out_of_memory_is_reported_with_its_remedy(owner, method, message, make_engine, monkeypatch):
    monkeypatch.setattr(owner, method, lambda *a, **k: torch.empty(10**15))
    engine = make_engine([])
    with pytest.raises(InputError, match=message):
        engine.train()
    monkeypatch.setattr(owner, method, lambda *a, **k: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        engine.train()


def test_a_weighted_loss_that_is_infinite_is_called_out(distil, refused, monkeypatch):
    monkeypatch.setattr("datafree.criterions.bn_distance", lambda statistics, _: 3e37 * statistics[0].mean.norm())
    line = refused(distil, "--bn", 1e9, "--g_steps", 1, before_run=False)
    assert "the synthesis loss became inf; lower the weights of its terms" in line


def test_out_of_memory_in_evaluation_is_reported(distil, refused, monkeypatch):
    monkeypatch.setattr("datafree.session.evaluate", lambda *given: torch.empty(10**15))
    assert "out of memory during evaluation; lower --image_size" in refused(distil, before_run=False)


def test_warm_up_makes_images_without_the_student(make_engine):
    events = []
    make_engine(events, warmup=1).train()
    assert events == ["synthesis without student"] * 2 + ["synthesis", 0.5, 0.625, "synthesis", 0.75, 0.875]


FROZEN_POOL = [
    (
        {"synthesis_rounds": 3},
        ["synthesis", 0.0, 0.125, "synthesis", 0.25, 0.375, "synthesis", 0.5, 0.625, 0.75, 0.875],
    ),
    (
        {"synthesis_rounds": 1, "warmup": 1, "epochs": 3, "rounds": 1},
        ["synthesis without student", 0.333, 0.5, 0.667, 0.833],
    ),
]


@pytest.mark.parametrize("counts, expected", FROZEN_POOL)
def test_after_the_last_round_that_synthesises_the_student_still_trains(make_engine, counts, expected):
    events = []
    make_engine(events, **counts).train()
    assert events == expected


@pytest.mark.parametrize("where", ["synthesis", "student"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_stops_the_run_and_is_named(make_engine, tmp_path, where, value):
    engine = make_engine([], **{f"{where}_term": value})
    with pytest.raises(InputError, match=rf"{where}.*(bn|kd) became {value}"):
        engine.train()
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not rows(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_terms_within_an_epoch_are_logged_at_print_freq(make_engine, tmp_path):
    make_engine([], run=Run(print_freq=3)).train()
    lines = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "[Train]" in line]
    assert [line.split("Step=")[1].split()[0] for line in lines] == ["3", "6"]
    assert "kd=1.0000" in lines[0]


def test_evaluation_and_grids_come_at_their_epochs_and_at_the_end(make_engine, tmp_path):
    engine = make_engine([], run=Run(grid_every=2), epochs=5, eval_every=2)
    scores = iter([50.0, 70.0, 60.0])
    engine.evaluate = lambda tick: {"acc1": next(scores), "acc5": 90.0, "loss": 1.0}
    result = engine.train()
    assert [row.get("acc1") for row in rows(tmp_path / "run")] == [None, 50.0, None, 70.0, 60.0]
    assert result["acc1"] == 60 and result["best_acc1"] == 70 and engine.best == {"acc1": 70.0, "epoch": 3}
    assert sorted(path.stem for path in (tmp_path / "run" / "grids").iterdir()) == [
        "epoch_0000",
        "epoch_0002",
        "epoch_0004",
    ]
    files = tmp_path / "run" / "checkpoints"
    best, last = (torch.load(files / f"model_{which}.pth", weights_only=True) for which in ("best", "last"))
    assert (best["epoch"], best["acc1"], last["epoch"], last["acc1"]) == (4, 70.0, 5, 60.0)


def test_a_picture_that_fails_does_not_end_the_run(make_engine, tmp_path, monkeypatch):
    def failing(*given):
        raise TypeError("cannot handle this image")

    monkeypatch.setattr("datafree.grids.draw_grid", failing)
    engine = make_engine([])
    engine.train()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "[Alarm] the image grid of epoch 0 could not be drawn: TypeError: cannot handle this image" in log
    assert engine.position["epoch"] == 2 and (engine.folder.checkpoints / "last.pth").exists()


def test_the_checkpoint_is_written_before_the_process_may_end(make_engine, tmp_path, monkeypatch):
    """Whatever follows the end of an epoch, its row and its checkpoint agree."""
    engine = make_engine([])
    at_call(monkeypatch, Engine, "close_epoch", 2, kill)
    with pytest.raises(Killed):
        engine.train()
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pth", weights_only=True)
    assert state["position"] == {"epoch": 1, "round": 0, "step": 0} and len(rows(tmp_path / "run")) == 1


def test_means_survive_a_restart():
    whole, first, second = Means(), Means(), Means()
    values = [torch.tensor(v) for v in (0.1, 0.2, 0.4)]
    for value in values:
        whole.add("student", {"kd": value})
    first.add("student", {"kd": values[0]})
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    for value in values[1:]:
        second.add("student", {"kd": value})
    assert second.values() == whole.values()
    assert whole.values()["student/kd"].item() == pytest.approx(0.7 / 3)
