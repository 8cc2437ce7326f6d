"""Small adapted models for the tests: an engine of the native GPT with an adapter, and a transformers model with its values as a source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.config.loader import Recipe
from gptoughts.config.recipe import AdapterConfig, ModelConfig
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine, Source
from gptoughts.engine.objectives.base import NextToken
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.adapters.adapter import adapted
from gptoughts.models.adapters.weights import AdapterSource
from gptoughts.models.family import FAMILIES, Family, repeated_blocks
from gptoughts.models.sources import Initialization, meta_model
from gptoughts.planning.resolve import Plan
from gptoughts.run.build import build_engine
from tests.support.engines import ROWS, plan_of, random_batches, recipe_of

ANY = ModelConfig()


@contextmanager
def adapted_engine(
    adapter: AdapterConfig,
    form: str = "modern",
    plan: Plan | None = None,
    batches: Iterator[Any] | None = None,
    ranks: Ranks | None = None,
    saved: Source | None = None,
    recipe: Recipe | None = None,
) -> Iterator[Engine]:
    """Build an engine that trains `adapter` on initialized weights."""
    recipe = recipe or recipe_of(form)
    family = adapted(FAMILIES["gpt"], adapter)
    model = meta_model(recipe, family, ROWS)
    base = Initialization(FAMILIES["gpt"], recipe.model, recipe.seed)
    source = AdapterSource(base, model, adapter.kind, recipe.seed, saved)
    here = ranks or Ranks(World(), torch.device("cpu"))
    stream = batches or random_batches(recipe)
    with build_engine(
        model, family, NextToken(), recipe, plan or plan_of(recipe), CATALOG, ranks=here, batches=stream, source=source
    ) as engine:
        yield engine


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class State:
    """Source of values by name, like a checkpoint."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values, self.left = values, dict.fromkeys(values)

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        self.left.pop(name, None)
        return self.values.get(name)

    def buffer(self, name: str) -> Tensor | None:
        return self.tensor(name, torch.Size())

    def unused(self) -> list[str]:
        return list(self.left)


def theirs(kind: str) -> nn.Module:
    """Build a transformers model of a few thousand parameters, with weights large enough to affect the logits."""
    import transformers as t

    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "llama":
        model = t.LlamaForCausalLM(
            t.LlamaConfig(**small, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True)
        )
    elif kind == "gpt2":
        model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    else:
        config = t.DeepseekV3Config(
            **small, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4,
        )  # fmt: skip
        model = t.DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def plain_family(model: nn.Module) -> Family:
    """Return the custom family of a transformers model; `build` makes an empty one of its config."""

    def build(config: ModelConfig, rows: int, length: int) -> nn.Module:
        with torch.device("meta"):
            return type(model)(model.config)

    return Family(
        name="plain",
        build=build,
        blocks=repeated_blocks,
        tied=lambda _: [],
        retie=lambda made: made.tie_weights(),
        buffers=_buffers,
    )


def _buffers(model: nn.Module, device: torch.device) -> None:
    """Copy rotary frequencies and masks, which follow from the config, from a model built on the CPU."""
    real = type(model)(model.config)
    for name, buffer in real.named_buffers():
        place, _, own = name.rpartition(".")
        model.get_submodule(place)._buffers[own] = buffer.to(device)


def filled(family: Family, source_of: Any) -> nn.Module:
    """Build a model with the values of `source_of(model)`, as `Engine.materialize` fills it."""
    recipe = recipe_of("modern")
    model = family.build(ANY, 96, 32)
    source = source_of(model)
    cpu = torch.device("cpu")
    Engine(model, family, NextToken(), recipe, Ranks(World(), cpu), cpu, batches=iter(())).materialize(source)
    return model.eval()
