"""The readers of files, each with small valid files as seeds. `read` returns or raises GptoughtsError, whatever is in the file."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.golden_files import ROOT

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Seed:
    """A valid file, its format for `mutations.KINDS`, and the folder around it."""

    path: Path
    kind: str
    content: bytes


@dataclass(frozen=True)
class Reader:
    """How files of a kind are made and read. `imports` are loaded before the clock of a case starts."""

    seeds: Callable[[Path], list[Seed]]
    read: Callable[[Seed], object]
    imports: Sequence[str] = ()

    def load(self) -> None:
        """Import what the reader needs."""
        for name in self.imports:
            importlib.import_module(name)


def seed(path: Path, kind: str, content: bytes | str) -> Seed:
    """Write a seed."""
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return Seed(path, kind, raw)


# --- recipes, profiles, machines


RECIPE = """name = "x"
seed = 3
objective = "next-token"
[model]
depth = 2
width = 32
heads = 2
norm = "rmsnorm"
vocab_size = 512
[data]
path = "text.txt"
tokenizer = "bytes"
sequence_length = 16
[train]
steps = 2
global_batch = 4
[optim]
name = "adamw"
learning_rate = 0.001
[slurm]
partition = "gpu"
nodes = 2
time = "1-00:00:00"
"""
PROFILE = """name = "mine"
note = "a test"
auto = false
extends = "cpu"
[match]
gpu = false
max_memory_gb = 64.5
[slots]
compile = ["eager"]
attention = [{layer = "sdpa", backend = "auto"}, "math"]
microbatch = [{layer = "fixed", sequences = 1}]
"""


def recipes(folder: Path) -> list[Seed]:
    (folder).mkdir(parents=True)
    (folder.parent / "text.txt").write_text("some text\n" * 50)
    shipped = (ROOT / "gptoughts" / "recipes" / "llada-tiny.toml", ROOT / "gptoughts" / "recipes" / "quickstart.toml")
    return [
        seed(folder / "r.toml", "toml", RECIPE),
        *(seed(folder / path.name, "toml", path.read_bytes()) for path in shipped if path.is_file()),
    ]


def read_recipe(case: Seed) -> None:
    from gptoughts import api
    from gptoughts.config.loader import load
    from gptoughts.config.site import read_site
    from gptoughts.console import redacted

    loaded = load(str(case.path))
    again = case.path.with_suffix(".again.toml")
    again.write_text(loaded.to_toml(), encoding="utf-8")
    read_back, before = (redacted(one.recipe.model_dump()) for one in (load(str(again)), loaded))
    assert read_back == before, "a recipe that is written reads back, but for secrets"
    read_site(str(case.path), None, {})
    api.plan(str(case.path), machine=str(ROOT / "tests" / "machines" / "cpu.json")).table()


def profiles(folder: Path) -> list[Seed]:
    shipped = ROOT / "profiles" / "h100-fp8.toml"
    found = [seed(folder / "p.toml", "toml", PROFILE)]
    return [*found, seed(folder / shipped.name, "toml", shipped.read_bytes())] if shipped.is_file() else found


def read_profile(case: Seed) -> None:
    from gptoughts import api

    machine = "h100.json" if case.path.name.startswith("h100") else "cpu.json"
    api.plan("quickstart", profile=str(case.path), machine=str(ROOT / "tests" / "machines" / machine)).table()


def machines(folder: Path) -> list[Seed]:
    names = ("cpu.json", "h100x8.json", "mixed.json")
    return [seed(folder / name, "json", (ROOT / "tests" / "machines" / name).read_bytes()) for name in names]


def read_machine(case: Seed) -> None:
    from gptoughts import api

    api.plan("quickstart", machine=str(case.path)).table()


def deepspeed(folder: Path) -> list[Seed]:
    content = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu"},
            "allgather_bucket_size": 5e8,
            "overlap_comm": True,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1e-8}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
        "bf16": {"enabled": "auto"},
    }
    return [seed(folder / "d.json", "json", json.dumps(content))]


def read_deepspeed(case: Seed) -> None:
    from gptoughts.config.deepspeed_json import refusal

    raise refusal(case.path)


# --- data


def text_rows(folder: Path) -> list[Seed]:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    rows = "\n".join(json.dumps({"text": f"row {number} é 世界", "meta": {"n": number}}) for number in range(4)).encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), _made(folder) / "p.parquet")
    return [
        seed(folder / "a.jsonl", "jsonl", rows),
        seed(folder / "a.jsonl.gz", "binary", gzip.compress(rows)),
        seed(folder / "a.jsonl.zst", "binary", zstandard.compress(rows)),
        seed(folder / "p.parquet", "binary", (folder / "p.parquet").read_bytes()),
        seed(folder / "a.txt", "text", "Plain text.\nWith lines, é and 世界.\n"),
    ]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_text(case: Seed) -> None:
    from gptoughts.data.text.sources import open_source

    for document in open_source(str(case.path)).documents():
        document.text.encode()


MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q <|im_end|>"},
    {"role": "assistant", "content": "A", "weight": 1},
]
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "R", "tool_call_id": "1"},
    {"role": "assistant", "content": "A", "reasoning_content": "T"},
]
CHAT = (
    {"messages": MESSAGES},
    {"messages": CALLS, "tools": [{"type": "function"}]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
    {"instruction": "I", "input": "x", "output": "A"},
    {"prompt": "Q", "completion": "A"},
    {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
    {"question": "Q", "answer": "A"},
)


def chat(folder: Path) -> list[Seed]:
    rows = "\n".join(json.dumps(row) for row in CHAT)
    return [
        seed(folder / "c.jsonl", "jsonl", rows),
        seed(folder / "c.json", "json", json.dumps(CHAT)),
        seed(folder / "c.csv", "csv", "instruction,input,output\nI,x,A\nJ,,B\n"),
        *(seed(folder / f"{number}.jsonl", "jsonl", json.dumps(row)) for number, row in enumerate(CHAT)),
    ]


def read_chat(case: Seed) -> None:
    from gptoughts.data.chat.conversations import InvalidRow, chat_source, conversations
    from gptoughts.data.chat.template import load_template

    template = load_template("chatml", case.path.parent, {"eos_token": "</s>"})
    for one in conversations(list(chat_source(str(case.path)).files), template):
        if isinstance(one, InvalidRow):
            assert "\n" not in str(one), "a bad row is one line"
        else:
            template.render(one.messages)


def squad(folder: Path) -> list[Seed]:
    entry = {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}], "is_impossible": False}
    other = {"id": "2", "question": "What?", "answers": [], "is_impossible": True}
    paragraphs = [{"context": "Ada wrote it.", "qas": [entry]}, {"context": "Nobody knows.", "qas": [other]}]
    official = {"version": "v2.0", "data": [{"title": "T", "paragraphs": paragraphs}]}
    row = {
        "id": "1",
        "question": "Who?",
        "context": "Ada wrote it.",
        "answers": {"text": ["Ada"], "answer_start": [0]},
        "title": "T",
    }
    more = {**row, "id": "2", "context": "Nobody knows.", "answers": {"text": [], "answer_start": []}}
    rows = "\n".join(map(json.dumps, (row, more)))
    return [seed(folder / "s.json", "json", json.dumps(official)), seed(folder / "s.jsonl", "jsonl", rows)]


def read_squad(case: Seed) -> None:
    from gptoughts.data.squad.examples import read_squad, split_questions

    split_questions(read_squad(case.path), 0.5)


def shards(folder: Path) -> list[Seed]:
    from gptoughts.data.text.tokenize import tokenize

    (_made(folder) / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz\n" * 40)
    tokenize(str(folder / "a.txt"), "bytes", folder / "o", val_fraction=0.1, shard_tokens=300, processes=1)
    out = folder / "o"
    array = next(out.glob("train_000000.npy"))
    saved = out / "tokenizer"
    return [
        seed(out / "index.json", "json", (out / "index.json").read_bytes()),
        seed(array, "binary", array.read_bytes()),
        seed(saved / "gptoughts_tokenizer.json", "json", (saved / "gptoughts_tokenizer.json").read_bytes()),
        seed(saved / "tokenizer.json", "json", (saved / "tokenizer.json").read_bytes()),
    ]


def read_shards(case: Seed) -> None:
    from gptoughts.data.text.shards import Shards

    folder = case.path.parent.parent if case.path.parent.name == "tokenizer" else case.path.parent
    opened = Shards.open(folder)
    assert opened.fingerprint
    for name in opened.index.splits:
        stream = opened.split(name)
        stream.check_files()
        stream.window(0, min(16, len(stream)))
        for number in range(len(opened.index.splits[name].shards)):
            opened.documents(name, number)
    opened.tokenizer().encode("abc")
    opened.verify_hashes()


# --- tokenizers


def tokenizers(folder: Path) -> list[Seed]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from gptoughts.data.tokenizers import bpe

    trained = bpe.train(["The quick brown fox jumps over the lazy dog. " * 3], 300)
    unigram = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdet")], unk_id=0)
    )
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2, "##b": 3, "[CLS]": 4}, unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence([normalizers.BertNormalizer(), normalizers.Replace(Regex("  +"), " ")])
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), pre_tokenizers.BertPreTokenizer()]
    )
    words.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 4))
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    contents = [json.dumps(trained), unigram.to_str(), words.to_str()]
    found = [seed(folder / str(number) / "tokenizer.json", "json", content) for number, content in enumerate(contents)]
    config = {
        "eos_token": {"content": "</s>"},
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "add_bos_token": True,
    }
    (folder / "9").mkdir()
    shutil.copy(found[1].path, folder / "9" / "tokenizer.json")
    return [*found, seed(folder / "9" / "tokenizer_config.json", "json", json.dumps(config))]


def read_tokenizer(case: Seed) -> None:
    from gptoughts.data.chat.tokenizer import ChatTokenizer
    from gptoughts.data.squad.windows import Reader as PairReader
    from gptoughts.data.tokenizers.tokenizer import load_tokenizer
    from gptoughts.errors import DataError

    folder = case.path.parent
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode("a cab ate</s> The quick 123  fox <|im_end|>")
    tokenizer.decode(ids.tolist())
    stream = tokenizer.stream()
    assert all(isinstance(stream.push(int(index)), str) for index in ids[:20])
    tokenizer.accelerate(["a cab"])
    with contextlib.suppress(DataError):
        PairReader.open(folder)
    chat = ChatTokenizer.open(folder, None if case.path.name == "tokenizer_config.json" else "plain")
    chat.encode([chat.template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])])


# --- models


def safetensors(folder: Path) -> list[Seed]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    }
    text = json.dumps(header).encode()
    index = {"metadata": {"total_size": 24}, "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
    content = struct.pack("<Q", len(text)) + text + bytes(24)
    (_made(folder) / "i").mkdir()
    (folder / "i" / "model-1.safetensors").write_bytes(content)
    return [
        seed(folder / "m" / "model.safetensors", "safetensors", content),
        seed(folder / "i" / "model.safetensors.index.json", "json", json.dumps(index)),
    ]


def read_safetensors(case: Seed) -> None:
    from gptoughts.models.weight_files import opened, weight_files

    for path in weight_files(case.path.parent):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                file.get_tensor(name)


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "tie_word_embeddings": False, "torch_dtype": "float32",
    "hidden_act": "silu", "attention_dropout": 0.0, "eos_token_id": 2, "bos_token_id": 1, "head_dim": 8,
}  # fmt: skip
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "decoder_sparse_step": 1, "mlp_only_layers": [0], "max_position_embeddings": 64,
}  # fmt: skip
BERT = {
    "architectures": ["BertForQuestionAnswering"], "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "vocab_size": 300, "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip
LLADA = {
    "model_type": "llada", "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 64, "vocab_size": 300,
    "embedding_size": 300, "max_sequence_length": 64, "rope_theta": 500000.0, "mask_token_id": 299, "eos_token_id": 298, "weight_tying": False,
    "layer_norm_type": "rms", "activation_type": "silu", "block_type": "llama", "rms_norm_eps": 1e-5, "include_bias": False,
}  # fmt: skip


def words(folder: Path) -> None:
    """Write a small tokenizer.json."""
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "</s>"}
    seed(folder / "tokenizer.json", "json", json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def configs(folder: Path) -> list[Seed]:
    named = {"llama": LLAMA, "moe": MOE, "bert": BERT, "llada": LLADA}
    for name in named:
        words(folder / name)
    return [seed(folder / name / "config.json", "json", json.dumps(content)) for name, content in named.items()]


def read_config(case: Seed) -> None:
    from gptoughts import api
    from gptoughts.config.recipe import ModelConfig
    from gptoughts.inference.load import exported_recipe
    from gptoughts.models.hf.config import open_config

    exported_recipe(case.path.parent, None)
    values = {
        "name": "x",
        "model.config": str(case.path),
        "data.path": "text.txt",
        "data.tokenizer": "bytes",
        "data.sequence_length": 16,
        "train.steps": 1,
    }
    values |= (
        {"model.family": "llada", "objective": "masked-diffusion"}
        if case.path.parent.name == "llada"
        else {"model.family": "hf"}
    )
    api.plan(values, machine=str(ROOT / "tests" / "machines" / "cpu.json")).table()
    if case.path.parent.name != "llada":
        open_config(ModelConfig(family="hf", config=str(case.path)))


def adapters(folder: Path) -> list[Seed]:
    content = {
        "peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0,
        "bias": "none", "task_type": "CAUSAL_LM", "inference_mode": True, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "fan_in_fan_out": False,
    }  # fmt: skip
    (_made(folder) / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(LLAMA))
    words(folder / "base")
    content["base_model_name_or_path"] = str(folder / "base")
    return [seed(folder / "a" / "adapter_config.json", "json", json.dumps(content))]


def read_adapter(case: Seed) -> None:
    from gptoughts.inference.load import exported_recipe
    from gptoughts.models.adapters.folder import read_config as read

    read(case.path.parent)
    exported_recipe(case.path.parent, None)


def gguf(folder: Path) -> list[Seed]:
    import numpy as np
    from gguf import GGUFWriter

    path = _made(folder) / "m.gguf"
    writer = GGUFWriter(path, "llama")
    for name, value in (
        ("context_length", 32),
        ("embedding_length", 16),
        ("block_count", 1),
        ("feed_forward_length", 32),
        ("head_count", 2),
        ("head_count_kv", 2),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), "▁", "a", "b", "▁a"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 4])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    sizes = {"token_embd": (len(tokens), 16), "output_norm": (16,), "output": (len(tokens), 16)}
    block = {
        "attn_norm": (16,),
        "ffn_norm": (16,),
        "attn_q": (16, 16),
        "attn_k": (16, 16),
        "attn_v": (16, 16),
        "attn_output": (16, 16),
    }
    block |= {"ffn_gate": (32, 16), "ffn_up": (32, 16), "ffn_down": (16, 32)}
    for name, size in (sizes | {f"blk.0.{name}": size for name, size in block.items()}).items():
        writer.add_tensor(f"{name}.weight", np.full(size, 0.01, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [seed(path, "binary", path.read_bytes())]


def read_gguf(case: Seed) -> None:
    from gptoughts.models.hf.gguf import convert

    out = case.path.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    convert(case.path, out)


# --- checkpoints and runs


def checkpoint(folder: Path, name: str) -> Seed:
    """Write an intact checkpoint and return one file of it."""
    made = folder / name / "step-000002"
    seed(made / "state.json", "json", (HERE / "seeds" / "state.json").read_bytes())
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    for stem in ("model", "optimizer", "state"):
        (made / f"{stem}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    seal(made)
    return Seed(made / name, "json", (made / name).read_bytes())


def seal(folder: Path) -> None:
    """Write the manifest that fits the files: a hostile file has the right hash."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def read_checkpoint(case: Seed) -> None:
    from gptoughts.engine.checkpoint import integrity
    from gptoughts.engine.checkpoint.state import restore_host_generators
    from gptoughts.engine.checkpoint.store import read_state
    from gptoughts.inference.load import trained_recipe
    from gptoughts.run.resume import read_point

    folder = case.path.parent
    if case.path.name == "state.json":
        seal(folder)
    if integrity.damage(folder):
        return
    if not isinstance(read_point(folder), str):
        restore_host_generators(read_state(folder)["generators"], folder)
    trained_recipe(folder, None)


