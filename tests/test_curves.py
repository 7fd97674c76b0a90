"""Plots of runs over their epochs."""

import json

import pytest
from PIL import Image

from datafree import curves
from datafree.errors import InputError, OptionError


@pytest.fixture
def runs(tmp_path):
    for tag, accuracies in (("seed0", [50.0, None, 80.0]), ("seed1", [55.0])):
        folder = tmp_path / "runs" / "some_run" / tag
        folder.mkdir(parents=True)
        rows = [{"epoch": i, "acc1": acc1, "images/near_duplicates": 0.1 * i} for i, acc1 in enumerate(accuracies)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "runs"


@pytest.fixture
def drawn(monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, save=Figure.savefig, **k: figures.append(figure) or save(figure, *a, **k)
    )
    return figures


def test_a_panel_for_every_metric_that_the_runs_have(runs, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["curves", str(tmp_path / "c.png"), str(runs)])
    curves.main()
    assert Image.open(tmp_path / "c.png").width > 500 and "c.png" in capsys.readouterr().out
    accuracy, duplicates = drawn[0].axes
    assert [list(line.get_xdata()) for line in accuracy.lines] == [[1, 3], [1]]
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[50, 80], [55]]
    assert [line.get_label() for line in duplicates.lines] == ["some_run/seed0", "some_run/seed1"]


def test_one_metric_over_minutes(runs, drawn, tmp_path, monkeypatch, capsys):
    folder = runs / "some_run" / "seed0"
    rows = [{"epoch": i, "acc1": 10.0 * i, "seconds/synthesis": 30 * i, "seconds/student": 60 * i} for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["curves", str(tmp_path / "c.png"), str(folder), "--over", "minutes", "--of=acc1"]
    monkeypatch.setattr("sys.argv", words)
    curves.main()
    [accuracy] = drawn[0].axes
    assert accuracy.get_xlabel().startswith("minutes of synthesis") and list(accuracy.lines[0].get_xdata()) == [
        0,
        1.5,
        3,
    ]
    for more, sentence in (
        (["--over", "hours"], "takes epochs, minutes"),
        (["--all", "x"], "options are --over, --of"),
    ):
        monkeypatch.setattr("sys.argv", [*words[:3], *more])
        with pytest.raises(OptionError, match=sentence):
            curves.main()
    with pytest.raises(InputError, match="not all of these runs state their seconds"):
        curves.draw(curves.read_curves([runs]), tmp_path / "c.png", ["acc1"], "minutes")
    monkeypatch.setattr("sys.argv", [*words[:2], "--of", "acc1"])
    with pytest.raises(OptionError, match="then folders"):
        curves.main()
    monkeypatch.setattr("sys.argv", [*words[:3], "--of", "acc2"])
    with pytest.raises(InputError, match="none of these runs has the metric acc2"):
        curves.main()


def test_forty_runs_have_distinct_lines(drawn, tmp_path):
    curves.draw({f"run{i}": [{"epoch": 0, "acc1": i}, {"epoch": 1, "acc1": i}] for i in range(40)}, tmp_path / "c.png")
    lines = drawn[0].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 40


def test_what_cannot_be_plotted_is_named(runs, tmp_path):
    with pytest.raises(InputError, match="no run"):
        curves.read_curves([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="nowhere"):
        curves.draw(curves.read_curves([runs]), tmp_path / "nowhere" / "c.png")
    with pytest.raises(InputError, match="no finished epoch"):
        curves.draw({"new": []}, tmp_path / "c.png")
    (runs / "some_run" / "seed0" / "metrics.jsonl").write_text('{"epoch": 0}\n{"epo')
    assert curves.read_curves([runs])["some_run/seed0"] == [{"epoch": 0}]  # still running
    (runs / "some_run" / "seed0" / "metrics.jsonl").write_text("broken}")
    with pytest.raises(InputError, match="metrics.jsonl"):
        curves.read_curves([runs])
