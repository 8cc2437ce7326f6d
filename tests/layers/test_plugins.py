"""Plugins: a named file adds layers, families and objectives; whatever is wrong with it is one message that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoughts.errors import ConfigError
from gptoughts.layers import CATALOG
from gptoughts.layers.plugins import extensions

LAYER = """
from __future__ import annotations
from contextlib import contextmanager
from dataclasses import dataclass
from gptoughts.planning.layer import Layer, Option, active

@dataclass
class Own:
    size: int = 3

@contextmanager
def apply(engine, options):
    yield

LAYERS = [Layer("probe", "offload", "A probe.", apply, lambda *_: active("x"), options={"size": Option(1, "its size", int)})]
"""


def written(tmp_path: Path, text: str, name: str = "mine.py") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_no_plugin_changes_nothing() -> None:
    assert extensions().catalog == CATALOG and not extensions().families and not extensions().objectives


def test_a_plugin_adds_to_a_copy(tmp_path: Path) -> None:
    text = LAYER + "\nFAMILIES = {'mine': 1}\nOBJECTIVES = {'guess': 2}\n"
    found = extensions([written(tmp_path, text)])
    assert found.catalog["probe"].slot == "offload" and "probe" not in CATALOG
    assert (found.families, found.objectives) == ({"mine": 1}, {"guess": 2})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "defines none of LAYERS, FAMILIES, OBJECTIVES"),
        ("LAYERS = 3", "LAYERS: must be a list of gptoughts.planning.layer.Layer. Found 3"),
        ("LAYERS = ['sdpa']", "LAYERS: must be a list of gptoughts.planning.layer.Layer"),
        ("FAMILIES = ['gpt']", "FAMILIES: must be a dict of names"),
        (LAYER.replace('"probe"', '"sdpa"'), "'sdpa' exists already; choose another name"),
        (LAYER + "LAYERS = LAYERS * 2", "LAYERS: two layers share a name"),
        (LAYER.replace('"offload"', '"offlaod"'), "no slot 'offlaod' (did you mean 'offload'?)"),
        ("\n\n1 / 0", "ZeroDivisionError in line 3"),
        ("def (", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_wrong_plugins(text: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        extensions([path])
    assert words in str(caught.value) and f"--plugin {path}: " in str(caught.value)


def test_all_plugins_are_told_at_once(tmp_path: Path) -> None:
    files = [str(tmp_path / "none.py"), written(tmp_path, "LAYERS = []", "text.txt"), written(tmp_path, "x", "x.py")]
    good = written(tmp_path, LAYER)
    with pytest.raises(ConfigError) as caught:
        extensions([*files, good, good])
    for words in ("none.py: no such file", "text.txt: not a Python file", "x.py: NameError", "'probe' exists already"):
        assert words in str(caught.value)
