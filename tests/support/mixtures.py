"""Small mixtures of experts from transformers as this house calls models, and engines that train them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import NextToken
from gptoughts.hardware.world import World
from gptoughts.models.family import custom_family
from tests.support.engines import recipe_of

WORDS, WIDTH = 64, 32
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    "first_k_dense_replace": 1, "num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "head_dim": 8, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "glm4_moe": {**LATENT, "partial_rotary_factor": 0.5},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rotary_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_num_shared_experts": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}  # fmt: skip


class Called(nn.Module):
    """A transformers model, called as `model(input_ids, labels) -> loss sum`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.inner(input_ids, use_cache=False).logits.float()
        if labels is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def config(kind: str, **more: Any) -> Any:
    """A tiny config of `kind`."""
    from transformers import CONFIG_MAPPING

    values = {**SIZES, **KINDS[kind], **more}
    return CONFIG_MAPPING[kind](**values)


def mixture(kind: str = "mixtral", implementation: str = "grouped_mm", seed: int = 0, **more: Any) -> Called:
    """Random weights, in training mode; routers are drawn wide enough to tell tokens apart."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = config(kind, **more)
    model = AutoModelForCausalLM.from_config(settings, experts_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return Called(model).train()


def ids(rows: int = 4, columns: int = 17, seed: int = 0) -> Tensor:
    """Random words, skewed so that experts are not loaded alike."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((rows, columns), generator=generator) ** 3 * WORDS).long()


def engine_for(model: nn.Module, batch: dict[str, Tensor], micro_batch: int | None = None, rate: float = 1e-2) -> Engine:
    """An engine that sees the same batch again and again."""
    ranks = Ranks(World(), torch.device("cpu"))
    stream: Iterator[Any] = repeat((batch, 0))
    engine = Engine(model, custom_family(model), NextToken(), recipe_of(), ranks, ranks.device, batches=stream)
    engine.optimizer = torch.optim.SGD(engine.parameters(), lr=rate)
    engine.micro_batch = micro_batch
    return engine
