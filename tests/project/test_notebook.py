"""The notebook runs from top to bottom, its loss falls, and everything that it planned was active."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from gptoughts.hardware.machine import probe

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "fit.ipynb"
ASK = """
import json
print(json.dumps({
    "losses": fitted.losses,
    "evidence": {line.layer: str(line.evidence.status) for line in fitted.evidence},
    "plan": fitted.plan.table(),
    "right": sum(complete(f"{a}+{b}=") == f"{a}+{b}={a + b:02d}." for a in range(10) for b in range(10)),
}))
"""


@pytest.mark.slow
def test_fit_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    cores = probe().cpu.usable_cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # kind to a busy machine, and not what the plan wants where there are more cores
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()

    told = json.loads("".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout"))
    assert told["losses"][0] == pytest.approx(math.log(13), abs=0.2)
    # The second digit is one of ten and the other five characters can be known.
    assert math.log(10) / 6 * 0.8 < told["losses"][-1] < 0.3 * told["losses"][0]
    assert set(told["evidence"].values()) == {"active"}
    if cores > 1:
        assert f"needs OMP_NUM_THREADS={cores} before torch is imported" in told["plan"]
    assert told["right"] >= 80
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1
    assert list(tmp_path.glob("out")) == [], "nothing is written where nothing was asked for"


def test_notebook_holds_no_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not [cell.id for cell in cells if cell.get("outputs") or cell.get("execution_count")]
