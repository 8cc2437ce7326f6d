"""Packed documents are independent, the llada family is bidirectional, and its published layout round-trips."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoughts.config import llada_spec
from gptoughts.config.loader import ModelConfig
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.layers.loss_fused_ce import SlicedCrossEntropy
from gptoughts.models.family import FAMILIES, initialize
from gptoughts.models.gpt import llada_layout
from gptoughts.models.gpt.attention import document_mask, math_attention
from gptoughts.models.gpt.gpt import GPT, KeyValueCache, full_cross_entropy
from gptoughts.models.gpt.sdpa import attend

FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True},
    "modern": {"kv_heads": 2},
}
BOTH = pytest.mark.parametrize("family", ["gpt", "llada"])
EACH_FORM = pytest.mark.parametrize("form", FORMS)


def build(family: str, form: str = "modern", rows: int = 96, length: int = 16, depth: int = 2, **words: Any) -> GPT:
    config = ModelConfig(family=family, depth=depth, width=32, heads=4, **{**FORMS[form], **words})
    model = FAMILIES[family].build(config, rows, length)
    assert isinstance(model, GPT)
    initialize(model, FAMILIES[family], config, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)  # so that errors show
    return model.eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(seed))


def counted(*lengths: int) -> Tensor:
    """Return positions 1 x T of consecutive documents."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


# --- documents that share a row


@BOTH
@EACH_FORM
@pytest.mark.parametrize("function", [math_attention, attend])
def test_packed_documents_are_the_documents_alone(family: str, form: str, function: Any) -> None:
    model = build(family, form).double()
    for block in model.blocks:
        block.attention.attend = function
    tokens, labels, lengths = ids(2, 16), ids(2, 16, seed=1), (3, 1, 7, 5)
    positions = counted(*lengths).expand(2, -1)
    packed = model(tokens, labels, positions=positions, reduction="rows")
    logits = model(tokens, positions=positions)
    alone, start = torch.zeros(2, dtype=torch.float64), 0
    for length in lengths:
        part = slice(start, start + length)
        alone += model(tokens[:, part], labels[:, part], reduction="rows")
        torch.testing.assert_close(logits[:, part], model(tokens[:, part]), atol=1e-6, rtol=1e-6)
        start += length
    torch.testing.assert_close(packed.double(), alone, atol=0, rtol=1e-6)


@BOTH
@EACH_FORM
def test_one_document_is_no_positions(family: str, form: str) -> None:
    model, tokens = build(family, form), ids(3, 16)
    torch.testing.assert_close(model(tokens, positions=counted(16).expand(3, -1)), model(tokens), atol=1e-5, rtol=1e-5)


