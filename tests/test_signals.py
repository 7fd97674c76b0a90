"""Signals: answered at once by a line, recorded for the loop, and the end of a program outside of it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, forked

from datafree import program, signals
from datafree.errors import exit_on_input_error
from datafree.signals import ENDING, StopSignal

NAMES = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP"]


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_answered_and_recorded_and_the_handlers_are_restored(name, capfd):
    before = [signal.getsignal(n) for n in ENDING]
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.received == name
        assert f"\n{name}: the run stops after this step and is saved" in capfd.readouterr().err
    assert [signal.getsignal(n) for n in ENDING] == before


def test_the_second_interrupt_is_raised():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_stop_signal_outside_the_main_thread():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", NAMES)
def test_outside_the_loop_a_signal_ends_the_program_with_a_line_and_its_code(name, capfd):
    number = getattr(signal, name)
    signals.let_resume()  # of an earlier program in the same process
    assert forked(exit_on_input_error, lambda: os.kill(os.getpid(), number) or time.sleep(5)) == 128 + number
    assert f"{name}: stopped\n" in capfd.readouterr().err


def test_a_program_that_trains_says_how_a_run_goes_on(capfd, monkeypatch):
    def stopped(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(program, "_run", stopped)
    assert forked(exit_on_input_error, lambda: program.run(None)) == 128 + signal.SIGTERM
    assert "SIGTERM: stopped; --resume auto continues a run from its last checkpoint\n" in capfd.readouterr().err


@pytest.mark.parametrize("library", ["libtorch_cpu", "libtorch_python"])
def test_ctrl_c_while_packages_load_is_no_traceback(library, tmp_path):
    words = [sys.executable, ROOT / "train_scratch.py", "--dataset", "digits", "--model", "resnet8"]
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while library not in Path(f"/proc/{started.pid}/maps").read_text() and started.poll() is None:
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate()
    assert started.returncode == 130 and "Traceback" not in said and "SIGINT" in said
