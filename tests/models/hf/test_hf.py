"""Hugging Face models inside the engine: the same logits, the same training, packed documents, attention, heads, buffers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gptoughts.config.loader import ModelConfig, Recipe, from_values
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine, Source
from gptoughts.engine.objectives.base import NextToken
from gptoughts.errors import ConfigError, LayerError, RunError
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.family import Family, draw
from gptoughts.models.gpt.attention import math_attention
from gptoughts.models.hf import config as hf_config
from gptoughts.models.hf import initial as hf_initial
from gptoughts.models.hf.family import HFEncoder, HFModel, hf_family
from gptoughts.models.hf.weights import Pretrained
from gptoughts.models.sources import Initialization, meta_model
from gptoughts.run.build import build_engine
from tests.models.hf.hf_configs import CAUSAL, DENSE, ENCODERS, LENGTH, ROWS, write_config
from tests.support.engines import plan_of, random_batches, steps

CPU = torch.device("cpu")
TRAINED = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "deepseek_v2", "deepseek_v3"]
POSITIONS = torch.tensor([[*range(10), *range(22)], [*range(1), *range(20), *range(11)]])


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def recipe_of(folder: Path, key: str = "path", **model: Any) -> Recipe:
    values = {
        "name": "tiny", "model": {"family": "hf", key: str(folder), **model}, "train": {"steps": 100_000, "global_batch": 4},
        "data": {"sequence_length": LENGTH, "tokenizer": "chars"}, "optim": {"warmup_steps": 0, "learning_rate": 1e-3},
        "experts": {"bias_rate": 0.0},
    }  # fmt: skip
    return from_values(values, "the test").recipe


def saved(folder: Path, kind: str, **more: Any) -> Path:
    """Save a transformers model with random weights."""
    content = {"model_type": kind, **(CAUSAL | ENCODERS).get(kind, DENSE), **more}
    loader = AutoModelForQuestionAnswering if kind in ENCODERS else AutoModelForCausalLM
    torch.manual_seed(0)
    model = loader.from_config(CONFIG_MAPPING[kind].from_dict(content), dtype=torch.float32)
    with torch.no_grad():
        kept = model.state_dict()
        for tensor in [*model.parameters(), *(value for name, value in model.named_buffers() if name in kept)]:
            tensor.add_(0.05 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return folder


@contextmanager
def engine_of(recipe: Recipe, family: Family, source: Source, ragged: bool = False, **layers: Any) -> Iterator[Engine]:
    stream, ranks = random_batches(recipe, ragged), Ranks(World(), CPU)
    model = meta_model(recipe, family, ROWS)
    with build_engine(
        model, family, NextToken(), recipe, plan_of(recipe, layers), CATALOG, ranks=ranks, batches=stream, source=source
    ) as engine:
        yield engine


@contextmanager
def opened(folder: Path) -> Iterator[HFModel]:
    """Open the folder's model in an engine, in evaluation mode."""
    recipe = recipe_of(folder)
    with engine_of(recipe, hf_family(recipe.model), Pretrained(folder)) as engine:
        model = engine.bare.eval()
        assert isinstance(model, HFModel)
        with torch.no_grad():
            yield model


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def ids_of(rows: int = 2) -> Tensor:
    return torch.randint(0, ROWS, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


# --- the same model


@pytest.mark.parametrize("kind", list(CAUSAL))
def test_the_model_is_transformers_own(kind: str, tmp_path: Path) -> None:
    folder, ids = saved(tmp_path, kind), ids_of()
    theirs = plain(folder).eval()
    with opened(folder) as model:
        logits = model(ids)
        assert torch.equal(logits, theirs(ids).logits)
        assert set(dict(model.named_parameters())) == set(dict(theirs.named_parameters()))
        assert model.state_dict().keys() == theirs.state_dict().keys()
        together = model(ids, positions=POSITIONS)
        apart = [[model(ids[:1, :10]), model(ids[:1, 10:])], [model(ids[1:, :1]), model(ids[1:, 1:21]), model(ids[1:, 21:])]]
        assert torch.allclose(together, torch.cat([torch.cat(row, dim=1) for row in apart]), atol=1e-5)
        assert (together - logits).abs().max() > 1e-2
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        assert torch.allclose(model(ids, labels=ids, reduction="rows"), wanted.sum(1), rtol=1e-5)
        assert torch.allclose(model(ids, labels=ids), wanted.sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", TRAINED)
def test_three_steps_are_those_of_a_plain_loop(kind: str, tmp_path: Path) -> None:
    config = ModelConfig(family="hf", path=str(saved(tmp_path, kind)))
    theirs = plain(tmp_path).train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    recipe = recipe_of(tmp_path)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": recipe.optim.weight_decay},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    words = {"lr": 1e-3, "betas": (recipe.optim.beta1, recipe.optim.beta2), "eps": recipe.optim.epsilon}
    # Same arithmetic as the engine: different last bits can route a token to another expert.
    optimizer = torch.optim.AdamW(groups, **words, foreach=False, fused=False)
    losses, stream = [], random_batches(recipe, ragged=True)
    for _ in range(3):
        batch, _ = next(stream)
        logits = theirs(batch["input_ids"][:, :-1]).logits.flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), recipe.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with engine_of(recipe, hf_family(config), Pretrained(tmp_path), ragged=True) as engine:
        assert steps(engine, 3) == pytest.approx(losses, abs=1e-5)
        after = dict(theirs.named_parameters())
        assert max(float((p - after[name]).detach().abs().max()) for name, p in engine.bare.named_parameters()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "deepseek_v3"])
