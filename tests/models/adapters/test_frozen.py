"""A frozen base in the 16 bits of its checkpoint trains to the bits of a float32 base, in half the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gptoughts
from gptoughts.models.adapters import adapter
from gptoughts.models.adapters.frozen import FrozenLinear, hold, widen
from gptoughts.models.adapters.merge import merge
from gptoughts.run.tracking.jsonl import read
from tests.models.hf.hf_configs import CAUSAL

TEXT = "".join(f"line {number}: the quick brown fox jumps over {number % 7} lazy dogs\n" for number in range(200))


def write_base(folder: Path, dtype: torch.dtype, kind: str = "llama") -> Path:
    """Write a tiny model folder with a tokenizer and with weights of this dtype."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **CAUSAL[kind])
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    words = {
        word: at for at, word in enumerate(["<unk>", "<s>", "</s>", *sorted(set(TEXT.split()))][: CAUSAL[kind]["vocab_size"]])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    return folder


def trained(base: Path, name: str, layers: dict[str, str], **more: Any) -> Any:
    values = {
        "name": "tiny", "data.path": "text.txt", "data.sequence_length": 32, "train.global_batch": 4,
        "train.steps": 3, "optim.warmup_steps": 0, "eval.batches": 1, "eval.every": 0, "sample.tokens": 1, "log.every": 1,
        "model.path": str(base), "adapter.kind": "lora", "adapter.rank": 4, **more,
    }  # fmt: skip
    plan = {"compile": "eager", "host": "system", **layers}
    return gptoughts.train(values, layers=plan, run=name, verbose=False, numerics="off")


@pytest.mark.parametrize(
    ("dtype", "kind", "layers"),
    [
        (torch.bfloat16, "lora", {"precision": "bf16", "recompute": "recompute-blocks"}),
        pytest.param(torch.bfloat16, "lora", {"precision": "fp32"}, marks=pytest.mark.slow),
        pytest.param(torch.float16, "dora", {"precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_it_trains_to_the_bits_of_a_float32_base(
    dtype: torch.dtype, kind: str, layers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    base = write_base(tmp_path / "base", dtype)
    runs = [trained(base, "narrow", layers, **{"adapter.kind": kind})]
    monkeypatch.setattr(adapter, "HALF_TYPES", ())
    runs.append(trained(base, "wide", layers, **{"adapter.kind": kind}))
    narrow, wide = ([row["train/loss"] for row in read(run.out / "metrics.jsonl") if "train/loss" in row] for run in runs)
    assert narrow == wide and len(narrow) == 3
    one, other = (load_file(run.checkpoint / "model.safetensors") for run in runs)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    held, full = (next(row for row in read(run.out / "metrics.jsonl") if "memory/measured_bytes" in row) for run in runs)
    assert held["memory/measured_bytes"] < full["memory/measured_bytes"]


def test_merged_weights_are_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged weight has more digits than the 16 bits of its base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    trained(write_base(tmp_path / "base", torch.bfloat16), "run", {"precision": "fp32"})
    from gptoughts.inference.load import load

    model = load("run").model
    assert any(isinstance(module, FrozenLinear) for module in model.modules())
    values = merge(model)
    assert {value.dtype for value in values.values()} == {torch.float32}
    rounded = [name for name, value in values.items() if "q_proj" in name and torch.equal(value, value.bfloat16().float())]
    assert rounded == []


def test_gradients_are_those_of_the_cast_weight_and_no_copy_is_kept() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(12, 8).requires_grad_(False)
    plain.weight.data = plain.weight.data.bfloat16().float()
    with torch.device("meta"):
        holder = nn.ModuleDict({"x": nn.Linear(12, 8).requires_grad_(False)})
    hold(holder, ["x"], torch.bfloat16)
    made = holder["x"]
    assert isinstance(made, FrozenLinear)
    made.weight, made.bias = nn.Parameter(plain.weight.bfloat16(), requires_grad=False), plain.bias
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(5, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours = made(x)
    assert [tensor.dtype for tensor in saved] == [torch.bfloat16] and saved[0] is made.weight
    mine = torch.autograd.grad(ours.square().sum(), x)[0]
    theirs = plain(x)
    assert torch.equal(ours, theirs) and torch.equal(mine, torch.autograd.grad(theirs.square().sum(), x)[0])


def test_an_engine_of_one_dtype_gets_float32_weights_again() -> None:
    with torch.device("meta"):
        holder = nn.ModuleDict({"x": nn.Linear(12, 8).requires_grad_(False), "conv": nn.Conv1d(1, 1, 1)})
    hold(holder, ["x", "conv"], torch.float16)
    assert isinstance(holder["x"], FrozenLinear) and isinstance(holder["conv"], nn.Conv1d)
    widen(holder)
    assert holder["x"].weight.dtype == torch.float32 and not holder["x"].weight.requires_grad
