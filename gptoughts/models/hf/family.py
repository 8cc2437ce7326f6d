"""Any causal language model or question-answering encoder of Hugging Face transformers as one of our families, by its own names.

The parameters are transformers' own, under its names. Around them stand our model call (labels, packed documents), our head with a
replaceable loss, and ports for attention, ties, buffers and initial weights. Attention written out ("eager") is the baseline.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

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
from gptoughts.models.hf.config import Task, model_class, open_config
from gptoughts.models.hf.introspect import plain_head, separates_documents
from gptoughts.models.meta import on_meta
from gptoughts.models.torch_internals import child_table, share_tables


class Adopted(nn.Module):
    """A module that has the parts of a transformers model as its own, under the same names.

    Both hold the very same tables of parts, so whoever replaces a parameter or a module here replaces it there, too, and
    transformers' own methods (generate, save_pretrained) go on working. `inner` itself is no part.
    """

    inner: PreTrainedModel
    form: MaskForm = "dense"
    """Of the masks that its attention takes."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        object.__setattr__(self, "inner", inner)
        share_tables(self, inner)

    def train(self, mode: bool = True) -> Adopted:
        """Set the mode of both."""
        self.inner.training = mode
        super().train(mode)
        return self


class Head(nn.Module):
    """The output layer: logits, or with labels the loss, through a replaceable `loss`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # V C
        self.loss: LossFunction = full_cross_entropy

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        """Logits B T V of hidden B T C, or with labels (B T, already shifted, -100 ignored) the summed loss, a scalar or B "rows"."""
        if labels is None:
            return F.linear(hidden, self.weight)
        return self.loss(hidden, self.weight, labels, reduction)


class HFModel(Adopted):
    """A causal language model of transformers, called as ours are."""

    def __init__(self, inner: PreTrainedModel, sequence_length: int) -> None:
        super().__init__(inner)
        self.vocab_size = len(_embedding(inner))
        self.sequence_length = sequence_length
        self.packs = separates_documents(inner)
        self.head_name = plain_head(inner)
        if self.head_name is not None:
            weight = inner.get_submodule(self.head_name).weight
            assert isinstance(weight, nn.Parameter)
            inner.set_submodule(self.head_name, Head(weight))

    @property
    def head(self) -> Head | None:
        """The head; None where the model does more between hidden states and logits than one product."""
        if self.head_name is None:
            return None
        head = self.inner.get_submodule(self.head_name)
        assert isinstance(head, Head)
        return head

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, positions: Tensor | None = None, reduction: Reduction = "sum"
    ) -> Tensor:
        """Logits B T V of integer `input_ids` B T; with `labels` (B T, shifted, -100 ignored) the summed loss instead.

        `positions` (B T) count inside each document of a row, and a 0 begins one: tokens see no other document. Without them
        a row is one document. `reduction` "rows" gives one sum per row. Raises ValueError for documents in a model that
        does not keep them apart.
        """
        words: dict[str, Any] = {"input_ids": input_ids.long(), "use_cache": False}
        if positions is not None:
            if not self.packs:
                raise ValueError(
                    f"{type(self.inner).__name__} does not keep documents in one row apart; set data.packing = false"
                )
            # transformers tells documents apart by positions that do not go on, where no mask is given.
            words["position_ids"] = positions.long()
            documents = lengths(positions, True, input_ids) if self.form == "lengths" else None
            if documents is not None:  # the words that transformers has for it
                words |= {"cu_seq_lens_q": documents.bounds, "cu_seq_lens_k": documents.bounds}
                words |= {"max_length_q": documents.longest, "max_length_k": documents.longest}
        if self.head is not None:
            base = getattr(self.inner, self.inner.base_model_prefix)
            return self.head(base(**words)[0], labels, reduction)
        logits = self.inner(**words).logits
        return logits if labels is None else _cross_entropy(logits, labels, reduction)

    def reader(self) -> HFModel:
        """What `generate.autoregressive` asks for: itself."""
        return self

    def reading(self) -> Callable[[list[int]], Tensor]:
        """A fresh key-value cache: takes the ids that follow those before, returns the logits (V) of the next one."""
        cache, device = DynamicCache(config=self.inner.config), _embedding(self.inner).device

        def read(ids: list[int]) -> Tensor:
            given = torch.tensor([ids], device=device)
            return self.inner(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

        return read


def _embedding(inner: PreTrainedModel) -> Tensor:
    weight = inner.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    each = F.cross_entropy(
        logits.float().flatten(0, -2), labels.long().flatten(), ignore_index=IGNORED_LABEL,
        reduction="sum" if reduction == "sum" else "none",
    )  # fmt: skip
    return each if reduction == "sum" else each.view(labels.shape).sum(dim=-1)


class HFEncoder(Adopted):
    """An encoder of transformers that marks where an answer begins and ends."""

    def __init__(self, inner: PreTrainedModel, sequence_length: int) -> None:
        super().__init__(inner)
        self.sequence_length = sequence_length
        takes = inspect.signature(inner.forward).parameters
        self.has_types = "token_type_ids" in takes and getattr(inner.config, "type_vocab_size", 2) > 1

    def forward(self, input_ids: Tensor, token_types: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits B T 2 (begins here, ends here) of `input_ids` B T. `mask` B T is true for tokens, false for padding.

        `token_types` B T tell question from context; encoders that have none are not given them.
        """
        words: dict[str, Any] = {"input_ids": input_ids.long()}
        if mask is not None:
            words["attention_mask"] = mask.bool()
        if token_types is not None and self.has_types:
            words["token_type_ids"] = token_types.long()
        found = self.inner(**words)
        return torch.stack((found.start_logits, found.end_logits), dim=-1)


