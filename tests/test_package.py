"""The package as a user installs it: its requirements, its commands from another folder, its functions by import."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import scratch

import datafree
import registry
from datafree import __main__ as commands
from datafree.__main__ import PROGRAMS
from datafree.errors import InputError

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def listed(name):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {line for line in lines if line and not line.startswith("-r")}


def python(*words, cwd, path=""):
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env={"PYTHONPATH": str(path)}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as pip installs it, without the packages that it needs."""
    source, place = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("installed")
    unused = shutil.ignore_patterns(".*", "runs", "data", "docs", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unused)  # because pip leaves what it builds there
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    return place


def test_both_lists_of_required_packages_agree():
    extras = PROJECT["optional-dependencies"]
    assert set(PROJECT["dependencies"]) == listed("requirements.txt")
    assert set(extras["export"]) == listed("requirements-export.txt")
    own = {name for name in extras["dev"] if not name.startswith("datafree[")}
    assert own | set(extras["plot"]) | set(extras["timm"]) == listed("requirements-dev.txt")


def test_every_program_is_a_command():
    assert PROJECT["scripts"] == {f"datafree-{name}": f"datafree.__main__:{name}" for name in commands.PROGRAMS}
    for name in commands.PROGRAMS:
        assert getattr(commands, name).args == (name,)


def test_the_package_lists_its_programs_and_starts_them(tmp_path):
    listing = python("-m", "datafree", cwd=tmp_path, path=ROOT)
    assert listing.returncode == 0 and all(f"\n  {name} " in listing.stdout for name in commands.PROGRAMS)
    helped = python("-m", "datafree", "kd", "--help", cwd=tmp_path, path=ROOT)
    assert helped.stdout.startswith("usage: datafree-kd [--option value ...]\n")
    unknown = python("-m", "datafree", "distil", cwd=tmp_path, path=ROOT)
    assert unknown.returncode == 2 and unknown.stderr.startswith(
        "error: there is no program distil; the programs are kd,"
    )


@pytest.mark.parametrize("words", [(str(ROOT / "datafree_kd.py"),), *(("-m", "datafree", n) for n in ("", *PROGRAMS))])
def test_the_version_is_that_of_the_package(words, tmp_path):
    assert python(*filter(None, words), "--version", cwd=tmp_path, path=ROOT).stdout == datafree.__version__ + "\n"


def test_a_registry_of_another_project_does_no_harm(tmp_path):
    (tmp_path / "registry.py").write_text("MODELS = {}\n")
    script = "import registry, sys, datafree_kd; sys.argv = ['x', '--print_config']; datafree_kd.main()"
    shown = python("-c", script, cwd=tmp_path, path=ROOT)
    assert shown.returncode == 0 and "\nmethod: rgal\n" in "\n" + shown.stdout


@pytest.mark.slow
def test_the_installed_package_distils_digits_from_another_folder(installed, tmp_path):
    (tmp_path / "registry.py").write_text("MODELS = {}\n")
    tiny = ["--dataset", "digits", "--threads", "1", "--epochs", "1"]

    def command(name, *words):
        run = start(name, *words)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def start(name, *words):
        return python(installed / "bin" / f"datafree-{name}", *words, *tiny, cwd=tmp_path, path=installed)

    assert "train it by: datafree-train --dataset digits --model resnet8" in start("kd", "--teacher", "resnet8").stderr
    command("train", "--model", "resnet8")
    steps = ["--ep_steps", "4", "--kd_steps", "2", "--g_steps", "2", "--synthesis_batch_size", "16"]
    logged = command("kd", "--teacher", "resnet8", "--student", "resnet8", *steps)
    accuracy = float(logged.split("Last: ")[1].split()[0])
    page = python(installed / "bin" / "datafree-report", "runs", "--html", "x.html", cwd=tmp_path, path=installed)
    assert page.returncode == 0 and (tmp_path / "x.html").is_file(), page.stderr
    script = """
import datafree.registry
network = datafree.load("runs/digits_rgal_resnet8_resnet8/seed0")
images, labels = next(datafree.registry.get_dataset("digits")[2].batches(355))
print(100 * (network(images).argmax(1) == labels).float().mean().item())
"""
    loaded = python("-c", script, cwd=tmp_path, path=installed)
    assert float(loaded.stdout) == pytest.approx(accuracy, abs=1e-3), loaded.stderr
    for name in PROJECT["scripts"]:
        helped = subprocess.run(
            [installed / "bin" / name, "--help"], env={"PYTHONPATH": str(installed)}, capture_output=True, text=True
        )
        assert helped.returncode == 0 and "datafree" in helped.stdout and not helped.stderr, (name, helped.stderr)
    example = start("kd", "--config", "configs/digits/rgal_resnet20_resnet8.yaml", "--print_config")
    assert "\n  teacher: resnet20\n" in example.stdout, example.stderr
    words = ["runs/digits_rgal_resnet8_resnet8/seed0", "--format", "pt2", "--repeats", "1"]
    exported = python(installed / "bin" / "datafree-export", *words, cwd=tmp_path, path=installed)
    assert exported.returncode == 0 and "model.pt2" in exported.stdout, exported.stderr


def blocks():
    page = (ROOT / "docs" / "library.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(blocks())))
def test_a_block_of_the_page_on_the_library_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "seed0" in blocks()[number]:
        scratch("--model", "resnet8", "--epochs", 1)
    exec(compile(blocks()[number], "docs/library.md", "exec"), {})


def test_models_and_data_sets_come_by_name(tmp_path):
    model = registry.get_model("resnet8", 10, in_channels=1)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    assert registry.get_model("torchvision:resnet18", 5, False)(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(InputError, match="resnet8 has no weights of its own"):
        registry.get_model("resnet8", 10, True)
    classes, train, test = registry.get_dataset("digits", tmp_path)
    images, labels = next(test.batches(5))
    assert (classes, len(train), len(test)) == (10, 1442, 355)
    assert images.shape == (5, 1, 16, 16) and 0 <= images.min() and images.max() <= 1 and len(labels) == 5
