"""Detect properties of a transformers model by running or parsing its code, not by its name."""

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
"""Functions that build self-attention masks in a base model's forward."""


def plain_head(inner: PreTrainedModel) -> str | None:
    """Return the name of the head if logits are exactly its matmul with the base model's hidden states, else None.

    Calls the model's forward with a stub base and a stub head of known, large values, which reveals soft caps, scales and biases.
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
            child_table(inner)[base_name] = _StubBase(hidden)
            child_table(inner)[name] = _StubHead(weight)
            logits = inner(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=False).logits
        except (AttributeError, RuntimeError, TypeError, ValueError):  # forward needs more than the stubs
            return None
        finally:
            inner.training = training
            child_table(inner).update(parts)
        return name if torch.equal(logits, F.linear(hidden, weight)) else None


class _StubBase(nn.Module):
    """Stub base model with fixed hidden states and no other outputs."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _StubOutput(self.hidden)


class _StubOutput:
    """Stub model output: hidden states, None for every other field."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _StubHead(nn.Module):
    """Stub head with a fixed weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


def separates_documents(inner: PreTrainedModel) -> bool:
    """Return whether the base model builds every mask from positions and has no recurrent or convolution layers."""
    base = getattr(inner, inner.base_model_prefix, None)
    kinds = getattr(inner.config, "layer_types", None) or []
    if base is None or any("attention" not in kind or "linear" in kind for kind in kinds):
        return False
    return bool(hf_attention.attentions(base)) and _masks_use_positions(type(base))


def _masks_use_positions(base: type[nn.Module]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base.forward)))
    except (OSError, TypeError, SyntaxError):  # no source, so it cannot be verified
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and MASK_MAKER.fullmatch(ast.unparse(node.func))]
    keys = {ast.unparse(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys if key}
    in_dict = "'position_ids'" in keys
    uses = [any(word.arg == "position_ids" or (word.arg is None and in_dict) for word in call.keywords) for call in calls]
    return bool(uses) and all(uses)
