"""What needs no network answers at once: it imports neither torch nor TensorBoard, which take seconds."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

SLOW = ("torch", "torchvision", "tensorboard", "PIL")
# Runs what follows -c as python itself would, then prints which of the slow packages were imported.
SCRIPT = f"""
import runpy, sys
_, kind, name, *words = sys.argv
sys.argv = [name, *words]
sys.path.insert(0, {str(ROOT)!r})
try:
    run = runpy.run_path if kind == "path" else runpy.run_module
    run(name, run_name="__main__")
except SystemExit as stop:
    print("exit", stop.code)
print("imported", *sorted(set({SLOW!r}) & sys.modules.keys()))
"""


def start(kind, name, *words, cwd):
    """Run a program in a new process -> its output, its exit code and the slow packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(name), *map(str, words)], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    code = lines.pop().split()[1] if lines and lines[-1].startswith("exit ") else "None"
    return "\n".join(lines) + done.stderr, code, last.split()[1:]


@pytest.mark.parametrize(
    "program, words, part, code",
    [
        ("datafree_kd.py", ["--help"], "usage: datafree_kd.py", "0"),
        ("train_scratch.py", ["-h"], "usage: train_scratch.py", "0"),
        ("datafree_kd.py", ["--epcohs", 3], "error: unknown option --epcohs", "2"),
        ("datafree_kd.py", ["--bn", "much"], "error: --bn cannot be 'much'", "2"),
        ("datafree_kd.py", ["--method", "rgla"], "did you mean rgal", "2"),
        ("datafree_kd.py", ["--source", "noise", "--bn", 2], "error: --bn has no effect", "2"),
        ("datafree_kd.py", ["--kd_steps", 3, "--ep_steps", 4], "error: ep_steps 4", "1"),
        ("datafree_kd.py", ["--start_layer", 3, "--end_layer", 2], "error: start_layer 3", "2"),
        ("datafree_kd.py", ["--source", "nowhere.py:Mine"], "error: there is no file 'nowhere.py'", "1"),
        ("datafree_kd.py", ["--print_config"], "\nsynthesis:\n", "None"),
        ("datafree_quantize.py", ["--help"], "usage: datafree_quantize.py", "0"),
        ("datafree_quantize.py", ["--w_bits", 33], "error: --w_bits cannot be 33", "2"),
        ("datafree_quantize.py", ["--print_config"], "\nquantizer:\n", "None"),
        ("datafree_incremental.py", ["--help"], "usage: datafree_incremental.py", "0"),
        ("datafree_incremental.py", ["--method", "abdd"], "did you mean abd", "2"),
        ("datafree_incremental.py", ["--method", "lwf", "--striplet", 1], "error: --striplet has no effect", "2"),
        ("datafree_incremental.py", ["--resume", "x.pth"], "error: --resume x.pth: a run of several tasks", "2"),
        ("datafree_incremental.py", ["--print_config"], "\nincremental:\n", "None"),
        ("train_scratch.py", ["--epcohs", 3], "error: unknown option --epcohs", "2"),
        ("train_scratch.py", ["--print_config"], "\ntraining:\n", "None"),
    ],
)
def test_help_mistakes_and_the_configuration_import_nothing_slow(program, words, part, code, tmp_path):
    output, ended, imported = start("path", ROOT / program, *words, cwd=tmp_path)
    assert part in output and ended == code
    assert imported == []


def test_the_report_imports_nothing_slow(tmp_path):
    summary = {"run": "digits_rgal_a_b", "seed": 0, "last_acc1": 91.5, "best_acc1": 92.0, "options": {"bn": 1.0}}
    (tmp_path / "runs" / "seed0").mkdir(parents=True)
    (tmp_path / "runs" / "seed0" / "summary.json").write_text(json.dumps(summary))
    output, ended, imported = start("module", "datafree.report", "runs", cwd=tmp_path)
    assert "digits_rgal_a_b" in output and "91.5" in output and ended == "None"
    assert imported == []
    output, ended, imported = start("module", "datafree.report", "nowhere", cwd=tmp_path)
    assert "error: there is no folder nowhere" in output and ended == "1" and imported == []


def test_the_ledger_and_mistakes_about_an_experiment_import_nothing_slow(tmp_path):
    for words, part in ((["--ledger"], "# Ledger of the experiments"), (["none.yaml"], "error: cannot read none.yaml")):
        output, _, imported = start("module", "datafree.reproduce", *words, cwd=tmp_path)
        assert part in output and imported == []


def test_a_run_is_seen_to_import_torch(tmp_path):
    """The test of the tests above."""
    _, _, imported = start("path", ROOT / "datafree_kd.py", "--dataset", "digits", cwd=tmp_path)
    assert "torch" in imported
