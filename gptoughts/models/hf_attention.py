"""Attention of transformers models through a function of ours: the same port that the native models have.

transformers looks its attention up by a name in the model's config. Under the name `gptoughts` stands a function that calls what
the module itself carries as `attend`; masks come as bool tensors, or not at all where causality says everything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from gptoughts.errors import LayerError
from gptoughts.models.attention import AttentionFunction

NAME = "gptoughts"
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


def set_attention(model: PreTrainedModel, function: AttentionFunction) -> Callable[[], None]:
    """Let every attention module compute with `function`. Returns the undo. Raises LayerError where a model's attention is its own."""
    found = attentions(model)
    if not found or not model._can_set_attn_implementation():
        raise LayerError(f"transformers' {type(model).__name__} calls its attention itself; take --layer.attention math")
    own = [key for key in ("attn_logit_softcapping", "attention_softcap") if getattr(model.config, key, None)]
    if own:
        raise LayerError(f"{type(model).__name__} caps its attention scores ({own[0]}); take --layer.attention math")
    dropping = [name for name, module in found.items() if _dropout(module)]
    if dropping:
        raise LayerError(f"{dropping[0]} drops attention probabilities, which a fused kernel here does not; set dropout to 0")
    AttentionInterface.register(NAME, _dispatch)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    had = {name: module.__dict__.get("attend") for name, module in found.items()}
    for module in found.values():
        module.attend = function  # type: ignore[assignment]  # a plain attribute, not a module
    model.set_attn_implementation(NAME)

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
    asked = [word for word, given in words.items() if given is not None and word not in HARMLESS]
    if asked or dropout:
        what = ", ".join([*asked, *(["dropout"] if dropout else [])])
        raise LayerError(f"{type(module).__name__} asks its attention for {what}; take --layer.attention math")
    causal = module.is_causal if is_causal is None else is_causal
    # One query sees all keys; with a mask the mask says everything.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    mixed = module.attend(query, key, value, causal, attention_mask, scaling)  # B H T E
    return mixed.transpose(1, 2).contiguous(), None
