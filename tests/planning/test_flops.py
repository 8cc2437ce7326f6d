"""FLOPs per token: what torch counts in a real step, what others published, and what recomputation adds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptoughts.config.model_spec import ModelSpec, attention_flops, flops_per_token, of, spec_for
from gptoughts.config.recipe import ModelConfig
from gptoughts.engine.accumulation import accumulate
from gptoughts.hardware.machine import Machine, read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.adapters.adapter import adapted
from gptoughts.models.sources import meta_model
from gptoughts.planning.flops import model_flops, plan_flops
from gptoughts.planning.memory_model import adapter_parameters
from gptoughts.planning.plan import Plan
from gptoughts.run.throughput import throughput, utilization
from tests.support.engines import LENGTH, ROWS, engine_of, family_for, objective_for, plan_of, recipe_of
from tests.support.golden_files import ROOT

LAYERNORM = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False}
LLAMA = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "qk_norm": False, "tied": False}


def native(length: int, **shape: Any) -> ModelSpec:
    return of(ModelConfig(**shape), length, None)


@dataclass(frozen=True)
class SetUp:
    """A published speed and utilization. `tokens` per second are over all `devices`, `extra` are FLOPs per token that only they count."""

    name: str
    source: str
    spec: ModelSpec
    devices: int
    tokens: float
    mfu: float
    machine: str | None = None
    """A machine with their GPU; None for a device that our table of peaks does not know, whose peak is in `tflops`."""
    tflops: float = 0.0
    extra: int = 0


def mpt(length: int, depth: int, width: int, heads: int) -> ModelSpec:
    return native(length, depth=depth, width=width, heads=heads, vocab_size=50368, **LAYERNORM)


FOUNDRY = (
    "mosaicml/llm-foundry, scripts/train/benchmarking/README.md, formula in collect_results.py: 6N + 12LCT, N with positions"
)
TITAN = "pytorch/torchtitan, docs/performance.md of 2024: 64 A100, FSDP2, T = 8192, formula 6N + 12LCT of its train.py"
PALM = "Chowdhery et al. 2022, PaLM, section 4.1 and appendix B: 6N + 12LHQT"
LLAMA3 = {"heads": 64, "kv_heads": 8, "vocab_size": 128256, **LLAMA}

SET_UPS = [
    SetUp(
        "PaLM 540B on 6144 TPU v4", PALM,
        # Its shape is not one of ours: parallel layers, one key head, heads x 256 below the width.
        ModelSpec(
            depth=118, width=18432, attention_width=48 * 256, sequence_length=2048, vocab_size=256_000, tied=True,
            parameters=540_350_000_000, embedding_parameters=256_000 * 18432,
        ),
        6144, 238.3e3, 0.462, tflops=275.0,
    ),
    SetUp(
        "Megatron-Turing NLG 530B on 2240 A100", PALM + "; shape of Smith et al. 2022",
        native(2048, depth=105, width=20480, heads=128, vocab_size=51200, bias=True, **LAYERNORM),
        2240, 65.43e3, 0.302, "a100x8-80gb",
    ),
    SetUp("MPT-7B on 8 H100", FOUNDRY, mpt(2048, 32, 4096, 32), 8, 85144, 0.4644, "h100x8"),
    SetUp("MPT-1B on 8 A100", FOUNDRY, mpt(2048, 24, 2048, 16), 8, 164109, 0.5986, "a100x8-80gb"),
    SetUp("MPT-125M on 8 A100", FOUNDRY, mpt(2048, 12, 768, 12), 8, 1142641, 0.4479, "a100x8-80gb"),
    SetUp("MPT-7B, 65,536 tokens, on 8 A100", FOUNDRY, mpt(65536, 32, 4096, 32), 8, 8108, 0.4697, "a100x8-80gb"),
    SetUp(
        "Llama 3 70B on 64 A100", TITAN + "; N with the input embedding, which we leave out: 1.3 % of the FLOPs",
        native(8192, depth=80, width=8192, hidden=28672, **LLAMA3), 64, 64 * 331, 0.517, "a100x8-80gb",
    ),
    SetUp(
        "Llama 3 8B on 64 A100", TITAN + "; N with the input embedding, which we leave out: 5.2 % of the FLOPs",
        native(8192, depth=32, width=4096, hidden=14336, **{**LLAMA3, "heads": 32}), 64, 64 * 2973, 0.582, "a100x8-80gb",
        extra=6 * 128256 * 4096,
    ),
]  # fmt: skip


def machine_of(name: str) -> Machine:
    return read(str(ROOT / "tests" / "machines" / f"{name}.json"))


@pytest.mark.parametrize("case", SET_UPS, ids=lambda case: case.name)
def test_published_utilization_is_found_from_published_speed(case: SetUp) -> None:
    flops = flops_per_token(case.spec)
    assert flops is not None
    if case.machine is None:
        found: float | None = (flops + case.extra) * case.tokens / (case.devices * case.tflops * 1e12)
    else:
        mfu, line = utilization(flops + case.extra, machine_of(case.machine), case.devices)
        found = mfu(case.tokens)
        assert "dense bf16" in line
    assert found == pytest.approx(case.mfu, rel=0.02)


def test_a_difference_of_formula_is_named_where_it_matters() -> None:
    """Without the term that they count and we do not, the deviation is the share that the source line names."""
    small = SET_UPS[-1]
    flops = flops_per_token(small.spec)
    assert flops is not None and small.extra / (flops + small.extra) == pytest.approx(0.052, abs=0.001)
    large = SET_UPS[-2]
    flops = flops_per_token(large.spec)
    assert flops is not None and 6 * 128256 * 8192 / flops == pytest.approx(0.013, abs=0.001)


def test_hardware_utilization_of_a_published_run_with_recomputed_blocks() -> None:
    """MPT-7B at 65,536 tokens recomputes every block: 62.63 % HFU beside 46.97 % MFU.

    They count the whole forward again; torch stops before each block's last projection and does not run the head again.
    """
    case = next(one for one in SET_UPS if "65,536" in one.name)
    recipe = recipe_of("gpt2")
    plan = plan_of(recipe, {"recompute": "recompute-blocks"})
    figures = throughput(case.spec, recipe, plan, machine_of("a100x8-80gb"), World(0, 0, 8, 8), CATALOG).row(case.tokens)
    assert figures["perf/mfu"] == pytest.approx(0.4697, rel=0.02)
    flops = flops_per_token(case.spec)
    assert flops is not None and figures["perf/mfu"] and figures["perf/hfu"]
    left_out = 2 * (32 * 4 * 4096 * 4096 + 50368 * 4096)
    assert figures["perf/hfu"] + figures["perf/mfu"] * left_out / flops == pytest.approx(0.6263, rel=0.02)


# --- against torch's own count


def counted(recipe: Any, plan: Plan) -> float:
    """FLOPs per token of a real forward and backward, as torch counts operators."""
    with engine_of(recipe, plan) as engine:
        batch, _ = engine.next_batch()
        engine.model.train()
        with FlopCounterMode(display=False) as counter:
            accumulate(engine, batch, torch.tensor(1.0))
        return counter.get_total_flops() / engine.objective.tokens(batch)


WIDE = {"depth": 3, "width": 128, "heads": 4}


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("modern", {**WIDE, "kv_heads": 2}),
        ("gpt2", {}),
        ("llada", {**WIDE, "family": "llada"}),
        ("llama", {}),
    ],
)
def test_the_formula_is_what_torch_counts(family: str, model: dict[str, Any]) -> None:
    """Norms, biases and rotary positions are no matrix products; in models this small they are some per cent of N."""
    recipe = recipe_of(family)
    if model:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})
    flops, formula = model_flops(spec_for(recipe), recipe)
    assert formula == "6N + 12LCT"
    assert flops == pytest.approx(counted(recipe, plan_of(recipe)), rel=0.05)


def test_frozen_weights_have_no_gradient_of_their_own() -> None:
    """Weights are not initialized: only their shapes count. The first block's inputs need no gradient, so torch counts a little less than the formula."""
    recipe = recipe_of("llama", adapter={"kind": "lora", "rank": 4})
    spec = spec_for(recipe)
    flops, formula = model_flops(spec, recipe)
    assert formula == "4N + 6A + 12LCT" and flops is not None
    model = meta_model(recipe, adapted(family_for(recipe), recipe.adapter), ROWS).to_empty(device="cpu")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter_parameters(spec, recipe) == trained
    batch = {"input_ids": torch.zeros(2, LENGTH + 1, dtype=torch.long)}
    with FlopCounterMode(display=False) as counter:
        objective_for(recipe)(model, batch).backward()
    found = counter.get_total_flops() / (2 * LENGTH)
    everything = flops_per_token(spec)
    assert found < flops < (everything or 0)
    assert flops == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    "layers",
    [
        {"recompute": "recompute-blocks"},
        {"recompute": "recompute-ops", "recompute.keep": "attention"},
        {"recompute": "recompute-ops"},
    ],
)
def test_recomputed_forwards_are_what_torch_counts(layers: dict[str, str]) -> None:
    recipe = recipe_of("modern", model={**WIDE, "kv_heads": 2, "vocab_size": 128})
    layers = {"attention": "sdpa"} | layers
    plain, again = plan_of(recipe, {"attention": "sdpa"}), plan_of(recipe, layers)
    spec = spec_for(recipe)
    planned = plan_flops(spec, recipe, again, CATALOG)
    assert planned.model is not None and planned.hardware is not None
    added = counted(recipe, again) - counted(recipe, plain)
    # torch does not count its attention kernel for CPUs.
    attention = (attention_flops(spec) or 0) / 3 if layers["recompute"] == "recompute-blocks" else 0
    assert planned.hardware - planned.model == pytest.approx(added + attention, rel=0.01, abs=0.001 * planned.model)


