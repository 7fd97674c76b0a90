"""Several processes that make one run, forked from the test: what torchrun would set is in their environment."""

import os
import signal
import traceback
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch.distributed import TCPStore

from datafree import distributed
from datafree.config import Run
from datafree.runtime import seed_everything


def together(work, count=2):
    """Call ``work()`` in ``count`` forked copies of this process -> their exit codes."""
    with store() as port:
        children = [forked(partial(start, work, rank, count, port)) for rank in range(count)]
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@contextmanager
def store():
    """The port of a store in a process of its own, as torchrun has it."""
    reading, writing = os.pipe()

    def serve():
        served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(served.port).encode())
        signal.pause()

    server = forked(serve)
    try:
        yield int(os.read(reading, 9))
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        os.close(reading), os.close(writing)


def forked(work):
    """Call ``work()`` in a copy of this process -> its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(work, rank, count, port):
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(ranks, **sizes, **place)
    work()


def connected(work):
    """``work``, called by processes that are connected."""

    def connect_and_work():
        with distributed.one_run():
            distributed.start(Run(), torch.device("cpu"), "")
            work()

    return connect_and_work


def assert_same_apart(work, rtol=1e-4, atol=1e-6):
    """``work()`` gives the same by all processes as by each of them alone."""
    found = []
    for context in (distributed.apart(), nullcontext()):
        seed_everything(0, False)
        with context:
            found.append(work())
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=atol)
