"""Adapter folders round-trip with peft and compute the same; other bases and kinds of adapters are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptoughts.config.recipe import AdapterConfig, ModelConfig
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import NextToken
from gptoughts.errors import CheckpointError, ConfigError, RunError
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.adapters.adapter import adapted, adapter_layers, is_trained
from gptoughts.models.adapters.folder import (
    BASE,
    CONFIG,
    WEIGHTS,
    AdapterFolder,
    adapted_as,
    check_base,
    internal,
    published,
    record_of,
    record_of_drawn,
    save_adapter,
)
from gptoughts.models.adapters.merge import merge, summary
from gptoughts.models.adapters.weights import AdapterSource
from gptoughts.models.hf.family import hf_family
from gptoughts.models.hf.weights import Pretrained
from gptoughts.run.build import build_engine
from tests.models.adapters.adapters import ANY, State, filled, plain_family, theirs
from tests.support.engines import plan_of, random_batches, recipe_of, steps

peft = pytest.importorskip("peft")
IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def config(kind: str = "lora", **more: Any) -> AdapterConfig:
    return AdapterConfig(kind=kind, **{"rank": 4, "alpha": 8.0, **more})


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def ours(base: nn.Module, adapter: AdapterConfig, seed: int = 0) -> tuple[nn.Module, AdapterSource]:
    made: list[AdapterSource] = []

    def source(model: nn.Module) -> AdapterSource:
        made.append(AdapterSource(State(values(base)), model, adapter.kind, seed))
        return made[0]

    return filled(adapted(plain_family(base), adapter), source), made[0]


def trained(model: nn.Module, updates: int = 3) -> nn.Module:
    """Run a few updates, so that the adapter is not zero."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(updates):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def stored(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["llama", "gpt2", "deepseek"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_peft_opens_what_we_write(kind: str, form: str, tmp_path: Path) -> None:
    base = theirs(form)
    folder = stored(base, tmp_path / "base")
    model, source = ours(base, config(kind))
    assert torch.allclose(logits(model), logits(base), atol=1e-5)
    wanted = logits(trained(model))
    assert not torch.allclose(wanted, logits(base), atol=1e-2)
    save_adapter(model, config(kind), tmp_path / "adapter", record_of(folder), source)
    opened = peft.PeftModel.from_pretrained(type(base).from_pretrained(folder), tmp_path / "adapter")
    assert torch.allclose(logits(opened), wanted, atol=1e-5)
    targets = json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]
    assert len(targets) <= 8  # last names, not every module
    merged = merge(model)
    assert merged.keys() == values(base).keys() | merged.keys() - dict(base.named_parameters()).keys()
    base.load_state_dict(merged, strict=False)
    assert torch.allclose(logits(base), wanted, atol=1e-5)


@pytest.mark.parametrize("form", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_we_open_what_peft_writes(kind: str, form: str, tmp_path: Path) -> None:
    base, other = theirs(form), theirs(form)
    wrapped = peft.get_peft_model(other, peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear" if form == "llama" else ["c_attn", "c_fc"], use_dora=kind == "dora",
        rank_pattern={"c_fc": 2, "up_proj": 2}, fan_in_fan_out=form == "gpt2",
    ))  # fmt: skip
    wanted = logits(trained(wrapped))
    wrapped.save_pretrained(tmp_path)
    family = adapted_as(plain_family(base), tmp_path)
    model = filled(family, lambda made: AdapterSource(State(values(base)), made, saved=AdapterFolder(tmp_path)))
    assert torch.allclose(logits(model), wanted, atol=1e-5)


