"""Cards: docs/layers.md is what the command prints, and a card says everything that the record holds."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from gptoughts.cli import main
from gptoughts.layer import Layer, Option, active
from gptoughts.layers import CATALOG
from gptoughts.report.cards import card, layers_page
from tests.golden_files import ROOT, compare


def test_docs_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["layers", "--markdown"])
    printed = capsys.readouterr().out
    assert left.value.code == 0 and printed == layers_page(CATALOG)
    compare(ROOT / "docs" / "layers.md", printed)


def test_every_layer_is_on_the_page() -> None:
    page = layers_page(CATALOG)
    for name, layer in CATALOG.items():
        assert (f"**{name}** (baseline)" if layer.baseline else f"### {name}\n") in page


def test_a_card_says_all() -> None:
    layer = Layer(
        name="mine",
        slot="optimizer_offload",
        card="Does it.",
        apply=lambda *_: nullcontext(),
        verify=lambda *_: active(""),
        packages=(("a-package", "fp8"),),
        least_capability=(9, 0),
        options={"some_size": Option(None, "its my_size", int), "kind": Option("a", "a kind", choices=("a", "b"))},
        wraps=("backward",),
        replaces=("step",),
        clashes={"other": "both do it"},
        needs_slots={"compile": ("eager", "x")},
        changes_numerics=True,
        repeatable=False,
        permanent="it is written in stone",
        measured="docs/measurements/x.json",
    )
    text = card(layer)
    for words in (
        "optimizer_offload = mine",
        "- needs: compute capability 9.0, a-package (pip install 'gptoughts[fp8]'), compile = eager or x",
        "- applied: real",
        "- verbs: wraps backward, replaces step",
        "- clashes with other: both do it",
        "- changes numerics: yes; repeatable bit for bit: no",
        "- undo: it is written in stone",
        "- option `--layer.optimizer-offload.some-size`: its my_size (default none)",
        "- option `--layer.optimizer-offload.kind`: a kind (default a, one of a, b)",
        "- measured: docs/measurements/x.json",
    ):
        assert words in text
