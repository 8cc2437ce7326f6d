"""Nothing that comes from a file can move the cursor of a terminal. Each control shows the raw characters where no terminal reads them."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts import console
from gptoughts.console import COLORS, Console, escaped, print_line, print_result, shown
from tests.support.golden_files import ROOT

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\x08\x9b31md\u202etxt\u2066\x7f\u200b\ud800"
SAFE = r"a\x1b[2J\x1b]0;title\x07b\rc\x08\x9b31md\u202etxt\u2066\x7f\u200b\ud800"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_control_characters_are_shown_escaped() -> None:
    assert escaped(HOSTILE) == SAFE
    assert escaped("tab\t, newline\n, naïve café 世界 🎉 👩‍🚀 می‌خواهم") == "tab\t, newline\n, naïve café 世界 🎉 👩‍🚀 می‌خواهم"
    for number in range(0x20000):
        one = escaped(chr(number))
        assert one == "\n" or one == "\t" or one.isprintable() or number > 0x9F, hex(number)
    assert shown(f"{COLORS[0]}x{COLORS[1]}\x1b[31m") == f"{COLORS[0]}x{COLORS[1]}\\x1b[31m", "our own colors stay"


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_lines_and_rows_are_escaped_on_a_terminal_and_in_a_log(kind: type[io.StringIO]) -> None:
    stream = kind()
    made = Console(stream)
    made.say(HOSTILE)
    made.row("step 1", HOSTILE)
    made.say(HOSTILE)
    made.end_row()
    print_line(HOSTILE, stream)
    text = stream.getvalue()
    assert "\x1b[2J\x1b]0" not in text and "\x9b" not in text and "\u202e" not in text and "\x08" not in text
    assert text.count("\\x1b[2J") >= 3
    if kind is io.StringIO:
        assert "\x1b" not in text


def test_a_result_is_raw_only_where_no_terminal_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = HOSTILE[:-1]
    for stream, raw, expected in (
        (Terminal(), True, SAFE[:-6]),
        (io.StringIO(), False, SAFE[:-6]),
        (io.StringIO(), True, whole),
    ):
        monkeypatch.setattr(console.sys, "stdout", stream)
        print_result(whole, raw=raw, end="")
        assert stream.getvalue() == expected


def run_in_terminal(folder: Path, *words: str) -> bytes:
    """Return what a terminal receives from a command, standard output and error together."""
    leader, follower = pty.openpty()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from gptoughts.cli.main import main; main()", *words],
        cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    out = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the last writer has gone
            break
        if not part:
            break
        out += part
    process.wait(60)
    os.close(leader)
    return out


ATTACK = "\x1b[2J\x1b[31m"


def test_names_of_files_keys_and_text_reach_a_terminal_escaped(tmp_path: Path) -> None:
    (tmp_path / f"r{ATTACK}.toml").write_text(
        f'name = "x{ATTACK.encode("unicode_escape").decode().replace(chr(92) + "x", chr(92) + "u00")}"\nbogus = 1\n'
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": ATTACK}))
    (tmp_path / "c.toml").write_text('name = "x"\n[model]\nconfig = "config.json"\n[train]\nsteps = 1\n')
    for words in (
        ("plan", f"./r{ATTACK}.toml"),
        ("plan", "quickstart", "--profile", f"./{ATTACK}.toml"),
        ("plan", "c.toml"),
        ("tokenize", f"{ATTACK}.txt", "--to", "o"),
        ("compare", f"{ATTACK}"),
        (f"{ATTACK}",),
    ):
        out = run_in_terminal(tmp_path, *words)
        assert b"\x1b" not in out and rb"\x1b[2J" in out, (words, out)


def test_control_the_same_text_printed_plainly_reaches_the_terminal(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    subprocess.run([sys.executable, "-c", f"print({ATTACK!r})"], check=True, stdout=follower)
    assert ATTACK.encode() in os.read(leader, 100)
    os.close(leader)
    os.close(follower)
