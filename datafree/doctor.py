"""Check in less than a minute what a long run would stumble over:
python -m datafree.doctor [kd|quantize|incremental|train] [--option value ...]

The options are those of the program, of which kd is meant if none is named; nothing is written. Printed is a list of
findings, each ok, a warning or a fault, with its remedy. The exit code is 0 without faults, 1 with any, and 2 for a
mistake in options.
"""

import importlib
import sys
from collections import Counter
from contextlib import closing

from datafree.__main__ import PROGRAMS, TRAINING
from datafree.errors import InputError, OptionError, exit_on_input_error, printable
from datafree.program import Program

GRADES = ("ok", "warning", "fault")


def examine(program: Program) -> None:
    """In place of :func:`datafree.program.run`: print the findings about the run, and exit with 1 if any is a fault."""
    config, _ = program.read()
    if config.run.evaluate_only:
        raise OptionError("--evaluate_only: the doctor checks what a training needs; leave it out")
    # These import torch, which takes seconds; mistakes in the form of options are answered before.
    from datafree.checks import Finding, findings
    from datafree.session import Session

    found = Counter[str]()

    def tell(finding: Finding) -> None:
        found[finding.grade] += 1
        print(printable(f"{finding.grade:8} {finding.about}: {finding.text}"), flush=True)

    try:
        session = Session(config, derive_card=program.derive_card, write=False)
        with closing(program.trainings(session)) as in_turn:  # type: ignore[type-var]  # a generator
            for finding in findings(session, in_turn):
                tell(finding)
    except OptionError:
        raise
    except InputError as error:
        tell(Finding("fault", "run", f"{error}."))
    print(f"{', '.join(f'{found[grade]} {grade}' for grade in GRADES)}.")
    if found["fault"]:
        sys.exit(1)


def main() -> None:
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return
    name = words.pop(0) if words[0] in TRAINING else TRAINING[0]
    sys.argv = [sys.argv[0], *words]
    examine(importlib.import_module(PROGRAMS[name][0]).PROGRAM)


if __name__ == "__main__":
    exit_on_input_error(main)
