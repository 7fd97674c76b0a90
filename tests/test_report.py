"""The table of finished runs."""
import json

import pytest

from datafree import report
from datafree.errors import InputError


def write_run(root, run, seed, last, teacher=99.0, best=None, images=640, clock="12:00", **seconds):
    folder = root / run / f"seed{seed}"
    folder.mkdir(parents=True)
    summary = {"run": run, "seed": seed, "last_acc1": last, "best_acc1": best, "images": images,
               **(seconds or {"synthesis_s": 10.0, "student_s": 20.0}), "environment": {"time": clock}}
    if teacher is not None:
        summary["teacher_acc1"] = teacher
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_seeds_of_one_run_share_a_row(tmp_path):
    for seed, last in enumerate((90.0, 92.0, 97.0)):
        write_run(tmp_path, "rgal", seed, last, best=last + 1)
    [row] = report.report(report.read_summaries([tmp_path]))
    assert row["n"] == 3 and row["teacher"] == 99 and row["images"] == 640 and row["s"] == 30
    assert row["last"] == pytest.approx(93) and row["best"] == pytest.approx(94)
    assert row["std"] == pytest.approx(13**0.5)  # (9 + 1 + 16) / (3 - 1)


def test_rows_are_in_the_order_given_and_within_a_folder_in_the_order_of_time(tmp_path):
    for name, clock in (("c", "08:00"), ("a", "10:00"), ("b", "09:00")):
        write_run(tmp_path / "many", name, 0, 50.0, clock=clock)
    one = write_run(tmp_path / "one", "z", 0, 50.0, clock="11:00")
    rows = report.report(report.read_summaries([one, tmp_path / "many"]))
    assert [row["run"] for row in rows] == ["z", "c", "b", "a"]


def test_a_run_below_two_of_the_folders_counts_once(tmp_path):
    folder = write_run(tmp_path, "rgal", 0, 90.0)
    [row] = report.report(report.read_summaries([folder, tmp_path]))
    assert row["n"] == 1 and row["std"] is None


def test_numbers_that_a_run_does_not_have_stay_empty(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "rgal", 0, None, teacher=None)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    report.main()
    header, _, row, note = capsys.readouterr().out.splitlines()
    assert dict(zip(header.split(), row.split())) == {
        "run": "rgal", "n": "1", "teacher": "-", "last": "-", "std": "-", "best": "-",
        "images": "640", "s": "30"}
    assert "%" in note


def test_a_folder_that_is_missing_or_empty_and_a_damaged_summary_are_named(tmp_path):
    with pytest.raises(InputError, match="no folder .*nowhere"):
        report.read_summaries([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="no finished run"):
        report.read_summaries([tmp_path])
    write_run(tmp_path, "rgal", 0, 90.0)
    for text in ('{"run": ', "[]", "{}"):
        (tmp_path / "rgal" / "seed0" / "summary.json").write_text(text)
        with pytest.raises(InputError, match="summary.json is no summary"):
            report.read_summaries([tmp_path])


def test_without_folders_it_says_how_it_is_called(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report"])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 2
    assert "python -m datafree.report FOLDER" in capsys.readouterr().out


def test_runs_that_differ_in_an_option_do_not_share_a_row(tmp_path):
    for tag, seed, weight, last in (("a", 0, 0.1, 90.0), ("b", 1, 0.1, 92.0), ("c", 0, 0.3, 50.0)):
        write_settings(tmp_path / tag, seed, {"triplet": weight, "seed": seed}, last)
    rows = report.report(report.read_summaries([tmp_path]))
    assert [(row["options"], row["n"], row["last"]) for row in rows] == [("triplet=0.1", 2, 91.0),
                                                                         ("triplet=0.3", 1, 50.0)]


def test_weights_part_rows_only_within_a_seed(tmp_path):
    def settings(seed, weights):
        return {"seed": seed, "teacher_weights": weights}

    for tag, seed, weights, last in (("a", 0, "t0", 90.0), ("b", 1, "t1", 92.0), ("c", 0, "other", 50.0)):
        write_settings(tmp_path / tag, seed, settings(seed, weights), last)
    rows = report.report(report.read_summaries([tmp_path]))
    assert [(row["n"], row["last"]) for row in rows] == [(2, 91.0), (1, 50.0)]
    assert rows[1]["options"] == "teacher_weights=other"


def test_a_run_that_was_repeated_counts_once(tmp_path):
    for tag, clock, last in (("a", "10:00", 90.0), ("b", "11:00", 94.0)):
        write_settings(tmp_path / tag, 0, {"triplet": 0.1, "seed": 0}, last, clock)
    [row] = report.report(report.read_summaries([tmp_path]))
    assert row["n"] == 1 and row["last"] == 94 and "options" not in row


def write_settings(root, seed, settings, last, clock="12:00"):
    path = write_run(root, "rgal", seed, last, clock=clock) / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": settings}))


def test_gains_are_paired_by_seed(tmp_path, monkeypatch, capsys):
    lasts = {0.0: {0: 90.0, 1: 80.0, 2: 70.0}, 0.3: {0: 91.0, 1: 83.0, 2: 72.0, 3: 10.0}}
    for weight, seeds in lasts.items():
        for seed, last in seeds.items():
            write_settings(tmp_path / f"{weight}", seed, {"triplet": weight, "seed": seed}, last)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--against", "triplet=0"])
    report.main()
    base, other = (dict(zip(ROW, line.split())) for line in capsys.readouterr().out.splitlines()[2:4])
    assert base["gain"] == base["ci95"] == "-" and other["options"] == "triplet=0.3" and other["n"] == "4"
    # Gains 1, 3, 2: mean 2, standard deviation 1.
    assert other["gain"] == "2.00" and float(other["ci95"]) == pytest.approx(4.3027 / 3**0.5, abs=0.01)
    with pytest.raises(InputError, match="fits 0 rows"):
        report.report(report.read_summaries([tmp_path]), ["triplet=9"])


ROW = ("run", "options", "n", "teacher", "last", "std", "best", "images", "s", "gain", "ci95")


@pytest.mark.parametrize("freedom, quantile", [(1, 12.706), (4, 2.776), (9, 2.262), (10, 2.228), (20, 2.086),
                                               (100, 1.984)])
def test_the_quantile_of_students_t(freedom, quantile):
    """Values of the usual printed table."""
    assert report.t_quantile(freedom) == pytest.approx(quantile, abs=3e-3)