def test_attention_of_ours_and_back(kind: str, tmp_path: Path) -> None:
    calls = []

    def counted(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: Any = None) -> Tensor:
        calls.append((tuple(query.shape), key.shape[1], causal, None if mask is None else mask.dtype))
        return math_attention(query, key, value, causal, mask, scale)

    folder, ids = saved(tmp_path, kind), ids_of()
    recipe = recipe_of(folder)
    family = hf_family(recipe.model)
    with engine_of(recipe, family, Pretrained(folder)) as engine, torch.no_grad():
        model = engine.bare.eval()
        before = model(ids), model(ids, positions=POSITIONS)
        assert len(family.attentions(model)) == len(family.blocks(model)) == 3  # type: ignore[misc]
        undo = family.set_attention(model, counted)  # type: ignore[misc]
        after = model(ids), model(ids, positions=POSITIONS)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(before, after, strict=True))
        windowed = kind == "mistral"
        assert [call[2:] for call in calls[::3]] == [(not windowed, torch.bool if windowed else None), (False, torch.bool)]
        assert calls[0][1] == (2 if kind in ("llama", "mistral") else 4), "grouped keys are not copied"
        undo()
        calls.clear()
        assert torch.equal(model(ids), before[0]) and calls == []


def test_fused_attention_keeps_its_promise(tmp_path: Path) -> None:
    recipe = recipe_of(write_config(tmp_path, "llama"), "config")
    family = hf_family(recipe.model)
    with engine_of(recipe, family, Initialization(family, recipe.model, 1)) as engine:
        losses = steps(engine, 2)
    with engine_of(recipe, family, Initialization(family, recipe.model, 1), attention="sdpa", loss="fused-ce") as engine:
        assert steps(engine, 2) == pytest.approx(losses, abs=1e-5)
        assert engine.counters.call_counts["fused-ce"] == 2


def test_text_token_by_token_is_transformers_own(tmp_path: Path) -> None:
    folder, ids = saved(tmp_path, "deepseek_v3"), ids_of(1)[:, :4]
    wanted = plain(folder).generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with opened(folder) as model:
        read, written, unread = model.reader().reading(), ids[0].tolist(), ids[0].tolist()
        for _ in range(6):
            unread = [int(read(unread).argmax())]
            written += unread
        assert written == wanted[0].tolist()
        assert torch.equal(
            model.inner.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0), wanted
        )


