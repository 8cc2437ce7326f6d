"""Tiny configs of Hugging Face model types, as config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS, LENGTH = 128, 32
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
DENSE: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **ENDS,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "max_position_embeddings": 64, **ENDS,
}  # fmt: skip
READER: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 66, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": DENSE,
    "mistral": {**DENSE, "sliding_window": 8},
    "qwen2": {**DENSE, "tie_word_embeddings": True},
    "qwen3": {**DENSE, "head_dim": 16},
    "gpt2": {"vocab_size": ROWS, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, **ENDS},
    "deepseek_v2": {**LATENT, "n_shared_experts": 2, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "mixtral": {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **DENSE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        **DENSE, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0],
    },
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": READER,
    "roberta": {**READER, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": ROWS, "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
}  # fmt: skip


def write_config(folder: Path, kind: str, **more: Any) -> Path:
    """Write a folder with the config.json of a tiny `kind`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_type": kind, **(CAUSAL | ENCODERS).get(kind, DENSE), **more}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
