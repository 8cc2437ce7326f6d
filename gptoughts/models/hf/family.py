"""Families of transformers' causal language models and question-answering encoders, under transformers' parameter names.

Adds our call interface (labels, packed documents), a head with a replaceable loss, and the `Family` functions for attention, ties,
buffers and initialization. transformers' "eager" attention is the baseline.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gptoughts.config.hf_spec import max_positions
from gptoughts.config.loader import ModelConfig
from gptoughts.errors import ConfigError
from gptoughts.models.family import Family, repeated_blocks
from gptoughts.models.gpt.attention import AttentionFunction
from gptoughts.models.gpt.gpt import IGNORED_LABEL, LossFunction, Reduction, full_cross_entropy
from gptoughts.models.gpt.masks import MaskForm, lengths
from gptoughts.models.hf import attention as hf_attention
from gptoughts.models.hf import expert_autocast as hf_experts
from gptoughts.models.hf import initial as hf_initial
from gptoughts.models.hf import reading
from gptoughts.models.hf.config import LOADERS, Task, building, model_class, open_config, vocabulary
from gptoughts.models.hf.introspect import plain_head, separates_documents
from gptoughts.models.hf.probe import Probed, probe
from gptoughts.models.meta import on_meta
from gptoughts.models.torch_internals import child_table, share_tables


class TransformersModel(nn.Module):
    """Module that shares the parameter, buffer and module tables of a transformers model, under the same names.

    Replacing a parameter or module here replaces it in `inner` too, so transformers' methods (generate, save_pretrained) keep
    working. `inner` is not registered as a submodule.
    """

    inner: PreTrainedModel
    form: MaskForm = "dense"
    """Form of the masks that its attention takes."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        object.__setattr__(self, "inner", inner)
        share_tables(self, inner)

    def train(self, mode: bool = True) -> TransformersModel:
        """Set training mode here and in `inner`."""
        self.inner.training = mode
        super().train(mode)
        return self


