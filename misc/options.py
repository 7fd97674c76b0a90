"""Writes docs/options.md, every option of the training programs: python misc/options.py"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datafree.__main__ import PROGRAMS, TRAINING  # noqa: E402
from datafree.cli import method_defaults, shown_default  # noqa: E402
from datafree.config import sections  # noqa: E402
from datafree.options import Invocation, list_options  # noqa: E402

INTRO = """# Options

Written by `python misc/options.py` from the declarations that the programs read, `datafree/config.py`; `--help` of a
program shows its own. The programs are `datafree_kd.py` (kd), `datafree_quantize.py` (quantize),
`datafree_incremental.py` (incremental) and `train_scratch.py` (train). The file of a method may set other values;
those of the default method, rgal, are shown, and `--print_config` shows any. In a YAML file an option stands in the
section that is the heading here.
"""


def page() -> str:
    """The page as Markdown: a table per section, a row per option, and per kind of option where programs differ."""
    found = {}  # section -> option -> cells of its row -> programs
    titles = {"call": {Invocation.__doc__: TRAINING}}  # section -> sentence -> programs
    for program in TRAINING:
        given = importlib.import_module(PROGRAMS[program][0]).PROGRAM
        for name, section in sections(given.config_class).items():
            titles.setdefault(name, {}).setdefault(" ".join(section.__doc__.split()), []).append(program)
        options = list_options(given.config_class, given.method_files)
        by_method = method_defaults({option.name: option for option in options}, given.method_files)
        for option in options:
            row = option.flags, shown_default(option, by_method), option.allowed, option.help
            found.setdefault(option.section, {}).setdefault(option.name, {}).setdefault(row, []).append(program)
    blocks = [INTRO]
    for section, options in found.items():
        rows = [line(name, *row, of) for name, kinds in options.items() for row, of in kinds.items()]
        heading = {"call": "The call", "": "Outside the sections"}.get(section, f"`{section}`")
        about = titles.get(section, {})
        sentences = [text if len(about) == 1 else f"{', '.join(of)}: {text}" for text, of in about.items()]
        blocks += [f"## {heading}\n", *(f"{sentence}\n" for sentence in sentences), "\n".join([HEAD, *rows]) + "\n"]
    return "\n".join(blocks)


HEAD = "| option | programs | default | takes | |\n|---|---|---|---|---|"


def line(name, flags, default, allowed, help, of):
    """A row of a table. flags: further spellings. of: the programs that it is about."""
    programs = "all" if len(of) == len(TRAINING) else ", ".join(of)
    cells = (", ".join(f"`{flag}`" for flag in (f"--{name}", *flags)), programs, default, allowed, help)
    return f"| {' | '.join(cell.replace('<', '&lt;').replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    (ROOT / "docs" / "options.md").write_text(page())
