"""Files that would eat the machine, hang or escape their folder are refused in one line."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from gptoughts.config.loader import from_values
from gptoughts.config.model_path import check_sizes
from gptoughts.data.chat import conversations as chat_rows
from gptoughts.data.chat import sandbox
from gptoughts.data.chat.template import Template
from gptoughts.data.text import objects
from gptoughts.data.text.sources import open_source
from gptoughts.data.tokenizers import probe
from gptoughts.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from gptoughts.errors import CheckpointError, ConfigError, DataError
from gptoughts.files import load_json, parse_json, read_limited
from gptoughts.models.weight_files import opened, read_header, weight_files
from gptoughts.processes import LimitedChild
from tests.support.golden_files import ROOT

# --- chat templates

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set s = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x | length }}"
)
DEEP = "{% set s = namespace(x=[]) %}{% for i in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}{{ s.x | tojson }}"
HOSTILE = {
    "loop": LOOP,
    "doubling": DOUBLING,
    "product": "{{ 'a' * 10**10 }}",
    "center": "{{ 'a' | center(10**10) }}",
    "width": "{{ '%10000000000d' % 1 }}",
    "list": "{{ ([1] * 10**10) | length }}",
    "tojson": DEEP,
    "output": "{% for i in range(99999) %}{{ 'a' * 10**5 }}{% endfor %}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_templates_that_eat_the_machine_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoughts.data.chat import template

    monkeypatch.setattr(template, "SANDBOX", sandbox.Sandbox(seconds=1))
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"takes too long|takes too much memory|writes too much|rejects the messages") as told:
        Template(HOSTILE[kind], "hostile.jinja", {}).render([])
    assert time.monotonic() - begun < 60 and "Traceback" not in str(told.value)
    assert Template("{{ messages[0].content }}", "good", {}).render([{"role": "user", "content": "a"}]) == "a", "a new child"


def test_control_jinjas_sandbox_alone_does_not_end(tmp_path: Path) -> None:
    code = "import sys, jinja2.sandbox as s; s.ImmutableSandboxedEnvironment().from_string(sys.argv[1]).render()"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", code, LOOP], timeout=3, check=False)
    made = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(DOUBLING.replace("range(40)", "range(20)")).render()
    assert int(made) == 8 << 20, "doubles without a limit"


# --- weights


def safetensors(path: Path, header: object, body: bytes = bytes(16), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 16, [2])}


@pytest.mark.parametrize(
    ("header", "length", "said"),
    [
        (GOOD, 2**62, "longer than the file"),
        (GOOD, 2**63, "longer than the file"),
        ({"a": entry(0, 16, [4]), "b": entry(8, 16, [2])}, None, "overlaps another tensor"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 16, [1])}, None, "leaves a gap"),
        ({"a": entry(0, 16, [2**40, 2**40])}, None, "disagree"),
        ({"a": entry(0, 16, [-4])}, None, "disagree"),
        ({"a": entry(0, 2**60, [2**58])}, None, "in a file with room for 16"),
        ({"a": 5}, None, "cannot be read as safetensors"),
        (b"[" * 100_000, None, "nested too deeply"),
        (b"\xff\xfe", None, "cannot be read as safetensors"),
    ],
)
def test_headers_are_checked_before_they_are_believed(header: object, length: int | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_header(safetensors(tmp_path / "x.safetensors", header, length=length))


def test_control_a_sound_header_is_read(tmp_path: Path) -> None:
    assert list(read_header(safetensors(tmp_path / "x.safetensors", GOOD))) == ["a", "b"]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert "fuzz.safetensors" in str(error)
    else:
        assert list(opened(path).keys()) == list(header), "what is taken can be opened"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "sub/x.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside.safetensors", folder / "sub" / "x.safetensors", folder / "in.safetensors"):
        safetensors(path, GOOD)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="must be a file name in this folder"):
        weight_files(folder)
    index.write_text(json.dumps({"weight_map": {"a": "in.safetensors"}}))
    assert weight_files(folder) == [folder / "in.safetensors"], "the control"


# --- tokenizers


def tokenizer_spec(**changes: object) -> dict[str, object]:
    """A small sound tokenizer.json with some parts replaced."""
    vocab: dict[str, object] = {"</s>": 0, "a": 1, "b": 2}
    model: dict[str, object] = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": []}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "decoder": None,
        "model": model,
        **changes,
    }


def opened_tokenizer(content: object, path: Path) -> Tokenizer:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = load_tokenizer(str(path))
    tokenizer.encode("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab ab")
    return tokenizer


def model_of(**changes: object) -> dict[str, object]:
    return {"model": {"type": "BPE", "vocab": {"</s>": 0, "a": 1}, "merges": [], **changes}}


def added(**changes: object) -> dict[str, object]:
    return {"added_tokens": [{"id": 5, "content": "<x>", "special": True, **changes}]}


def split(pattern: str) -> dict[str, object]:
    return {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}}


def nested(depth: int) -> object:
    value: object = {}
    for _ in range(depth):
        value = {"type": "Sequence", "normalizers": [value]}
    return value


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TOKENIZERS = {
    "nested lists": ("[" * 200_000, "nested too deeply"),
    "nested tables": (tokenizer_spec(normalizer=nested(60)), "nested too deeply"),
    "an id of 2^40": (tokenizer_spec(**model_of(vocab={"</s>": 0, "a": 2**40})), "id of token 'a' must be from 0 to"),
    "an added id of 2^40": (tokenizer_spec(**added(id=2**40)), "id of token '<x>' must be from 0 to"),
    "a negative id": (tokenizer_spec(**added(id=-1)), "id of token '<x>' must be from 0 to"),
    "a true id": (tokenizer_spec(**model_of(vocab={"</s>": 0, "a": True})), "an id in model.vocab is not an integer"),
    "a text for an id": (tokenizer_spec(**added(id="5")), "the id of added token '<x>' is not an integer"),
    "no content": (tokenizer_spec(**added(content="")), "an added token without content"),
    "a list of numbers": (tokenizer_spec(**model_of(vocab=[1, 2])), "must list"),
    "merges of three": (tokenizer_spec(**model_of(merges=["a b c"])), "model.merges must be"),
    "half a surrogate": (tokenizer_spec(**added(content="\ud800")), "half of a surrogate pair"),
    "a decoder in a list": (tokenizer_spec(decoder=[]), "decoder must be a table"),
    "exponential pattern": (tokenizer_spec(**split("(a+)+$")), "its patterns fail on ordinary text"),
    "exponential on words": (tokenizer_spec(**split(r"(\w+\s?)+$")), "its patterns fail on ordinary text"),
    "cubic pattern": (tokenizer_spec(**split("a*a*a*a*[bc]{9}")), "its patterns fail on ordinary text"),
    "pattern of the decoder": (
        tokenizer_spec(decoder={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}), "its patterns fail",
    ),
    "text that doubles": (tokenizer_spec(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 40}), "its patterns fail"),
    "text that grows": (tokenizer_spec(normalizer={**REPLACE, "content": "a" * 10**6}), "writes too much|too much memory|died|ended"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_no_text_could_have_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "CHILD", LimitedChild(probe.__name__, "answering", 2, probe.MAX_MEMORY))
    content, said = TOKENIZERS[kind]
    with pytest.raises(DataError, match=said) as told:
        opened_tokenizer(content, tmp_path / "tokenizer.json")
    assert "\n" not in str(told.value) and "tokenizer.json" in str(told.value)
    assert capfd.readouterr().err == "", "what the library prints when it panics stays in the child"


def test_control_sound_tokenizers_are_opened_and_the_library_alone_takes_hostile_ones(tmp_path: Path) -> None:
    opened_tokenizer(tokenizer_spec(), tmp_path / "tokenizer.json")
    published = (  # cl100k, o200k, SmolLM's digits, Llama 2
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}{1,3}|\s+(?!\S)|\s+",
        r"\d{1,3}(?=(?:\d{3})*\b)",
    )
    for pattern in published:
        opened_tokenizer(tokenizer_spec(**split(pattern)), tmp_path / "tokenizer.json")
    spaces = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, {**REPLACE, "pattern": {"String": " "}, "content": "▁"}],
    }
    opened_tokenizer(tokenizer_spec(normalizer=spaces), tmp_path / "tokenizer.json")
    library = Library.from_str(json.dumps(tokenizer_spec(**split("(a+)+$"))))
    with pytest.raises(BaseException, match="retry-limit-in-match over") as told:
        library.encode("a" * 40 + "b")
    assert not isinstance(told.value, Exception), "ends a program that catches Exception"


# --- text and conversations


def test_a_long_line_in_a_small_gzip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects.objects, "__defaults__", (1 << 20, None))
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "fine"}\n{"text": "' + b"a" * (8 << 20) + b'"}\n')
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"bomb.jsonl.gz:2: row longer than 1 MiB"):
        list(open_source(str(path)).documents())
    monkeypatch.setattr(objects.objects, "__defaults__", (16 << 20, None))
    assert [len(one.text) for one in open_source(str(path)).documents()] == [4, 8 << 20], "the control"


def test_a_conversation_too_long_to_render_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "' + b"b" * chat_rows.MAX_ROW_BYTES + b'"}\n')
    with pytest.raises(DataError, match=r"long.jsonl:1: row longer than 16 MiB"):
        list(chat_rows.read_rows(path))


def test_numbers_and_nesting_of_json_rows(tmp_path: Path) -> None:
    for text in ('{"text": ' + "9" * 5000 + "}", '{"text": ' + "[" * 100_000 + "}"):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"a.jsonl:1: not JSON"):
            list(open_source(str(tmp_path / "a.jsonl")).documents())
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    for name in (str(tmp_path / "a.txt"), "/dev/zero"):
        with pytest.raises(DataError, match="a pipe or device, not a file"):
            open_source(name)
        with pytest.raises(ValueError, match="not a regular file"):
            load_json(Path(name))
    with pytest.raises(DataError, match="no readable file"):
        open_source(str(tmp_path))
    (tmp_path / "b").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="larger than 0 MiB"):
        read_limited(tmp_path / "b", 99)


# --- recipes and configs


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.depth", 10**9), ("train.hours", 1e300), ("train.steps", 10**30), ("data.sequence_length", 10**12),
     ("model.vocab_size", 10**15), ("train.global_batch", 2**40), ("seed", 2**63)],
)  # fmt: skip
def test_numbers_without_an_end_in_sight_are_out_of_range(key: str, value: float) -> None:
    length = {} if key.startswith("train.") and key != "train.global_batch" else {"train.steps": 1}
    with pytest.raises(ConfigError, match=rf"{key}: input should be less than"):
        from_values({"name": "x", **length, key: value}, "test")


def test_a_config_with_a_billion_layers_is_refused() -> None:
    for content in (
        {"num_hidden_layers": 10**9},
        {"text_config": {"n_layer": 10**9}},
        {"hidden_size": 2**40},
        {"num_labels": 2 * 10**9},
    ):
        with pytest.raises(ConfigError, match="is out of range"):
            check_sizes(content, "model.path x")
    check_sizes({"num_hidden_layers": 96, "vocab_size": 200_000, "max_position_embeddings": 10**7}, "model.path x")


def test_every_named_test_exists() -> None:
    import re

    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    assert len(named) == page.count("`tests/"), "every file of tests is named with its test"
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_a_small_parquet_file_is_not_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from gptoughts.data.text import objects, rows

    text = "a" * 1_000_000
    table = pyarrow.table(
        {"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 600, pyarrow.int32()), pyarrow.array([text]))}
    )
    parquet.write_table(table, tmp_path / "small.parquet", compression="zstd")
    assert (tmp_path / "small.parquet").stat().st_size < 10_000
    with parquet.ParquetFile(tmp_path / "small.parquet") as file:
        assert 600 < objects._rows_at_once(file) <= 1024, "the control: 600 MB at once are within the limit"
        monkeypatch.setattr(objects, "MOST_DECODED_BYTES", 8_000_000)
        assert objects._rows_at_once(file) < 9
    assert sum(1 for _ in objects.parquet_rows(tmp_path / "small.parquet", "text")) == 600
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 999_999)
    with pytest.raises(DataError, match=r"small.parquet:1: row longer than"):
        next(iter(open_source(str(tmp_path / "small.parquet")).documents()))
