"""`python -m benchmarks.data` measures batches and tokenizing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.data import main


def test_data_measures_any_text_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of a text that is measured\n" for number in range(4000)), encoding="utf-8")
    main(["--source", str(text), "--to", str(tmp_path / "data.json")])
    said = capsys.readouterr().out
    assert "mtok_per_second" in said
    assert "one_process_to_tiktoken" in said
    assert [run["what"] for run in json.loads((tmp_path / "data.json").read_text())["runs"]] == ["batches", "tokenize"]
