"""A console that cannot be written to is told once, and never ends what prints to it."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

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
