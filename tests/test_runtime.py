"""The machine: devices, seeds, saved random state, precision, signals, the provenance of a run."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import parts
import pytest
import torch

from datafree import runtime, session
from datafree.errors import InputError, OptionError

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that torch sees a number of GPUs."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(
    "count, name, expected",
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "cpu", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_device(gpus, count, name, expected):
    gpus(count)
    assert runtime.choose_device(name) == torch.device(expected)


@pytest.mark.parametrize("count, name", [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_absent_gpu_names_the_remedy(gpus, count, name):
    gpus(count)
    with pytest.raises(InputError, match=rf"{name}: no such GPU, torch finds {count}; --device cpu"):
        runtime.choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "cpu:0"])
def test_unknown_device_is_an_option_error(name):
    with pytest.raises(OptionError, match="not one of auto, cpu, cuda, cuda:N"):
        runtime.choose_device(name)


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()


def test_seed_repeats_every_generator():
    runtime.seed_everything(7, deterministic=False)
    first = draws()
    runtime.seed_everything(7, deterministic=False)
    assert draws() == first
    runtime.seed_everything(8, deterministic=False)
    assert not set(map(str, draws())) & set(map(str, first))


def test_deterministic_is_a_switch():
    runtime.seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    runtime.seed_everything(0, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_random_state_is_exact_through_a_file(tmp_path):
    runtime.seed_everything(3, deterministic=False)
    draws()  # leaves the second of a pair of Gaussians cached in Python and in NumPy
    torch.save(runtime.rng_state(), tmp_path / "rng.pth")
    expected = [draws() for _ in range(700)]  # more numbers than one block of the Mersenne twister
    runtime.seed_everything(99, deterministic=False)
    runtime.load_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True))
    assert [draws() for _ in range(700)] == expected


def test_autocast():
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with runtime.autocast(CPU, "bf16"):
        assert layer(x).dtype == torch.bfloat16
        with runtime.autocast(CPU, "none"):
            assert layer(x).dtype == torch.float32
    with pytest.raises(InputError, match="fp16 needs a GPU; use --precision bf16 or none"):
        runtime.autocast(CPU, "fp16")


def test_bf16_is_timed_against_fp32(monkeypatch):
    def convolution(images, filters):
        time.sleep(0.05 if images.dtype == torch.bfloat16 else 0.005)
        return images.sum() * filters.sum()

    monkeypatch.setattr(torch.nn.functional, "conv2d", convolution)
    assert 3 < runtime.bf16_slowdown() < 30


@pytest.mark.parametrize(
    "slowdown, precision, told", [(11.7, "bf16", True), (1.2, "bf16", False), (11.7, "none", False)]
)
def test_a_cpu_on_which_bf16_is_slow_is_an_alarm(slowdown, precision, told, monkeypatch):
    monkeypatch.setattr(session, "bf16_slowdown", lambda: slowdown)
    notes = session.Session(parts.options(precision=precision, device="cpu", dataset="digits"), write=False).notes
    assert [note for note in notes if "12 times as long as in fp32; leave the option out" in note] == notes[: int(told)]
    assert any(note.startswith("[Alarm] --precision bf16") for note in notes) == told


def test_threads():
    before = torch.get_num_threads()
    runtime.set_threads(1)
    assert torch.get_num_threads() == 1
    runtime.set_threads(0)
    assert torch.get_num_threads() == 1
    runtime.set_threads(before)


def test_environment_is_json(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["datafree_kd.py", "--seed", "1"])
    record = runtime.environment(CPU)
    assert json.loads(json.dumps(record)) == record
    assert record["torch"] == torch.__version__ and record["device"] == "cpu"
    assert record["command"] == "datafree_kd.py --seed 1" and record["threads"] == torch.get_num_threads()


def git(folder, *arguments):
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # a hook sets some
    command = ["git", "-C", folder, *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=clean).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_and_dirty_flag_are_of_this_tree_only(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(runtime, "SOURCE", tmp_path)
    record = runtime.environment(CPU)
    assert (record["commit"], record["dirty"]) == (git(tmp_path, "rev-parse", "HEAD").strip(), False)
    (tmp_path / "code.py").write_text("2")
    assert runtime.environment(CPU)["dirty"]
    monkeypatch.setattr(runtime, "SOURCE", tmp_path / "inside")  # the parent's repository is another project's
    assert runtime.environment(CPU)["commit"] is None


def test_peak_memory_is_that_of_this_program_and_not_of_the_one_that_began_it():
    held = torch.ones(10**9 // 4)  # which a child's ru_maxrss counts on Linux
    code = "import torch; from datafree.runtime import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < held.numel() * 4 / 1e6


def test_peak_memory_is_no_less_than_what_is_held():
    before = runtime.peak_memory(torch.device("cpu"))
    held = torch.ones(400, 1_000_000, dtype=torch.uint8)
    assert runtime.peak_memory(torch.device("cpu")) >= max(before, held.numel() / 1e6)


def test_free_memory_is_the_minimum_of_what_is_available_and_what_is_allowed(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   5000 kB\n", "/proc/self/status": "VmRSS:\t 1000 kB\n"}
    monkeypatch.setattr(runtime.Path, "read_text", lambda self: files[str(self)] if str(self) in files else missing())
    assert runtime.free_memory(torch.device("cpu")) == 5000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert runtime.free_memory(torch.device("cpu")) == 5000 * 1024
    files["/sys/fs/cgroup/memory.max"] = f"{3000 * 1024}\n"
    assert runtime.free_memory(torch.device("cpu")) == 2000 * 1024
    files.clear()
    assert runtime.free_memory(torch.device("cpu")) == 4 * 10**9


def missing():
    raise FileNotFoundError


@pytest.mark.parametrize(
    "device, variable, missing", [("cpu", "CXX", "C\\+\\+ compiler"), ("cuda", "CC", "C compiler")]
)
def test_a_missing_compiler_is_one_sentence(device, variable, missing, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(
        InputError, match=f"--compile needs a {missing} and finds none .no-such-compiler.*--compile off"
    ):
        runtime.require_compiler(torch.device(device))
    monkeypatch.setenv(variable, "ls")
    runtime.require_compiler(torch.device(device))


def test_without_triton_nothing_is_compiled_for_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package triton"):
        runtime.require_compiler(torch.device("cuda"))
