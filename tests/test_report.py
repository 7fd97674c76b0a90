"""The table of finished runs."""

import csv
import io
import json
import re

import pytest

from datafree import report, tables
from datafree.arguments import read_arguments
from datafree.errors import InputError, exit_on_input_error
from datafree.intervals import t_quantile


def write_run(root, run, seed, last, teacher=99.0, best=None, images=640, clock="12:00", **seconds):
    folder = root / run / f"seed{seed}"
    folder.mkdir(parents=True)
    summary = {
        "run": run,
        "seed": seed,
        "last_acc1": last,
        "best_acc1": best,
        "images": images,
        **(seconds or {"synthesis_s": 10.0, "student_s": 20.0}),
        "environment": {"time": clock},
    }
    if teacher is not None:
        summary["teacher_acc1"] = teacher
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def table_of(summaries, against=()):
    return report.report(report.group(summaries), against)


def test_seeds_of_one_run_share_a_row(tmp_path):
    for seed, last in enumerate((90.0, 92.0, 97.0)):
        write_run(tmp_path, "rgal", seed, last, best=last + 1)
    [row] = table_of(report.read_summaries([tmp_path]))
    assert row["n"] == 3 and row["teacher"] == 99 and row["images"] == 640 and row["s"] == 30
    assert row["last"] == pytest.approx(93) and row["best"] == pytest.approx(94)
    assert row["std"] == pytest.approx(13**0.5)  # (9 + 1 + 16) / (3 - 1)


def test_rows_are_in_the_order_of_the_folders_and_of_time_within_a_folder(tmp_path):
    for name, clock in (("c", "08:00"), ("a", "10:00"), ("b", "09:00")):
        write_run(tmp_path / "many", name, 0, 50.0, clock=clock)
    one = write_run(tmp_path / "one", "z", 0, 50.0, clock="11:00")
    rows = table_of(report.read_summaries([one, tmp_path / "many"]))
    assert [row["run"] for row in rows] == ["z", "c", "b", "a"]


def test_a_run_found_below_two_folders_counts_once(tmp_path):
    folder = write_run(tmp_path, "rgal", 0, 90.0)
    [row] = table_of(report.read_summaries([folder, tmp_path]))
    assert row["n"] == 1 and row["std"] is None


def test_metrics_that_a_run_does_not_have_stay_empty(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "rgal", 0, None, teacher=None)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    report.main()
    header, _, row, note = capsys.readouterr().out.splitlines()
    assert dict(zip(header.split(), row.split())) == {
        "run": "rgal",
        "n": "1",
        "teacher": "-",
        "last": "-",
        "std": "-",
        "best": "-",
        "images": "640",
        "s": "30",
    }
    assert "%" in note


def test_a_folder_that_is_missing_or_empty_and_a_damaged_summary_are_named(tmp_path):
    with pytest.raises(InputError, match="no folder .*nowhere"):
        report.read_summaries([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="no finished run"):
        report.read_summaries([tmp_path])
    write_run(tmp_path, "rgal", 0, 90.0)
    for text in ('{"run": ', "[]", "{}"):
        (tmp_path / "rgal" / "seed0" / "summary.json").write_text(text)
        with pytest.raises(InputError, match="summary.json is not the summary of a run"):
            report.read_summaries([tmp_path])


def test_without_folders_the_usage_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report"])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 2
    assert "python -m datafree.report FOLDER" in capsys.readouterr().out


def test_runs_that_differ_in_an_option_do_not_share_a_row(tmp_path):
    for tag, seed, weight, last in (("a", 0, 0.1, 90.0), ("b", 1, 0.1, 92.0), ("c", 0, 0.3, 50.0)):
        write_options(tmp_path / tag, seed, {"triplet": weight, "seed": seed}, last)
    rows = table_of(report.read_summaries([tmp_path]))
    assert [(row["options"], row["n"], row["last"]) for row in rows] == [
        ("triplet=0.1", 2, 91.0),
        ("triplet=0.3", 1, 50.0),
    ]


def test_weights_separate_rows_only_within_a_seed(tmp_path):
    def options(seed, weights):
        return {"seed": seed, "teacher_weights": weights}

    for tag, seed, weights, last in (("a", 0, "t0", 90.0), ("b", 1, "t1", 92.0), ("c", 0, "other", 50.0)):
        write_options(tmp_path / tag, seed, options(seed, weights), last)
    rows = table_of(report.read_summaries([tmp_path]))
    assert [(row["n"], row["last"]) for row in rows] == [(2, 91.0), (1, 50.0)]
    assert rows[1]["options"] == "teacher_weights=other"


def test_a_run_that_was_repeated_counts_once(tmp_path):
    for tag, clock, last in (("a", "10:00", 90.0), ("b", "11:00", 94.0)):
        write_options(tmp_path / tag, 0, {"triplet": 0.1, "seed": 0}, last, clock)
    [row] = table_of(report.read_summaries([tmp_path]))
    assert row["n"] == 1 and row["last"] == 94 and "options" not in row


def write_options(root, seed, options, last, clock="12:00", run="rgal", key="options"):
    """A finished run with the options that count for its result; earlier versions wrote them as "settings"."""
    path = write_run(root, run, seed, last, clock=clock) / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: options}))


