"""Writes docs/options.md, every option of the training programs: python misc/options.py"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datafree.cli import display  # noqa: E402
from datafree.config import sections  # noqa: E402
from datafree.options import Invocation, list_options  # noqa: E402
from datafree.programs import distill, incremental, quantize, train  # noqa: E402

PROGRAMS = {"kd": distill, "quantize": quantize, "incremental": incremental, "train": train}
INTRO = """# Options

Written by `python misc/options.py` from the declarations that the programs read, `datafree/config.py`; `--help` of a
program shows its own. The programs are `datafree_kd.py` (kd), `datafree_quantize.py` (quantize),
`datafree_incremental.py` (incremental) and `train_scratch.py` (train). A default is that of the program; the file of a
method may set another, which `--print_config` shows. In a YAML file an option stands in the section that is the heading
here.
"""


def page() -> str:
    """The page as Markdown: a table per section, a row per option, and per kind of option where programs differ."""
    found = {}  # section -> option -> (default, values, help) -> programs
    titles = {"call": Invocation.__doc__, "": "Outside the sections."}
    for program, module in PROGRAMS.items():
        cls = module.PROGRAM.config_class
        titles |= {name: section.__doc__ for name, section in sections(cls).items() if name not in titles}
        for option in list_options(cls, module.PROGRAM.method_files):
            row = display(option.default), option.allowed, option.help
            found.setdefault(option.section, {}).setdefault(option.name, {}).setdefault(row, []).append(program)
    blocks = [INTRO]
    for section, options in found.items():
        rows = [line(name, *row, of) for name, kinds in options.items() for row, of in kinds.items()]
        heading = {"call": "The call", "": "At the top"}.get(section, f"`{section}`")
        blocks.append(f"## {heading}\n\n{' '.join(titles[section].split())}\n\n{HEAD}\n" + "\n".join(rows) + "\n")
    return "\n".join(blocks)


HEAD = "| option | programs | default | takes | |\n|---|---|---|---|---|"


def line(name, default, allowed, help, of):
    """A row of a table. of: the programs that it is about."""
    programs = "all" if len(of) == len(PROGRAMS) else ", ".join(of)
    cells = (f"`--{name}`", programs, default, allowed, help)
    return f"| {' | '.join(cell.replace('<', '&lt;').replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    (ROOT / "docs" / "options.md").write_text(page())