def test_a_pretrained_folder_takes_an_adapter_and_opens_with_it_again(tmp_path: Path) -> None:
    """End to end: transformers folder, our family, engine updates, adapter folder, our model and peft's."""
    folder, adapter = stored(theirs("llama"), tmp_path / "base"), config("pissa")
    named = ModelConfig(family="hf", path=str(folder))
    plain = hf_family(named)
    family = adapted(plain, adapter)
    recipe = recipe_of()
    model = family.build(named, 96, 32)
    source = AdapterSource(Pretrained(folder), model, adapter.kind, recipe.seed)
    ranks = Ranks(World(), torch.device("cpu"))
    batches = ({"input_ids": batch["input_ids"] % 96} for batch, _ in random_batches(recipe))
    stream = ((batch, index) for index, batch in enumerate(batches))
    with build_engine(
        model, family, NextToken(), recipe, plan_of(recipe), CATALOG, ranks=ranks, batches=stream, source=source
    ) as engine:
        steps(engine, 3)
        save_adapter(engine.bare, adapter, tmp_path / "adapter", record_of(folder), source)
        with torch.no_grad():
            wanted = engine.bare.eval()(IDS)
    assert check_base(tmp_path / "adapter", record_of(folder)) == ""
    again = adapted_as(plain, tmp_path / "adapter")
    model = again.build(named, 96, 32)
    source = AdapterSource(Pretrained(folder), model, saved=AdapterFolder(tmp_path / "adapter"))
    Engine(model, again, NextToken(), recipe, ranks, ranks.device, batches=iter(())).materialize(source)
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS), wanted, atol=1e-5)
    opened = peft.PeftModel.from_pretrained(type(theirs("llama")).from_pretrained(folder), tmp_path / "adapter")
    assert torch.allclose(logits(opened), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_update_is_pefts_own(kind: str) -> None:
    model, _ = ours(theirs("llama"), config(kind))
    wrapped = peft.get_peft_model(theirs("llama"), peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=sorted(adapter_layers(model)), use_rslora=kind == "rslora", use_dora=kind == "dora"
    ))  # fmt: skip
    mine = values(model)
    with torch.no_grad():
        for name, value in wrapped.base_model.model.named_parameters():
            assert value.requires_grad is is_trained(name)
            value.copy_(mine[name])
    before = values(model)
    trained(model, 4)
    trained(wrapped, 4)
    for name, value in wrapped.base_model.model.named_parameters():
        assert torch.allclose(value, model.get_parameter(name), atol=1e-6), name
    assert any(not torch.equal(value, before[name]) for name, value in values(model).items())


def test_experts_routers_and_what_peft_takes_for_experts_stay_frozen_and_are_named() -> None:
    base = theirs("deepseek")
    model, _ = ours(base, config())
    words = {name.rpartition(".")[2] for name in adapter_layers(model)}
    assert words == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    told = summary(model)
    assert "not adapted: 2 x gate_proj, 2 x up_proj, 2 x down_proj" in told
    assert "not adapted, stacked experts: model.layers.*.mlp.experts.down_proj" in told
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert "model.layers.1.mlp.gate.weight" in frozen and "lm_head.weight" in frozen
    with pytest.raises(ConfigError, match="peft maps down_proj to this model's fused experts"):
        ours(base, config(targets="o_proj, down_proj"))


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_an_adapter_over_four_bits_opens_over_a_full_base(form: str, tmp_path: Path) -> None:
    base = theirs(form)
    model, source = ours(base, config(base="nf4"))
    rounded = merge(model)  # B is still zero
    changed = (rounded[name] - value for name, value in values(base).items() if name in rounded)
    assert max(float(change.abs().max()) for change in changed) > 0
    wanted = logits(trained(model))
    save_adapter(model, config(base="nf4"), tmp_path / "adapter", record_of(stored(base, tmp_path / "base")), source)
    base.load_state_dict(rounded, strict=False)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(logits(opened), wanted, atol=1e-5)


# --- records and mistakes


def test_names_go_both_ways() -> None:
    for name, stored_name in [
        ("a.q.lora_A.default.weight", "base_model.model.a.q.lora_A.weight"),
        ("a.q.lora_B.default.weight", "base_model.model.a.q.lora_B.weight"),
        ("a.q.lora_magnitude_vector.default.weight", "base_model.model.a.q.lora_magnitude_vector"),
    ]:
        assert published(name) == stored_name and internal(stored_name) == name and is_trained(name)


