"""The notebook runs from top to bottom, its loss falls, and everything that it planned was active."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "fit.ipynb"
ASK = """
import json
print(json.dumps({
    "losses": fitted.losses,
    "evidence": {line.layer: str(line.evidence.status) for line in fitted.evidence},
    "plan": fitted.plan.table(),
    "sums": [complete(f"{a:02d}+{b:02d}=") for a in range(0, 50, 7) for b in range(0, 50, 7)],
}))
"""


def test_fit_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()

    told = json.loads("".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout"))
    assert told["losses"][0] == pytest.approx(math.log(13), abs=0.2)
    # Of the 8 characters that are predicted, 3 digits are drawn evenly and can be known no better than by their frequency.
    assert told["losses"][-1] < 0.55 * told["losses"][0]
    assert set(told["evidence"].values()) == {"active"}
    assert "needs OMP_NUM_THREADS" in told["plan"], "torch was imported first, and the plan says what to type"
    assert len(told["sums"]) == 64
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1
    assert list(tmp_path.glob("out")) == [], "nothing is written where nothing was asked for"


def test_notebook_holds_no_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not [cell.id for cell in cells if cell.get("outputs") or cell.get("execution_count")]