def test_a_sliding_window_takes_the_place_of_the_sequence(tmp_path: Path) -> None:
    def spec(length: int, **keys: Any) -> ModelSpec:
        shape = {
            "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 128, "vocab_size": 128, "max_position_embeddings": 4096,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({**shape, **keys}))
        recipe = recipe_of("llama", data={"sequence_length": length, "tokenizer": "chars"})
        model = recipe.model.model_copy(update={"config": str(tmp_path), "vocab_size": None})
        return spec_for(recipe.model_copy(update={"model": model}))

    whole = flops_per_token(spec(256))
    assert whole is not None
    assert flops_per_token(spec(256, sliding_window=None)) == whole
    assert flops_per_token(spec(256, sliding_window=512)) == whole
    assert flops_per_token(spec(256, sliding_window=64)) == whole - 12 * 4 * 64 * (256 - 64)
    mixed = spec(256, sliding_window=64, layer_types=["sliding_attention", "full_attention"] * 2)
    assert flops_per_token(mixed) == whole - 12 * 2 * 64 * (256 - 64)
    qwen = {"model_type": "qwen2", "sliding_window": 64}
    off, on = spec(256, **qwen), spec(256, **qwen, use_sliding_window=True, max_window_layers=3)
    assert off.attention_window is None and on.attention_window == (3 * 256 + 64) / 4