# --- heads that do more


@pytest.mark.parametrize(
    ("kind", "more"),
    [("gemma2", {"head_dim": 16, "sliding_window": 8}), ("cohere", {}), ("granite", {"logits_scaling": 4.0}), ("phi", {})],
)
def test_a_head_that_does_more_goes_through_the_models_own_forward(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    folder, ids = saved(tmp_path, kind, **more), ids_of()
    assert hf_family(ModelConfig(family="hf", path=str(folder))).head is None
    theirs = plain(folder).eval()
    with opened(folder) as model:
        assert model.head is None
        logits = theirs(ids).logits
        assert torch.equal(model(ids), logits)
        rows = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape).sum(1)
        assert torch.allclose(model(ids, labels=ids, reduction="rows"), rows, rtol=1e-5)
        assert torch.allclose(model(ids, labels=ids), rows.sum(), rtol=1e-5)


def test_a_scale_of_one_is_no_scale(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "granite", logits_scaling=1.0)
    assert hf_family(ModelConfig(family="hf", config=str(folder))).head is not None


def test_scores_with_a_cap_refuse_other_attention(tmp_path: Path) -> None:
    family = hf_family(ModelConfig(family="hf", config=str(write_config(tmp_path, "gemma2", head_dim=16))))
    with pytest.raises(LayerError, match=r"has a cap on attention scores"):
        family.set_attention(family.build(ModelConfig(), ROWS, LENGTH), math_attention)  # type: ignore[misc]


def test_documents_are_refused_where_the_model_mixes_them(tmp_path: Path) -> None:
    folder = saved(tmp_path, "opt", word_embed_proj_dim=64, ffn_dim=96)
    with opened(folder) as model:
        assert not model.packs
        with pytest.raises(ValueError, match=r"does not separate packed documents. Try: --data.packing false"):
            model(ids_of(), positions=POSITIONS)


# --- random weights


@pytest.mark.parametrize("kind", [*CAUSAL, *ENCODERS])
def test_random_weights_follow_transformers_scheme(kind: str, tmp_path: Path) -> None:
    task = "causal" if kind in CAUSAL else "question-answering"
    model = ModelConfig(family="hf", config=str(write_config(tmp_path, kind)))
    family = hf_family(model, task)
    loader = AutoModelForCausalLM if kind in CAUSAL else AutoModelForQuestionAnswering
    theirs = loader.from_config(CONFIG_MAPPING[kind].from_dict(json.loads((tmp_path / "config.json").read_text())))
    for name, parameter in theirs.named_parameters():
        ours = draw(1, name, parameter.shape, family.initial(name, parameter.shape, model))  # type: ignore[misc]
        if parameter.std() == 0:
            assert torch.equal(ours, parameter), name
        elif parameter.numel() > 1000:
            assert float(ours.std() / parameter.detach().std()) == pytest.approx(1, abs=0.1), name
    with pytest.raises(ConfigError, match=r"initialization is not normal, ones or zeros"):
        family.initial("nonesuch", (1,), model)  # type: ignore[misc]


def test_buffers_begin_as_transformers_begins_them(tmp_path: Path) -> None:
    scaled = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    recipe = recipe_of(write_config(tmp_path, "deepseek_v3", rope_parameters=scaled), "config")
    family = hf_family(recipe.model)
    state = torch.get_rng_state()
    with engine_of(recipe, family, Initialization(family, recipe.model, 1)) as engine:
        theirs = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["deepseek_v3"].from_dict(json.loads((tmp_path / "config.json").read_text()))
        )
        wanted = dict(theirs.named_buffers())
        found = dict(engine.bare.named_buffers())
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    hf_initial.build_buffers(engine.bare.inner, CPU)  # type: ignore[arg-type]
    assert len(state) == len(torch.get_rng_state())


