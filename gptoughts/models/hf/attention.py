"""Set the attention function of transformers models, as for native models.

transformers looks up attention functions by a name in the model's config. The functions registered here call the module's own
attribute `attend`. The name selects the mask form (`masks.MaskForm`): bool tensors, or None if causality is enough; BlockMasks; or
document offsets, passed beside the masks as transformers' `cu_seq_lens_q`.
"""

from __future__ import annotations

import inspect
import re
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

from gptoughts.config.hf_attention import attention_needs
from gptoughts.errors import LayerError
from gptoughts.models.gpt.attention import AttentionFunction
from gptoughts.models.gpt.masks import Documents, MaskForm
from gptoughts.models.torch_internals import attention_implementation, takes_attention_functions

NAMES: dict[MaskForm, str] = {"dense": "gptoughts", "blocks": "gptoughts_blocks", "lengths": "gptoughts_lengths"}
"""Mask form -> name registered in transformers. No name contains a word that transformers interprets, such as flash."""
EAGER = "eager"
"""transformers' name of its reference attention: the baseline."""
MATH = "--layer.attention math"
IGNORED_KWARGS = frozenset(
    ("sliding_window", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position",
     "position_embeddings", "is_causal", "deterministic", "past_key_values", "output_router_logits", "num_items_in_batch",
     "token_type_ids", "logits_to_keep")
)  # fmt: skip
"""Keyword arguments of transformers that do not change the result: masks already include sliding windows."""


OTHER_INPUTS = re.compile(r"encoder_attn|cross_?att|vision|visual|image|audio|speech", re.IGNORECASE)
"""Names of modules that do not run on text alone: attention to an encoder, and towers of other inputs."""


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> module whose forward looks up its attention function, and runs on text alone."""
    modules = model.named_modules()
    return {name: module for name, module in modules if not OTHER_INPUTS.search(name) and _uses_interface(type(module))}


def mark_causal(model: nn.Module) -> None:
    """Set `is_causal` of every attention module of a causal model: some keep their encoder's False, and rely on a mask that is left out."""
    for module in attentions(model).values():
        if getattr(module, "is_causal", True) is False:
            module.is_causal = True  # type: ignore[assignment]  # a plain attribute, not a module


def _uses_interface(kind: type[nn.Module]) -> bool:
    try:
        return kind.__module__.startswith("transformers") and "attention_interface(" in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # no source available
        return False


def set_attention(model: PreTrainedModel, function: AttentionFunction, form: MaskForm = "dense") -> Callable[[], None]:
    """Set `function`, which takes masks of `form`, in every attention module. Returns the undo.

    Raises LayerError for models with an attention that a function cannot replace.
    """
    found = attentions(model)
    if not found or not takes_attention_functions(model):
        raise LayerError(f"attention: {type(model).__name__} does not use transformers' attention interface", fix=MATH)
    needs = attention_needs({**model.config.get_text_config().to_dict(), "model_type": model.config.model_type})
    if needs is not None:
        raise LayerError(f"attention: the attention of {type(model).__name__} has {needs}", fix=MATH)
    dropping = [name for name, module in found.items() if _dropout(module)]
    if dropping:
        raise LayerError(
            f"attention: fused kernels have no dropout of probabilities, which {dropping[0]} uses", fix="--model.dropout 0"
        )
    AttentionInterface.register(NAMES[form], _dispatch_lengths if form == "lengths" else _dispatch)
    AttentionMaskInterface.register(NAMES[form], _MASKS[form])
    before = attention_implementation(model.config)
    previous = {name: module.__dict__.get("attend") for name, module in found.items()}
    for module in found.values():
        module.attend = function  # type: ignore[assignment]  # a plain attribute, not a module
    model.set_attn_implementation(NAMES[form])

    def undo() -> None:
        model.set_attn_implementation(before)
        for name, module in found.items():
            if previous[name] is None:
                del module.attend
            else:
                module.attend = previous[name]  # type: ignore[assignment]

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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: query B H T D, key B K S D, value B K S E, bool mask or None -> B T H E, no scores.

    transformers defines this signature.
    """
    _require_supported(module, kwargs, dropout)
    causal = _is_causal(module, is_causal)
    # A single query attends to all keys. A mask already includes causality.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    output = module.attend(query, key, value, causal, attention_mask, scaling)  # B H T E
    return output.transpose(1, 2).contiguous(), None


def _is_causal(module: Any, given: bool | None) -> bool:
    """Return the argument of the call, else the module's attribute; a module with neither, in a causal model, is causal."""
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _require_supported(module: Any, kwargs: dict[str, Any], dropout: float) -> None:
    unsupported = [key for key, value in kwargs.items() if value is not None and key not in IGNORED_KWARGS]
    unsupported += ["dropout"] if dropout else []
    if unsupported:
        raise LayerError(f"attention: {type(module).__name__} needs {', '.join(unsupported)}", fix=MATH)


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`_dispatch` for functions that take `Documents`: needs document offsets, or one document per row."""
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
        problem = f"attention: {type(module).__name__} has a sliding window of {window} tokens"
        raise LayerError(problem, fix="--layer.attention flex or sdpa")
    if cu_seq_lens_q is None:
        if attention_mask is not None:
            problem = f"attention: {type(module).__name__} masks tokens in a way that document offsets cannot express"
            raise LayerError(problem, fix="--layer.attention sdpa")
        return _dispatch(module, query, key, value, None, scaling, dropout, is_causal, **kwargs)
    _require_supported(module, kwargs, dropout)
    assert max_length_q is not None
    causal = _is_causal(module, is_causal)
    output = module.attend(query, key, value, causal, Documents(cu_seq_lens_q, max_length_q), scaling)
    return output.transpose(1, 2).contiguous(), None


def _block_mask(
    batch_size: int,
    kv_length: int,
    q_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Any:
    """Return a BlockMask of documents, windows and padding; with a cache (fewer queries than keys) a dense mask.

    transformers defines this signature.
    """
    if q_length != kv_length:
        dense: dict[str, Any] = {"batch_size": batch_size, "kv_length": kv_length, "q_length": q_length, "q_offset": q_offset}
        dense |= {"kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask, "device": device}
        return sdpa_mask(**dense, **kwargs)
    from torch.nn.attention.flex_attention import create_block_mask

    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    if q_offset or kv_offset:
        mask_function = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    return create_block_mask(mask_function, batch_size, None, q_length, kv_length, device=device)


def _no_mask(
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """Return None if causality is enough, else an empty mask, which `_dispatch_lengths` refuses without document offsets."""
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    if plain and attention_mask is None:
        return None
    return torch.empty(0, 1, 0, 0, dtype=torch.bool)


_MASKS: dict[MaskForm, Callable[..., Any]] = {"dense": sdpa_mask, "blocks": _block_mask, "lengths": _no_mask}
