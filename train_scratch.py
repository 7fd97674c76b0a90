"""Trains a network on real images: a teacher, or a student as the upper bound."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() answers it: no traceback while packages load

from datafree.program import exit_on_input_error
from datafree.programs.train import main

if __name__ == "__main__":
    import registry  # noqa: F401  with the lines that you added there

    exit_on_input_error(main)
