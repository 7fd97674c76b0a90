"""The run folder: who may use it, what it holds, and what a resumed run finds."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader as EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from datafree import logger
from datafree.errors import InputError
from datafree.logger import RunFolder, table
from datafree.runtime import environment

CONFIG = "run:\n  seed: 3\n"


def begin(root, name, config, resume=False):
    """A folder that holds a run."""
    folder = RunFolder(root, name, resume)
    folder.record(config, environment(torch.device("cpu")))
    (folder.checkpoints / "last.pth").touch()
    return folder


def rows(root):
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def events(root):
    accumulator = EventAccumulator(str(root / "tb"), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def test_layout(tmp_path, capsys):
    root = tmp_path / "rgal" / "seed0"
    with begin(root, "rgal", CONFIG) as folder:
        folder.log("two\nlines")
        folder.metrics(0, {"acc1": 92.41})
        folder.grid(0, Image.new("RGB", (64, 48)))
        folder.summary({"acc1": 92.41, "bad": float("nan"), "nested": {"n": torch.tensor(3)}})
        assert folder.checkpoints == root / "checkpoints" and folder.checkpoints.is_dir()
    assert yaml.safe_load((root / "config.yaml").read_text()) == {"run": {"seed": 3}}
    assert json.loads((root / "env.json").read_text())["torch"] == torch.__version__
    assert json.loads((root / "summary.json").read_text()) == {"acc1": 92.41, "bad": None, "nested": {"n": 3}}
    log = (root / "log.txt").read_text()
    assert re.fullmatch(r"\[\d\d/\d\d \d\d:\d\d:\d\d rgal\]: two\nlines\n", log)
    assert capsys.readouterr().out == log
    assert (root / "grids" / "epoch_0000.png").is_file()
    assert not list(root.rglob("*.tmp"))


def test_metrics_are_json_and_tensorboard(tmp_path):
    with begin(tmp_path, "r", CONFIG) as folder:
        folder.metrics(0, {"loss": 1 / 3, "big": np.float32(12345.67), "images": 256, "t": torch.tensor(0.1)})
        folder.metrics(1, {"loss": float("nan"), "inf": -float("inf"), "none": None, "tiny": 1.23456789e-9})
        assert rows(tmp_path) == [  # written at once, not at close
            {"epoch": 0, "loss": 0.333333, "big": 12345.7, "images": 256, "t": 0.1},
            {"epoch": 1, "loss": None, "inf": None, "none": None, "tiny": 1.23457e-9},
        ]
        seen = events(tmp_path)
    tags = ["accuracy/test_loss", "images/synthesised", "other/big", "other/t", "other/tiny"]
    assert sorted(seen.Tags()["scalars"]) == tags
    assert [(e.step, round(e.value, 6)) for e in seen.Scalars("accuracy/test_loss")] == [(0, 0.333333)]


def test_a_folder_that_holds_a_run(tmp_path):
    begin(tmp_path, "r", CONFIG).close()
    with pytest.raises(InputError, match="already holds a run; .*--log_tag NEW, .*--resume auto"):
        begin(tmp_path, "r", "other")
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    begin(tmp_path, "r", "other", resume=True).close()  # the refusal did not keep the lock
    assert (tmp_path / "config.yaml").read_text() == "other"


def test_resume_where_nothing_is_yet(tmp_path):
    with begin(tmp_path / "new", "r", CONFIG, resume=True) as folder:
        folder.truncate_metrics(0)
        folder.metrics(0, {"a": 1})
    assert rows(tmp_path / "new") == [{"epoch": 0, "a": 1}]


def test_resume_never_doubles_a_row(tmp_path):
    with begin(tmp_path, "r", CONFIG) as folder:
        for epoch in range(4):
            folder.metrics(epoch, {"a": epoch})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 1, "a')  # a row that a kill cut short
    with begin(tmp_path, "r", CONFIG, resume=True) as folder:
        folder.truncate_metrics(2)
        assert rows(tmp_path) == [{"epoch": 0, "a": 0}, {"epoch": 1, "a": 1}]
        folder.metrics(2, {"a": 20})
    assert [row["a"] for row in rows(tmp_path)] == [0, 1, 20]
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("other/a")] == [(0, 0), (1, 1), (2, 20)]


HOLDER = """
import sys, time
from datafree.logger import RunFolder
folder = RunFolder(sys.argv[1], "r")
print("held", flush=True)
time.sleep(60)
"""


def test_in_use_until_the_other_process_dies(tmp_path):
    source = Path(logger.__file__).parents[1]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, cwd=source)
    try:
        assert holder.stdout.readline() == b"held\n"
        for resume in (False, True):
            with pytest.raises(InputError, match="in use by a running process; .*--log_tag NEW"):
                begin(tmp_path, "r", CONFIG, resume=resume)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    begin(tmp_path, "r", CONFIG, resume=True).close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_closed_folder_is_free_while_forked_workers_live(tmp_path):
    reader, writer = os.pipe()
    folder = begin(tmp_path, "r", CONFIG)
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)  # lives until the parent closes the pipe
        os._exit(0)
    folder.close()
    folder.close()
    begin(tmp_path, "r", CONFIG, resume=True).close()
    os.close(writer)
    os.wait()


def test_without_locks_a_run_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr(logger, "fcntl", None)
    with begin(tmp_path, "r", CONFIG) as folder:
        folder.log("x")


def test_a_root_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="could not write .*file.*; choose another --save_dir or"):
            begin(root, "r", CONFIG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied.* choose another --save_dir"):
        begin(tmp_path / "run", "r", CONFIG)


@contextmanager
def full_disk():
    """No file may become larger than it is; as on a full disk, but without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_names_the_file_and_what_was_written_stays(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(logger, "show", lambda line: None)  # or the file that holds pytest's output would be full, too
    folder = RunFolder(tmp_path, "r")
    writes = {
        "metrics.jsonl": lambda: folder.metrics(0, {"a": 1}),
        "log.txt": lambda: folder.log("x"),
        "summary.json": lambda: folder.summary({"a": 1}),
        "grids/epoch_0007.png": lambda: folder.grid(7, Image.new("RGB", (8, 8))),
        "tb": lambda: folder._add_points(0, []),
    }
    for name, write in writes.items():
        with pytest.raises(InputError, match=rf"could not write .*{name} \(File too large\); raise the limit"):
            with full_disk():
                write()
    folder.close()
    assert "Traceback" not in capfd.readouterr().err and not list(tmp_path.rglob("*.tmp"))


def lose_a_row(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))


