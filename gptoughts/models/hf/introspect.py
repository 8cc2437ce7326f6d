"""What kind of model a transformers model is, asked of the model itself and not looked up by its name."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptoughts.models.hf import attention as hf_attention
from gptoughts.models.torch_internals import child_table

MASK_MAKER = re.compile(r"create_\w*causal_mask|mask_function")
"""What builds the mask of self-attention in a base model's forward."""


def plain_head(inner: PreTrainedModel) -> str | None:
    """The name of the head, where logits are nothing but its product with the base model's hidden states; else None.

    Asked by calling the model's own forward around a stand-in base and a stand-in head with known, large values: soft caps, scales
    and biases would all show.
    """
    output, base_name = inner.get_output_embeddings(), inner.base_model_prefix
    name = next((name for name, module in inner.named_modules() if module is output), None)
    if (
        type(output) is not nn.Linear
        or output.bias is not None
        or name is None
        or "." in name
        or base_name not in child_table(inner)
    ):
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"):
        hidden = torch.randn(1, 3, output.in_features, generator=generator)
        weight = 10 * torch.randn(7, output.in_features, generator=generator)
        parts = {base_name: child_table(inner)[base_name], name: output}
        training = inner.training
        try:
            inner.training = False
            child_table(inner)[base_name] = _Says(hidden)
            child_table(inner)[name] = _Maps(weight)
            logits = inner(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
        except (AttributeError, RuntimeError, TypeError, ValueError):  # it wants more than a plain model does
            return None
        finally:
            inner.training = training
            child_table(inner).update(parts)
        return name if torch.equal(logits, F.linear(hidden, weight)) else None


class _Says(nn.Module):
    """A base model that has always the same hidden states, and nothing else to say."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *arguments: Any, **words: Any) -> Any:
        return _Output(self.hidden)


class _Output:
    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _Maps(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


def separates_documents(inner: PreTrainedModel) -> bool:
    """Whether the base model builds every mask from positions and has no layer that carries state along the row."""
    base = getattr(inner, inner.base_model_prefix, None)
    kinds = getattr(inner.config, "layer_types", None) or []
    if base is None or any("attention" not in kind or "linear" in kind for kind in kinds):
        return False
    return bool(hf_attention.attentions(base)) and _masks_know_positions(type(base))


def _masks_know_positions(base: type[nn.Module]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base.forward)))
    except (OSError, TypeError, SyntaxError):  # no source to be read: then nothing can be promised
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and MASK_MAKER.fullmatch(ast.unparse(node.func))]
    words = {ast.unparse(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys if key}
    shared = "'position_ids'" in words
    told = [any(word.arg == "position_ids" or (word.arg is None and shared) for word in call.keywords) for call in calls]
    return bool(told) and all(told)
