"""Every command that the project shows can be typed as it is; every config states only what differs."""

import importlib.util
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import asdict

import pytest
import torch
import yaml
from conftest import ROOT, call
from torch.distributed.run import get_args_parser

import datafree_incremental
import datafree_kd
import datafree_quantize
import registry
import train_scratch
from datafree import cli, config, report
from datafree.arguments import read_arguments
from datafree.config import DistillConfig, IncrementalConfig, QuantizeConfig, ScratchConfig
from datafree.ledger import read_cell
from datafree.models.factory import build_model

PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md"))]
SCRIPTS = sorted(ROOT.glob("scripts/*.sh"))
CONFIGS = sorted(
    path
    for path in ROOT.glob("configs/*/*.yaml")
    if path.parent.name not in ("methods", "quantization", "incremental")
    and path.stem not in ("base", "students", "incremental", "quantize_inversion")
)
PROGRAMS = {
    "datafree_kd.py": (datafree_kd, DistillConfig, registry.METHODS),
    "datafree_quantize.py": (datafree_quantize, QuantizeConfig, registry.QUANTIZATION_METHODS),
    "train_scratch.py": (train_scratch, ScratchConfig, None),
    "datafree_incremental.py": (datafree_incremental, IncrementalConfig, registry.INCREMENTAL_METHODS),
}
TINY = {
    "datafree_kd.py": "--epochs 1 --ep_steps 2 --kd_steps 2".split(),
    "datafree_quantize.py": "--epochs 1 --warmup 1 --ep_steps 2 --kd_steps 2 --calibration 1".split(),
    "train_scratch.py": "--epochs 1 --batch_size 512".split(),
    "datafree_incremental.py": "--epochs 1 --ep_steps 2 --kd_steps 2 --batch_size 16".split(),
}


def texts():
    """(file, text in which commands are to be found)."""
    for path in PAGES:
        blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        yield path, "\n".join(blocks)
    for path in [*SCRIPTS, *CONFIGS]:  # a comment may end with ": command"
        yield path, re.sub(r"^# .*: (?=python |bash )", "", path.read_text(), flags=re.MULTILINE)
    for name, (program, *_) in PROGRAMS.items():
        yield ROOT / name, sys.modules[program.main.__module__].EXAMPLES


def commands(text):
    """The words of each line that starts with python, bash or torchrun, without prompt, settings before and "$@".

    A command by torchrun is yielded as one by python.
    """
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = re.sub(r"^(\$ |srun |[A-Z_]+=(\"[^\"]*\"|\S*) )+", "", line.strip()).replace('"$@"', "")
        line = re.sub(r" \$\w*options", "", line)
        line = re.sub(r'"\$(seed|SLURM_ARRAY_TASK_ID)"', "0", line)  # of loops and arrays
        if re.match(r"(python|bash|torchrun) ", line):
            words = shlex.split(re.split(r" [|<>&]|;", line)[0], comments=True)
            yield tuple(words) if words[0] != "torchrun" else ("python", *launched(words[1:]))


def launched(words):
    """The program and its options, or -m and a module, that torchrun is to start by these words."""
    given = get_args_parser().parse_args(words)
    return [*["-m"] * given.module, given.training_script, *given.training_script_args]


