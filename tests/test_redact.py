"""Secrets do not reach trackers; what only sounds like one stays."""

from __future__ import annotations

import pytest

from gptoughts.config.loader import load
from gptoughts.config.recipe import fields
from gptoughts.console import HIDDEN, Redactor, is_secret_name
from gptoughts.layers import CATALOG

SECRET = "not-a-real-one-1234"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "password", "db.password", "api-key"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)
    assert Redactor({name: SECRET})({"note": f"in {SECRET} a text", "list": [SECRET]}) == {
        "note": f"in {HIDDEN} a text",
        "list": [HIDDEN],
    }
    assert Redactor({})({name: SECRET, "other": {name: SECRET}}) == {name: HIDDEN, "other": {name: HIDDEN}}


def test_no_field_of_a_recipe_is_taken_for_a_secret() -> None:
    assert [key for key, _, _ in fields() if is_secret_name(key.rpartition(".")[2])] == []
    assert not is_secret_name("train/num_tokens") and not is_secret_name("monkey") and not is_secret_name("tokenizer")


def test_short_values_of_variables_are_words() -> None:
    assert Redactor({"MY_KEY": "data", "EMPTY_TOKEN": ""})("data stays") == "data stays"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/data", f"https://{HIDDEN}@host/data"),
        ("hf_" + "a" * 34, HIDDEN),
        ("see https://host/a@b", "see https://host/a@b"),
        ("ghp_" + "a" * 36 + " end", f"{HIDDEN} end"),
    ],
)
def test_forms_of_secrets(text: str, shown: str) -> None:
    assert Redactor({})(text) == shown


def test_other_values_stay() -> None:
    value = {"train": {"steps": 3, "tokens": None}, "flag": True, "shares": [0.1, 0.2]}
    assert Redactor({"A_TOKEN": SECRET})(value) == value


def test_no_option_of_a_layer_is_taken_for_a_secret() -> None:
    assert [f"{name}.{option}" for name, layer in CATALOG.items() for option in layer.options if is_secret_name(option)] == []
    assert not is_secret_name("data.text_key") and not is_secret_name("diffusion.mask_token")


def test_a_saved_recipe_keeps_paths_that_are_values_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_KEY", "text.txt")
    monkeypatch.setenv("OTHER_TOKEN", "secret-note")
    flags = {"data.path": "text.txt", "model.path": "https://me:pass@host/x", "sample.prompt": "secret-note text.txt"}
    saved = load("quickstart", flags).saved_values()
    assert saved["data.path"] == "text.txt" and saved["model.path"] == "https://[redacted]@host/x"
    assert saved["sample.prompt"] == "[redacted] [redacted]"
    assert 'path = "text.txt"' in load("quickstart", flags).to_toml()
