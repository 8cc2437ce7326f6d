"""Attention of transformers models through a function of ours: the same port that the native models have.

transformers looks its attention up by a name in the model's config. Under the names here stands a function that calls what the
module itself carries as `attend`. The name decides the form of its masks (`packing.MaskForm`): bool tensors, or none where causality
says everything; BlockMasks; or the bounds of documents, which travel beside the masks as transformers' own `cu_seq_lens_q`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    AttentionMaskInterface,
    add_offsets_to_mask_function,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    padding_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from gptoughts.errors import LayerError
from gptoughts.models.gpt.attention import AttentionFunction
from gptoughts.models.gpt.masks import Documents, MaskForm
from gptoughts.models.torch_internals import attention_implementation, takes_attention_functions

NAMES: dict[MaskForm, str] = {"dense": "gptoughts", "blocks": "gptoughts_blocks", "lengths": "gptoughts_lengths"}
"""Form of the masks -> the name that transformers looks up. None of them holds a word that transformers has meanings for."""
WRITTEN_OUT = "eager"
"""transformers' name for attention written out: the baseline."""
HARMLESS = frozenset(
    ("sliding_window", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position",
     "position_embeddings", "is_causal", "deterministic", "past_key_values", "output_router_logits", "num_items_in_batch",
     "token_type_ids")
)  # fmt: skip
"""Words that transformers passes and that change no number here: the mask already says which tokens a window shows."""


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module whose forward looks its attention function up."""
    return {name: module for name, module in model.named_modules() if _looks_up(type(module))}


def _looks_up(kind: type[nn.Module]) -> bool:
    try:
        return kind.__module__.startswith("transformers") and "attention_interface(" in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # code without source
        return False


def set_attention(model: PreTrainedModel, function: AttentionFunction, form: MaskForm = "dense") -> Callable[[], None]:
    """Let every attention module compute with `function`, which takes masks of `form`. Returns the undo.

    Raises LayerError where a model's attention is its own.
    """
    found = attentions(model)
    if not found or not takes_attention_functions(model):
        raise LayerError(f"transformers' {type(model).__name__} calls its attention itself; take --layer.attention math")
    own = [key for key in ("attn_logit_softcapping", "attention_softcap") if getattr(model.config, key, None)]
    if own:
        raise LayerError(f"{type(model).__name__} caps its attention scores ({own[0]}); take --layer.attention math")
    dropping = [name for name, module in found.items() if _dropout(module)]
    if dropping:
        raise LayerError(f"{dropping[0]} drops attention probabilities, which a fused kernel here does not; set dropout to 0")
    AttentionInterface.register(NAMES[form], _dispatch_lengths if form == "lengths" else _dispatch)
    AttentionMaskInterface.register(NAMES[form], _MASKS[form])
    before = attention_implementation(model.config)
    had = {name: module.__dict__.get("attend") for name, module in found.items()}
    for module in found.values():
        module.attend = function  # type: ignore[assignment]  # a plain attribute, not a module
    model.set_attn_implementation(NAMES[form])

    def undo() -> None:
        model.set_attn_implementation(before)
        for name, module in found.items():
            if had[name] is None:
                del module.attend
            else:
                module.attend = had[name]  # type: ignore[assignment]

    return undo


def _dropout(module: nn.Module) -> float:
    rate = getattr(module, "attention_dropout", getattr(module, "attn_dropout", getattr(module, "dropout", 0.0)))
    return float(rate.p if isinstance(rate, nn.Dropout) else rate if isinstance(rate, int | float) else 0.0)


def _dispatch(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **words: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query B H T D, key B K S D, value B K S E, a bool mask or None -> B T H E, and no scores."""
    _refuse(module, words, dropout)
    causal = module.is_causal if is_causal is None else is_causal
    # One query sees all keys; with a mask the mask says everything.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    mixed = module.attend(query, key, value, causal, attention_mask, scaling)  # B H T E
    return mixed.transpose(1, 2).contiguous(), None


def _refuse(module: Any, words: dict[str, Any], dropout: float) -> None:
    asked = [word for word, given in words.items() if given is not None and word not in HARMLESS]
    if asked or dropout:
        what = ", ".join([*asked, *(["dropout"] if dropout else [])])
        raise LayerError(f"{type(module).__name__} asks its attention for {what}; take --layer.attention math")


def _dispatch_lengths(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None,
    **words: Any,
) -> tuple[Tensor, None]:
    """`_dispatch` for functions that take `Documents`: their bounds must have come with the call, or rows be one document each."""
    window = words.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise LayerError(f"{type(module).__name__} looks back {window} tokens only; take --layer.attention flex or sdpa")
    if cu_seq_lens_q is None:
        if attention_mask is not None:
            raise LayerError(f"{type(module).__name__} hides tokens that no document bounds tell; take --layer.attention sdpa")
        return _dispatch(module, query, key, value, None, scaling, dropout, is_causal, **words)
    _refuse(module, words, dropout)
    assert max_length_q is not None
    causal = bool(module.is_causal if is_causal is None else is_causal)
    mixed = module.attend(query, key, value, causal, Documents(cu_seq_lens_q, max_length_q), scaling)
    return mixed.transpose(1, 2).contiguous(), None


def _block_mask(
    batch_size: int,
    kv_length: int,
    q_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **words: Any,
) -> Any:
    """A BlockMask of what transformers asks for: documents, windows, padding. With a cache, where queries are few, a dense mask."""
    if q_length != kv_length:
        asked: dict[str, Any] = {"batch_size": batch_size, "kv_length": kv_length, "q_length": q_length, "q_offset": q_offset}
        asked |= {"kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask, "device": device}
        return sdpa_mask(**asked, **words)
    from torch.nn.attention.flex_attention import create_block_mask

    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    if q_offset or kv_offset:
        mask_function = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    return create_block_mask(mask_function, batch_size, None, q_length, kv_length, device=device)


def _no_mask(
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, **words: Any
) -> Tensor | None:
    """None where causality says everything; else an empty mask, so that a call without the bounds of documents is noticed."""
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    if plain and attention_mask is None:
        return None
    return torch.empty(0, 1, 0, 0, dtype=torch.bool)


_MASKS: dict[MaskForm, Callable[..., Any]] = {"dense": sdpa_mask, "blocks": _block_mask, "lengths": _no_mask}
