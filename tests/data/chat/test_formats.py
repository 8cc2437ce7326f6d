"""Every format of conversations gives the rows of its messages; what is not learned keeps its ids; no key is dropped in silence."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoughts.config.recipe import DataConfig
from gptoughts.data.chat.answers import render_chat
from gptoughts.data.chat.formats import LEARN_KEYS
from gptoughts.data.chat.rows import prepare_chat
from gptoughts.data.chat.tokenizer import ChatTokenizer
from gptoughts.errors import DataError
from tests.support.chat_parts import chat

TURNS = [("what is two plus two?", "It is four."), ("who?", "the dog")]
SHAREGPT = [{"from": "system", "value": "be kind"}] + [
    {"from": name, "value": text} for pair in TURNS for name, text in zip(("human", "gpt"), pair, strict=True)
]
PARTS = [
    {**message, "content": [{"type": "text", "text": message["content"][:3]}, {"type": "text", "text": message["content"][3:]}]}
    for message in chat(TURNS, "be kind")
]


def rows_of(folder: Path, tokenizer: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> dict[str, np.ndarray]:
    path = folder / name
    if name.lower().endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif name.lower().endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare_chat(DataConfig(**settings_of(path)), tokenizer)["train"].arrays


def settings_of(path: Path) -> dict[str, Any]:
    return {
        "path": str(path), "format": "chat", "sequence_length": 256, "val_fraction": 0.0, "cache": str(path.parent / "cache"),
    }  # fmt: skip


def learned(arrays: dict[str, np.ndarray], tokenizer: Path) -> list[str]:
    """Texts of the stretches of learned tokens in the only row."""
    one, (labels,) = ChatTokenizer.open(tokenizer), arrays["labels"]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (labels >= 0).astype(int), [0]])))
    return [one.tokenizer.library.decode(labels[start:end].tolist()) for start, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": "be kind"},
        {"messages": PARTS},
        {"conversation": chat(TURNS, "be kind")},
        {
            "messages": [
                {**message, "weight": 1} if message["role"] == "assistant" else message for message in chat(TURNS, "be kind")
            ]
        },
    ],
    ids=["sharegpt", "sharegpt with system", "text parts", "conversation", "weights of 1"],
)
def test_formats_of_turns_are_messages(row: dict[str, Any], tmp_path: Path, folders: dict[str, Path]) -> None:
    expected = rows_of(tmp_path, folders["chatml"], {"messages": chat(TURNS, "be kind")})
    found = rows_of(tmp_path, folders["chatml"], row)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "ROWS.JSONL", "Rows.Csv"])
def test_files_of_rows_are_read_by_their_ending_in_any_case(name: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [
        {"instruction": "what", "input": "fox", "output": "dog"},
        {"instruction": 'two, "or"\nthree', "input": "", "output": "four"},
    ]
    expected = rows_of(tmp_path, folders["chatml"], *rows)
    found = rows_of(tmp_path, folders["chatml"], *rows, name=name)
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_only_the_completion_is_learned(tmp_path: Path, folders: dict[str, Path]) -> None:
    messages = chat(TURNS)
    found = rows_of(tmp_path, folders["chatml"], {"prompt": messages[:3], "completion": messages[3:]})
    whole = rows_of(tmp_path, folders["chatml"], {"messages": messages})
    assert np.array_equal(found["input_ids"], whole["input_ids"])
    assert [text.strip() for text in learned(found, folders["chatml"])] == ["the dog"]
    short = rows_of(tmp_path, folders["chatml"], {"prompt": "who?", "completion": messages[3:]})
    assert [text.strip() for text in learned(short, folders["chatml"])] == ["the dog"]


@pytest.mark.parametrize("key", LEARN_KEYS)
@pytest.mark.parametrize("family", ["chatml", "tagged", "deepseek"])
@pytest.mark.parametrize("place", [0, 1])
def test_an_answer_of_weight_0_keeps_its_ids_and_is_not_learned(
    key: str, family: str, place: int, tmp_path: Path, folders: dict[str, Path]
) -> None:
    messages = chat(TURNS)
    marked = [dict(message) for message in messages]
    marked[2 * place + 1][key] = False if key.startswith("train") else 0
    found = rows_of(tmp_path, folders[family], {"messages": marked})
    whole = rows_of(tmp_path, folders[family], {"messages": messages})
    assert np.array_equal(found["input_ids"], whole["input_ids"])
    both = learned(whole, folders[family])
    assert len(both) == 2 and learned(found, folders[family]) == [both[1 - place]]


REFUSED = {
    "no answer is learned": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
    r"weight must be 0, 1, true or false\. Found 0\.5": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0.5},
    ],
    "train of a message that is not an answer": [
        {"role": "user", "content": "a", "train": True},
        {"role": "assistant", "content": "b"},
    ],
    "weight and train contradict": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 1, "train": False},
    ],
    r"a part that is not text\. Found type 'image_url'": [
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
        {"role": "assistant", "content": "b"},
    ],
    "function_call is not supported": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "function_call": {"name": "f"}},
    ],
    "from: must be one of": [{"from": "narrator", "value": "a"}, {"from": "gpt", "value": "b"}],
}


@pytest.mark.parametrize("expected", REFUSED)
def test_what_changes_the_meaning_of_a_row_is_refused(expected: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=expected):
        rows_of(tmp_path, folders["chatml"], {"messages": REFUSED[expected]})


def test_learning_everything_and_weights_contradict(folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"message 2: has weight 0, but data\.train_on = all"):
        render_chat(ChatTokenizer.open(folders["chatml"]), chat(TURNS), "all", {1})


def test_keys_that_nothing_reads_are_named(tmp_path: Path, folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        rows = [{"messages": [{**chat(TURNS)[0], "emotion": "calm"}, *chat(TURNS)[1:]], "id": number} for number in range(3)]
        rows_of(tmp_path, folders["chatml"], *rows)
    said = {record.message for record in caplog.records if "is not used" in record.message}
    assert said == {"data: key 'id' is not used (3 rows)", "data: key 'emotion' is not used (3 rows)"}


def test_bad_rows_can_be_skipped_and_are_counted(
    tmp_path: Path, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": chat(TURNS)})
    path.write_text(f'{good}\n{{"prompt": "a"}}\n[]\nnot JSON\n', encoding="utf-8")
    settings = settings_of(path)
    with pytest.raises(DataError, match=r"3 invalid rows(.|\n)*--data\.bad-rows skip"):
        prepare_chat(DataConfig(**settings), folders["chatml"])
    with caplog.at_level(logging.INFO):
        found = prepare_chat(DataConfig(**settings, bad_rows="skip"), folders["chatml"])["train"]
    assert "data: 3 bad rows skipped (data.bad_rows = skip)" in {record.message for record in caplog.records}
    assert found.stats["conversations"] == 1


TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{% for call in m.tool_calls %}call {{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = [
    {"role": "user", "content": "what is two plus two?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "four"},
    {"role": "assistant", "content": "It is four."},
]


def test_calls_of_tools_are_learned_and_their_answers_are_not(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="tool_calls is not rendered by"):
        rows_of(tmp_path, folders["chatml"], {"messages": CALLS})
    template = tmp_path / "tools.jinja"
    template.write_text(TOOLS, encoding="utf-8")
    one = ChatTokenizer.open(folders["chatml"], str(template))
    text = render_chat(one, CALLS, "answers").texts
    encoded = one.encode(text)[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.learned.astype(int), [0]])))
    said = [
        one.tokenizer.library.decode(encoded.ids[start:end].tolist(), skip_special_tokens=False)
        for start, end in edges.reshape(-1, 2)
    ]
    assert [text.strip() for text in said] == ['call add{"a": 2}<|im_end|>', "It is four.<|im_end|>"]
