"""Values of adapter_config.json of another type, or out of range, are one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptoughts.errors import CheckpointError
from gptoughts.models.adapters.folder import CONFIG, read_config

GOOD = {"peft_type": "LORA", "r": 8, "lora_alpha": 16.0, "lora_dropout": 0, "target_modules": ["q_proj"], "rank_pattern": {}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", value) for value in (-1, 0, "x", True, 1.5, 1e9, 1e30, 10**30, None, [8])),
        *(("lora_alpha", value) for value in ("1e", -1, True, 1e30, float("nan"), None)),
        *(("lora_dropout", value) for value in ("0", 2, True)),
        *(("target_modules", value) for value in (5, "(", [5], True, {"q": 1})),
        *(("exclude_modules", value) for value in (5, "[", [None])),
        *(("layers_to_transform", value) for value in ("x", [True], 1.5)),
        *(("rank_pattern", value) for value in ([1], {"q": "8"}, {"q": 0}, {"q": 1e30})),
        *(("alpha_pattern", value) for value in (5, {"q": None})),
        *(("use_dora", value) for value in ("yes", 1)),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({**GOOD, key: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{CONFIG}: {key} must (be|hold).*Found"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [{}, {"target_modules": "all-linear"}, {"target_modules": None, "layers_to_transform": [0, 1]}, {"layers_to_transform": 3},
     {"rank_pattern": {"q": 4}, "alpha_pattern": {"q": 1.5}}, {"use_dora": None}],
)  # fmt: skip
def test_what_peft_writes_is_accepted(tmp_path: Path, changed: dict[str, Any]) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({**GOOD, **changed}), encoding="utf-8")
    assert read_config(tmp_path) == {**GOOD, **changed}
