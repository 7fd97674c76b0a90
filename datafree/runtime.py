"""The machine under a run: device, precision, seeds, signals, and a record of them."""

import ctypes
import importlib.util
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic
import torchvision
from torch import Tensor

from datafree import __version__, distributed, launch
from datafree.errors import InputError, OptionError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

SOURCE = Path(__file__).resolve().parent.parent


def choose_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the first GPU, or else the CPU.

    Of several processes each has the GPU of its number on its machine. Raises OptionError for another name and
    InputError if there is no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if not re.fullmatch(r"auto|cuda(:\d+)?", name):
        raise OptionError(f"--device {name} is not one of auto, cpu, cuda, cuda:N")
    number = name.partition(":")[2]
    if number and launch.processes() > 1:
        raise OptionError(f"--device {name} is one GPU for {launch.processes()} processes; give --device cuda")
    index = int(number or launch.local_rank())
    if index >= count and count and launch.processes() > 1:
        raise InputError(
            f"process {index} of this machine has no GPU, torch finds {count}; start as many processes as there are "
            "GPUs, or give --device cpu"
        )
    if index >= count:
        raise InputError(f"--device {name}: no such GPU, torch finds {count}; --device cpu runs without one")
    return torch.device("cuda", index)


def require_compiler(device: torch.device) -> None:
    """Raise InputError if torch.compile lacks what ``device`` needs: a C++ compiler, or on a GPU Triton and a C one."""
    if device.type == "cpu":
        language, compilers = "C++", [os.environ.get("CXX", "g++")]
    else:
        language, compilers = "C", [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
        if importlib.util.find_spec("triton") is None:
            raise InputError("--compile needs the package triton on a GPU; install it, or leave --compile off")
    if not any(map(shutil.which, compilers)):
        raise InputError(
            f"--compile needs a {language} compiler and finds none ({', '.join(compilers)}); install one, such as g++, "
            "or leave --compile off"
        )


def require_default_state() -> None:
    """Raise InputError where torch was told, by a program or a network's file, to compute otherwise than by default."""
    if torch.is_inference_mode_enabled():
        raise InputError("nothing can be trained inside torch.inference_mode; call it outside")
    if torch.get_default_dtype() != torch.float32:
        raise InputError(
            f"torch's default type was set to {str(torch.get_default_dtype())[6:]}; networks are trained in float32: "
            "leave torch.set_default_dtype out, and give a network's type by .double() or .to(dtype)"
        )


def set_threads(n: int) -> None:
    """Use ``n`` CPU threads; 0 keeps torch's default."""
    if n:
        torch.set_num_threads(n)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python, NumPy and torch; ``deterministic`` restricts torch to kernels that are exactly reproducible."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    distributed.seed_own(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not reproducible without it
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def rng_state() -> dict[str, Any]:
    """State of all global random number generators, in plain types that a weights-only load accepts."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),  # type: ignore[attr-defined]
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(n) for n in distributed.gpus()] if torch.cuda.is_initialized() else [],
        "own": distributed.own_state(),
    }


def load_rng_state(state: dict[str, Any]) -> None:
    """Restore a :func:`rng_state`; GPUs that only one of the two machines has keep their state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for index, gpu_state in zip(distributed.gpus(), state["cuda"]):
        torch.cuda.set_rng_state(gpu_state, index)
    distributed.load_own_state(state.get("own", []))  # which earlier versions did not save


@contextmanager
def same_rng() -> Iterator[None]:
    """After the block, all global random number generators are in the state that they were in before it."""
    state = rng_state()
    try:
        yield
    finally:
        load_rng_state(state)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A new context for forward passes in ``none`` (fp32), ``bf16`` or ``fp16`` (GPU only).

    Raises InputError if the device does not support the precision.
    """
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU; use --precision bf16 or none on the CPU")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"{torch.cuda.get_device_name(device)} has no bf16; use --precision fp16 or none")
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "none")


def bf16_slowdown() -> float:
    """Measured on this CPU: the time of a convolution and its gradients in bf16, over that in fp32."""

    def seconds(dtype: torch.dtype) -> float:
        images = torch.ones(8, 32, 16, 16, dtype=dtype).requires_grad_()
        filters = torch.ones(32, 32, 3, 3, dtype=dtype).requires_grad_()
        taken = []
        for _ in range(5):  # the first one also chooses a kernel
            start = time.perf_counter()
            torch.nn.functional.conv2d(images, filters).sum().backward()
            taken.append(time.perf_counter() - start)
        return min(taken)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def peak_memory(device: torch.device) -> int | None:
    """Peak memory so far, in MB: of tensors on a GPU, or of this process on the CPU (None if unknown)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    peak = _number_in("/proc/self/status", r"VmHWM:\s*(\d+) kB", 1024)  # Linux, whose getrusage counts a parent's too
    if peak is None and resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None if peak is None else round(peak / 1e6)


def reset_peak(device: torch.device) -> float | None:
    """Let :func:`peak_memory` be that of what follows -> MB in use now; None where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return peak_memory(device)
    try:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # of glibc: what was freed is in use no longer
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not on Linux
        return None
    return peak_memory(device)


def free_memory(device: torch.device) -> int:
    """Bytes available for tensors on ``device``: of a GPU, or of the machine, within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_number_in("/proc/meminfo", r"MemAvailable:\s*(\d+) kB", 1024)]
    resident = _number_in("/proc/self/status", r"VmRSS:\s*(\d+) kB", 1024) or 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        allowed = _number_in(limit, r"(\d+)")
        free.append(allowed and max(0, allowed - resident))
    return min((size for size in free if size is not None), default=4 * 10**9)  # unknown outside Linux


def unfilled(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    """``torch.empty``, for a tensor whose unwritten rows are never used.

    With --deterministic torch would fill it, and so all of its memory would be in use at once.
    """
    switches: Any = torch.utils.deterministic
    filled, switches.fill_uninitialized_memory = switches.fill_uninitialized_memory, False
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    finally:
        switches.fill_uninitialized_memory = filled


def _number_in(path: str, pattern: str, unit: int = 1) -> int | None:
    """The first number in a system file that ``pattern`` matches, times ``unit``; None if there is none."""
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return int(found[1]) * unit if found else None


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Provenance to report with a result: commit, versions, machine, command line and time; JSON types only."""
    device, cpuinfo = device or choose_device("auto"), Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "version": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _git("status", "--porcelain", "-uno") not in ("", None),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": distributed.count(),
        "command": shlex.join(sys.orig_argv),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    """Output of git for this source tree; None without git, or if only a parent folder is a repository."""
    try:
        return subprocess.run(
            ["git", f"--git-dir={SOURCE / '.git'}", f"--work-tree={SOURCE}", *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
