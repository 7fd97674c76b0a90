"""What the tests of whole programs share: one thread, a trained teacher, programs called in this process."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import nets  # noqa: E402

import datafree_kd  # noqa: E402
import datafree_quantize  # noqa: E402
import registry  # noqa: E402
import train_scratch  # noqa: E402
from datafree import cli, cost  # noqa: E402
from datafree.config import CONFIGS, DistillConfig  # noqa: E402
from datafree.errors import InputError, exit_on_input_error  # noqa: E402
from datafree.synthesis import traits_of  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    """All tests but those of ``-m gpu`` run on the CPU, where results repeat to the bit, also beside a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def few_measured_steps(monkeypatch):
    """A dry run measures no longer than it must."""
    monkeypatch.setattr(cost, "SECONDS", 0)


def mostly_slow(cases, quick):
    """Values for ``parametrize``: all ``cases``, of which the quick tests run those in ``quick`` alone."""
    cases = list(cases)
    assert set(quick) <= set(cases), set(quick) - set(cases)
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*value, marks=[] if case in quick else pytest.mark.slow) for value, case in zip(values, cases)]


@contextmanager
def command_line(*words):
    """Inside, the program's name and arguments are these."""
    before = sys.argv
    sys.argv = list(map(str, words))
    try:
        yield
    finally:
        sys.argv = before


def call(program, *words):
    """Do what ``python <program> <words>`` does, in this process."""
    with command_line(f"{program.__name__}.py", *words):
        exit_on_input_error(program.main)


def scratch(*words):
    call(train_scratch, "--threads", 1, "--dataset", "digits", "--crop_padding", 1, *words)


TINY_RUN = (
    *("--threads", 1, "--dataset", "digits", "--crop_padding", 1, "--student", nets.name("small")),
    *("--epochs", 4, "--ep_steps", 6, "--kd_steps", 3, "--batch_size", 16),
)
TINY_SYNTHESIS = ("--g_steps", 3, "--synthesis_batch_size", 16, "--lr_g", 0.03)
TINY_GENERATOR = ("--nz", 16, "--ngf", 4)


def tiny_run(*words):
    """Options of a tiny budget for a run with the options ``words``, without those that nothing would read there."""
    pairs = zip(map(str, words), map(str, words[1:]))
    named = [word for pair in pairs if pair[0] in ("--method", "--source") for word in pair]
    try:
        with command_line("", *named):
            config, _ = cli.parse(
                DistillConfig, named, description="", method_files=registry.METHODS, other_configs=CONFIGS
            )
    except InputError:  # a mistake, which the program is to report
        config = DistillConfig()
    traits = traits_of(config.synthesis.source)
    return (
        *TINY_RUN,
        *(TINY_SYNTHESIS if traits.synthesises else ()),
        *(TINY_GENERATOR if traits.has_generator else ()),
        *(("--warmup", 0) if config.schedule.warmup else ()),
        *(("--reset_epoch", 2) if config.synthesis.reset_epoch else ()),
        *(("--pool_images", ROOT / "docs" / "results") if config.synthesis.source == "folder" else ()),
    )


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Path of the weights of a ``tiny`` network that knows digits well."""
    place = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        scratch("--model", nets.name("tiny"), "--epochs", 12, "--batch_size", 64, "--save_dir", "runs")
    return place / "checkpoints" / "pretrained" / "digits_nets-tiny.pth"


@pytest.fixture
def distil(teacher, tmp_path, monkeypatch):
    """Call datafree_kd.py on a tiny budget from ``tmp_path`` -> the folder of the run, called ``tag``."""
    monkeypatch.chdir(tmp_path)

    def run(*words, method="rgal", tag="run", save_dir="runs"):
        given = (
            *("--method", method, "--teacher", nets.name("tiny"), "--teacher_weights", teacher),
            *("--save_dir", save_dir, "--log_tag", tag),
        )
        call(datafree_kd, *given, *tiny_run(*given, *words), *words)
        return next((tmp_path / save_dir).glob(f"*/{tag}"), None)

    return run


TINY_QUANTIZATION = (
    *("--threads", 1, "--dataset", "digits", "--teacher", nets.name("tiny"), "--w_bits", 3, "--a_bits", 3),
    *("--ep_steps", 6, "--kd_steps", 3, "--batch_size", 16, "--calibration", 2),
)
QUANTIZATION_LENGTH = ("--epochs", 2, "--warmup", 2)
QUANTIZATION_SYNTHESIS = ("--g_steps", 3, "--synthesis_batch_size", 16)
QUANTIZATION_BUDGETS = {
    "rgal": (*QUANTIZATION_SYNTHESIS, "--nz", 8, "--ngf", 4),
    "gdfq": (*QUANTIZATION_SYNTHESIS, "--nz", 8, "--ngf", 4),
    "inversion": (*QUANTIZATION_SYNTHESIS, "--nz", 8, "--ngf", 4),
    "pixels": (*QUANTIZATION_SYNTHESIS, "--synthesis_rounds", 6),
    "noise": (),
    "real": (),
}


@pytest.fixture
def quantised(teacher, tmp_path, monkeypatch):
    """Call datafree_quantize.py on a tiny budget from ``tmp_path`` -> the folder of the run, called ``tag``."""
    monkeypatch.chdir(tmp_path)

    def run(*words, method="rgal", tag="run", length=QUANTIZATION_LENGTH):
        given = ("--method", method, "--teacher_weights", teacher, "--log_tag", tag)
        call(datafree_quantize, *TINY_QUANTIZATION, *QUANTIZATION_BUDGETS[method], *length, *given, *words)
        return next((tmp_path / "runs").glob(f"*/{tag}"), None)

    return run


@pytest.fixture
def refused(capsys):
    """Call what has to stop with exit code ``code`` and one line "error: ..." on stderr -> that line.

    before_run: nothing else may be on stderr; a run that had begun leaves its progress bar there.
    """

    def run(function, *words, code=1, before_run=True):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*words)
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == code and lines[-1].startswith("error: "), lines
        assert not before_run or len(lines) == 1, lines
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    return run


def forked(function, *arguments):
    """Call ``function`` in a forked copy of this process -> its exit code."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            function(*arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def command(*words, **options):
    """Run ``python <words>`` as a separate process that can import the project and the tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, **options
    )


OF_THE_MACHINE = ("seconds/",)  # what a run costs


def rows(folder):
    """The rows of metrics.jsonl without what depends on the machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(OF_THE_MACHINE)} for line in lines]
