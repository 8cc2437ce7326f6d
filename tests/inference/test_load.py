"""What is opened to read and write with: exported folders, adapters and their bases, runs; and what cannot be opened, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, logging

import gptoughts
from gptoughts.cli.generate import offloaded
from gptoughts.config import model_path as hub
from gptoughts.config.recipe import AdapterConfig, ModelConfig
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.inference.export_adapter import export_checkpoint
from gptoughts.inference.generate.autoregressive import generate
from gptoughts.inference.load import exported_recipe, load
from gptoughts.models.hf.config import open_config
from tests.inference.test_export import TEXT, words
from tests.models.hf.hf_configs import LENGTH
from tests.models.hf.test_hf import saved

PLAIN = {"compile": "eager", "host": "system", "precision": "fp32"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    Path("text.txt").write_text(TEXT * 20)
    return tmp_path


def folder(name: str, kind: str = "llama", **more: Any) -> Path:
    """A model of transformers with a tokenizer of words."""
    tokenizer = words()
    assert isinstance(tokenizer, JsonTokenizer)
    made = saved(Path(name), kind, **more)
    (made / "tokenizer.json").write_bytes(tokenizer.canonical)
    return made


def trained(run: str, **more: Any) -> Path:
    values = {
        "name": "tiny", "data.path": "text.txt", "data.sequence_length": LENGTH, "train.steps": 1, "train.global_batch": 2,
        "optim.warmup_steps": 0, "eval.batches": 1, "sample.tokens": 4, **more,
    }  # fmt: skip
    checkpoint = gptoughts.train(values, layers=PLAIN, run=run).checkpoint
    assert checkpoint is not None
    return checkpoint


def adapter_config(place: str, content: str) -> Path:
    Path(place).mkdir()
    (Path(place) / "adapter_config.json").write_text(content)
    return Path(place)


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "gpt_neo"])
def test_models_whose_attention_is_their_own_are_read_as_they_are(kind: str) -> None:
    sizes_of: dict[str, dict[str, Any]] = {
        "gemma2": {"head_dim": 16},
        "bloom": {"n_layer": 2, "n_head": 4},
        "gpt_neo": {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]},
    }
    made = folder(kind, kind, **sizes_of[kind])
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        fused, plain = load(str(made)).model(ids), load(str(made), attention="written out").model(ids)
    assert torch.equal(fused, plain)


def test_a_folder_for_question_answering_is_one() -> None:
    made = folder("reader", "bert")
    recipe = exported_recipe(made, None)
    assert (recipe.objective, recipe.data.format, recipe.data.sequence_length) == ("question-answering", "squad", 66)
    loaded = load("reader")
    assert loaded.model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 2)


def test_a_base_is_given_to_adapters_alone() -> None:
    folder("base")
    with pytest.raises(ConfigError, match=r"--base base: base is not an adapter"):
        load("base", base="base")
    trained("plain", **{"model.path": "base"})
    with pytest.raises(ConfigError, match=r"--base base: .*plain.* is not an adapter\.\n  Try: omit --base"):
        load("plain", base="base")


def test_an_adapter_whose_base_moved_is_opened_with_its_new_place() -> None:
    folder("base")
    trained("one", **{"model.path": "./base", "adapter.kind": "lora", "adapter.rank": 4})
    export_checkpoint("one", "alone", adapter_only=True)
    Path("base").rename("moved")
    for name in ("one", "alone"):
        with pytest.raises(ConfigError, match=r"base model of the adapter not found: [^\n]*\n  Try: --base FOLDER"):
            load(name)
        assert load(name, base="./moved").model is not None


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "IA3"}'])
def test_a_broken_adapter_config_is_told(content: str) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config.json: (not a JSON object|unsupported settings|cannot)"):
        load(str(adapter_config("broken", content)))


def test_an_adapter_would_leave_a_new_head_for_answers_as_it_was_drawn() -> None:
    from gptoughts.models.adapters.adapter import adapted
    from gptoughts.models.hf.family import hf_family

    model = ModelConfig(family="hf", path=str(folder("reader", "bert")))
    family = adapted(hf_family(model, "question-answering"), AdapterConfig(kind="lora", rank=4))
    with pytest.raises(ConfigError, match=r"adapter.kind: with objective question-answering"):
        family.build(model, 128, LENGTH)


# --- code of a model's own

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_code(name: str) -> Path:
    made = folder(name)
    content = json.loads((made / "config.json").read_text())
    content |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    content["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (made / "config.json").write_text(json.dumps(content))
    (made / "own.py").write_text(CODE)
    return made


def test_a_model_with_its_own_code_is_read_after_training(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    own_code("own")
    trained("one", **{"model.path": "./own", "model.remote_code": "./own"})
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        ours = load("one", remote_code="./own").model(ids)
    assert "logits over" in export_checkpoint("one", "whole", remote_code="./own")
    theirs = AutoModelForCausalLM.from_pretrained("whole", trust_remote_code=True)
    assert type(theirs).__name__ == "OwnForCausalLM"
    with torch.no_grad():
        assert (theirs(ids).logits - ours).abs().max() < 1e-4
    shutil.rmtree("own")
    with pytest.raises(ConfigError, match=r"model ./own: no such file or folder"):
        load("one", remote_code="./own")


def test_code_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    made = own_code("lacking")
    (made / "own.py").unlink()
    asked = ModelConfig(family="hf", path="./lacking", remote_code="./lacking")
    with pytest.raises(ConfigError, match=r"model.remote_code: code of './lacking' cannot be used: .+") as told:
        open_config(asked)
    assert "\n" not in str(told.value)
    (made / "own.py").write_text("import a_package_that_nobody_has\n" + CODE)
    with pytest.raises(ConfigError, match="a_package_that_nobody_has"):
        open_config(asked)


def test_code_is_fetched_only_where_it_may_run(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    asked: list[list[str]] = []
    made = own_code("snapshot")
    (made / "own.py").unlink()
    monkeypatch.setattr(hub, "_cached", lambda name: made)

    def fetched(name: str, files: list[str]) -> Path:
        asked.append(files)
        return made

    monkeypatch.setattr(hub, "_fetched", fetched)
    assert hub.resolve_model_folder("some/model") == made and asked == []
    assert hub.folder_with_code("some/model") == made and "*.py" in asked[0]


# --- larger than memory


def test_what_is_offloaded_and_what_is_not() -> None:
    pytest.importorskip("accelerate")
    made = folder("model")
    model, _, recipe, place, _ = offloaded("model", 4.0, "spare")
    assert place == made and recipe.objective == "next-token" and model.vocab_size == 128
    trained("run", **{"model.path": "./model"})
    adapter_config("adapter", '{"peft_type": "LORA", "base_model_name_or_path": "model"}')
    for name in ("run", "checkpoints/run", "adapter"):
        with pytest.raises(
            CheckpointError, match=rf"offloading needs a whole model .*\n  Try: gptoughts export {name} --to DIR"
        ):
            offloaded(name, 4.0, None)
    (made / "model.safetensors").rename("elsewhere")
    with pytest.raises(CheckpointError, match=r"^model/model.safetensors: not found") as told:
        offloaded("model", 4.0, None)
    assert "\n" not in str(told.value)
    folder("reader", "bert")
    with pytest.raises(ConfigError, match=r"omit --memory and --offload"):
        offloaded("reader", 4.0, None)


def test_a_model_that_does_not_fit_writes_the_same_text_from_disk() -> None:
    pytest.importorskip("accelerate")
    made = folder("model")
    from gptoughts.data.tokenizers.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(made))
    whole = load("model", attention="written out")
    wanted = generate(whole.model, tokenizer, [[1, 2, 3]], 8, temperature=0.0, stop_at_eot=False)
    size = sum(parameter.nbytes for parameter in whole.model.parameters())
    model, *_ = offloaded("model", 0.6 * size / 2**30, "spare")
    assert model.places["disk"] > 0 and model.places["cpu"] > 0
    assert generate(model, tokenizer, [[1, 2, 3]], 8, temperature=0.0, stop_at_eot=False) == wanted


def test_an_exported_adapter_asks_for_its_own_base() -> None:
    trained("one", **{"model.path": str(folder("base")), "adapter.kind": "lora"})
    export_checkpoint("one", "alone", adapter_only=True)
    load("alone")
    other = folder("other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="trained on another base"):
        load("alone", base=str(other))


def test_a_model_that_denoises_is_not_offloaded() -> None:
    run = {"model.family": "llada", "objective": "masked-diffusion", "data.tokenizer": "bytes", "diffusion.steps": 2}
    trained("fills", **run, **{"model.depth": 2, "model.width": 32, "model.heads": 2, "model.qk_norm": False})
    export_checkpoint("fills", "published")
    tokenizer = words()
    assert isinstance(tokenizer, JsonTokenizer)
    (Path("published") / "tokenizer.json").write_bytes(tokenizer.canonical)
    assert exported_recipe(Path("published"), None).objective == "masked-diffusion"
    with pytest.raises(ConfigError, match=r"omit --memory and --offload"):
        offloaded("published", 4.0, None)