def test_gains_are_paired_by_seed(tmp_path, monkeypatch, capsys):
    lasts = {0.0: {0: 90.0, 1: 80.0, 2: 70.0}, 0.3: {0: 91.0, 1: 83.0, 2: 72.0, 3: 10.0}}
    for weight, seeds in lasts.items():
        for seed, last in seeds.items():
            write_options(tmp_path / f"{weight}", seed, {"triplet": weight, "seed": seed}, last)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--against", "triplet=0"])
    report.main()
    base, other = (dict(zip(ROW, line.split())) for line in capsys.readouterr().out.splitlines()[2:4])
    assert base["gain"] == base["ci95"] == "-" and other["options"] == "triplet=0.3" and other["n"] == "4"
    # Gains 1, 3, 2: mean 2, standard deviation 1.
    assert other["gain"] == "2.00" and float(other["ci95"]) == pytest.approx(4.3027 / 3**0.5, abs=0.01)
    with pytest.raises(InputError, match="matches 0 rows"):
        table_of(report.read_summaries([tmp_path]), ["triplet=9"])


def test_rows_are_compared_with_the_baseline_of_their_name_if_each_has_one(tmp_path):
    for run, seed, weight, last in (
        ("dafl", 0, 0.0, 50.0),
        ("dafl", 0, 0.1, 53.0),
        ("fast", 0, 0.0, 90.0),
        ("fast", 0, 0.1, 91.0),
        ("real", 0, 0.3, 99.0),
    ):
        write_options(tmp_path / f"{weight}", seed, {"striplet": weight, "seed": seed}, last, run=run)
    rows = table_of(report.read_summaries([tmp_path]), ["striplet=0"])
    assert {(row["run"], row["last"]): row["gain"] for row in rows} == {
        ("dafl", 50): None,
        ("dafl", 53): 3,
        ("fast", 90): None,
        ("fast", 91): 1,
        ("real", 99): None,
    }
    write_options(tmp_path / "more", 0, {"striplet": 0.0, "ngf": 8, "seed": 0}, 10.0, run="dafl")
    with pytest.raises(InputError, match="matches 3 rows; it must match one, or one per run name"):
        table_of(report.read_summaries([tmp_path]), ["striplet=0"])


def write_effects(root):
    """Two seeds of different levels: triplets gain 1 or 3 (2 or 4 with seed 1) by their relation, ngf 47 or 46 more.

    A run without triplets has no options of theirs.
    """
    for seed, level in ((0, 60.0), (1, 30.0)):
        shared = {"source": "inversion", "ngf": 8, "seed": seed}
        triplets = {**shared, "triplet": 0.1, "sampling": "focal"}
        for tag, options, gain in (
            ("none", {**shared, "triplet": 0.0}, 0),
            ("paper", {**triplets, "relation": "paper"}, 1 + seed),
            ("release", {**triplets, "relation": "release"}, 3 + seed),
            ("wide", {**triplets, "relation": "release", "ngf": 9}, 50),
        ):
            write_options(root / tag, seed, options, level + gain)
            (root / tag / "rgal" / f"seed{seed}" / "metrics.jsonl").write_text(
                '{"images/x": 9}\n' + json.dumps({"images/x": gain / 100}) + '\n{"images/x": '
            )


