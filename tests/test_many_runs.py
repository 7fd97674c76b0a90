"""The commands of docs/many_runs.md: each run of a grid is made once, goes on where it stopped, and is in the table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "many_runs.md").read_text(), re.DOTALL | re.MULTILINE)
SEEDS, GRID, LOOP, XARGS, SLURM, REPORT = BLOCKS
TINY = {
    "datafree_kd.py": "--epochs 1 --ep_steps 2 --kd_steps 2 --g_steps 1",
    "train_scratch.py": "--epochs 1 --batch_size 512",
}
STAND_INS = {"srun": '[ -z "${SRUN_CODE:-}" ] || exit "$SRUN_CODE"\nexec "$@"', "scontrol": 'echo "scontrol $*"'}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_page_is_valid_bash(number):
    assert subprocess.run(["bash", "-n"], input=BLOCKS[number], text=True).returncode == 0


def test_slurms_options_are_before_the_first_command_and_an_array_has_a_task_for_each_run():
    lines = SLURM.splitlines()
    options = [line for line in lines if line.startswith("#SBATCH --")]
    assert lines[0] == "#!/bin/bash" and lines[1 : 1 + len(options)] == options
    cells = re.search(r"cells.txt <<'END'\n(.*?)END\n", GRID, re.DOTALL)[1].splitlines()
    seeds = re.search(r"for seed in ([\d ]+);", GRID)[1].split()
    assert f"#SBATCH --array=0-{len(cells) * len(seeds) - 1}" in options


@pytest.fixture
def shell(tmp_path):
    """Run a block in a folder like the project's, on tiny budgets -> (exit code, what it printed)."""
    for name in ("configs", "datafree", "registry.py", *TINY):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    cases = "".join(f'{name}) set -- "$@" {words};;\n' for name, words in TINY.items())
    python = f'case $1 in\n{cases}esac\nexec {sys.executable} "$@"'
    for name, text in {**STAND_INS, "python": python}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(block, **settings):
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **settings}
        done = subprocess.run(["bash", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


def fewer(block):
    """The block for two seeds."""
    return block.replace("0 1 2", "0 1")


def rows_of(table):
    return [line.split() for line in table.splitlines() if line.startswith("digits_rgal")]


@pytest.mark.slow
def test_seeds_one_after_the_other(shell, tmp_path):
    code, printed = shell(fewer(SEEDS))
    [row] = rows_of(printed.split("\nrun ")[-1])
    assert code == 0 and row[0] == "digits_rgal_resnet20_resnet8"
    assert len(list(tmp_path.glob("runs/digits_rgal_*/seed*/summary.json"))) == 2


@pytest.mark.slow
def test_a_grid_is_made_two_at_a_time_once_and_goes_on_where_it_was_stopped(shell, tmp_path):
    assert shell(SEEDS.splitlines()[0])[0] == 0
    assert shell(fewer(GRID)) == (0, "")
    assert (tmp_path / "runs.txt").read_text().splitlines()[1] == "1 alone --triplet 0 --striplet 0"
    code, printed = shell(XARGS)
    runs = sorted(path.parent.name for path in tmp_path.glob("runs/grid/*/*/summary.json"))
    assert code == 0 and runs == ["alone-seed0", "alone-seed1", "both-seed0", "both-seed1"], printed
    assert shell(LOOP) == (0, "")  # all are finished
    [summary] = tmp_path.glob("runs/grid/*/both-seed0/summary.json")
    before = summary.read_text()
    summary.unlink()
    code, printed = shell(SLURM, SLURM_ARRAY_TASK_ID="2", SLURM_JOB_ID="7")
    assert code == 0 and "Resumed from last.pth: epoch 1" in printed and "scontrol" not in printed
    assert re.search('"last_acc1": .*', summary.read_text())[0] == re.search('"last_acc1": .*', before)[0]
    code, table = shell(REPORT)
    assert code == 0 and [row[1:3] for row in rows_of(table)] == [
        ["striplet=0", "triplet=0"],
        ["striplet=0.1", "triplet=0.1"],
    ]
    assert [row[3] for row in rows_of(table)] == ["2", "2"]


def test_a_job_whose_time_is_over_is_put_into_the_queue_again(shell):
    shell(GRID)
    task = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_JOB_ID": "7"}
    assert shell(SLURM, SRUN_CODE="138", **task) == (138, "scontrol requeue 7\n")
    assert shell(SLURM, SRUN_CODE="2", **task) == (2, "")


def test_a_run_that_fails_does_not_keep_others_from_being_made(shell, tmp_path):
    shell(GRID)
    (tmp_path / "bin" / "python").write_text('#!/bin/bash\necho "$@"\nexit 1\n')
    code, printed = shell(LOOP)
    assert code == 0 and printed.count("code 1: ") == 6
    assert "--triplet 0.1 --striplet 0.1 --save_dir runs/grid --log_tag both-seed2 --seed 2 --resume auto" in printed
    assert Path(tmp_path / "runs.txt").read_text().count("\n") == 6
