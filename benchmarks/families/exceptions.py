"""What single model types need beyond the rules of `benchmarks.families.tiny`."""

from __future__ import annotations

from typing import Any

_ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_GLOBAL_HEAD: dict[str, Any] = {"global_head_dim": 16, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
_INDEXER: dict[str, Any] = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4,
    "output_gate_type": "sigmoid", "ngram_vocab_size_base": 64, "split_ngram_parts": 8, "heads_per_ngram": 2,
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 32, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": None, "sliding_attention": {**_ROTARY, "mrope_section": [2, 3, 3]}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "flint": {"mlp_only_layers": [0]},
    "dory": {  # its config.json counts attention and MLP apart
        "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2, "n_recurrent_loops": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    },
    "dots3_note": {"vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": _GLOBAL_HEAD,
    "gemma4_unified_text": _GLOBAL_HEAD,
    "gemma4": {"text_config": _GLOBAL_HEAD},
    "gemma4_unified": {"text_config": _GLOBAL_HEAD},
    "granitemoehybrid": {"mamba_d_head": 32, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hrm_text": {"num_layers_per_stack": 1, "L_cycles": 1, "H_cycles": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_head_dim": 16},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "lsh"],
        "num_buckets": 4, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8,
    },
    "roc_bert": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "rwkv": {"attention_hidden_size": 64},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"embedding_dim": 64, "qk_dim_factor": 1.0, "chunk_size": 8},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_head_dim": 32,
        "attention_hidden_size": 128, "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128, "mamba_headdim": 32, "n_mamba_heads": 4, "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Model type -> keys of its config.json."""
