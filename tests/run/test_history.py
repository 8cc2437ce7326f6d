"""A result in a notebook: columns of its metrics, and a table with its losses that shows text as text."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from gptoughts.run.tracking.history import columns, figures_of, summary_html
from tests.support.run_files import SPIKE, metrics_rows, write_lines


def test_columns_have_one_value_per_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [*metrics_rows(20), *metrics_rows(10, attempt=2, first=16, loss=3.0)])
    path.write_bytes(path.read_bytes()[:-20])  # cut off in its last line
    found = columns(path)
    assert len({len(values) for values in found.values()}) == 1
    losses = [value for value in found["train/loss"] if value is not None]
    assert len(losses) == 24 and SPIKE in losses
    assert found["step"] == sorted(found["step"]) and found["perf/of_gemm"] == [None] * len(found["step"])
    assert columns(tmp_path / "missing.jsonl") == {}


def test_the_table_of_a_notebook_escapes_text_and_holds_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, metrics_rows(20))
    shown = summary_html("<script>$x$", figures_of(columns(path)), path)
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "<td>20 k</td>" in shown
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', shown)
    assert picture and base64.b64decode(picture[1]).startswith(b"\x89PNG")
    assert "<img" not in summary_html("empty", {}, tmp_path / "missing.jsonl")
