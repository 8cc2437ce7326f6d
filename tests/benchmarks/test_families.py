"""Model types beside plain transformers: a few of each kind here, all of them in the long set; the table of the page is the recorded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import logging

from benchmarks.families.__main__ import WRONG, main
from benchmarks.families.compare import Different, _near, examine
from benchmarks.families.table import BEGIN, END, rewritten, table
from benchmarks.families.tiny import KINDS, tiny
from gptoughts.errors import ConfigError
from tests.support.golden_files import ROOT
from tests.support.tiers import slow_except

EQUAL = {
    "gpt_oss": ("math", False),  # attention sinks
    "qwen3_next": ("sdpa", False),  # one of two layers is linear
    "doge": ("math", False),  # a mask that a layer computes
    "apertus": ("sdpa", True),  # buffers that its constructor fills
    "bigbird_pegasus": ("sdpa", False),  # attention that is marked as reading both ways
    "deepseek_v32": ("math", False),  # chosen keys
    "minimax": ("sdpa", False),  # a cache of its own class
    "opt": ("sdpa", False),  # no positions
}
REFUSED = {
    "jetmoe": "no router returns scores and chosen experts",
    "cpmant": "is bidirectional and cannot be trained to predict the next token",
    "musicgen": "transformers does not build it",
}
KNOWN = [kind for kind in (*EQUAL, *REFUSED) if kind in KINDS]
"""Types of the installed transformers."""


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()


def test_the_examples_are_types_of_transformers() -> None:
    assert {"gpt_oss", "qwen3_next", "opt", "cpmant", "musicgen"} <= set(KNOWN)


@pytest.mark.parametrize(
    "kind", slow_except([kind for kind in EQUAL if kind in KINDS], "gpt_oss", "qwen3_next", "bigbird_pegasus")
)
def test_a_type_equals_plain_transformers(kind: str, tmp_path: Path) -> None:
    row = examine(kind, tmp_path / "model")
    assert row["state"] == "equal", row["reason"]
    assert (row["attention"], row["packs"]) == EQUAL[kind]
    assert row["evidence"] == "active"


@pytest.mark.parametrize("kind", slow_except([kind for kind in REFUSED if kind in KINDS], "cpmant"))
def test_a_type_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    row = examine(kind, tmp_path / "model")
    assert row["state"] == "refused"
    assert REFUSED[kind] in row["reason"]


def test_a_decoder_of_a_config_that_reads_both_ways_is_refused(tmp_path: Path) -> None:
    row = examine("bert", tmp_path / "model", {**tiny("bert"), "is_decoder": False})
    assert (row["state"], row["stage"]) == ("refused", "adopt")
    assert '"is_decoder": true in config.json' in row["reason"]


def test_a_difference_is_found() -> None:
    with pytest.raises(Different, match=r"loss: relative difference"):
        _near("loss", 1.001, 1.0)
    with pytest.raises(Different, match="nan"):
        _near("loss", float("nan"), 1.0)
    assert _near("loss", 1.0, 1.0) == 0


# --- the record


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    (run,) = json.loads((ROOT / "docs" / "measurements" / "cpu" / "families.json").read_text(encoding="utf-8"))["runs"]
    return run  # type: ignore[no-any-return]


def test_the_table_of_the_page_is_the_recorded_one(recorded: dict[str, Any]) -> None:
    """Fix a difference with `python -m benchmarks.families --from docs/measurements/cpu/families.json --table docs/models.md`."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page.split(f"{BEGIN}\n")[1].split(f"\n{END}")[0] == table(recorded)
    assert rewritten(page, recorded) == page
    with pytest.raises(ConfigError, match=r"--table: the page has no lines"):
        rewritten("no markers", recorded)


def test_no_recorded_type_is_wrong_and_each_refusal_has_a_reason(recorded: dict[str, Any]) -> None:
    rows = recorded["types"]
    assert [row["type"] for row in rows if row["state"] in WRONG] == []
    assert sum(row["state"] == "equal" for row in rows) >= 150
    assert all(row["reason"] for row in rows if row["state"] != "equal")
    assert len({row["type"] for row in rows}) == len(rows)


@pytest.mark.long
def test_every_type_is_equal_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    status = main([])
    assert status == 0, capsys.readouterr().out