def python_blocks(page):
    """The Python files that a page shows."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)


USER_CODE = [*python_blocks("own_method.md"), *python_blocks("own_learner.md")]
SHOWN = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:90]}")
    for path, text in texts()
    for words in dict.fromkeys(commands(text))
]


def read(program, words):
    """The configuration that these words make."""
    _, config_class, methods = PROGRAMS[program]
    return cli.parse(config_class, words, description="", method_files=methods, other_configs=config.CONFIGS)[0]


def test_commands_are_found_in_every_kind_of_file():
    found = {path.name for path, text in texts() if list(commands(text))}
    assert {"quickstart.sh", "test.sh", "rgal_cifar10.sh", "rgal_cifar100.sh", "datafree_kd.py"} <= found
    assert not any(path.name == "README.md" for path in PAGES) or "README.md" in found
    text = '$ A=b python x.py --a 1 \\\n  "$@" | tee log  # why\npythonic prose\nbash s.sh'
    text += "\nsrun torchrun --nnodes 2 x.py --b 2"
    assert list(commands(text)) == [("python", "x.py", "--a", "1"), ("bash", "s.sh"), ("python", "x.py", "--b", "2")]


@pytest.mark.parametrize("words", SHOWN)
def test_a_shown_command_names_files_that_exist_and_options_that_parse(words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # where commands are typed
    runner, first, *rest = words
    if first == "-m":
        assert importlib.util.find_spec(rest[0]), f"no module {rest[0]}"
        if rest[0] == "datafree.report" and "--help" not in rest:
            assert read_arguments(rest[1:], report.OF_ONE, report.OF_SEVERAL)[""]
        if rest[0] == "datafree.reproduce" and rest[1] not in ("--ledger", "FILE"):
            assert read_cell(rest[1]).program
    elif first not in ("-c", "cell.sh"):  # which docs/many_runs.md writes; its own test runs it
        assert (ROOT / first).is_file(), f"no file {first}"
    if first in PROGRAMS and "--help" not in rest:
        (tmp_path / "file.py").write_text("\n\n".join(USER_CODE))
        read(first, [word.replace("path/to/file.py", str(tmp_path / "file.py")) for word in rest])


NAMED = sorted({name for path in PAGES for name in re.findall(r"`(datafree\.[\w.]+)`", path.read_text())})


@pytest.mark.parametrize("name", NAMED)
def test_a_function_named_on_a_page_exists(name):
    assert pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash_and_stops_at_the_first_error(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert path.name == "env.sh" or "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.name != "env.sh"], ids=lambda path: path.name)
@pytest.mark.parametrize("words", [["--help"], ["--seed", "1", "-h"]], ids=str)
def test_a_script_called_for_help_prints_its_comment_and_does_nothing_else(path, words, tmp_path):
    environment = {**os.environ, "RGAL_VENV": str(tmp_path / "venv")}
    done = subprocess.run(["bash", path, *words], capture_output=True, text=True, cwd=tmp_path, env=environment)
    comment = path.read_text().split("\nset -euo")[0].replace("\n# ", "\n").partition("\n")[2]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{comment}\n", "") and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder in which commands run as in the project's root, but what they write stays here."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("benchmarks", "configs", "datafree", "registry.py", *PROGRAMS):
        (folder / name).symlink_to(ROOT / name)
    (folder / "scripts").mkdir()
    for path in SCRIPTS:
        (folder / "scripts" / path.name).write_text(path.read_text())
    return folder


def on_digits():
    """Shown commands that train on the digits; those of the quickstart run there."""
    for shown in SHOWN:
        program, *rest = shown.values[0][1:]
        if program in PROGRAMS and "--help" not in rest and not re.search("quickstart.sh|study|path/to", shown.id):
            config = read(program, [str(ROOT / w) if w.startswith("configs/") else w for w in rest])
            if config.data.dataset == "digits" and not config.run.evaluate_only:
                marks = [] if shown.id.startswith(("README.md", "scripts/")) else pytest.mark.slow
                yield pytest.param(program, rest, config, id=shown.id, marks=marks)


@pytest.mark.parametrize("program, words, config", list(on_digits()))
def test_a_shown_command_on_digits_runs(program, words, config, checkout, monkeypatch, tmp_path):
    monkeypatch.chdir(checkout)
    own = ["--threads", 1, "--save_dir", tmp_path]
    if program in ("datafree_kd.py", "datafree_quantize.py"):
        teacher = config.teacher.teacher
        weights = checkout / "checkpoints" / "pretrained" / f"digits_{teacher}.pth"
        if not weights.exists():
            its_words = ["--dataset", "digits", "--model", teacher, *TINY["train_scratch.py"]]
            call(train_scratch, *its_words, "--threads", 1, "--save_dir", checkout / "runs")
        own += ["--teacher_weights", weights]
        own += ["--g_steps", 1] if config.synthesis.source in ("inversion", "pixels") else []
        own += ["--warmup", 0] if config.schedule.warmup and program == "datafree_kd.py" else []
    if program == "datafree_incremental.py" and config.incremental.learner == "replay":
        own += ["--g_steps", 1]
    call(PROGRAMS[program][0], *words, *TINY[program], *own)
    assert ("--dry_run" in words) != bool(list(tmp_path.rglob("summary.json")))


@pytest.fixture
def script(checkout, tmp_path):
    """Run a script of the checkout on tiny budgets -> what it printed."""
    cases = "".join(f'{name}) set -- "$@" {" ".join(flags)};;\n' for name, flags in TINY.items())
    cases += 'esac\ncase "$*" in "datafree_kd.py "*rgal_resnet*) set -- "$@" --g_steps 1;;\n'
    cases += '"datafree_kd.py "*fast_*) set -- "$@" --warmup 0;;\n'
    cases += '"datafree_quantize.py "*"--epochs 0"*) set -- "$@" --epochs 0;;\n'
    cases += '"datafree_incremental.py "*_replay.yaml* | "datafree_incremental.py "*_inversion.yaml*)'
    cases += ' set -- "$@" --g_steps 1;;\n'
    run_it = f'exec {sys.executable} "$@"\n'
    as_long_as_given = f'case "$*" in *" --budget "*) {run_it};; esac\n'
    (tmp_path / "python").write_text(f"#!/bin/bash\n{as_long_as_given}case $1 in\n{cases}esac\n{run_it}")
    (tmp_path / "python").chmod(0o755)
    # This environment will do, so none is made.
    environment = checkout / "scripts" / "env.sh"
    joined = re.search(r"^joined\(\) \{.*?^\}\n", environment.read_text(), re.MULTILINE | re.DOTALL)[0]
    environment.write_text(f"cd {checkout}; PATH={tmp_path}:$PATH\n{joined}")

    def run(name, *words, **settings):
        done = subprocess.run(
            ["bash", checkout / "scripts" / name, *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.slow
def test_the_quickstart_runs_from_elsewhere_and_distils_from_its_own_teacher(script, checkout):
    printed = script("quickstart.sh", "--seed", "3")
    [runs] = checkout.glob("runs/quickstart-*")
    rows = [line.split() for line in printed.splitlines() if line.startswith("digits_")][-4:]
    assert [row[0].split("_")[1] for row in rows] == ["scratch", "rgal", "noise", "real"]
    used = {
        yaml.safe_load(path.read_text()).get("teacher", {}).get("teacher_weights")
        for path in runs.glob("*_resnet8/seed3/config.yaml")
    }
    assert used == {f"runs/{runs.name}/digits_scratch_resnet20/seed3"}
    assert list(runs.glob("digits_rgal_*/seed3/grids/epoch_*.png")) and list(runs.glob("digits_rgal_*/seed3/tb/*"))


@pytest.mark.slow
def test_the_study_of_the_triplets_pairs_its_seeds_and_resumes_where_it_stopped(script, checkout):
    options = {"SEEDS": "0 1", "CELLS": "none|both-release-logits-distance", "STUDY": "runs/study"}
    table = script("study_relation.sh", **options).split("\nrun ")[-3]
    rows = [line for line in table.splitlines() if line.startswith("digits_rgal")]
    assert len(rows) == 2 and " triplet=0 " in rows[0] and " - " in rows[0]
    assert " striplet=0.1 triplet=0.1 " in rows[1]
    [path] = checkout.glob("runs/study/*/both-*-seed1/config.yaml")
    relation = yaml.safe_load(path.read_text())["relation"]
    assert [relation[name] for name in ("relation", "sampling_space", "sampling", "striplet_sampling")] == [
        "release",
        "logits",
        "distance",
        "distance",
    ]
    assert dict(zip(reversed(table.split("\n")[0].split()), reversed(rows[1].split())))["n"] == "2"
    assert len(list(checkout.glob("runs/study/*/*/summary.json"))) == 2 + 2 * 2
    again = script("study_relation.sh", **options)
    assert "Plan" not in again and again.split("\nrun ")[-3].endswith(table.partition("\n")[2])


@pytest.mark.slow
def test_the_study_of_ratios_is_one_of_its_own(script, checkout):
    table = script("study_relation.sh", UNIT="gradient", SEEDS="0", CELLS="none|ratio1-paper").split("\nrun ")[-3]
    rows = [line for line in table.splitlines() if line.startswith("digits_rgal")]
    assert len(rows) == 2 and " triplet=0 " in rows[0] and " triplet=1 " in rows[1]
    assert (checkout / "runs" / "study_relation_gradient").is_dir()


@pytest.mark.slow
def test_the_study_on_cifar10_needs_no_more_than_the_teacher(script, checkout, tmp_path):
    weights = tmp_path / "teacher.th"
    torch.save({"state_dict": build_model("cifar_resnet20", 10).state_dict()}, weights)
    printed = script(
        "study_relation_cifar10.sh",
        weights,
        *"--eval none --warmup 0 --g_steps 1 --ngf 8".split(),
        SEEDS="0",
        CELLS="none|^synthesis-release",
        STUDY="runs/study10",
    )
    rows = [line for line in printed.split("\nrun ")[-1].splitlines() if line.startswith("cifar10_rgal")]
    assert len(rows) == 2 and " triplet=0 " in rows[0] and " triplet=0.1 " in rows[1]


@pytest.mark.slow
def test_the_frontier_needs_no_more_than_the_teacher_and_has_budgets(script, checkout, tmp_path):
    weights = tmp_path / "teacher.th"
    torch.save({"state_dict": build_model("cifar_resnet20", 10).state_dict()}, weights)
    options = {"SEEDS": "0", "CELLS": "^fast$", "BUDGETS": "20s", "FRONTIER": "runs/frontier"}
    words = (weights, *"--eval none --warmup 0 --ngf 8 --synthesis_batch_size 16 --batch_size 16 --lr 0.001".split())
    printed = script("frontier.sh", *words, **options)
    assert [line for line in printed[printed.index("In 20s:") :].splitlines() if line.startswith("cifar10_fast_")]
    [summary] = checkout.glob("runs/frontier/20s/*/fast-seed0/summary.json")
    assert json.loads(summary.read_text())["options"]["budget"] == "20s"
    assert "Plan" not in script("frontier.sh", *words, **options)


@pytest.mark.slow
def test_the_comparison_of_methods_makes_two_tables_and_resumes_where_it_stopped(script, checkout):
    options = {"SEEDS": "0", "METHODS": "fast", "BUDGET": "1", "COMPARISON": "runs/methods"}
    printed = script("compare_methods.sh", **options)
    tables = printed[printed.index("Equal steps:") :].split("Equal seconds-1:")
    for table in tables:
        rows = [line.split() for line in table.splitlines() if line.startswith("digits_")]
        names = [row[0].split("_")[1] for row in rows]
        assert names == ["fast", "fast"]
        weights = [dict(word.split("=") for word in row if "=" in word) for row in rows]
        assert weights == [{"striplet": "0", "triplet": "0"}, {"striplet": "0.1", "triplet": "0.1"}]
        assert [row[-2] == "-" for row in rows] == [True, False]  # the gain over the row above
    assert (checkout / "runs" / "methods" / "seconds-1" / "fast-alone-epochs").read_text().strip().isdigit()
    again = script("compare_methods.sh", **options)
    assert "Plan" not in again and again.strip() == printed[printed.index("Equal steps:") :].strip()
    alone = script("compare_methods.sh", **options | {"CELLS": "rgal", "TABLES": "steps", "COMPARISON": "runs/other"})
    assert "gain" not in alone[alone.index("Equal steps:") :]


@pytest.mark.slow
def test_the_comparison_on_cifar10_needs_no_more_than_the_teacher(script, tmp_path):
    weights = tmp_path / "teacher.th"
    torch.save({"state_dict": build_model("cifar_resnet20", 10).state_dict()}, weights)
    printed = script(
        "compare_methods.sh",
        *"--eval none --ngf 8".split(),
        WEIGHTS=str(weights),
        TABLES="steps",
        METHODS="dafl",
        SEEDS="0",
        CELLS="alone",
        COMPARISON="runs/methods10",
        BUDGET="1",
    )
    assert "cifar10_dafl_cifar_resnet20_wrn16_1" in printed[printed.index("Equal steps:") :]


@pytest.mark.slow
def test_the_digits_are_quantised_from_their_own_network(script, checkout):
    printed = script("quantize_digits.sh", "--seed", "3")
    rows = [line.split() for line in printed.splitlines() if line.startswith("digits_")]
    names = [row[0].removeprefix("digits_").split("_resnet8") for row in rows[-7:]]
    expected = [("noise", 2), ("gdfq", 2), ("gdfq", 2), ("rgal", 2), ("real", 2), ("gdfq", 8)]
    assert names[0] == ["scratch", ""] and names[1:] == [[name, f"_w{bits}a{bits}"] for name, bits in expected]


@pytest.mark.slow
def test_the_study_of_quantization_pairs_its_cells(script, checkout):
    options = {"SEEDS": "0", "BITS": "2", "CELLS": "host|rgal|ranges-noise", "STUDY": "runs/quantization"}
    printed = script("study_quantization.sh", **options)
    table = [line for line in printed.split("\nrun ")[-2].splitlines() if line.startswith("digits_gdfq")]
    assert len(table) == 2 and " triplet=0 " in table[0] and " triplet=0.1 " in table[1]
    assert "Plan" not in script("study_quantization.sh", **options)


@pytest.fixture
def shown_class(tmp_path):
    """Write the code of a class that a page shows to a file -> how to name it."""

    def write(name):
        [code] = [block for block in USER_CODE if f"class {name}(" in block]
        assert len(code.splitlines()) < 60
        (tmp_path / "file.py").write_text(code)
        return f"{tmp_path / 'file.py'}:{name}"

    return write


@pytest.mark.parametrize("name, terms", [("Pyramid", ("bn", "oh", "adv", "triplet")), ("Leaves", ())])
def test_the_user_defined_methods_of_their_page_run(name, terms, distil, shown_class):
    weights = "--oh 1 --bn 0.1 --adv 1 --triplet 0.1 --lr_g 0.05".split() if terms else []
    weights += ["--levels", 2] if name == "Pyramid" else []
    folder = distil("--epochs", 2, *weights, "--striplet", 0.1, method=shown_class(name))
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {key.removeprefix("synthesis/") for key in row if key.startswith("synthesis/")} == set(terms)
    assert row["images"] == (64 if terms else 2 * 6 * 16) and list((folder / "grids").glob("*.png"))


@pytest.mark.parametrize(
    "name, terms", [("HardLabels", {"kd", "cd_loss", "striplet", "hard"}), ("FrozenNorms", {"kl"})]
)
def test_the_user_defined_learners_of_their_page_run(name, terms, distil, shown_class):
    folder = distil("--epochs", 2, "--learner", shown_class(name), *(["--hard", 0.3] if name == "HardLabels" else []))
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {key.removeprefix("student/") for key in row if key.startswith("student/")} == terms
    norms = [
        value
        for key, value in torch.load(folder / "checkpoints" / "model_last.pth")["state_dict"].items()
        if key.endswith("running_mean")
    ]
    assert all(norm.any() for norm in norms) == (name == "HardLabels")  # the other one leaves them as they were


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_run_is_logged_to_a_tracker_as_its_page_shows(tracker, distil, tmp_path):
    pytest.importorskip(tracker)
    [code] = [block for block in python_blocks("trackers.md") if f"import {tracker}\n" in block]
    folder = distil("--epochs", 1)
    environment = {**os.environ, "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*")) or (tmp_path / "mlflow.db").exists()


STAND_INS = {
    "wandb": """
        from contextlib import contextmanager
        from types import SimpleNamespace

        @contextmanager
        def init(project, group, name, config):
            print("run", project, group, name, config["seed"])
            yield SimpleNamespace(log=lambda row, step: print("row", step, sorted(row)))

        def Image(path):
            open(path).close()
        """,
    "mlflow": """
        from contextlib import nullcontext

        def set_experiment(name):
            print("run", name)

        def start_run(run_name):
            return nullcontext(print(run_name))

        def log_params(options):
            print(options["seed"])

        def log_metrics(row, step):
            print("row", step, sorted(row))

        def log_artifact(path):
            print("file", path)

        log_artifacts = log_artifact
        """,
}


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_what_a_page_gives_to_a_tracker_is_what_a_run_left(tracker, distil, tmp_path):
    """With a stand-in for the tracker, which need not be installed."""
    (tmp_path / f"{tracker}.py").write_text(textwrap.dedent(STAND_INS[tracker]))
    [code] = [block for block in python_blocks("trackers.md") if f"import {tracker}\n" in block]
    folder = distil("--epochs", 2)
    done = subprocess.run(
        [sys.executable, "-c", code, folder], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("row")]
    assert [row.split()[1] for row in rows] == ["0", "1"] and all("'student/kd'" in row for row in rows)
    assert folder.parent.name in done.stdout


def test_the_page_of_options_is_what_its_program_writes():
    spec = importlib.util.spec_from_file_location("options_page", ROOT / "misc" / "options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "options.md").read_text() == module.page(), "python misc/options.py writes it anew"


@pytest.mark.parametrize("word", ["--save_dir", "--log-tag=mine", "--dry_run", "--resume"])
def test_the_quickstart_refuses_options_that_it_would_ignore(word, checkout):
    done = subprocess.run(["bash", checkout / "scripts" / "quickstart.sh", word, "x"], capture_output=True, text=True)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "program, name", [(program, name) for program in PROGRAMS for name in PROGRAMS[program][2] or ()]
)
def test_a_method_file_parses(program, name):
    assert read(program, ["--method", name]).method == name


@pytest.mark.slow
def test_incremental_learning_on_the_digits_shares_its_first_task_and_resumes_where_it_stopped(script, checkout):
    options = {"SEEDS": "0", "CELLS": "^inversion$|inversion-both", "STUDY": "runs/incremental"}
    printed = script("incremental_digits.sh", **options)
    table = printed.split("\nrun ")[-2]
    rows = [line.split() for line in table.splitlines() if line.startswith("digits_")]
    assert [row[0].split("_")[1] for row in rows] == ["finetune", "abd", "abd"]
    assert rows[1][1:3] == ["striplet=0", "triplet=0"] and rows[2][1:3] == ["striplet=1", "triplet=1"]
    tasks = {path.name for path in checkout.glob("runs/incremental/*/inversion-seed0/task_*")}
    assert tasks == {"task_01", "task_02", "task_03", "task_04"}  # the first is that of the fine-tuning
    assert "Plan" not in script("incremental_digits.sh", **options)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_config_parses_and_states_only_differences(path):
    stated = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    named = {"train": "train_scratch.py", "incremental": "datafree_incremental.py", "quantize": "datafree_quantize.py"}
    program = named.get(read_cell(path).program, "datafree_kd.py")
    assert program == "train_scratch.py" or "method" in stated, "name the method, even the default one"
    words = ["--method", stated["method"]] if "method" in stated else []
    words += ["--config", str(path.parent / stated["base"])] if "base" in stated else []
    before = asdict(read(program, words))
    after = asdict(read(program, ["--config", str(path)]))
    sections = {name: values for name, values in stated.items() if name not in ("method", "base", "expect")}
    needless = [
        f"{name}.{key}" for name, values in sections.items() for key in values if before[name][key] == after[name][key]
    ]
    assert not needless
