"""One file in each customary format: `data show` has the ids of transformers, the answers are learned, and a run trains on it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoughts.cli.data import show
from tests.data.chat.test_published import TOOLS, calls
from tests.support.chat_parts import chat
from tests.support.published_templates import write_family

TURNS = [("what is two plus two?", "It is four."), ("who?", "the dog")]
MESSAGES, ONE = chat(TURNS, "be kind"), chat([("what is two plus two?\n\nA number.", "It is four.")])
SHAREGPT = [
    {"from": {"system": "system", "user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]}
    for message in MESSAGES
]
PARTS = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES]
ALPACA = {"instruction": "what is two plus two?", "input": "A number.", "output": "It is four."}
CALLS = [{key: value for key, value in message.items() if value is not None} for message in calls(False)]


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(delimiter: str, row: dict[str, str]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(row), delimiter=delimiter)
    writer.writeheader()
    writer.writerow(row)
    return file.getvalue().encode()


def parquet(*rows: dict[str, Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()


Case = tuple[str, Callable[[], bytes], list[dict[str, Any]], list[str]]
BOTH, LAST, FOUR = ["It is four.", "the dog"], ["the dog"], ["It is four."]
FILES: dict[str, Case] = {
    "openai": ("a.jsonl", lambda: lines({"messages": MESSAGES}), MESSAGES, BOTH),
    "content parts, compressed": ("a.JSONL.gz", lambda: gzip.compress(lines({"messages": PARTS})), MESSAGES, BOTH),
    "weights": (
        "a.jsonl", lambda: lines({"messages": [*MESSAGES[:2], {**MESSAGES[2], "weight": 0}, *MESSAGES[3:]]}), MESSAGES, LAST
    ),
    "sharegpt, an array": ("a.json", lambda: json.dumps([{"conversations": SHAREGPT}]).encode(), MESSAGES, BOTH),
    "sharegpt, lines in .json": ("a.json", lambda: lines({"conversations": SHAREGPT}), MESSAGES, BOTH),
    "message lists": ("a.jsonl", lambda: lines({"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}), MESSAGES, LAST),
    "prompt and completion": (
        "a.jsonl", lambda: lines({"prompt": ONE[0]["content"], "completion": "It is four."}), ONE, FOUR
    ),
    "alpaca, csv": ("a.csv", lambda: table(",", ALPACA), ONE, FOUR),
    "alpaca, history": (
        "a.jsonl",
        lambda: lines({"instruction": "who?", "input": "", "output": "the dog", "history": [list(TURNS[0])], "system": "be kind"}),
        MESSAGES,
        BOTH,
    ),
    "messages in a csv": ("a.csv", lambda: table(",", {"messages": json.dumps(MESSAGES)}), MESSAGES, BOTH),
    "pairs, tsv": ("a.tsv", lambda: table("\t", {"question": ONE[0]["content"], "answer": "It is four."}), ONE, FOUR),
    "parquet": ("a.parquet", lambda: parquet({"messages": MESSAGES, "id": 1}), MESSAGES, BOTH),
    "tools": ("a.jsonl", lambda: lines({"messages": calls(True), "tools": TOOLS}), CALLS, ["<tool_call>", "It is four."]),
    "tools, parquet": (
        "a.parquet", lambda: parquet({"messages": json.dumps(calls(True)), "tools": json.dumps(TOOLS)}), CALLS,
        ["<tool_call>", "It is four."],
    ),
}  # fmt: skip


def fields_of(name: str, tmp_path: Path) -> dict[str, str]:
    file, content, *_ = FILES[name]
    (tmp_path / file).write_bytes(content())
    return {
        "data.path": str(tmp_path / file), "data.format": "chat", "data.val_fraction": "0", "data.sequence_length": "512",
        "data.tokenizer": str(write_family("qwen-2.5", tmp_path / "tokenizer")), "data.cache": str(tmp_path / "cache"),
    }  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_shown_with_the_ids_of_transformers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    _, _, messages, answers = FILES[name]
    fields = fields_of(name, tmp_path)
    assert show("quickstart", fields, {}, 1, ids=True) == 0
    out = capsys.readouterr().out
    (line,) = re.findall(r"^ids (.*)$", out, re.MULTILINE)
    oracle = AutoTokenizer.from_pretrained(fields["data.tokenizer"])
    tools = TOOLS if name.startswith("tools") else None
    expected = oracle.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert [int(one.strip("⟦⟧")) for one in line.split()] == expected
    texts = re.findall(r"⟦([^⟧]*)⟧", out[: out.index("\nids ")].split("--- sample 1", 1)[1])
    assert [text.strip().startswith(answer) for text, answer in zip(texts, answers, strict=True)] == [True] * len(answers)
    assert all(text.endswith("<|im_end|>") for text in texts)
    spelled = oracle.convert_ids_to_tokens([int(one.strip("⟦⟧")) for one in line.split() if one.startswith("⟦")])
    assert spelled.count("<|im_end|>") == len(answers), "each end of turn is learned"


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_a_file_trains(name: str, tmp_path: Path) -> None:
    from gptoughts.api import train

    sizes = {"model.width": 32, "model.depth": 1, "model.heads": 2, "train.global_batch": 1, "train.steps": 1}
    result = train("quickstart", fields={**fields_of(name, tmp_path), **sizes}, run="run", run_dir=str(tmp_path), verbose=False)
    assert result.progress.step == 1
