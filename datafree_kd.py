"""Data-free knowledge distillation: a student from a trained teacher, without the teacher's training data."""

from datafree.program import exit_on_input_error
from datafree.programs.distill import main

if __name__ == "__main__":
    import registry  # noqa: F401  with the lines that you added there

    exit_on_input_error(main)