def test_a_buffer_that_nobody_writes_is_told(tmp_path: Path) -> None:
    family = hf_family(ModelConfig(family="hf", config=str(write_config(tmp_path, "llama"))))
    model = family.build(ModelConfig(), ROWS, LENGTH)
    model.inner.model.register_buffer("forgotten", torch.ones(3))  # type: ignore[union-attr,operator]
    with pytest.raises(RunError, match=r"does not initialize these buffers: model.forgotten"):
        family.buffers(model, CPU)


def test_dropout_is_the_recipes(tmp_path: Path) -> None:
    model = ModelConfig(family="hf", config=str(write_config(tmp_path, "gpt2")))
    config, notes = hf_config.open_config(model)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.0, 0.0, 0.0)
    assert "resid_pdrop 0.1 -> 0" in notes[0]
    config, _ = hf_config.open_config(model.model_copy(update={"dropout": 0.2}))
    assert (config.resid_pdrop, config.attn_pdrop) == (0.2, 0.0)


def test_what_cannot_be_built(tmp_path: Path) -> None:
    unknown = write_config(tmp_path / "a", "nonesuch", auto_map={"AutoModelForCausalLM": "x.Y"})
    with pytest.raises(
        ConfigError,
        match=r"model_type unknown to transformers; the model's own code is not executed by default. Found 'nonesuch'",
    ):
        hf_family(ModelConfig(family="hf", path=str(unknown)))
    with pytest.raises(ConfigError, match=r"bert is bidirectional"):
        hf_family(ModelConfig(family="hf", config=str(write_config(tmp_path / "b", "bert"))))
    with pytest.raises(ConfigError, match=r"no question-answering model for model_type 'deepseek_v3'"):
        hf_family(ModelConfig(family="hf", config=str(write_config(tmp_path / "c", "deepseek_v3"))), "question-answering")
    llama = ModelConfig(family="hf", config=str(write_config(tmp_path / "d", "llama")))
    with pytest.raises(ConfigError, match=r"data.sequence_length: llama has 64 positions. Found 65"):
        hf_family(llama).build(llama, ROWS, 65)
    with pytest.raises(ConfigError, match=r"model.remote_code: must equal model.path, None. Found 'org/name'"):
        hf_family(llama.model_copy(update={"remote_code": "org/name"}))
    config, notes = hf_config.open_config(
        ModelConfig(config=str(write_config(tmp_path / "e", "llama", auto_map={"AutoConfig": "x.Y"})))
    )
    assert "LlamaForCausalLM is used instead" in notes[0] and not hasattr(config, "auto_map")


# --- encoders


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_an_encoder_answers_as_transformers_own(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind)
    recipe = recipe_of(folder)
    family = hf_family(recipe.model, "question-answering")
    theirs = AutoModelForQuestionAnswering.from_pretrained(folder, attn_implementation="eager").eval()
    ids = ids_of().clamp(min=2)
    types, mask = (torch.arange(LENGTH) > 10).long().expand(2, -1), torch.arange(LENGTH) < torch.tensor([[LENGTH], [20]])
    ids = ids.masked_fill(~mask, theirs.config.pad_token_id)
    with engine_of(recipe, family, Pretrained(folder, "question-answering")) as engine, torch.no_grad():
        model = engine.bare.eval()
        assert isinstance(model, HFEncoder) and model.has_types is (kind == "bert")
        words = {"token_type_ids": types} if kind == "bert" else {}
        wanted = theirs(ids, attention_mask=mask.long(), **words)
        found = model(ids, token_types=types, mask=mask)
        assert torch.equal(found, torch.stack((wanted.start_logits, wanted.end_logits), -1))
        undo = family.set_attention(model, math_attention)  # type: ignore[misc]
        assert torch.allclose(model(ids, token_types=types, mask=mask), found, atol=1e-5)
        assert torch.allclose(model(ids[:1], types[:1], mask[:1])[0], model(ids[:1, :LENGTH], types[:1])[0], atol=1e-5)
        undo()
