"""resolve_recipe completes a recipe from its model and reports all contradictions in one message, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptoughts.config.loader import from_values, recipe_names
from gptoughts.config.resolve import resolve_recipe
from gptoughts.errors import ConfigError
from tests.models.hf.hf_configs import write_config

LLADA = {
    "model_type": "llada",
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 96,
    "vocab_size": 128,
    "embedding_size": 128,
}


def recipe(**more: Any) -> Any:
    return from_values({"name": "x", "train.steps": 1, "data.sequence_length": 16, **more}, "the test")


def folder(tmp_path: Path, kind: str = "llama", **more: Any) -> Path:
    place = write_config(tmp_path / kind, kind, **more)
    (place / "tokenizer.json").write_text("{}", encoding="utf-8")
    return place


def test_a_path_brings_family_and_tokenizer(tmp_path: Path) -> None:
    place = folder(tmp_path)
    found = resolve_recipe(recipe(**{"model.path": str(place)}))
    assert (found.recipe.model.family, found.recipe.data.tokenizer) == ("hf", str(place))
    assert found.sources["model.family"] == found.sources["data.tokenizer"] == "model.path"
    drawn = resolve_recipe(recipe(**{"model.config": str(place), "data.tokenizer": "bytes"}))
    assert (drawn.recipe.model.family, drawn.recipe.data.tokenizer) == ("hf", "bytes")
    assert resolve_recipe(found) == found


def test_a_llada_folder_brings_the_sizes_of_the_native_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA), encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    model = resolve_recipe(recipe(**{"model.path": str(tmp_path), "objective": "masked-diffusion"})).recipe.model
    assert (model.family, model.depth, model.width, model.heads, model.inner, model.tied) == ("llada", 2, 64, 4, 96, False)
    (tmp_path / "config.json").write_text(json.dumps({**LLADA, "alibi": True}), encoding="utf-8")
    with pytest.raises(ConfigError, match="alibi = True"):
        resolve_recipe(recipe(**{"model.path": str(tmp_path), "objective": "masked-diffusion"}))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model.path": "P", "model.config": "P"}, "exclude each other"),
        ({"model.family": "hf"}, "needs model.path"),
        ({"model.family": "gpt", "model.path": "P"}, "a native model takes no model.path"),
        ({"objective": "masked-diffusion"}, 'Try: model.family = "llada"'),
        ({"model.family": "llada"}, 'Try: objective = "masked-diffusion"'),
        ({"objective": "question-answering"}, "incompatible with data.format text"),
        ({"data.format": "squad", "objective": "question-answering"}, "needs model.path"),
        ({"data.format": "chat"}, "needs a tokenizer with chat tokens"),
        ({"model.path": "P", "data.tokenizer": "bpe"}, "pretrained weights need their own tokenizer"),
        ({"model.path": "P", "adapter.base": "nf4"}, "Try: --adapter.kind lora"),
        ({"model.path": "P", "model.depth": 3}, "model.depth: not used with model.path"),
        ({"model.path": "P", "data.sequence_length": 65}, "positions for 64 tokens"),
        ({"model.path": "./not-here"}, "no such file or folder"),
        ({"model.path": "P", "objective": "masked-diffusion"}, "needs a LLaDA model, this is not one"),
        ({"model.path": "L"}, "cannot learn next-token prediction"),
        ({"model.path": "L", "objective": "masked-diffusion", "model.heads": 8}, r"model.heads = 8 \(config.json: 4\)"),
        ({"model.family": "mine", "model.path": "P"}, "a plugin's model takes no model.path"),
        (
            {"model.path": "P", "adapter.kind": "lora", "objective": "question-answering", "data.format": "squad"},
            "freezes the new head",
        ),
        ({"adapter.rank": 64}, "adapter.rank: has no effect. Try: --adapter.kind lora"),
        ({"diffusion.steps": 64}, "diffusion.steps: has no effect. Try: objective"),
        ({"experts.bias_rate": 0.1}, "experts.bias_rate: has no effect. Try: model.path"),
        ({"data.template": "chatml", "data.val_path": "x"}, "data.template: has no effect. Try: data.format"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictions(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    places = {"P": str(folder(tmp_path)), "L": str(folder(tmp_path / "llada"))}
    (Path(places["L"]) / "config.json").write_text(json.dumps(LLADA), encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        resolve_recipe(recipe(**{key: places.get(str(value), value) for key, value in more.items()}))


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_recipe(recipe(**{"model.family": "hf", "data.format": "squad", "adapter.base": "nf4"}))
    told = str(caught.value)
    assert all(part in told for part in ("needs model.path", "data.format squad", "adapter.kind"))


def test_a_recipe_from_python_is_settled_as_one_from_a_file(tmp_path: Path) -> None:
    from gptoughts.api import _recipe

    given = recipe(**{"model.path": str(folder(tmp_path))}).recipe
    resolved = _recipe(given, None, None)
    assert resolved is not None and resolve_recipe(resolved).recipe.model.family == "hf"


def test_a_hub_name_without_network_is_one_line(tmp_path: Path) -> None:
    program = "import sys\nfrom gptoughts.cli.main import main\nmain(['plan', 'llama-sft'])"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") <= 2 and "meta-llama/Llama-3.2-1B-Instruct" in done.stderr, done.stderr


def test_every_shipped_recipe_settles_or_names_the_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoughts.config.loader import load
    from gptoughts.config.model_spec import spec_for

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in recipe_names():
        resolved = load(name)
        path = resolved.recipe.model.path
        if path is not None and not Path(path).exists():
            continue
        spec = spec_for(resolve_recipe(resolved).recipe)
        assert spec.depth and spec.width, name
