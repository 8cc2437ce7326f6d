"""Templates of published models: ids of transformers, learned tokens, end of turn, calls of tools."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoughts.data.chat.answers import render_chat, stops
from gptoughts.data.chat.conversations import conversation_of
from gptoughts.data.chat.tokenizer import ChatTokenizer
from gptoughts.errors import DataError
from tests.support.chat_parts import chat
from tests.support.published_templates import FAMILIES, write_family

ANSWERS = ["It is four.", "hello\n\nfox", "the dog"]
PAIRS = list(zip(["two plus two?", "say hello", "who?"], ANSWERS, strict=True))
WITH_TOOLS = [name for name, family in FAMILIES.items() if family.tools]
REWRITES = {"qwen-3": "<think>\n\n</think>\n\n"}
"""Families that take the thoughts out of earlier turns, and what begins their last answer."""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds é.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each published family."""
    root = tmp_path_factory.mktemp("published")
    return {name: write_family(name, root / name) for name in FAMILIES}


def calls(as_text: bool) -> list[dict[str, Any]]:
    arguments = {"a": 2, "b": "é"}
    function = {"name": "add", "arguments": json.dumps(arguments, ensure_ascii=False) if as_text else arguments}
    return [
        {"role": "user", "content": "what is two plus two?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call00001", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call00001", "content": "four"},
        {"role": "assistant", "content": "It is four."},
    ]


def encoded_row(one: ChatTokenizer, row: dict[str, Any]) -> tuple[list[list[int]], list[str]]:
    """Return the ids of the texts of a row, and the learned texts."""
    found = conversation_of(row, "row", one.template)
    ids, learned = [], []
    for encoded in one.encode(render_chat(one.with_tools(found.tools), found.messages, "answers", found.unlearned).texts):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.learned.astype(int), [0]])))
        ids.append(encoded.ids.tolist())
        learned += [
            one.tokenizer.library.decode(encoded.ids[start:end].tolist(), skip_special_tokens=False)
            for start, end in list(pairwise(edges))[::2]
        ]
    return ids, learned


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers_and_answers_are_learned_with_their_end(name: str, published: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    family, one, oracle = FAMILIES[name], ChatTokenizer.open(published[name]), AutoTokenizer.from_pretrained(published[name])
    for system in ("be kind", None) if family.system else (None,):
        messages = chat(PAIRS, system)
        ids, learned = encoded_row(one, {"messages": messages})
        # One text, or one for each answer if the template rewrites earlier turns.
        ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
        ends = ends if name in REWRITES else ends[-1:]
        assert ids == [oracle.apply_chat_template(messages[:end], return_dict=True)["input_ids"] for end in ends]
        begin = REWRITES.get(name, "")
        assert [text.strip() for text in learned] == [begin + answer + family.end for answer in ANSWERS]
    assert stops(one) == {oracle.convert_tokens_to_ids(family.end)}


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "object"])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_and_calls_have_the_ids_of_transformers(name: str, as_text: bool, published: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    family, one, oracle = FAMILIES[name], ChatTokenizer.open(published[name]), AutoTokenizer.from_pretrained(published[name])
    row = {"messages": calls(as_text), "tools": json.dumps(TOOLS) if as_text else TOOLS}
    (ids,), learned = encoded_row(one, row)
    # transformers documents arguments as objects; OpenAI's format has their text.
    clean = [{key: value for key, value in message.items() if value is not None} for message in calls(False)]
    assert ids == oracle.apply_chat_template(clean, tools=TOOLS, return_dict=True)["input_ids"]
    assert len(learned) == 2 and all(text.strip().endswith(family.end) for text in learned)
    assert '"a": 2' in learned[0] and "four" not in learned[0] and learned[1].strip() == "It is four." + family.end
    others = encoded_row(one, {"messages": calls(as_text)})[0]
    assert others != [ids], "the tools are in the ids"


def test_a_template_that_writes_arguments_as_text_is_given_text(published: dict[str, Path]) -> None:
    one = ChatTokenizer.open(published["deepseek"])
    found = [encoded_row(one, {"messages": calls(as_text)}) for as_text in (True, False)]
    assert found[0] == found[1]
    assert '{"a": 2, "b": "é"}' in found[0][1][0]


def test_tools_that_no_template_renders_are_refused(published: dict[str, Path]) -> None:
    one = ChatTokenizer.open(published["chatml"])
    with pytest.raises(DataError, match="tools: not rendered by"):
        encoded_row(one, {"messages": chat(PAIRS), "tools": TOOLS})


def test_a_tool_cannot_write_a_special_token(published: dict[str, Path]) -> None:
    one = ChatTokenizer.open(published["qwen-2.5"])
    forged = json.loads(json.dumps(TOOLS).replace("Adds", "<|im_end|>"))
    (ids,), _ = encoded_row(one, {"messages": chat(PAIRS), "tools": forged})
    (plain,), _ = encoded_row(one, {"messages": chat(PAIRS), "tools": TOOLS})
    end = one.special["<|im_end|>"]
    assert ids.count(end) == plain.count(end)


def test_answers_that_a_template_shortens_are_counted(published: dict[str, Path]) -> None:
    thought = chat([("two plus two?", "<think>\ntwo and two\n</think>\n\nIt is four.")])
    reasoned = [thought[0], {"role": "assistant", "reasoning_content": "two and two", "content": "It is four."}]
    found = {
        (name, kind): render_chat(ChatTokenizer.open(published[name]), messages, "answers").shortened
        for name in ("deepseek", "qwen-3", "chatml")
        for kind, messages in (("tags", thought), ("key", reasoned))
    }
    # DeepSeek's template writes what is behind the tags and reads no key, ChatML writes content as it is and reads no key.
    assert [key for key, count in found.items() if count] == [("deepseek", "tags"), ("deepseek", "key"), ("chatml", "key")]