@pytest.mark.parametrize(
    "damage, left, aside",
    [
        (lose_a_row, [0, 2], False),
        (Path.unlink, [], False),
        (lambda path: path.write_text(path.read_text().replace('{"epoch": 1, "a": 1}', '{"epo}')), [0, 2], True),
        (lambda path: path.write_text(path.read_text().replace('{"epoch": 1, "a": 1}', "{}")), [0, 2], True),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"a": 1', b'"\xff": 1')), [0, 1, 2], True),
        (lambda path: path.write_bytes(b"\xff\x00\n" + path.read_bytes()), [0, 1, 2], True),
        (lambda path: path.unlink() or path.mkdir(), [], True),
    ],
)
def test_rows_that_were_lost_or_damaged_are_named_and_the_run_goes_on(damage, left, aside, tmp_path):
    with begin(tmp_path, "r", CONFIG) as folder:
        for epoch in range(3):
            folder.metrics(epoch, {"a": epoch})
    damage(tmp_path / "metrics.jsonl")
    with begin(tmp_path, "r", CONFIG, resume=True) as folder:
        folder.truncate_metrics(3)
        folder.metrics(3, {"a": 3})
    assert [row["epoch"] for row in rows(tmp_path)] == [*left, 3]
    log, kept = (tmp_path / "log.txt").read_text(), list(tmp_path.glob("metrics.damaged-*"))
    assert ("damaged rows" in log) == aside == bool(kept)
    assert ("has no rows of epoch" in log) == (left != [0, 1, 2])


def test_metrics_that_somebody_removes_are_written_again(tmp_path):
    with begin(tmp_path, "r", CONFIG) as folder:
        folder.metrics(0, {"a": 0})
        (tmp_path / "metrics.jsonl").unlink()
        shutil.rmtree(tmp_path / "tb")
        folder.metrics(1, {"a": 1})
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1]
    assert [point.step for point in events(tmp_path).Scalars("other/a")] == [1]


def test_a_folder_that_vanishes_is_not_made_anew_in_its_place(tmp_path):
    folder = begin(tmp_path / "run", "r", CONFIG)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    for write in (lambda: folder.metrics(0, {"a": 1}), lambda: folder.log("x"), lambda: folder._add_points(0, [])):
        with pytest.raises(InputError, match="its folder has vanished: put it back, then continue by --resume auto"):
            write()
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_a_run_whose_folder_was_replaced_leaves_the_new_one_alone(tmp_path):
    first = begin(tmp_path / "run", "r", CONFIG)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    second = begin(tmp_path / "run", "r", CONFIG)
    second.metrics(0, {"a": 1})
    for write in (lambda: first.metrics(0, {"a": 2}), lambda: first.summary({"a": 2}), first.require_own):
        with pytest.raises(InputError, match="is another run's now: the folder of this one was moved or removed"):
            write()
    assert rows(tmp_path / "run")[0]["a"] == 1
    second.metrics(1, {"a": 3})