class Head(nn.Module):
    """Output layer: logits, or with labels the loss, computed by a replaceable `loss`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # V C
        self.loss: LossFunction = full_cross_entropy

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        """Return logits B T V of hidden B T C, or with labels (B T, shifted, -100 ignored) the summed loss: a scalar, or B with "rows"."""
        if labels is None:
            return F.linear(hidden, self.weight)
        return self.loss(hidden, self.weight, labels, reduction)


class HFModel(TransformersModel):
    """Causal language model of transformers with the call interface of native models."""

    def __init__(self, inner: PreTrainedModel, sequence_length: int, found: Probed) -> None:
        super().__init__(inner)
        self.vocab_size = vocabulary(inner.config)  # some models embed more rows, which text does not hold
        self.sequence_length = sequence_length
        self.packs = separates_documents(inner) if found.separates is None else found.separates
        self.caches = found.caches
        self.head_name = plain_head(inner)
        if self.head_name is not None:
            weight = inner.get_submodule(self.head_name).weight
            assert isinstance(weight, nn.Parameter)
            inner.set_submodule(self.head_name, Head(weight))

    @property
    def head(self) -> Head | None:
        """Return the head, or None if logits are more than one matmul of the hidden states."""
        if self.head_name is None:
            return None
        head = self.inner.get_submodule(self.head_name)
        assert isinstance(head, Head)
        return head

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, positions: Tensor | None = None, reduction: Reduction = "sum"
    ) -> Tensor:
        """Return logits B T V of integer `input_ids` B T, or with `labels` (B T, shifted, -100 ignored) the summed loss.

        `positions` (B T) count inside each document of a row; 0 starts a document, and tokens attend within their document only.
        Without `positions` a row is one document. `reduction` "rows" gives one sum per row. Raises ValueError for `positions` in
        a model that does not separate packed documents.
        """
        kwargs: dict[str, Any] = {"input_ids": input_ids.long(), "use_cache": False}
        if positions is not None:
            if not self.packs:
                raise ValueError(
                    f"data.packing: {type(self.inner).__name__} does not separate packed documents. Try: --data.packing false"
                )
            # Without a mask, transformers detects documents by non-consecutive position_ids.
            kwargs["position_ids"] = positions.long()
            documents = lengths(positions, True, input_ids) if self.form == "lengths" else None
            if documents is not None:  # transformers' names of document offsets
                kwargs |= {"cu_seq_lens_q": documents.bounds, "cu_seq_lens_k": documents.bounds}
                kwargs |= {"max_length_q": documents.longest, "max_length_k": documents.longest}
        if self.head is not None:
            base = getattr(self.inner, self.inner.base_model_prefix)
            return self.head(base(**kwargs)[0], labels, reduction)
        logits = self.inner(**kwargs).logits
        return logits if labels is None else _cross_entropy(logits, labels, reduction)

    def reader(self) -> HFModel:
        """Return the model itself, for `generate.autoregressive`."""
        return self

    def reading(self) -> reading.Read:
        """Return a function that takes the next ids of a new text and returns the logits (V) of the following one."""
        return reading.cached(self.inner) if self.caches else reading.whole(self.inner)


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    losses = F.cross_entropy(
        logits.float().flatten(0, -2), labels.long().flatten(), ignore_index=IGNORED_LABEL,
        reduction="sum" if reduction == "sum" else "none",
    )  # fmt: skip
    return losses if reduction == "sum" else losses.view(labels.shape).sum(dim=-1)


class HFEncoder(TransformersModel):
    """Encoder of transformers that predicts start and end of an answer span."""

    def __init__(self, inner: PreTrainedModel, sequence_length: int) -> None:
        super().__init__(inner)
        self.sequence_length = sequence_length
        parameters = inspect.signature(inner.forward).parameters
        self.has_types = "token_type_ids" in parameters and getattr(inner.config, "type_vocab_size", 2) > 1

    def forward(self, input_ids: Tensor, token_types: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return logits B T 2 (answer start, answer end) of `input_ids` B T. `mask` B T is true for tokens, false for padding.

        `token_types` B T distinguish question and context; encoders without token types ignore them.
        """
        kwargs: dict[str, Any] = {"input_ids": input_ids.long()}
        if mask is not None:
            kwargs["attention_mask"] = mask.bool()
        if token_types is not None and self.has_types:
            kwargs["token_type_ids"] = token_types.long()
        outputs = self.inner(**kwargs)
        return torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)


# --- the family


def hf_family(config: ModelConfig, task: Task = "causal") -> Family:
    """Return the family of the transformers model at `config.path` or `config.config`. Raises ConfigError if `task` does not support it."""
    hf_config, _ = open_config(config, task)
    probe = _build(hf_config, config, task, 1, rows=None)
    with on_meta():
        initials = hf_initial.scheme(_transformers_model(hf_config, config, task, None))
    has_head = isinstance(probe, HFModel) and probe.head_name is not None
    return Family(
        name=str(hf_config.model_type),
        build=lambda config, rows, length: _build(hf_config, config, task, length, rows),
        blocks=lambda model: _blocks(_checked(model)),
        tied=lambda model: _ties(_checked(model).inner),
        retie=lambda model: _retie(_checked(model).inner),
        buffers=lambda model, device: hf_initial.build_buffers(_checked(model).inner, device),
        attentions=hf_attention.attentions,
        set_attention=_set_attention,
        head=_head if has_head else None,
        initial=hf_initial.initial_of(initials),
    )


def _checked(model: nn.Module) -> TransformersModel:
    if not isinstance(model, TransformersModel):
        raise TypeError(f"model: not a Hugging Face model. Found {type(model).__name__}")
    return model


def _set_attention(model: nn.Module, function: AttentionFunction, form: MaskForm = "dense") -> Callable[[], None]:
    adopted = _checked(model)
    undo, before = hf_attention.set_attention(adopted.inner, function, form), adopted.form
    adopted.form = form

    def restore() -> None:
        adopted.form = before
        undo()

    return restore