def test_an_adapter_for_another_base_is_told_with_both(tmp_path: Path) -> None:
    base = theirs("llama")
    first, second = stored(base, tmp_path / "first"), tmp_path / "second"
    model, source = ours(base, config())
    save_adapter(model, config(), tmp_path / "adapter", record_of(first), source)
    assert check_base(tmp_path / "adapter", record_of(first)) == ""
    stored(base, second)  # the same weights elsewhere
    assert check_base(tmp_path / "adapter", record_of(second)) == ""
    with torch.no_grad():  # the same shapes, names and sizes, other values
        for value in base.parameters():
            value.add_(1e-3)
    stored(base, second)
    with pytest.raises(CheckpointError, match=rf"another base, {first} .*Found {second} .*\n  Try: --model.path {first}"):
        check_base(tmp_path / "adapter", record_of(second))
    drawn = record_of_drawn({"width": 64}, 1)
    assert drawn == record_of_drawn({"width": 64}, 1) != record_of_drawn({"width": 64}, 2)
    (tmp_path / "adapter" / BASE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"base.json: cannot be read"):
        check_base(tmp_path / "adapter", drawn)
    (tmp_path / "adapter" / BASE).unlink()
    assert "no base.json; base assumed to be drawn from seed 1" in check_base(tmp_path / "adapter", drawn)
    with pytest.raises(CheckpointError, match="no base weights"):
        record_of(tmp_path / "adapter")


def test_a_pissa_adapter_needs_its_beginning(tmp_path: Path) -> None:
    base = theirs("llama")
    model, _ = ours(base, config("pissa"))
    with pytest.raises(CheckpointError, match="needs the base's weights"):
        save_adapter(model, config("pissa"), tmp_path, record_of_drawn({}, 0))


def folder_with(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **changes}
    (folder / CONFIG).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"velora_config": {"x": 1}}, "velora_config is set"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_other_kinds_of_adapters_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told):
        adapted_as(plain_family(theirs("llama")), folder_with(tmp_path, **changes))


def test_folders_that_cannot_be_opened_are_told(tmp_path: Path) -> None:
    family = plain_family(theirs("llama"))
    with pytest.raises(CheckpointError, match=r"adapter_config.json: cannot be read"):
        adapted_as(family, tmp_path / "nothing")
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match=r"not a JSON object. Found list"):
        adapted_as(family, tmp_path)
    with pytest.raises(CheckpointError, match="not found"):
        AdapterFolder(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickle, which can run code"):
        AdapterFolder(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"no header")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        AdapterFolder(tmp_path)
    with pytest.raises(ConfigError, match="lm_head, outside the blocks"):
        adapted_as(family, folder_with(tmp_path, target_modules=["q_proj", "lm_head"])).build(ANY, 96, 8)


def test_a_folder_that_does_not_fit_is_told_by_name(tmp_path: Path) -> None:
    base = theirs("llama")
    model, source = ours(base, config())
    save_adapter(model, config(), tmp_path, record_of_drawn({}, 0), source)
    held = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    family = adapted(plain_family(base), config())

    def opened() -> None:
        filled(family, lambda made: AdapterSource(State(values(base)), made, saved=AdapterFolder(tmp_path)))

    opened()
    ours_name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    save_file({**held, name: torch.zeros(2, 32)}, tmp_path / WEIGHTS)
    with pytest.raises(RunError, match=rf"{ours_name}: the model needs shape \(4, 32\). Found shape \(2, 32\)"):
        opened()
    save_file({**held, "base_model.model.x.lora_A.weight": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(RunError, match=r"unused in the source: base_model.model.x.lora_A.weight"):
        opened()
    del held[name]
    save_file(held, tmp_path / WEIGHTS)
    with pytest.raises(RunError, match=f"missing in the source: {ours_name}"):
        opened()