def test_an_effect_is_the_mean_over_seeds_of_pairs_that_differ_in_it_alone(tmp_path, monkeypatch, capsys):
    write_effects(tmp_path)
    rows = report.group(report.read_summaries([tmp_path]))
    [relation] = report.effects(rows, "relation")
    assert relation == {
        "option": "relation",
        "from": "paper",
        "to": "release",
        "pairs": 2,
        "seeds": 2,
        "gain": 2.0,
        "ci95": 0.0,
    }
    # The run without triplets has no relation, so it is a pair with the runs of both relations.
    [triplet] = report.effects(rows, "triplet")
    assert (triplet["from"], triplet["to"], triplet["pairs"], triplet["gain"]) == ("0", "0.1", 4, 2.5)
    assert triplet["ci95"] == pytest.approx(12.7062 * 0.5**0.5 / 2**0.5)
    assert report.effects(rows, "sampling") == []
    words = ["--effect", "relation", "ngf", "source", "--of", "images/x"]
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), *words])
    report.main()
    text = capsys.readouterr().out
    assert "images/x after the last epoch" in text and "0.0200" in text and "ngf" in text.split("\n\n")[2]
    assert text.endswith("\nno two runs with the same seed differ in source alone\n")


def test_a_metric_that_no_run_has_an_unknown_option_and_lost_metrics_are_named(tmp_path, monkeypatch):
    write_effects(tmp_path)
    with pytest.raises(InputError, match="no run has the metric images/y"):
        report.read_summaries([tmp_path], "images/y")
    (tmp_path / "none" / "rgal" / "seed0" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="cannot read .*metrics.jsonl"):
        report.read_summaries([tmp_path], "images/x")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--efect", "ngf"])
    with pytest.raises(InputError, match="unknown option --efect"):
        report.main()


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "give folders"),
        (("RUNS", "--of"), "--of needs a value"),
        (("RUNS", "--effect", "relatoin"), "no run has such an option"),
    ],
)
def test_arguments_that_are_missing_or_mistyped_are_named(words, message, tmp_path, monkeypatch):
    write_effects(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        [
            "report",
            *(str(tmp_path) if word == "RUNS" else word for word in words),
            *(() if words else ("--effect", "ngf")),
        ],
    )
    with pytest.raises(InputError, match=message):
        report.main()


def test_an_option_that_only_some_runs_have_separates_rows(tmp_path):
    write_options(tmp_path / "old", 0, {"triplet": 0.1}, 90.0)
    write_options(tmp_path / "new", 0, {"triplet": 0.1, "keep": "best"}, 91.0)
    assert {row["options"] for row in table_of(report.read_summaries([tmp_path]))} == {"", "keep=best"}


def test_a_summary_of_an_earlier_version_is_read(tmp_path):
    """Its options are called "settings"; equal ones share a row with those of a new summary."""
    write_options(tmp_path / "old", 0, {"triplet": 0.1, "seed": 0}, 90.0, key="settings")
    write_options(tmp_path / "new", 1, {"triplet": 0.1, "seed": 1}, 94.0)
    write_options(tmp_path / "other", 0, {"triplet": 0.3, "seed": 0}, 95.0, key="settings")
    rows = report.group(report.read_summaries([tmp_path]))
    assert [(row["options"], row["n"], row["last"]) for row in report.report(rows)] == [
        ("triplet=0.1", 2, 92.0),
        ("triplet=0.3", 1, 95.0),
    ]
    [effect] = report.effects(rows, "triplet")
    assert (effect["from"], effect["to"], effect["gain"]) == ("0.1", "0.3", 5.0)


ROW = ("run", "options", "n", "teacher", "last", "std", "best", "images", "s", "gain", "ci95")


@pytest.mark.parametrize(
    "freedom, quantile",
    [
        *enumerate(
            (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788), 1
        ),
        *enumerate((2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687), 13),
        *((30, 2.0423), (31, 2.0395), (40, 2.0211), (60, 2.0003), (100, 1.9840), (10**6, 1.9600)),
    ],
)
def test_the_quantile_of_students_t(freedom, quantile):
    """Values of the usual printed table."""
    assert t_quantile(freedom) == pytest.approx(quantile, abs=3e-4)


# Class-incremental learning.


def write_incremental(root, seed, class_seed, last, **options):
    folder = write_run(root, "digits_abd_resnet8", f"{seed}-{class_seed}-{last}", last)
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"seed": seed, "options": {"class_seed": class_seed, "init_cls": 2, **options}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "task_00").mkdir()
    (folder / "task_00" / "summary.json").write_text(json.dumps(summary | {"task": 0, "last_acc1": 100.0}))


def test_the_tasks_of_a_run_are_no_runs_of_their_own(tmp_path):
    write_incremental(tmp_path, 0, 1993, 60.0)
    [row] = table_of(report.read_summaries([tmp_path]))
    assert row["n"] == 1 and row["last"] == 60