@pytest.mark.parametrize("hours", [-24 * 365, -1, 0, 1])
def test_tensorboard_shows_all_points_whatever_the_clock_says(hours, tmp_path, monkeypatch):
    begun = time.time()
    for first in (0, 2, 4):
        monkeypatch.setattr(time, "time", lambda first=first: begun + first / 2 * hours * 3600)
        with begin(tmp_path, "r", CONFIG, resume=True) as folder:
            folder.truncate_metrics(first)
            for epoch in range(first, first + 3):  # the last one is to be replaced
                folder.metrics(epoch, {"a": 10 * first + epoch})
    points = [(point.step, point.value) for point in events(tmp_path).Scalars("other/a")]
    assert points == [(0, 0), (1, 1), (2, 22), (3, 23), (4, 44), (5, 45), (6, 46)]


def test_a_grid_is_a_file_and_a_point_of_tensorboard(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    with begin(tmp_path, "r", CONFIG) as folder:
        folder.grid(40, Image.fromarray(pixels))
        folder.test_picture(40, Image.fromarray(pixels), Image.new("RGB", (32, 48)))
    for name in ("epoch_0040", "test"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "grids" / f"{name}.png")), pixels)
    for tag, width in (("grids/epoch", 64), ("grids/test", 32)):
        assert [(e.step, e.width, e.height) for e in events(tmp_path).Images(tag)] == [(40, width, 48)]


def plugin_data(root, plugin):
    """tag -> the summaries of a plugin of TensorBoard, in their order."""
    found = {}
    for path in sorted((root / "tb").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == plugin:
                    found.setdefault(value.tag, []).append(value)
    return found


def test_tensorboard_is_told_what_the_run_is(tmp_path):
    options = {"lr": 0.1, "bn": 1, "relation": "paper", "flip": True, "none": None, "std": [0.5, 0.25]}
    with RunFolder(tmp_path, "r") as folder:
        folder.record(CONFIG, {"commit": "abc"}, options)
        assert not list((tmp_path / "tb").iterdir())  # or a resumed run would begin where it does not
        folder.metrics(0, {"acc1": 50.0, "lr": 0.1})
        folder.summary({})
    texts = plugin_data(tmp_path, "text")
    assert texts["config.yaml/text_summary"][0].tensor.string_val[0].decode() == "    run:\n      seed: 3\n"
    assert texts["env.json/text_summary"][0].tensor.string_val[0].decode() == "    commit: abc\n"
    table = plugin_data(tmp_path, "hparams")
    parsed = {
        tag: HParamsPluginData.FromString(values[0].metadata.plugin_data.content) for tag, values in table.items()
    }
    experiment, begun, ended = (
        parsed[f"_hparams_/{part}"] for part in ("experiment", "session_start_info", "session_end_info")
    )
    assert [metric.name.tag for metric in experiment.experiment.metric_infos] == ["accuracy/acc1", "accuracy/best_acc1"]
    given = begun.session_start_info.hparams
    assert (given["lr"].number_value, given["bn"].number_value, given["relation"].string_value) == (0.1, 1, "paper")
    assert (given["flip"].string_value, given["none"].string_value, given["std"].string_value) == (
        "True",
        "None",
        "[0.5, 0.25]",
    )
    assert ended.session_end_info.status == 1 and "accuracy/acc1" in events(tmp_path).Tags()["scalars"]


def test_the_charts_of_tensorboard_find_the_metrics_that_runs_have(distil, tmp_path):
    root = distil("--epochs", 1)
    [layout] = plugin_data(root, "custom_scalars")["custom_scalars__config__"]
    groups = Layout.FromString(layout.tensor.string_val[0]).category
    charts = {chart.title: list(chart.multiline.tag) for group in groups for chart in group.chart}
    tags = events(root).Tags()["scalars"]
    assert {tag.split("/")[0] for tag in tags} == {"accuracy", "images", "seconds", "student", "synthesis"}
    shown = {
        name: [tag for tag in tags if any(re.search(part, tag) for part in parts)] for name, parts in charts.items()
    }
    assert {name for name, found in shown.items() if not found} == set() and len(shown["fractions"]) > 5
    assert shown["student"] == [tag for tag in tags if re.fullmatch("student/(kd|cd_loss|striplet)", tag)]


def test_table():
    text = table([{"name": "teacher", "acc1": 99.4, "images": 1347}, {"name": "RGAL student", "acc1": 5, "note": None}])
    assert text.splitlines() == [
        "name           acc1  images  note",
        "------------  -----  ------  ----",
        "teacher       99.40    1347  -",
        "RGAL student      5       -  -",
    ]
