"""Files that are written whole or not at all: several writers, ends at any moment, and what is wrong where it fails."""

import errno
import os
import resource
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, forked
from resuming import assert_same_run, checkpoint_of

from datafree import checkpoint, files
from datafree.errors import InputError, exit_on_input_error
from datafree.files import locked, remove_left_over, replacing, write_text
from datafree.logger import RunFolder
from datafree.training import publish_weights


def test_several_writers_of_one_path_never_tear_it(tmp_path):
    path = tmp_path / "teacher.pth"
    checkpoint.save(path, {"w": torch.zeros(3000)})

    def write(value):
        for _ in range(60):
            checkpoint.save(path, {"w": torch.full((3000,), value)})

    children = []
    for value in (1.0, 2.0):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                write(value)
                code = 0
            finally:
                os._exit(code)
    while os.waitpid(children[0], os.WNOHANG) == (0, 0):
        assert len(checkpoint.load(path)["w"].unique()) == 1
    assert os.waitpid(children[1], 0)[1] == 0
    assert os.listdir(tmp_path) == ["teacher.pth"]


def test_the_file_and_its_name_are_on_the_disk_before_the_next_step(tmp_path, monkeypatch):
    done = []

    def fsync(number):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))

    monkeypatch.setattr(os, "fsync", fsync)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: done.append("replaced") or replace(old, new))
    write_text(tmp_path / "a.json", "{}")
    beside, *rest = done
    assert beside.startswith("a.json.") and rest == ["replaced", tmp_path.name]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    def killed():
        with replacing(tmp_path / "last.pth") as beside:
            beside.write_text("half")
            os._exit(9)

    assert forked(killed) == 9
    for name in ("last.pth", "notes.tmp", "last.pth.old.tmp"):
        (tmp_path / name).touch()
    assert len(os.listdir(tmp_path)) == 4
    remove_left_over(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["last.pth", "last.pth.old.tmp", "notes.tmp"]


def no_room(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def too_large(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        write_text(path, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read_only(path):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def vanished(path):
    os.rename(path.parent, path.parent.with_name("elsewhere"))
    write_text(path, "new")


def folder_in_the_way(path):
    path.unlink()
    (path / "below").mkdir(parents=True)
    write_text(path, "new")


def file_in_the_way(path):
    write_text(path / "below", "new")


@pytest.mark.parametrize(
    "fail, cause, remedy",
    [
        (no_room, "No space left on device", "make room, then continue by --resume auto"),
        (too_large, "File too large", "raise the limit of the size of files (ulimit -f), then"),
        (read_only, "Read-only file system", "make its folder writable, then"),
        (vanished, "No such file or directory", "its folder has vanished: put it back, then"),
        (folder_in_the_way, "Is a directory", "move the folder of that name away, then"),
        (file_in_the_way, "Not a directory", "move the file away that stands where its folder belongs, then"),
    ],
)
def test_the_remedy_is_that_of_the_cause(fail, cause, remedy, tmp_path):
    path = tmp_path / "run" / "a.json"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(InputError) as raised, files.writing(path):
        fail(path)
    assert "a.json" in str(raised.value) and f"({cause}); {remedy}" in str(raised.value)
    assert not list(tmp_path.rglob("*.tmp"))
    if path.is_file():
        assert path.read_text() == "old"


def test_a_run_whose_disk_fills_goes_on_when_there_is_room(distil, capfd):
    """The pool grows by the round, so that the checkpoint of the last epoch does not fit.

    It holds the tag, so both have the same length.
    """
    words = ("--epochs", 4, "--synthesis_batch_size", 400)
    straight = distil(*words, tag="free")
    limit = (straight / "checkpoints" / "last.pth").stat().st_size - 1
    assert all(path.stat().st_size < limit / 2 for path in straight.glob("tb/*"))

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        distil(*words, tag="full")

    assert forked(exit_on_input_error, run) == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "last.pth" in last and "(File too large); raise the limit" in last
    full = next(straight.parent.glob("full"))
    assert checkpoint_of(full)["position"]["epoch"] == 3 and not list(full.rglob("*.tmp"))
    assert_same_run(straight, distil(*words, "--resume", "auto", tag="full"))


def test_a_lock_is_waited_for_and_ends_with_its_process(tmp_path):
    lock, seen = tmp_path / "new" / ".lock", tmp_path / "seen"
    child = os.fork()
    if child == 0:
        with locked(lock):
            seen.touch()
            time.sleep(0.3)
            (tmp_path / "end").touch()
            os._exit(0)
    while not seen.exists():
        time.sleep(0.01)
    with locked(lock):
        assert (tmp_path / "end").exists()
    os.waitpid(child, 0)


@pytest.mark.parametrize("first, second, stays", [(90.0, 80.0, 1.0), (80.0, 90.0, 2.0)])
def test_of_two_runs_that_publish_a_teacher_at_once_the_better_one_stays(first, second, stays, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = SimpleNamespace(card=SimpleNamespace(name="digits"))

    def publish(number, accuracy, before_saving):
        with RunFolder(tmp_path / f"run{number}", f"run{number}") as folder:
            path = folder.checkpoints / "model_last.pth"
            save = checkpoint.save
            save(path, {"state_dict": {"w": torch.tensor(number)}, "model": "tiny", "acc1": accuracy})
            monkeypatch.setattr(checkpoint, "save", lambda *given: before_saving() or save(*given))
            publish_weights(session, folder, "tiny")

    def slow():
        (tmp_path / "compared").touch()
        time.sleep(0.3)

    child = os.fork()
    if child == 0:
        publish(1.0, first, slow)  # has compared, and saves later
        os._exit(0)
    while not (tmp_path / "compared").exists():
        time.sleep(0.01)
    publish(2.0, second, lambda: None)
    os.waitpid(child, 0)
    [place] = (tmp_path / "checkpoints" / "pretrained").glob("*.pth")
    assert checkpoint.load(place)["state_dict"]["w"] == stays


def test_a_teacher_that_cannot_be_published_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").touch()
    with RunFolder(tmp_path / "run", "run") as folder:
        checkpoint.save(folder.checkpoints / "model_last.pth", {"model": "tiny"})
        with pytest.raises(InputError, match="move the file away .*; the new weights are .*model_last.pth"):
            publish_weights(SimpleNamespace(card=SimpleNamespace(name="digits")), folder, "tiny")


def test_a_script_works_in_the_project_whatever_cdpath_says(tmp_path):
    (tmp_path / "other" / "scripts").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\npwd\nexit 1\n")
    python.chmod(0o755)
    settings = {**os.environ, "CDPATH": str(tmp_path / "other"), "RGAL_VENV": str(tmp_path)}
    done = subprocess.run(["bash", "scripts/test.sh"], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.stdout == f"{ROOT}\n" and done.returncode == 1
