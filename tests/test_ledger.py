"""What experiments are expected to give: the blocks of their files, the ledger, and the verdict about a new result."""

import json
import random
import re
import shlex
import statistics
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, call
from scipy import stats

from datafree import registry, reproduce
from datafree.errors import InputError
from datafree.ledger import PAGE, Measured, cells, ledger, read_cell

CELLS = list(cells(ROOT / "configs"))
SHARED = {
    *("digits/base", "digits/students", "digits/incremental", "cifar10_short/students"),
    *("cifar10/incremental", "cifar10/quantize_inversion"),
}


def name(path):
    return f"{path.parent.name}/{path.stem}"


def test_every_experiment_says_what_it_is_expected_to_give():
    files = {path for path in ROOT.glob("configs/*/*.yaml") if path.parent.name not in registry_folders()}
    assert {name(path) for path in files} == {name(cell.path) for cell in CELLS} | SHARED
    assert not [path for path in ROOT.glob("configs/*/*.yaml") if re.search(r"#.*\bours:", path.read_text())]


def registry_folders():
    return {path.parent.name for path in [*registry.METHODS.values(), *registry.QUANTIZATION_METHODS.values()]} | {
        path.parent.name for path in registry.INCREMENTAL_METHODS.values()
    }


def test_the_ledger_is_that_of_the_files(capsys):
    call(reproduce, "--ledger")
    assert capsys.readouterr().out == ledger(ROOT / "configs") == (ROOT / PAGE).read_text()


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: name(cell.path))
def test_a_block_fits_its_file_and_its_own_figures(cell):
    options = shlex.split(cell.ours.options.replace("{seed}", "0")) if cell.ours else []
    reproduce.read_options(cell, options)
    if cell.ours and cell.ours.runs:
        assert statistics.fmean(cell.ours.runs) == pytest.approx(cell.ours.mean, abs=0.011)  # of rounded figures
        assert cell.ours.n == 1 or statistics.stdev(cell.ours.runs) == pytest.approx(cell.ours.std, abs=0.011)
    if cell.ours:
        assert all(0 <= figure <= 100 for figure in (cell.ours.mean, *cell.published.values()))
        assert (ROOT / cell.ours.page).is_file() and re.match(r"[0-9a-f]{7}\b", cell.ours.commit)
        assert not cell.ours.teacher or (cell.path.parent / shlex.split(cell.ours.teacher)[0]).is_file()
        page = (ROOT / cell.ours.page).read_text()
        assert f"{cell.ours.mean:.2f}" in page and re.match(r"\w+", cell.ours.commit)[0] in page + UNMENTIONED


UNMENTIONED = "d6c686c"  # of a run that its page mentions without its commit


def expected(mean=90.0, std=1.0, n=3):
    return Measured(mean, n, "a CPU", "abc1234", std if n > 1 else None)


@pytest.mark.parametrize("n, m", [(3, 3), (10, 2), (3, 1), (1, 4), (2, 2)])
def test_a_result_is_judged_by_students_t(n, m):
    """Against scipy's test of two samples with equal variances."""
    generator = random.Random(n + m)
    for shift in (-3.0, -1.0, 0.0, 1.0, 3.0):
        ours = [90 + generator.gauss(0, 1) for _ in range(n)]
        values = [90 + shift + generator.gauss(0, 1) for _ in range(m)]
        stated = expected(statistics.fmean(ours), statistics.stdev(ours) if n > 1 else None, n)
        verdict = reproduce.judge(stated, values)
        oracle = interval_by_scipy(ours, values)
        assert verdict.difference == pytest.approx(statistics.fmean(values) - stated.mean)
        assert verdict.half == pytest.approx(oracle, rel=1e-3)
        outside = abs(verdict.difference) > oracle + reproduce.ROUNDING
        assert verdict.word == ("as expected" if not outside else "better" if verdict.difference > 0 else "worse")


def interval_by_scipy(ours, values):
    """Half the width; of a single run by the definition of the pooled variance, because scipy wants two."""
    if min(len(ours), len(values)) > 1:
        interval = stats.ttest_ind(values, ours, equal_var=True).confidence_interval(0.95)
        return (interval.high - interval.low) / 2
    several = ours if len(ours) > 1 else values
    freedom = len(several) - 1
    return stats.t.ppf(0.975, freedom) * statistics.stdev(several) * (1 + 1 / len(several)) ** 0.5


def test_made_up_results_get_their_verdicts():
    assert reproduce.judge(expected(), [90.4, 89.1, 90.9]).word == "as expected"
    assert reproduce.judge(expected(), [95.0, 95.5, 96.0]).word == "better"
    assert reproduce.judge(expected(), [80.0, 81.0, 79.5]).word == "worse"
    assert reproduce.judge(expected(n=1), [50.0]) == ("not judged", -40.0, None)
    assert reproduce.judge(expected(std=0.0), [90.004, 90.004]).word == "as expected"  # the mean is stated so finely
    assert reproduce.judge(expected(std=0.0), [90.1, 90.1]).word == "better"