def _head(model: nn.Module) -> nn.Module:
    assert isinstance(model, HFModel) and model.head is not None
    return model.head


def _transformers_model(hf_config: PretrainedConfig, config: ModelConfig, task: Task, rows: int | None) -> PreTrainedModel:
    hf_config = copy.deepcopy(hf_config)
    if rows is not None and config.path is None and rows != vocabulary(hf_config):
        hf_config.get_text_config().vocab_size = rows
    loader, kwargs = model_class(task, config)
    with building(config):
        model: PreTrainedModel = loader.from_config(
            hf_config, attn_implementation=hf_attention.EAGER, dtype=torch.float32, **kwargs
        )
    return model


def _build(hf_config: PretrainedConfig, config: ModelConfig, task: Task, length: int, rows: int | None) -> Any:
    if rows is not None and config.path is not None and rows > vocabulary(hf_config):
        problem = f"model.path {config.path}: the tokenizer needs {rows} embedding rows"
        raise ConfigError(problem, found=vocabulary(hf_config))
    limit = max_positions({**hf_config.to_dict(), "model_type": hf_config.model_type})
    if limit is not None and length > limit:
        problem = f"data.sequence_length: {hf_config.model_type} has {limit} positions"
        raise ConfigError(problem, found=length, fix=f"--data.sequence_length {limit}")
    with on_meta():
        inner = _transformers_model(hf_config, config, task, rows)
    hf_experts.use_autocast_experts(inner)
    if task != "causal":
        return HFEncoder(inner, length)
    if config.remote_code is None and inner.config.model_type not in LOADERS["causal"][1]:
        problem = f"model {config.path or config.config}: of {hf_config.model_type}, transformers opens no folder of the text part alone"
        raise ConfigError(problem, found=f"model_type {inner.config.model_type!r}")
    found = _probed(hf_config, config, inner)
    hf_attention.mark_causal(inner)
    return HFModel(inner, length, found)


def _probed(hf_config: PretrainedConfig, config: ModelConfig, inner: PreTrainedModel) -> Probed:
    """Return what a run of the model, or of its tiny twin, shows. Raises ConfigError for a model that is not causal."""
    size = sum(parameter.numel() for parameter in inner.parameters())
    found = probe(hf_config, lambda made: _transformers_model(made, config, "causal", None), size)
    if found.causal or (found.causal is None and not _reads_both_ways(inner)):
        return found
    problem = f"objective: {hf_config.model_type} is bidirectional and cannot be trained to predict the next token"
    moved = None if found.before is None else f"logits that move by {found.before:.1g} of the largest with a later token"
    fixes = ['"is_decoder": true in config.json'] if getattr(hf_config, "is_decoder", None) is False else []
    fixes += ["--objective question-answering"] if hf_config.model_type in LOADERS["question-answering"][1] else []
    raise ConfigError(problem, found=moved, fix=", or ".join(fixes))


def _reads_both_ways(inner: PreTrainedModel) -> bool:
    return any(getattr(module, "is_causal", True) is False for module in hf_attention.attentions(inner).values())


def _blocks(model: TransformersModel) -> dict[str, nn.Module]:
    base_name = model.inner.base_model_prefix
    base = child_table(model).get(base_name) or model
    prefix = f"{base_name}." if base is not model else ""
    return {f"{prefix}{name}": block for name, block in repeated_blocks(base).items()}


def _ties(inner: PreTrainedModel) -> list[tuple[str, str]]:
    mapping = inner.get_expanded_tied_weights_keys(all_submodels=True)
    return [(alias, owner) for alias, owner in mapping.items()]


def _retie(inner: PreTrainedModel) -> None:
    for alias, owner in _ties(inner):
        module, _, attribute = alias.rpartition(".")
        setattr(inner.get_submodule(module), attribute, inner.get_parameter(owner))
