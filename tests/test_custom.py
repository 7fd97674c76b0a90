"""Runs with user-defined learners and sources: their options, their mistakes, and what a resume checks of them."""

import json
import shutil
from pathlib import Path

import custom
import nets
import pytest
import yaml
from conftest import call, rows

import datafree_kd

SCALED, GREY = custom.name("Scaled"), custom.name("Grey")


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def options_of(folder):
    return summary_of(folder)["options"]


def test_a_user_defined_learner_trains_the_student(distil):
    [row] = rows(distil("--epochs", 1, "--learner", custom.name("Averaged")))
    assert row["student/ce"] > 0 and row["average"] > 0 and "student/kd" not in row
    assert row["lr"] == 0 and row["images"] == 32


def test_the_options_of_a_learner_reach_it(distil):
    words = ("--epochs", 1, "--learner", SCALED)
    straight, scaled = distil(*words, tag="straight"), distil(*words, "--factor", 0, tag="scaled")
    assert options_of(straight)["factor"] == 1 and options_of(scaled)["factor"] == 0
    plain = rows(distil("--epochs", 1, tag="plain"))[0]
    assert {k: v for k, v in rows(straight)[0].items() if k != "student/scaled"} == plain
    assert rows(scaled)[0]["acc1"] != plain["acc1"]  # a loss of 0 trains nothing


def test_the_options_of_a_source_reach_it(distil):
    words = ("--epochs", 1, "--source", GREY)
    folder = distil(*words, "--level", 0.25, "--polarity", "negative")
    [row] = rows(folder)
    assert row["images/near_duplicates"] == 1 and row["images"] == 96
    options = options_of(folder)
    assert (options["level"], options["polarity"], options["dither"]) == (0.25, "negative", None)
    # Its traits tell that it has no generator; what else it reads cannot be known.
    assert "nz" not in options and "tv" in options


def test_options_are_inherited_with_their_section(distil):
    folder = distil("--epochs", 1, "--source", custom.name("Darker"), "--level", 0.25)
    assert yaml.safe_load((folder / "config.yaml").read_text())["grey"]["level"] == 0.25
    assert options_of(folder)["level"] == 0.25


def test_the_configuration_left_repeats_a_run_with_user_defined_classes(distil):
    folder = distil("--epochs", 1, "--source", GREY, "--level", 0.25, "--learner", SCALED, "--factor", 0.5)
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["grey"]["level"] == 0.25 and written["scaled"] == {"factor": 0.5}
    call(datafree_kd, "--config", folder / "config.yaml", "--log_tag", "again")
    again = folder.with_name("again")
    assert rows(again) == rows(folder) and options_of(again) == options_of(folder)


def test_print_config_reads_back_with_user_defined_options(distil, capsys, tmp_path):
    distil("--source", GREY, "--level", 0.25, "--learner", SCALED, "--print_config")
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    call(datafree_kd, "--config", tmp_path / "printed.yaml", "--print_config")
    assert capsys.readouterr().out == text
    assert yaml.safe_load(text)["grey"] == {"level": 0.25, "polarity": "positive", "dither": None}


@pytest.mark.parametrize(
    "before, after, named",
    [
        (("--source", GREY), ("--source", GREY, "--level", 0.25), "--level"),
        (("--source", GREY, "--dither", 0.5), ("--source", GREY), "--dither"),
        (("--learner", SCALED), ("--learner", SCALED, "--factor", 0.5), "--factor"),
        (("--learner", SCALED), (), "--learner"),
        (("--learner", custom.name("Averaged")), (), "--learner"),
        ((), ("--learner", SCALED), "--learner"),
    ],
)
def test_user_defined_options_count_at_resume(before, after, named, distil, refused):
    folder = distil("--epochs", 1, *before)
    line = refused(distil, "--epochs", 2, "--resume", "auto", *after)
    assert named in line and "last.pth" in line
    assert len(rows(distil("--epochs", 2, "--resume", "auto", *before))) == 2 == len(rows(folder))


def copies(tmp_path, *places):
    """Copies of custom.py -> their paths."""
    for place in places:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(custom.__file__, tmp_path / place)
    return [tmp_path / place for place in places]


@pytest.mark.parametrize("option, name", [("learner", "Scaled"), ("source", "Grey"), ("method", "Grey")])
def test_code_counts_at_resume_by_its_content_and_not_by_its_place(option, name, distil, refused, tmp_path):
    first, second = copies(tmp_path, "a/mine.py", "b/mine.py")
    folder = distil("--epochs", 1, f"--{option}", f"{first}:{name}")
    digest = options_of(folder)[option]
    assert str(tmp_path) not in digest and name in digest
    first.unlink()
    resumed = (f"--{option}", f"{second}:{name}", "--resume", "auto")
    assert distil("--epochs", 2, *resumed) == folder and len(rows(folder)) == 2
    assert options_of(folder)[option] == digest
    second.write_text(second.read_text() + "\n# another state of it\n")
    assert f"--{option}" in refused(distil, "--epochs", 3, *resumed)


@pytest.mark.parametrize(
    "name, parts",
    [
        (custom.name("Grey"), ("Grey failed when it was constructed", "total_steps")),
        (nets.name("Nothing"), ("Nothing", "subclass of Learner")),
        (custom.name("Failing"), ("Failing failed when it was constructed", "ZeroDivisionError: no total")),
        (nets.name("tiny"), ("nets.py:tiny failed when it was constructed", "TypeError")),
        (custom.name("Missing"), ("has no function or class 'Missing'",)),
        ("nowhere.py:Learner", ("there is no file 'nowhere.py'", "check the path")),
    ],
)
def test_a_learner_that_cannot_be_used(name, parts, distil, refused, tmp_path):
    line = refused(distil, "--learner", name)
    assert all(part in line for part in parts)
    assert not (tmp_path / "runs").exists()


def test_a_file_of_a_learner_that_cannot_be_imported(distil, refused, tmp_path):
    broken = Path(tmp_path / "broken.py")
    for code, error in (("import no_such_module", "ModuleNotFoundError"), ("1 +", "SyntaxError"), ("exit()", "Exit")):
        broken.write_text(code)
        line = refused(distil, "--learner", f"{broken}:Learner")
        assert "broken.py' cannot be imported" in line and error in line
    assert "distill, or path/to/file.py:Class" in refused(distil, "--learner", "distil", code=2)
