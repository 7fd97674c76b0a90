"""Interrupting a run at a chosen call, and comparing the resumed run with the straight one to the last bit."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch
from conftest import OF_THE_MACHINE, rows


class Killed(BaseException):
    """Ends a run as nothing in the program expects."""


def kill():
    raise Killed


@contextmanager
def stopped(act):
    """The run inside ends as ``act`` ends runs."""
    with pytest.raises(Killed if act is kill else SystemExit) as end:
        yield
    assert act is kill or end.value.code == 128 + signal.SIGTERM


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def at_call(patch, owner, method, number, act):
    """Let ``act`` happen just before the ``number``-th call of ``owner.method``."""
    original, calls = getattr(owner, method), []

    def wrapped(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            act()
        return original(self, *args, **kwargs)

    patch.setattr(owner, method, wrapped)


def checkpoint_of(folder, name="last.pth"):
    state = torch.load(folder / "checkpoints" / name, weights_only=True)
    state.pop("seconds"), state.pop("paces"), state.pop("metadata")
    state["result"] = {k: v for k, v in state["result"].items() if not k.startswith(OF_THE_MACHINE)}
    return state


def same(a, b):
    """Whether two nested states are equal to the last bit."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(one, other):
    first, second = checkpoint_of(one), checkpoint_of(other)
    assert first.keys() == second.keys()
    for part in first:
        assert same(first[part], second[part]), part
    assert rows(one) == rows(other) and len(rows(one)) == 4
    assert same(checkpoint_of(one, "best.pth"), checkpoint_of(other, "best.pth"))
