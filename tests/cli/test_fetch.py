"""`gptoughts fetch`: what a recipe needs from the hub, where it lands, and what is said without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.test_main import here, said

__all__ = ["here"]


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Stand-ins for the download functions of huggingface_hub and datasets, the only parts that need a network."""
    asked: list[tuple[str, Any]] = []
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (here / "scratch").mkdir()
    (here / "home").mkdir()
    monkeypatch.setenv("SCRATCH", str(here / "scratch"))
    monkeypatch.setenv("HOME", str(here / "home"))

    def download(name: str, allow_patterns: list[str], cache_dir: Path) -> str:
        asked.append((name, cache_dir))
        if name == "no/model":
            raise OSError("404 Client Error: no such repository")
        return str(cache_dir / name)

    def load_dataset(name: str, cache_dir: str) -> dict[str, range]:
        asked.append((name, cache_dir))
        return {"train": range(1200), "val": range(3)}

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_models_and_datasets_land_on_scratch(
    hub: list[tuple[str, Any]], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said("fetch deepseek-sft org/model quickstart --dataset org/text --dataset org/text", capsys)
    assert (code, err) == (0, "")
    cache = here / "scratch" / "huggingface"
    model = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert hub == [(model, cache / "hub"), ("org/model", cache / "hub"), ("org/text", str(cache / "datasets"))]
    assert out.splitlines() == [
        f"model    {model}  {cache}/hub/{model}", f"model    org/model  {cache}/hub/org/model",
        "dataset  org/text  train 1,200 rows, val 3 rows",
    ]  # fmt: skip
    assert not list((here / "home").iterdir())


def test_a_recipe_that_needs_nothing_says_so(hub: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert said("fetch quickstart", capsys)[:2] == (0, "nothing to fetch: quickstart needs no files from the hub\n")
    assert hub == []


def test_offline_every_missing_name_is_listed_and_nothing_is_asked(
    hub: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = said("fetch org/model --dataset org/text", capsys)
    assert code == 2 and hub == []
    assert "model org/model: not a local folder, not fully cached, and HF_HUB_OFFLINE is set" in err
    assert "dataset org/text: HF_HUB_OFFLINE is set" in err and "Try: unset HF_HUB_OFFLINE" in err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fetch", "fetch: nothing to fetch"),
        ("fetch deepsek-sft", "neither a recipe nor OWNER/MODEL (did you mean 'deepseek-sft'?)"),
        ("fetch no/model org/model", "no/model: not a local folder, and the download failed: 404"),
    ],
)
def test_mistakes(line: str, expected: str, hub: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(line, capsys)
    assert code == 2 and expected in err