METRICS = {
    "step": 1,
    "attempt": 1,
    "train/loss": 5.7,
    "train/num_tokens": 32,
    "perf/mfu": None,
    "val/loss": 5.7,
    "perf/tokens_per_second": 900.5,
}


def runs(folder: Path) -> list[Seed]:
    out = folder / "run"
    rows = "\n".join(json.dumps({**METRICS, "step": step}) for step in range(1, 5))
    system = "\n".join(
        json.dumps({"time": 1.5e9 + step, "step": step, "cpu/percent": 50.0, "gpu0/name": "x"}) for step in range(3)
    )
    plan = {"profile": "cpu", "machine": "CPU", "layers": {"host": {"layer": "system", "options": {}}}, "memory": {"peak": 1}}
    return [
        seed(out / "metrics.jsonl", "jsonl", rows),
        seed(out / "system.jsonl", "jsonl", system),
        seed(out / "samples.jsonl", "jsonl", json.dumps({"step": 2, "attempt": 1, "name": "a", "text": "some text"})),
        seed(out / "plan.json", "json", json.dumps(plan)),
        seed(
            out / "evidence.json",
            "json",
            json.dumps({"layers": [{"slot": "host", "layer": "system", "status": "active", "text": "t"}]}),
        ),
        seed(out / "goodput.json", "json", json.dumps({"seconds": {"start": 1.0, "steps": 2.0}})),
        seed(out / "recipe.toml", "toml", RECIPE),
    ]


