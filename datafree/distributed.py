"""The processes of one run: how they find each other, agree and end together. Gloo connects CPUs, NCCL GPUs.

All of them execute the same program on the same tensors and draw the same random numbers, so that they take the same
decisions; what they divide is in :mod:`datafree.shares`. Only the first one writes and speaks. Alone, a process finds
here that there is nothing to do.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from datafree import launch
from datafree.config import Run
from datafree.errors import InputError, OptionError
from datafree.plugins import first_line
from datafree.signals import let_error_end

TIMEOUT = timedelta(minutes=30)  # of waiting for another process; one that is gone is noticed at once
LOST = r"peer|connection|socket|broken pipe|timed? ?out|abort|NCCL"  # in what the backends say of another process


class ProcessLost(InputError):
    """Another process of the run is gone."""


class _Group:
    """What this process knows as one of several: its device, whether it computes apart for a while, and the states of
    its own random numbers."""

    def __init__(self, device: torch.device):
        self.device, self.is_apart = device, False
        self.own: list[Tensor] = []


_group: _Group | None = None
_store: dist.Store | None = None  # by which the processes find each other


def count() -> int:
    """How many processes share the passes of the networks; 1 for one that acts alone."""
    return dist.get_world_size() if _group and not _group.is_apart else 1


def rank() -> int:
    """The number of this process; the first one, 0, is the one that writes."""
    return dist.get_rank() if _group else 0


@contextmanager
def one_run() -> Iterator[None]:
    """Inside, the processes that torchrun started make one run once :func:`start` is called; there may be one alone.

    An error of one of them ends all, with the line of the first one that has an error.
    """
    global _store
    if launch.processes() == 1:
        yield
        return
    _store = _rendezvous()
    try:
        yield
    except Exception as error:
        if not _is_first_to_fail():
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        if isinstance(error, InputError) and launch.rank():
            error.args = (f"process {launch.rank()} of {launch.processes()}: {error}",)
        raise  # the others see the connection end
    except SystemExit:
        _end()
        raise
    _end()


def start(run: Run, device: torch.device, options: str) -> None:
    """Connect this process, which computes on ``device``, with the others of :func:`one_run`; do nothing outside of it.

    options: of the program, in words. Raises InputError if they differ, and for what several processes cannot do.
    """
    global _group
    if _store is None:
        return
    if run.compile != "off":
        raise OptionError(
            f"--compile {run.compile} does not go with several processes, which exchange statistics within a pass; "
            "give --compile off, or start one process"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _connecting():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=_store, rank=launch.rank(), world_size=launch.processes(), timeout=TIMEOUT
        )
    _group = _Group(device)
    require_same(options, "was started with other options than the first one; start all by the same command")


def _end() -> None:
    global _group, _store
    if _group:
        dist.destroy_process_group()
    _group = _store = None


def _rendezvous() -> dist.Store:
    """The store of all processes, found by the variables that torchrun sets. Raises InputError.

    It is that of all attempts of torchrun to start the processes, hence the prefix: addresses of an earlier attempt
    would be waited for in vain.
    """
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise InputError(
                f"WORLD_SIZE is {launch.processes()} in the environment but {name} is not set; start the processes by "
                "torchrun, or unset WORLD_SIZE for one alone"
            )
    with _connecting():
        store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def _connecting() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"could not connect to the other processes at {place} ({first_line(error)}); check address, port and "
            "firewall"
        ) from error


def _is_first_to_fail() -> bool:
    """Whether no other process has reported why it fails; its line is then the one that is printed."""
    assert _store is not None
    with suppress(RuntimeError):  # of a store that is gone with the process that kept it
        return _store.add("failures", 1) == 1
    return True


def call(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of torch.distributed; ProcessLost if another process is gone."""
    try:
        return collective(*args, **kwargs)
    except RuntimeError as error:
        if not re.search(LOST, str(error), re.IGNORECASE):
            raise
        let_error_end()
        raise ProcessLost(
            "lost the connection to another process of the run, which was killed or has ended (torchrun says how); "
            "--resume auto continues from the last checkpoint"
        ) from error


# Agreement. Everything here passes through the CPU, so that no device is waited for.


def gathered(value: Any) -> list[Any]:
    """What each process calls this with, plain values; all must call it."""
    if count() == 1:
        return [value]
    values = [None] * count()
    call(dist.all_gather_object, values, value)
    return values


def require_same(value: Any, fault: str) -> None:
    """Raise InputError in all processes if ``value`` differs between them; fault: what the one that differs did."""
    values = gathered(value)
    for number, other in enumerate(values):
        if other != values[0]:
            raise InputError(f"process {number} {fault}")


def least(number: int) -> int:
    """The least of the numbers that the processes call this with; each waits for all."""
    return _reduced(number, dist.ReduceOp.MIN)


def wait_for_all() -> None:
    """Return when all processes have called this."""
    least(0)


def any_signal(received: str | None) -> str | None:
    """A signal that any process has received, by name: the same answer in all; None if there is none."""
    if count() == 1:
        return received
    number = _reduced(signal.Signals[received].value if received else 0, dist.ReduceOp.MAX)
    return signal.Signals(number).name if number else None


def _reduced(number: int, op: Any) -> int:
    if count() == 1:
        return number
    value = torch.tensor(number)
    call(dist.all_reduce, value, op)
    return int(value)


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the first process go through the block, then the first one of each machine, then all others.

    So what the first one downloads or writes, the others find.
    """
    turn = (1 if launch.local_rank() == 0 else 2) if rank() else 0
    for _ in range(turn if count() > 1 else 0):
        wait_for_all()
    with apart():
        yield
    for _ in range(2 - turn if count() > 1 else 0):
        wait_for_all()


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process computes by itself, as if it were alone, and the others need not come here."""
    before = _group.is_apart if _group else False
    if _group:
        _group.is_apart = True
    try:
        yield
    finally:
        if _group:
            _group.is_apart = before


# Random numbers. The global ones are the same in all processes; within a divided pass a network draws its own.


def seed_own(seed: int) -> None:
    """Seed the random numbers that networks draw in the passes of this process."""
    if _group:
        value = int(np.random.SeedSequence((seed, rank())).generate_state(1, np.uint64)[0] >> np.uint64(1))
        devices = [torch.device("cpu"), *[_group.device] * (_group.device.type == "cuda")]
        _group.own = [torch.Generator(device).manual_seed(value).get_state() for device in devices]


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Inside, torch draws the random numbers of this process (as for dropout) instead of those of all."""
    assert _group
    common = _states()
    _set_states(_group.own or common)
    try:
        yield
    finally:
        _group.own = _states()
        _set_states(common)


def own_state() -> list[Tensor]:
    """The states of the random numbers of this process alone."""
    return list(_group.own) if _group else []


def load_own_state(states: list[Tensor]) -> None:
    """Continue where :func:`own_state` was taken."""
    if _group and len(states) == len(_group.own):
        _group.own = list(states)


def gpus() -> range:
    """Indices of the GPUs whose random numbers this process may draw: all, or of several processes its own."""
    if not _group:
        return range(torch.cuda.device_count())
    index = _group.device.index
    return range(index, index + 1) if _group.device.type == "cuda" else range(0)


def _states() -> list[Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus())]


def _set_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for index, state in zip(gpus(), states[1:]):
        torch.cuda.set_rng_state(state, index)
