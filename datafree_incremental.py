"""Class-incremental learning without the old images: new classes arrive in tasks, and synthetic images stand in for
those of the classes before them."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() answers it: no traceback while packages load

from datafree.program import exit_on_input_error
from datafree.programs.incremental import main

if __name__ == "__main__":
    import registry  # noqa: F401  with the lines that you added there

    exit_on_input_error(main)