# --- the family


def hf_family(config: ModelConfig, task: Task = "causal") -> Family:
    """The family of the transformers model that `config.path` or `config.config` names. Raises ConfigError where it is none for `task`."""
    theirs, _ = open_config(config, task)
    specimen = _build(theirs, config, task, 1, wanted_rows=None)
    if task == "causal":
        _require_causal(specimen.inner)
    begins = _begins(theirs, config, task)
    plain = isinstance(specimen, HFModel) and specimen.head_name is not None
    return Family(
        name=str(theirs.model_type),
        build=lambda ours, rows, length: _build(theirs, ours, task, length, rows),
        blocks=lambda model: _blocks(_adopted(model)),
        tied=lambda model: _ties(_adopted(model).inner),
        retie=lambda model: _retie(_adopted(model).inner),
        buffers=lambda model, device: hf_initial.build_buffers(_adopted(model).inner, device),
        attentions=hf_attention.attentions,
        set_attention=_set_attention,
        head=_head if plain else None,
        initial=hf_initial.initial_of(begins),
    )


def _adopted(model: nn.Module) -> Adopted:
    if not isinstance(model, Adopted):
        raise TypeError(f"a family of Hugging Face models was given a {type(model).__name__}")
    return model


def _set_attention(model: nn.Module, function: AttentionFunction, form: MaskForm = "dense") -> Callable[[], None]:
    adopted = _adopted(model)
    undo, before = hf_attention.set_attention(adopted.inner, function, form), adopted.form
    adopted.form = form

    def back() -> None:
        adopted.form = before
        undo()

    return back


def _head(model: nn.Module) -> nn.Module:
    assert isinstance(model, HFModel) and model.head is not None
    return model.head


def _raw(theirs: PretrainedConfig, ours: ModelConfig, task: Task, rows: int | None) -> PreTrainedModel:
    mine = copy.deepcopy(theirs)
    if rows is not None and ours.path is None and rows != mine.vocab_size:
        mine.vocab_size = rows
    loader, words = model_class(task, ours)
    return loader.from_config(mine, attn_implementation=hf_attention.WRITTEN_OUT, dtype=torch.float32, **words)


def _build(theirs: PretrainedConfig, ours: ModelConfig, task: Task, length: int, wanted_rows: int | None) -> Any:
    if wanted_rows is not None and ours.path is not None and wanted_rows > theirs.vocab_size:
        raise ConfigError(f"model.path {ours.path}: {wanted_rows} rows are wanted and its embedding has {theirs.vocab_size}")
    most = max_positions({**theirs.to_dict(), "model_type": theirs.model_type})
    if most is not None and length > most:
        raise ConfigError(
            f"data.sequence_length = {length}: {theirs.model_type} has positions for {most} tokens; set at most {most}"
        )
    with on_meta():
        inner = _raw(theirs, ours, task, wanted_rows)
    hf_experts.use_grouped_product(inner)
    return HFModel(inner, length) if task == "causal" else HFEncoder(inner, length)


def _begins(theirs: PretrainedConfig, ours: ModelConfig, task: Task) -> dict[str, Any]:
    with on_meta():
        return hf_initial.scheme(_raw(theirs, ours, task, None))


def _require_causal(inner: PreTrainedModel) -> None:
    both_ways = [name for name, module in hf_attention.attentions(inner).items() if getattr(module, "is_causal", True) is False]
    if both_ways:
        raise ConfigError(
            f"{inner.config.model_type} reads both ways and cannot learn to predict the next token; "
            'objective = "question-answering" takes it'
        )


def _blocks(model: Adopted) -> dict[str, nn.Module]:
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