def test_orders_of_the_classes_count_like_seeds_and_pair_the_runs(tmp_path):
    for order, (alone, both) in enumerate([(60.0, 65.0), (50.0, 51.0), (70.0, 73.0)]):
        write_incremental(tmp_path, 0, order, alone, triplet=0.0)
        write_incremental(tmp_path, 0, order, both, triplet=1.0)
    rows = {row["options"]: row for row in table_of(report.read_summaries([tmp_path]), ["triplet=0"])}
    assert [row["n"] for row in rows.values()] == [3, 3]
    assert rows["triplet=1"]["gain"] == pytest.approx(3) and rows["triplet=1"]["ci95"] == pytest.approx(
        2 / 3**0.5 * 4.3027
    )
    [effect] = report.effects(report.group(report.read_summaries([tmp_path])), "triplet")
    assert effect["pairs"] == effect["seeds"] == 3 and effect["gain"] == pytest.approx(3)


# Formats.


def cells_of(text, form):
    """Header and lines of a printed table, without its rules and the remarks below it."""
    if form == "csv":
        return list(csv.reader(io.StringIO(text)))
    if form == "latex":
        lines = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r"\\")]
        return [[re.sub(r"\\([&%$#_{}])", r"\1", cell) for cell in line] for line in lines]
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.replace("\\", "") for cell in line] for line in lines[:1] + lines[2:]]


@pytest.mark.parametrize("form", ["md", "csv", "latex"])
def test_every_format_has_the_cells_of_the_text(form, tmp_path, monkeypatch, capsys):
    for tag, weight, seed, last in (("a", 0.1, 0, 90.0), ("a", 0.1, 1, 92.5), ("b", 0.3, 0, 1 / 3)):
        write_options(tmp_path / tag, seed, {"triplet": weight, "seed": seed}, last, run="a_b&c%")
    printed = {}
    for name in ("text", form):
        monkeypatch.setattr("sys.argv", ["report", "--format", name, str(tmp_path)])
        report.main()
        printed[name] = capsys.readouterr()
    text, other = printed["text"].out.splitlines(), cells_of(printed[form].out, form)
    assert other[0] == text[0].split()
    assert "last, std: top-1" in "".join(printed[form])  # in words, below the table or beside it
    for ours, theirs in zip(other[1:], (line.split() for line in text[2:4]), strict=True):
        if form == "csv":
            ours = [cell and f"{float(cell):.2f}" if "." in cell and "=" not in cell else cell or "-" for cell in ours]
        assert ours == theirs


def test_csv_keeps_every_digit_and_markdown_and_latex_escape_what_they_would_obey():
    rows = [{"run": r"a_b|c*d`<e>[f]_\$^~", "last": 1 / 3, "std": None}]
    assert tables.comma_separated(rows).splitlines()[1].endswith(f",{1 / 3!r},")
    assert tables.markdown(rows).splitlines()[2] == r"| a_b\|c\*d\`\<e>\[f]\_\\$^~ | 0.33 | - |"
    assert r"a\_b|c*d`<e>[f]\_\textbackslash{}\$\textasciicircum{}\textasciitilde{} & 0.33 & - \\" in tables.latex(rows)


@pytest.mark.parametrize(
    "words, message",
    [
        (("RUNS", "--format", "html"), "--format cannot be html; it takes text, md, csv, latex"),
        (("RUNS", "--format", "csv", "--effect", "ngf"), "--format csv is one table"),
        (("RUNS", "--format"), "--format needs a value"),
        (("RUNS", "--html", "--of"), "--html needs a value"),
        (("RUNS", "--html="), "--html needs a value"),
        (("--format", "md"), "give folders of runs"),
    ],
)
def test_a_format_that_cannot_be_is_refused(words, message, tmp_path, monkeypatch, refused):
    write_effects(tmp_path)
    monkeypatch.setattr("sys.argv", ["report", *(str(tmp_path) if word == "RUNS" else word for word in words)])
    assert message in refused(exit_on_input_error, report.main, code=2)


def test_arguments_may_come_in_any_order():
    words = "--format=md a=1 b --against x=1 y=2 --of acc5 c --effect=ngf lr"
    assert read_arguments(words.split(), report.OF_ONE, report.OF_SEVERAL) == {
        "": ["a=1", "b", "c"],
        "--format": ["md"],
        "--against": ["x=1", "y=2"],
        "--of": ["acc5"],
        "--effect": ["ngf", "lr"],
    }
