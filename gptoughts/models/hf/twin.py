"""Make the config of a tiny model of the same architecture, by the keys of a config, whatever its model type.

Sizes are set by key. A layer is kept for each kind of layer that lists with a value per layer distinguish, so that a hybrid stays one;
where a number sets how often a kind comes, so many layers are kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from gptoughts.config.hf_spec import ALIASES

ROWS, WIDTH, HEADS, HEAD, HIDDEN, LAYERS, EXPERTS, POSITIONS = 288, 64, 4, 16, 96, 2, 4, 128
MOST_LAYERS = 8
OTHER_TOKEN = 3
"""Id of every special token that text does not hold, such as an image's."""
_VALUES: dict[str, Any] = {
    r"(decoder_|unpadded_)?vocab_size|vocab_size_per_layer_input": ROWS,
    r"hidden_size|d_model|n_embd|embed_dim|emb_dim|dim|word_embed_proj_dim|embedding_dim|backbone_hidden_size|embedding_size"
    r"|lru_width|input_embedding_size|output_embedding_size|ple_embed_dim|mamba_d_ssm|adapter_(in|out)_dim|adapter_input_size": WIDTH,
    r"attention_hidden_size": 2 * WIDTH,
    r"num_attention_heads|n_heads?|num_heads|attention_heads|(num_)?(decoder|encoder)_attention_heads|swa_num_attention_heads"
    r"|linear_num_value_heads|linear_num_heads|mamba_num_heads|mamba_n_heads|num_query_groups": HEADS,
    r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_key_heads|index_n_heads|n_mamba_heads|kv_n_heads": 2,
    r"head_dim|global_head_dim|kv_channels|dim_head|d_head|d_kv|attention_head_size|linear_(key_|value_)?head_dim|swa_(v_)?head_dim"
    r"|v_head_dim|qk_nope_head_dim|index_head_dim": HEAD,
    r"attention_head_dim": 2 * HEAD,
    r"qk_rope_head_dim|rotary_dim": 8,
    r"qk_head_dim|q_lora_rank": 24,
    r"kv_lora_rank|o_lora_rank|mamba_dt_rank|time_step_rank|laurel_rank|adapter_rank|hc_lowrank|loop_gate_rank|gated_norm_rank"
    r"|router_hidden_size|hidden_size_per_layer_input|mamba_d_state|ssm_state_size|state_size|d_rel|pronunciation_embed_dim"
    r"|shape_embed_dim|mamba_head_dim": 16,
    r"pronunciation_vocab_size|shape_vocab_size|mamba_headdim": 32,
    r"intermediate_size|ffn_dim|dim_ff|dff|d_ff|d_inner|n_inner|feed_forward_size|(decoder|encoder)_ffn_dim|ffn_hidden_size"
    r"|intermediate_size_mlp|dense_intermediate_size": HIDDEN,
    r"(moe_|shared_|shared_expert_|moe_shared_expert_|shared_experts_)intermediate_size|expert_ffn_hidden_size": 32,
    r"(moe_)?num_(local_)?experts|n_routed_experts": EXPERTS,
    r"num_experts_per_tok(en)?|moe_topk|top_k_experts|moe_k|n_group|num_expert_group|topk_group|zero_expert_num|n_groups": 2,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|model_max_length|max_target_positions"
    r"|max_source_positions|context_length|original_max_position_embeddings|seq_length": POSITIONS,
    r"sliding_window(_size)?|attention_window_size|window_size|local_attention|attention_chunk_size|keep_window_size"
    r"|(mamba_)?chunk_size": 8,
    r"index_topk": 4,
    r"encoder_hash_byte_group_vocab": 512,
    r"pad_token_id": 0,
    r"bos_token_id|decoder_start_token_id": 1,
    r"eos_token_id|forced_eos_token_id|sep_token_id": 2,
}  # fmt: skip
SIZES = {re.compile(keys): value for keys, value in _VALUES.items()}
DEPTH_KEYS = ("num_hidden_layers", *ALIASES["num_hidden_layers"], "decoder_layers")
DEPTH = re.compile(r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(decoder|encoder)_layers")
TOKEN = re.compile(r".*_token_(id|index)|unk_index|mask_index|eod_token_id")
OFTEN = re.compile(r".*(period|interval|offset|every|step|pattern|frequency|group_size).*")
"""Keys of numbers that set how often a kind of layer comes."""
LABELS = ("id2label", "label2id")
PER_LAYER_CONFIG = "per_layer_config"
"""transformers' overrides by layer number, remade by the config class."""


def smaller(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config with small sizes; of lists with a value per layer, the values of the kept layers."""
    depth = next((content[key] for key in DEPTH_KEYS if isinstance(content.get(key), int)), None)
    lists = {
        key: value
        for key, value in content.items()
        if isinstance(value, list) and depth is not None and len(value) == depth > 2
    }
    kept = _kept(content, lists, depth)
    out: dict[str, Any] = {}
    for key, value in content.items():
        if key in LABELS or key == PER_LAYER_CONFIG:
            continue
        if isinstance(value, Mapping):
            out[key] = smaller(value)
        elif key in lists:
            out[key] = [value[layer] for layer in kept]
        else:
            out[key] = len(kept) if DEPTH.fullmatch(key) and isinstance(value, int) else _size(key, value)
    return _consistent(out)


def _kept(content: Mapping[str, Any], lists: Mapping[str, list[Any]], depth: int | None) -> list[int]:
    """Return a layer of each kind, by all lists together; without lists the first layers, up to the period of the kinds."""
    if not lists:
        often = [value for key, value in content.items() if OFTEN.fullmatch(key) and isinstance(value, int)]
        return list(range(min(depth or LAYERS, MOST_LAYERS, max([LAYERS, *often]))))
    kinds: dict[str, int] = {}
    for layer in range(depth or 0):
        kinds.setdefault(repr([value[layer] for value in lists.values()]), layer)
    kept = sorted(kinds.values())[: MOST_LAYERS // 2]
    return kept if len(kept) > 1 else [0, 1]


def _size(key: str, value: Any) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str | float):
        return value
    for keys, size in SIZES.items():
        if keys.fullmatch(key):
            number = min(size, value) if isinstance(value, int) and value > 0 else size
            return [size] * min(len(value), LAYERS) if isinstance(value, list) else number
    return OTHER_TOKEN if TOKEN.fullmatch(key) and isinstance(value, int) else copy.deepcopy(value)


def _consistent(out: dict[str, Any]) -> dict[str, Any]:
    """Set the sizes that follow from others: those of latent attention and of Mamba's heads."""
    heads, width = out.get("num_attention_heads"), out.get("hidden_size")
    if "kv_lora_rank" in out and "num_key_value_heads" in out:  # latent attention has a key for every query head
        out["num_key_value_heads"] = heads
    if "qk_rope_head_dim" in out and "head_dim" in out:  # a copy, which the rotary embedding of latent attention reads
        out["head_dim"] = out["qk_rope_head_dim"]
        if isinstance(rotary := out.get("rope_parameters"), dict) and "partial_rotary_factor" in rotary:
            rotary["partial_rotary_factor"] = 1.0
    if width and out.get("mamba_n_heads") and "mamba_d_head" in out:
        out["mamba_d_head"] = (out.get("mamba_d_ssm") or out.get("mamba_expand", 2) * width) // out["mamba_n_heads"]
    if width and "expand" in out and out.get("num_heads") and isinstance(out.get("head_dim"), int):
        out["num_heads"] = out["expand"] * width // out["head_dim"]
    if heads and isinstance(out.get("num_key_value_heads"), int) and heads % out["num_key_value_heads"]:
        out["num_key_value_heads"] = heads
    return out
