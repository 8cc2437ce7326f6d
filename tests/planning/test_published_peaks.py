"""The memory model against peaks that others published for one GPU. Shapes and layers are the model's; only the bytes in which the other
trainer keeps its tensors are given here, from its configuration.

Other trainers hold trained weights in 16 bits, where we keep float32: `TORCHTUNE` and `LLM_C` say what they hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gptoughts.config.loader import from_values
from gptoughts.config.model_spec import spec_for
from gptoughts.console import GIB, MIB
from gptoughts.planning.memory_model import Budget, baseline

README = "github.com/pytorch/torchtune README, batch 2 x 2048; its recipes/configs/llama3_1"
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_act": "silu",
    "max_position_embeddings": 8192, "num_key_value_heads": 8, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "124M": {"width": 768, "depth": 12, "heads": 12},
    "1558M": {"width": 1600, "depth": 48, "heads": 25},
}
GPT2 = {
    "family": "gpt", "vocab_size": 50304, "norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True,
}  # fmt: skip
MOST = 0.15


@dataclass(frozen=True)
class Peak:
    """A published peak in bytes, and how its trainer holds tensors."""

    model: str
    method: str
    sequences: int
    length: int
    rank: int
    hold: Callable[[Budget, Budget], Budget]
    """The trainer's budget, from ours and from that of the frozen base without an adapter."""
    bytes: float
    source: str


def sixteen(budget: Budget) -> Budget:
    """Weights, gradients, moments and activations in bf16, so nothing is cast; fused attention; blocks recomputed."""
    return replace(
        budget.half().without_scores(), weights=budget.weights // 2, gradients=budget.gradients // 2, optimizer=budget.optimizer // 2,
        temporary=0, cast_weights=0, stream_bytes=2, copies=0, inner=0.0, recasts=True,
    )  # fmt: skip


def torchtune(budget: Budget) -> Budget:
    """torchtune: bf16, logits in bf16 of which an eighth at a time is float32 in the loss."""
    return replace(sixteen(budget), logit_bytes=2 + 12 / 8)


def torchtune_full(budget: Budget, whole: Budget) -> Budget:
    """Updates in the backward, one bf16 gradient at a time; 8-bit moments paged to the host."""
    return replace(torchtune(budget), gradients=2 * budget.largest, optimizer=0, largest=budget.largest // 2)


def torchtune_lora(budget: Budget, whole: Budget) -> Budget:
    """Base and factors in bf16."""
    return torchtune(replace(budget, weights=whole.weights + 4 * trained(budget)))


def trained(budget: Budget) -> int:
    """Return the trained elements."""
    return budget.gradients // 4


def outside(budget: Budget) -> int:
    """Return the elements of embedding and head."""
    return 2 * budget.vocab_size * budget.width


def packed(budget: Budget, whole: Budget) -> int:
    """Return the bytes of blocks in NF4 with 8-bit scales of 64 values, whose float32 scales are of 256, and of the rest in bf16."""
    inside = whole.weights // 4 - outside(budget)
    return int(inside * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + outside(budget) * 2)


def torchtune_qlora(budget: Budget, whole: Budget) -> Budget:
    """Factors in bf16."""
    return replace(torchtune(budget), weights=packed(budget, whole) + 2 * trained(budget))


def transformers_qlora(budget: Budget, whole: Budget) -> Budget:
    """Factors, their moments and the loss in float32; bf16 activations."""
    held = replace(sixteen(budget), gradients=budget.gradients, optimizer=budget.optimizer)
    return replace(held, weights=packed(budget, whole) + 4 * trained(budget), logit_bytes=12)


def llm_c(budget: Budget, whole: Budget) -> Budget:
    """llm.c: bf16 weights, gradients, activations and logits, whose gradient takes their place; float32 moments and master weights."""
    count = trained(budget)
    held = replace(sixteen(budget), optimizer=12 * count, inner=1.0, recasts=False)
    return replace(held, logit_bytes=2, accumulates=True)


def llm_c_recomputed(budget: Budget, whole: Budget) -> Budget:
    """Also recomputes the activation function's output (-r 1)."""
    held = llm_c(budget, whole)
    return replace(held, compute=held.compute - held.inner_width)


def llm_c_sharded(budget: Budget, whole: Budget) -> Budget:
    """Moments and master weights over eight ranks (ZeRO-1)."""
    held = llm_c(budget, whole)
    return replace(held, optimizer=held.optimizer // 8)


PEAKS = [
    Peak("8B", "full", 2, 2048, 0, torchtune_full, 18.9 * GIB, README),
    Peak("8B", "LoRA", 2, 2048, 8, torchtune_lora, 16.2 * GIB, README),
    Peak("8B", "QLoRA", 2, 2048, 8, torchtune_qlora, 7.4 * GIB, README),
    Peak("70B", "QLoRA", 1, 2048, 16, transformers_qlora, 48e9, "LLaMA-Factory README, hardware requirement (an estimate)"),
    Peak("124M", "full", 56, 1024, 0, llm_c_recomputed, 20_460 * MIB, "llm.c log of an A800 in tannal/tannal.glitch.me ai.md"),
    Peak("1558M", "full", 16, 1024, 0, llm_c_sharded, 48_577 * MIB, "github.com/karpathy/llm.c/discussions/677, per GPU"),
]  # fmt: skip
"""The sums of what llm.c prints as allocated; its device figure adds the CUDA context."""


def predicted(peak: Peak, folder: Path) -> int:
    """Return the model's peak with the tensors of the other trainer."""
    gpt2 = peak.model.endswith("M")
    if gpt2:
        model = {**GPT2, **SIZES[peak.model]}
    else:
        (folder / "config.json").write_text(json.dumps({**LLAMA, **SIZES[peak.model]}), encoding="utf-8")
        model = {"family": "hf", "config": str(folder)}
    values = {"name": "published", "model": model, "data": {"sequence_length": peak.length}, "train": {"steps": 1}}
    whole = from_values(values, "test").recipe
    base = {"QLoRA": "nf4"}.get(peak.method, "full")
    adapter = {"kind": "none"} if not peak.rank else {"kind": "lora", "rank": peak.rank, "base": base}
    recipe = from_values({**values, "adapter": adapter}, "test").recipe
    spec = replace(spec_for(whole), stored_bytes=None)
    ours, all_trained = (baseline(spec, each, peak.sequences) for each in (recipe, whole))
    assert ours is not None and all_trained is not None
    return peak.hold(ours, all_trained).peak


@pytest.mark.parametrize("peak", PEAKS, ids=lambda peak: f"{peak.model} {peak.method}")
def test_published_peaks_are_predicted(peak: Peak, tmp_path: Path) -> None:
    error = predicted(peak, tmp_path) / peak.bytes - 1
    print(f"{peak.model} {peak.method}: {peak.bytes / GIB:.1f} GiB published, {error:+.1%}, {peak.source}")
    assert abs(error) <= MOST