@BOTH
@EACH_FORM
def test_no_gradient_crosses_into_another_document(family: str, form: str) -> None:
    model, seen = build(family, form), []

    def keep(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    model.embed.register_forward_hook(keep)
    labels = torch.full((1, 16), -100)
    labels[0, 4:9] = ids(5)
    model(ids(1, 16), labels, positions=counted(4, 5, 7)).backward()
    reached = seen[0].grad[0].abs().sum(dim=-1) > 0
    assert reached.tolist() == [False] * 4 + [True] * 5 + [False] * 7


@BOTH
def test_rotary_positions_tell_only_the_distance(family: str) -> None:
    model, tokens = build(family, length=64), ids(2, 16)
    for shift in (1, 20, 48):
        moved = model(tokens, positions=counted(16).expand(2, -1) + shift)
        torch.testing.assert_close(moved, model(tokens), atol=1e-4, rtol=1e-4)
    stretched = model(tokens, positions=counted(16).expand(2, -1) * 2)
    assert not torch.allclose(stretched, model(tokens), atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans())
def test_the_mask_is_of_one_document_and_holds_the_token_itself(lengths: list[int], causal: bool) -> None:
    mask = document_mask(counted(*lengths), causal)[0, 0]
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    for here, mine in enumerate(document):
        for there, other in enumerate(document):
            assert bool(mask[here, there]) == (mine == other and (not causal or there <= here))


def test_all_blocks_get_the_mask_that_was_built_once() -> None:
    model, seen = build("gpt", depth=4), []

    def recorded(*arguments: Any) -> Tensor:
        seen.append(arguments[4] if len(arguments) > 4 else None)
        return math_attention(*arguments)

    for block in model.blocks:
        block.attention.attend = recorded
    model(ids(1, 16), positions=counted(9, 7))
    assert len(seen) == 4 and len({id(mask) for mask in seen}) == 1 and seen[0].dtype == torch.bool
    seen.clear()
    model(ids(1, 16))
    assert seen == [None] * 4


@pytest.mark.parametrize("form", FORMS)
def test_positions_without_a_table_row_are_named(form: str) -> None:
    model = build("gpt", form)
    with pytest.raises(ValueError, match=r"positions: must be from 0 to 15. Found 1 to 16"):
        model(ids(1, 16), positions=counted(16) + 1)
    with pytest.raises(ValueError, match="Found -1 to 14"):
        model(ids(1, 16), positions=counted(16) - 1)
    with pytest.raises(ValueError, match="Found 17"):
        model(ids(1, 17), positions=counted(9, 8))


def test_a_cache_needs_one_document_and_looking_back() -> None:
    for model, words in ((build("gpt"), {"positions": counted(16)}), (build("llada"), {})):
        with pytest.raises(ValueError, match="cache: needs a causal model and one document per row"):
            model(ids(1, 16), cache=KeyValueCache(2, 16), **words)


@BOTH
def test_packed_blocks_are_one_graph(family: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = build(family, depth=10), CompileCounterWithBackend("aot_eager")
    tokens, positions = ids(2, 16), counted(9, 7).expand(2, -1)
    expected = model(tokens, tokens, positions=positions)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=counter)
    torch.testing.assert_close(model(tokens, tokens, positions=positions), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- attention and loss as they are replaced


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_both_attentions_take_mask_scale_and_wider_values(kv_heads: int) -> None:
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, kv_heads, 9, 8), torch.randn(2, kv_heads, 9, 12)
    mask = (torch.rand(2, 1, 7, 9) > 0.5) | (torch.arange(9) == 0)
    for words in ({"mask": mask}, {"scale": 0.3}, {"mask": mask, "scale": 0.3}):
        for causal in (True, False):
            slow, fast = (function(query, key, value, causal, **words) for function in (math_attention, attend))
            assert slow.shape == (2, 4, 7, 12)
            torch.testing.assert_close(slow, fast)
    masked = math_attention(query, key, value, False, mask=mask)
    torch.testing.assert_close(math_attention(query, key, value, True, mask=mask), masked)  # a mask includes causality
    changed = value.clone()
    changed[:, :, 5] += 100
    same = math_attention(query, key, changed, False, mask=mask) == masked
    assert torch.equal(same.all(dim=-1), ~mask[..., 5].expand(2, 4, 7))  # True = attend


@BOTH
@pytest.mark.parametrize("sliced", [False, True])
def test_rows_are_the_sum_by_row(family: str, sliced: bool) -> None:
    model = build(family)
    if sliced:
        model.head.loss = SlicedCrossEntropy(10, Counter())
    tokens, labels = ids(3, 16), ids(3, 16, seed=1)
    labels[0, 3:], labels[1] = -100, -100
    rows = model(tokens, labels, reduction="rows")
    assert rows.shape == (3,) and rows[1] == 0
    torch.testing.assert_close(rows.sum(), model(tokens, labels))
    for row in range(3):
        torch.testing.assert_close(rows[row], model(tokens[row : row + 1], labels[row : row + 1]), atol=1e-4, rtol=1e-5)
    weights = torch.tensor([0.5, 7.0, 3.0])
    (rows * weights).sum().backward()
    found = model.head.weight.grad.clone()
    model.zero_grad()
    model.head.loss = full_cross_entropy
    (model(tokens, labels, reduction="rows") * weights).sum().backward()
    torch.testing.assert_close(found, model.head.weight.grad, atol=1e-4, rtol=1e-4)


# --- the family


def test_llada_sees_both_ways_and_gpt_does_not() -> None:
    for family, both in (("llada", True), ("gpt", False)):
        model, tokens = build(family), ids(1, 16)
        assert model.causal is not both
        for block in model.blocks:
            block.attention.attend = attend
        changed = tokens.clone()
        changed[0, -1] = (changed[0, -1] + 1) % 96
        before, after = model(tokens)[0, :-1], model(changed)[0, :-1]
        assert torch.equal(before, after) is not both
        if both:
            assert ((before - after).abs().amax(dim=-1) > 1e-6).all()


def test_llada_has_all_ports_of_gpt() -> None:
    model, family = build("llada"), FAMILIES["llada"]
    assert family.name == "llada" and list(family.blocks(model)) == ["blocks.0", "blocks.1"]
    assert family.attentions is not None and len(family.attentions(model)) == 2
    assert family.sites is not None and len(family.sites(model)) == 6
    assert list(model.state_dict()) == list(build("gpt").state_dict())
    assert torch.equal(model.blocks[0].attention.qkv.weight, build("gpt").blocks[0].attention.qkv.weight)


# --- the published layout

PUBLISHED = {"qk_norm": False, "kv_heads": 2, "tied": False, "hidden": 48, "rope_theta": 500000.0}


def publish(model: GPT, folder: Path, **words: Any) -> None:
    llada_layout.save(model.state_dict(), model.config, folder, 16, mask_id=95, eot_id=94, **words)


def filled(folder: Path, model: GPT) -> tuple[dict[str, Tensor], llada_layout.Published]:
    source = llada_layout.load(folder)
    state = {name: source.tensor(name, tensor.shape) for name, tensor in model.named_parameters()}
    assert all(source.buffer(name) is None for name, _ in model.named_buffers())
    return {name: tensor for name, tensor in state.items() if tensor is not None}, source


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_round_trip_gives_the_same_bits(tmp_path: Path, tied: bool, dtype: torch.dtype, shard_bytes: int) -> None:
    model = build("llada", **{**PUBLISHED, "tied": tied}).to(dtype)
    publish(model, tmp_path, shard_bytes=shard_bytes)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes < 10**9) == (tmp_path / "model.safetensors.index.json").exists()
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= shard_bytes for shard in shards)
    state, source = filled(tmp_path, model)
    assert source.unused() == []
    assert state.keys() == dict(model.named_parameters()).keys()
    assert all(tensor.dtype == dtype and torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    config = llada_spec.sizes(json.loads((tmp_path / "config.json").read_text()))
    assert ModelConfig(family="llada", **config) == model.config.model_copy(update={"vocab_size": 96})


def test_names_on_disk_are_the_published_ones(tmp_path: Path) -> None:
    publish(build("llada", depth=1, **PUBLISHED), tmp_path)
    block = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
    ends = {f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")}
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == ends | {f"model.transformer.blocks.0.{name}.weight" for name in block}
    assert written["model.transformer.blocks.0.k_proj.weight"].shape == (16, 32)


def test_published_weights_compute_what_a_llama_without_causal_mask_does(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = build("llada", **PUBLISHED)
    publish(model, tmp_path)
    theirs = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    inside = {
        "attn_norm": "input_layernorm", "attn_out": "self_attn.o_proj", "ff_norm": "post_attention_layernorm",
        "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
        "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    }  # fmt: skip
    state = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        parts = name.removeprefix("model.transformer.").removesuffix(".weight").split(".")
        where = f"model.layers.{parts[1]}.{inside[parts[2]]}" if parts[0] == "blocks" else theirs[parts[0]]
        state[f"{where}.weight"] = tensor
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, max_position_embeddings=16,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(state)
    tokens = ids(2, 16)
    everyone = torch.zeros(2, 1, 16, 16)
    with torch.no_grad():
        expected = llama(tokens, attention_mask=everyone).logits
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)


def test_names_without_the_outer_prefix_are_read(tmp_path: Path) -> None:
    model = build("llada", **PUBLISHED)
    publish(model, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    state, source = filled(tmp_path, model)
    assert torch.equal(state["embed.weight"], model.embed.weight) and source.unused() == []


def test_missing_unused_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    model = build("llada", **PUBLISHED)
    publish(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.transformer.blocks.0.lora"] = tensors.pop("model.transformer.blocks.1.k_proj.weight")
    save_file(tensors, file)
    source = llada_layout.load(tmp_path)
    assert "model.transformer.blocks.0.lora" in source.unused()
    with pytest.raises(CheckpointError, match=r"attention\.qkv\.weight needs 3 tensors, missing: .*blocks\.1\.k_proj"):
        source.tensor("blocks.1.attention.qkv.weight", torch.Size([64, 32]))
    with pytest.raises(CheckpointError, match=r"embed\.weight .*shape \(128, 32\) by the recipe's \[model\]. Found \(96, 32\)"):
        source.tensor("embed.weight", torch.Size([128, 32]))
    assert source.tensor("blocks.7.norm1.weight", torch.Size([32])) is None
    assert source.tensor("positions.weight", torch.Size([16, 32])) is None


def test_a_tied_file_with_another_head_is_refused(tmp_path: Path) -> None:
    model = build("llada", **{**PUBLISHED, "tied": True})
    publish(model, tmp_path)
    file, head = tmp_path / "model.safetensors", "model.transformer.ff_out.weight"
    tensors = load_file(file)
    save_file({**tensors, head: tensors["model.transformer.wte.weight"].clone()}, file)
    assert filled(tmp_path, model)[1].unused() == []
    save_file({**tensors, head: torch.zeros(96, 32)}, file)
    with pytest.raises(CheckpointError, match=r"ties head and embedding, but transformer\.ff_out\.weight differs"):
        filled(tmp_path, model)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.qk_norm = True"):
        publish(build("llada"), tmp_path)
    model = build("llada", **PUBLISHED)
    state = dict(model.state_dict())
    state["extra"] = state.pop("norm.weight")
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight; unused: extra"):
        llada_layout.save(state, model.config, tmp_path, 16, mask_id=95, eot_id=94)
    publish(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"already contains weights. Found model\.safetensors"):
        publish(model, tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_with_the_line_to_type(tmp_path: Path, name: str) -> None:
    publish(build("llada", **PUBLISHED), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: a pickle.*\n  Try: .*python -c .*save_file.*{name}") as refused:
        llada_layout.load(tmp_path)
    assert str(refused.value).count("\n") == 1


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        llada_layout.load(tmp_path)
    publish(build("llada", **PUBLISHED), tmp_path, shard_bytes=20_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*: cannot be read"):
        llada_layout.load(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"missing shards of its index: model-00002-of-"):
        llada_layout.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        llada_layout.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not found"):
        llada_layout.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"not a JSON object. Found list"):
        llada_layout.load(tmp_path)


def test_a_disk_that_lies_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensors: dict[str, Tensor], file: Path, metadata: Any) -> None:
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, file)

    monkeypatch.setattr(llada_layout, "save_file", broken)
    with pytest.raises(CheckpointError, match="read-back differs from the written values"):
        publish(build("llada", **PUBLISHED), tmp_path)
