"""The probe of an adopted model: causality, documents in a row and the cache, on the model or its twin, without a random draw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gptoughts.config.loader import ModelConfig
from gptoughts.engine.objectives.base import NextToken
from gptoughts.errors import ConfigError
from gptoughts.models.hf import probe as hf_probe
from gptoughts.models.hf import reading, twin
from gptoughts.models.hf.family import hf_family
from tests.models.hf.hf_configs import CAUSAL, DENSE, LENGTH, READER, ROWS, write_config

BLOOM = {"vocab_size": ROWS, "hidden_size": 64, "n_layer": 2, "n_head": 4, "model_type": "bloom"}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    hf_probe._KNOWN.clear()
    yield
    hf_probe._KNOWN.clear()


def probed(kind: str, **content: Any) -> hf_probe.Probed:
    config = CONFIG_MAPPING[kind].from_dict({**(CAUSAL.get(kind, DENSE)), **content})
    return hf_probe.probe(config, lambda made: AutoModelForCausalLM.from_config(made, attn_implementation="eager"), 1)


@pytest.mark.parametrize(
    ("kind", "content", "found"),
    [
        ("llama", {}, (True, True, True)),
        ("bloom", BLOOM, (True, False, True)),
        ("bert", {**READER, "is_decoder": False}, (False, False, False)),
        ("bert", {**READER, "is_decoder": True}, (True, False, True)),
    ],
)
def test_a_probe_finds_what_a_model_does(kind: str, content: dict[str, Any], found: tuple[bool, bool, bool]) -> None:
    seen = probed(kind, **content)
    assert (seen.causal, seen.separates, seen.caches) == found


def test_a_probe_draws_nothing_and_runs_once_for_each_config(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    real = hf_probe._probed

    def counting(*arguments: Any) -> hf_probe.Probed:
        runs.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(hf_probe, "_probed", counting)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = probed("llama"), probed("llama")
    assert torch.equal(torch.get_rng_state(), before)
    assert first is second and len(runs) == 1
    probed("llama", num_hidden_layers=4)
    assert len(runs) == 2


def test_a_model_that_cannot_run_is_not_judged_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def fails(config: PretrainedConfig) -> Any:
        raise RuntimeError("no such kernel")

    for _ in range(2):
        found = hf_probe.probe(CONFIG_MAPPING["llama"].from_dict(DENSE), fails, 1)
    assert [record.message for record in caplog.records] == [
        "model llama: not tried whether it is causal: no tiny model of this config: RuntimeError: no such kernel"
    ]
    assert (found.causal, found.separates, found.caches) == (None, None, False)
    assert "no such kernel" in found.problem


def test_a_large_model_is_probed_as_its_twin() -> None:
    sizes = []

    def make(config: PretrainedConfig) -> Any:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        sizes.append(model.num_parameters())
        return model

    config = CONFIG_MAPPING["llama"]()
    assert hf_probe.probe(config, make, 7_000_000_000).separates is True
    assert sizes[0] < 200_000


def test_a_twin_keeps_a_layer_of_each_kind() -> None:
    kinds = ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 4
    small = twin.smaller({"num_hidden_layers": 8, "layer_types": kinds, "hidden_size": 4096, "initializer_range": 0.02})
    assert small["layer_types"] == ["linear_attention", "full_attention"]
    assert (small["num_hidden_layers"], small["hidden_size"], small["initializer_range"]) == (2, 64, 0.02)


def test_a_model_that_reads_both_ways_is_refused_with_what_moved(tmp_path: Path) -> None:
    folder = str(write_config(tmp_path, "bert", is_decoder=False))
    with pytest.raises(ConfigError, match=r"(?s)bert is bidirectional .* Found logits that move by .* \"is_decoder\": true"):
        hf_family(ModelConfig(family="hf", config=folder))


def test_conversations_one_in_a_row_need_no_positions(tmp_path: Path) -> None:
    family = hf_family(ModelConfig(family="hf", config=str(write_config(tmp_path, "bloom", **BLOOM))))
    with torch.device("cpu"):
        model = family.build(ModelConfig(family="hf", config=str(tmp_path)), ROWS, LENGTH)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    family.buffers(model, torch.device("cpu"))
    text, width = torch.randint(3, ROWS, (1, 10), generator=generator), 17
    ids = torch.nn.functional.pad(text, (0, width - 10))
    batch = {
        "input_ids": ids,
        "labels": torch.nn.functional.pad(text, (0, width - 10), value=-100),
        "positions": torch.cat((torch.arange(10), torch.arange(width - 10)))[None],
    }
    with pytest.raises(ValueError, match=r"data.packing: .* Try: --data.packing false"):
        NextToken()(model, batch)
    alone = NextToken()(model, {"input_ids": text})
    torch.testing.assert_close(NextToken(one_document=True)(model, batch), alone, rtol=1e-5, atol=1e-5)


def test_reading_with_a_cache_and_without_are_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inner = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"].from_dict(DENSE), attn_implementation="eager").eval()
    parts = [[3, 4, 5, 6], [7], [8]]
    with torch.no_grad():
        cached, whole = reading.cached(inner), reading.whole(inner)
        for part in parts:
            torch.testing.assert_close(cached(part), whole(part), rtol=1e-5, atol=1e-5)