CELL = """
base: {base}
method: rgal
schedule: {{epochs: 1, ep_steps: 2, kd_steps: 2, g_steps: 1}}
synthesis: {{synthesis_batch_size: 16}}
expect:
  program: kd
  published: {{Somebody: 91.2}}
  source: nowhere
  ours:
    mean: 90.5
    std: 0.7071
    n: 2
    runs: [90.0, 91.0]
    images: 16
    device: a CPU
    commit: abc1234
    options: --triplet 0.2
"""


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """A small experiment on the digits, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(CELL.format(base=ROOT / "configs" / "digits" / "students.yaml"))
    return path


def finish(seed, last, images=16):
    """Leave what a finished run leaves, so that it is not repeated."""
    folder = Path.cwd() / "runs" / "reproduce" / "digits_rgal_a_b" / f"small-seed{seed}"
    folder.mkdir(parents=True)
    here = {"commit": "0123456789", "device": "cpu", "cpu": "a CPU", "threads": 1, "torch": "2.14.1", "dirty": False}
    summary = {"run": "digits_rgal_a_b", "seed": seed, "last_acc1": last, "images": images, "environment": here}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_finished_runs_are_judged_and_not_repeated(cell, capsys):
    finish(0, 90.0)
    finish(1, 91.5, images=32)
    with pytest.raises(SystemExit) as end:
        call(reproduce, cell)
    text = capsys.readouterr().out
    assert end.value.code == 0 and "datafree-kd" not in text
    assert [line.split() for line in text.splitlines()[2:4]] == [
        ["0", "90.00", "90.00", "16"],
        ["1", "91.50", "91.00", "32"],
    ]
    assert "measured: 90.75 ± 1.06 (n = 2), a CPU, threads: 1, torch 2.14.1, commit 012345678\n" in text
    assert "expected: 90.50 ± 0.71 (n = 2), a CPU, torch unknown, commit abc1234\n" in text
    assert "published: Somebody 91.20\n" in text and "synthesised 16, 32 images, not 16" in text
    assert "verdict: as expected; difference +0.25, ± 3.88 (95 %)\n" in text  # 4.3027 times the pooled deviation 0.9014


def test_a_worse_result_ends_with_code_1(cell, capsys):
    for seed in (3, 4):
        finish(seed, 50.0 + seed)
    with pytest.raises(SystemExit) as end:
        call(reproduce, cell, "--seeds", "3,4")
    assert end.value.code == 1 and "verdict: worse; difference -37.00" in capsys.readouterr().out


def test_an_experiment_that_was_not_run_yet_is_shown_but_not_judged(cell, capsys):
    finish(0, 90.0)
    stated = yaml.safe_load(cell.read_text())
    stated["expect"]["ours"] = "not run yet"
    cell.write_text(yaml.safe_dump(stated))
    with pytest.raises(SystemExit) as end:
        call(reproduce, cell, "--seeds=0")
    assert end.value.code == 0 and "verdict: not judged, because" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--epochs", 2], "--epochs would change what .*small.yaml computes, .* or run datafree-kd itself"),
        (["--triplet", 0], "--triplet would change"),
        (["--seed", 5], "--seed would change"),
        (["--epcohs", 2], "unknown option --epcohs"),
        (["--seeds", "0,0"], "--seeds cannot be 0,0"),
        (["--seeds", "x"], "--seeds cannot be x"),
        (["--seeds"], "--seeds needs a value"),
    ],
)
def test_options_that_make_another_experiment_are_refused(words, message, cell, refused):
    assert re.search(message, refused(call, reproduce, cell, *words, code=2))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda expect: expect.pop("program"), "program is one of kd, quantize"),
        (lambda expect: expect.update(acc1=3), "expect has the keys program, published, source, ours"),
        (lambda expect: expect["ours"].pop("commit"), "ours lacks commit"),
        (lambda expect: expect["ours"].update(mean="high"), "could not convert"),
        (lambda expect: expect["ours"].update(n=3), "n is 3, but there are 2 runs"),
        (lambda expect: expect["ours"].update(n=1, runs=[90.0]), "std belongs to more than one run"),
        (lambda expect: expect["ours"].update(speed=1), "unexpected keyword argument 'speed'"),
        (lambda expect: expect.update(ours="soon"), "expect cannot be"),
        (lambda expect: expect.update(published=[1]), "expect cannot be"),
        (lambda expect: expect["ours"].update(options="--x '"), "No closing quotation"),
    ],
)
def test_a_block_that_is_wrong_is_named(change, message, cell):
    stated = yaml.safe_load(cell.read_text())
    change(stated["expect"])
    cell.write_text(yaml.safe_dump(stated))
    with pytest.raises(InputError, match=message):
        read_cell(cell)


def test_files_that_are_no_experiments_are_named(tmp_path, refused):
    (tmp_path / "empty.yaml").write_text("")
    for path, message in ((tmp_path / "empty.yaml", "has no block expect"), (tmp_path / "no.yaml", "cannot read")):
        assert message in refused(call, reproduce, path)
    assert "the first argument is the YAML file" in refused(call, reproduce, "--seeds", "1", code=2)


@pytest.mark.slow
def test_an_experiment_is_run_with_its_teachers_and_judged(cell, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (cell.parent / "teacher.yaml").write_text("data: {dataset: digits}\ntraining: {model: resnet8, epochs: 1}\n")
    stated = yaml.safe_load(cell.read_text())
    stated["teacher"] = {"teacher": "resnet8"}
    stated["expect"]["ours"]["teacher"] = "teacher.yaml --batch_size 512"
    cell.write_text(yaml.safe_dump(stated))
    for repeated in (False, True):
        with pytest.raises(SystemExit) as end:
            call(reproduce, cell, "--threads", 1)
        text = capfd.readouterr().out
        assert end.value.code == 1 and "verdict: worse" in text  # nothing is learnt in two steps
        assert text.count("Plan: distilling") == text.count("Plan: training") == (0 if repeated else 2)
        assert "images, not" not in text
    configs = sorted(cell.parent.glob("runs/reproduce/*/small-seed*/config.yaml"))
    told = [yaml.safe_load(path.read_text()) for path in configs]
    assert [run["relation"]["triplet"] for run in told] == [0.2, 0.2] and [run["run"]["seed"] for run in told] == [0, 1]
    assert [run["teacher"]["teacher_weights"].split("/")[-1] for run in told] == ["teacher-seed0", "teacher-seed1"]
