"""What becomes of stdout and stderr ends no run: all of it is in log.txt."""

import os
import sys

import nets
import pytest
from conftest import forked, rows, scratch

from datafree.errors import exit_on_input_error

WORDS = ("--model", nets.name("tiny"), "--epochs", 2, "--batch_size", 256, "--log_tag", "run")


def closed(number):
    os.close(number)


def full(number):
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def unread(number):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)


def with_streams(breaking, numbers, run, buffering=1):
    """Call ``run`` as a program whose standard streams of these numbers are broken before it starts."""

    def child():
        for number, name in ((1, "stdout"), (2, "stderr")):
            if number in numbers:
                breaking(number)
            opened = breaking is not closed or number not in numbers
            setattr(sys, name, open(number, "w", buffering, closefd=False) if opened else None)
        run()
        for stream in filter(None, (sys.stdout, sys.stderr)):  # as Python does at its end
            stream.flush()

    return forked(child)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("breaking", [closed, full, unread])
def test_a_broken_stream_ends_no_run(breaking, numbers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datafree.progress.LINE_EVERY", 0)
    assert with_streams(breaking, numbers, lambda: scratch(*WORDS)) == 0
    folder = tmp_path / "runs" / "digits_scratch_nets-tiny" / "run"
    assert (folder / "summary.json").exists() and len(rows(folder)) == 2
    assert "Everything is in" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("breaking, code", [(full, 1), (unread, 141)])
def test_output_that_is_the_result_and_cannot_be_written_is_no_success(breaking, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_streams(breaking, (1,), lambda: scratch("--print_config")) == code


@pytest.mark.parametrize("length", [10, 10_000, 1_000_000])
@pytest.mark.parametrize("buffering", [1, -1])
def test_a_reader_that_goes_is_no_fault(length, buffering, capfd):
    """As head does, however much of a result is still to come."""
    tell = lambda: exit_on_input_error(lambda: print("-" * length))  # noqa: E731
    assert with_streams(unread, (1,), tell, buffering) == 141
    assert not capfd.readouterr().err
