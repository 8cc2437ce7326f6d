"""A console that cannot be written to is told once, and never ends what prints to it."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from gptoughts import console
from gptoughts.console import Console


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_told", set())


class Full(TextIOWrapper):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_characters_that_the_encoding_lacks_are_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    raw = BytesIO()
    printed = Console(TextIOWrapper(raw, encoding="ascii"))
    for _ in range(2):
        printed.say("loß")
        printed.row("✓", "step")
    assert raw.getvalue().decode().split() == ["lo\\xdf", "\\u2713", "step"] * 2
    assert capfd.readouterr().err == "note: the output's encoding is ascii; other characters are escaped\n"


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_stream_that_fails_is_told_once(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    stream = Full(BytesIO()) if kind == "full" else TextIOWrapper(BytesIO())
    if kind == "closed":
        stream.close()
        printed = Console.__new__(Console)
        printed._stream, printed._is_terminal, printed._live = stream, False, None
    else:
        printed = Console(stream)
    for _ in range(3):
        printed.say("x")
    assert capfd.readouterr().err.count("output cannot be written") == 1


@pytest.mark.parametrize("target", ["/dev/full", "closed pipe"])
def test_the_exit_code_stays_ours(target: str, tmp_path: Path) -> None:
    program = "from gptoughts.console import *; flush_output_at_exit(); print_line('x' * 100_000); print_line('y')"
    words = [sys.executable, "-c", program]
    if target == "/dev/full":
        with Path(target).open("wb") as file:
            ran = subprocess.run(words, stdout=file, stderr=subprocess.PIPE, text=True, check=False)
    else:
        ran = subprocess.run(["bash", "-c", '"$@" | true; exit "${PIPESTATUS[0]}"', "bash", *words], stderr=-1, text=True, check=False)  # fmt: skip
    assert ran.returncode == 0 and ran.stderr.count("output cannot be written") == 1, ran.stderr


CELL = """
from gptoughts.console import Console
console = Console()
console.say("before")
for step in range(1, 5):
    console.row(f"step {step}/4", "loss 2.5")
    console.say(f"line {step}")
console.end_row()
console.row("step 9", "loss 1.5")
"""


def test_a_notebook_shows_one_row_with_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    lines = "".join(output.text for output in outputs if output.output_type == "stream")
    rows = [output.data["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert lines == "before\nline 1\nline 2\nline 3\nline 4\n"
    assert rows == ["█" * 20 + " step 4/4  loss 2.5", "step 9  loss 1.5"]


def test_a_bar_shows_the_share_done() -> None:
    assert [console.bar(field, 4) for field in ("step 1/4", "step 9/4", "step 3", "step 0/0")] == ["█░░░ ", "████ ", "", ""]
