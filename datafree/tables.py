"""Tables of results as plain text, Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datafree.logger import columns, table

Rows = Sequence[Mapping[str, Any]]
OF_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def markdown(rows: Rows, decimals: int = 2) -> str:
    """A table of GitHub's Markdown, in which names are shown as they are."""
    parts = columns(rows, decimals)
    rule = ["---:" if part.is_number else "---" for part in parts]
    escaped = [[_of_markdown(cell) for cell in (part.name, *part.cells)] for part in parts]
    header, *lines = zip(*escaped)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _of_markdown(text: str) -> str:
    return re.sub(r"([\\`*<|\[]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def latex(rows: Rows, decimals: int = 2) -> str:
    """A tabular with the rules of the package booktabs."""
    parts = columns(rows, decimals)
    escaped = [["".join(OF_LATEX.get(c, c) for c in cell) for cell in (part.name, *part.cells)] for part in parts]
    header, *lines = (f"{' & '.join(line)} \\\\" for line in zip(*escaped))
    alignment = "".join("r" if part.is_number else "l" for part in parts)
    body = ["\\toprule", header, "\\midrule", *lines, "\\bottomrule"]
    return "\n".join([f"\\begin{{tabular}}{{{alignment}}}  % \\usepackage{{booktabs}}", *body, "\\end{tabular}"])


def comma_separated(rows: Rows, decimals: int = 2) -> str:
    """CSV for programs: numbers with all their digits, whatever ``decimals``, and nothing in place of a missing one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[[Rows, int], str]] = {"text": table, "md": markdown, "csv": comma_separated, "latex": latex}
REMARKS = {"text": "{}", "md": "\n{}", "latex": "% {}"}  # how a sentence below a table is written; CSV has none
