"""examples/quickstart.ipynb: its cells run one after another, without a kernel, and it shows all their outputs."""

import contextlib
import io
import json

import pytest
from conftest import ROOT

import datafree

NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_every_cell_was_run_in_turn_and_its_output_is_kept():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in CODE) and all(output["output_type"] != "error" for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1 and str(ROOT) not in json.dumps(outputs)


@pytest.mark.slow
def test_the_cells_run_in_one_namespace(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    space, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, cell in enumerate(CODE):
            exec(compile("".join(cell["source"]), f"cell {number + 1}", "exec"), space)
    numbers = space["result"].numbers
    assert numbers["teacher_acc1"] > 95 and numbers["last_acc1"] > 85
    assert all(row["agreement"] == 100 for row in space["rows"].values())
    assert "model.onnx" in printed.getvalue().splitlines()[-2]
    images = space["images"]
    assert datafree.load(space["result"].folder)(images).equal(space["result"].student(images))
