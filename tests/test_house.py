"""The structure of the code: imports without circles, and options that are read without torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

DOORS = {"datafree_incremental", "datafree_kd", "datafree_quantize", "train_scratch", "registry"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in [*ROOT.glob("datafree/**/*.py"), *ROOT.glob("*.py")]}


def imported(node):
    """Names of the project's modules that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    else:
        names = []
    return {name for name in names if name in FILES}


def imports_of(path):
    """Modules that are imported when the file is: not those for type checkers, nor those within functions."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        found |= imported(node)
    return found


def test_there_is_no_circle_of_imports_and_the_library_imports_no_program():
    graph = {name: imports_of(path) - {name, "datafree"} for name, path in FILES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert {"datafree.engine", "datafree.relation"} <= graph.keys() and graph["datafree.engine"]
    library = {name for name in graph if name.startswith("datafree.") and not name.startswith("datafree.programs.")}
    programs = {name for name in graph if name.startswith("datafree.programs.")} | DOORS
    assert len(programs) == 9 and not any(graph[name] & programs for name in library)


@pytest.mark.parametrize(
    "module",
    [
        *("datafree_incremental", "datafree_kd", "train_scratch"),
        *("datafree.doctor", "datafree.export", "datafree.report", "datafree.curves"),
    ],
)
def test_a_program_is_imported_without_torch(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'tensorboard', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
