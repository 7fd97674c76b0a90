"""The programs of the package: python -m datafree kd --help, or datafree-kd --help where it is installed."""

import importlib
import signal
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__" or Path(sys.argv[0]).name.startswith("datafree-"):  # and not where it is merely imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() answers it: no traceback while packages load

from datafree import __version__
from datafree.errors import OptionError, exit_on_input_error
from datafree.launch import FILES

PROGRAMS = {
    "kd": ("datafree.programs.distill", "a student from a trained teacher, without its data"),
    "quantize": ("datafree.programs.quantize", "low-bit quantization of a trained network, without its data"),
    "incremental": ("datafree.programs.incremental", "classes that arrive in tasks, without the old images"),
    "train": ("datafree.programs.train", "a network trained on real images: a teacher, or an upper bound"),
    "export": ("datafree.export", "a trained network as ONNX, pt2 or safetensors, compared with torch"),
    "doctor": ("datafree.doctor", "what a long run of the others would stumble over, in less than a minute"),
    "report": ("datafree.report", "a table of runs: means, deviations and paired gains over seeds"),
    "curves": ("datafree.curves", "a picture of runs over their epochs or minutes"),
    "reproduce": ("datafree.reproduce", "an experiment again, compared with what its file expects"),
}
TRAINING = tuple(FILES)  # whose modules have a PROGRAM


def start(name: str) -> None:
    """Run the program called ``name`` with the rest of the command line."""
    exit_on_input_error(lambda: importlib.import_module(PROGRAMS[name][0]).main())


def main() -> None:
    """``python -m datafree``: list the programs, or run the one that is named."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in PROGRAMS:
        sys.argv[:2] = [f"datafree-{name}"]
        start(name)
    elif name == "--version":
        print(__version__)
    elif name in ("-h", "--help"):
        print("python -m datafree PROGRAM [--option value ...], or datafree-PROGRAM; each has --help.\n")
        print("\n".join(f"  {name:12} {text}" for name, (_, text) in PROGRAMS.items()))
    else:
        raise OptionError(f"there is no program {name}; the programs are {', '.join(PROGRAMS)}")


# Entry points of the installed commands.
kd, quantize, incremental, train, export, doctor, report, curves, reproduce = (
    partial(start, name) for name in PROGRAMS
)

if __name__ == "__main__":
    exit_on_input_error(main)