def read_run(case: Seed) -> None:
    from gptoughts.diagnostics.report.locate import locate
    from gptoughts.diagnostics.report.page import page
    from gptoughts.diagnostics.report.run_data import load_named
    from gptoughts.diagnostics.report.text import comparison

    found = load_named([locate(str(case.path.parent)), locate(str(case.path.parent))])
    page(found, "1")
    comparison(found)


TORCH = ("torch", "gptoughts.layers", "gptoughts.api")
READERS: dict[str, Reader] = {
    "recipe": Reader(recipes, read_recipe, ("gptoughts.layers", "gptoughts.api")),
    "profile": Reader(profiles, read_profile, ("gptoughts.layers", "gptoughts.api")),
    "machine": Reader(machines, read_machine, ("gptoughts.layers", "gptoughts.api")),
    "deepspeed": Reader(deepspeed, read_deepspeed),
    "text": Reader(text_rows, read_text, ("pyarrow.parquet", "zstandard")),
    "chat": Reader(chat, read_chat),
    "squad": Reader(squad, read_squad),
    "shards": Reader(shards, read_shards, ("gptoughts.data.text.tokenize",)),
    "tokenizer": Reader(tokenizers, read_tokenizer, ("tokenizers", "gptoughts.data.tokenizers.tokenizer")),
    "safetensors": Reader(safetensors, read_safetensors, ("torch",)),
    "config": Reader(configs, read_config, (*TORCH, "transformers", "gptoughts.models.hf.config", "gptoughts.inference.load")),
    "adapter": Reader(
        adapters, read_adapter, (*TORCH, "transformers", "gptoughts.inference.load", "gptoughts.models.adapters.folder")
    ),
    "gguf": Reader(gguf, read_gguf, ("gptoughts.models.hf.gguf", "transformers", "gguf")),
    "manifest": Reader(
        lambda folder: [checkpoint(folder, "manifest.json")],
        read_checkpoint,
        (*TORCH, "gptoughts.run.resume", "gptoughts.inference.load"),
    ),
    "state": Reader(
        lambda folder: [checkpoint(folder, "state.json")],
        read_checkpoint,
        (*TORCH, "gptoughts.run.resume", "gptoughts.inference.load"),
    ),
    "run": Reader(runs, read_run, ("gptoughts.diagnostics.report.page", "gptoughts.diagnostics.report.text")),
}


def control(folder: Path) -> list[Seed]:
    return [seed(folder / "c.json", "json", "[1, 2, 3]")]


def traceback(case: Seed) -> None:
    json.loads(case.path.read_bytes())["key"]


def endless(case: Seed) -> None:
    while True:
        pass


def greedy(case: Seed) -> None:
    bytearray(20 << 30)


def panic(case: Seed) -> None:
    class PanicException(BaseException):
        pass

    raise PanicException


CONTROLS = {
    name: Reader(control, read)
    for name, read in (("traceback", traceback), ("endless", endless), ("greedy", greedy), ("panic", panic))
}
"""Readers that do what none may; the harness must find it."""
