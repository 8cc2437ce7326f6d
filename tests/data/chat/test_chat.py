"""Answers are learned, whole and alone; special tokens come from templates only; every row is used or named."""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptoughts.config.recipe import DataConfig
from gptoughts.console import Console
from gptoughts.data.batches import IGNORED
from gptoughts.data.chat.answers import prompt, render_chat, stops
from gptoughts.data.chat.rows import PROBLEMS_SHOWN, prepare_chat
from gptoughts.data.chat.tokenizer import ChatTokenizer
from gptoughts.data.corpus import cached_tokenizer
from gptoughts.data.table import Table
from gptoughts.data.tokenizers.tokenizer import load_tokenizer
from gptoughts.errors import DataError
from tests.support.chat_parts import FAMILIES, SPECIAL, chat, resolve_model_folder

plain_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), min_size=1, max_size=25).filter(str.strip)
spelled_text = st.lists(
    st.sampled_from([name for names in SPECIAL.values() for name in names] + ["<think>", "</think>", "a", " ", "<|", "|>", "\n", "<"]),
    min_size=1, max_size=6,
).map("".join).filter(str.strip)  # fmt: skip
turns = st.lists(st.tuples(plain_text, plain_text), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def chats(folders: dict[str, Path]) -> dict[str, ChatTokenizer]:
    return {family: ChatTokenizer.open(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def oracles(folders: dict[str, Path]) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    return {family: transformers.AutoTokenizer.from_pretrained(folder) for family, folder in folders.items()}


def learned_texts(one: ChatTokenizer, messages: list[dict[str, Any]]) -> list[str]:
    """What the loss sees, one text for each stretch of learned tokens, special tokens spelled out."""
    out = []
    for encoded in one.encode(render_chat(one, messages, "answers").texts):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.learned.astype(int), [0]])))
        for start, end in edges.reshape(-1, 2):
            out.append(one.tokenizer.library.decode(encoded.ids[start:end].tolist(), skip_special_tokens=False))
    return out


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(pairs=turns)
def test_ids_are_those_of_transformers(
    family: str, chats: dict[str, ChatTokenizer], oracles: dict[str, Any], pairs: list[tuple[str, str]]
) -> None:
    messages, one = chat(pairs), chats[family]
    assume(not one.mark_spelled(messages)[1])  # a spelled special token is text here, and the token itself in transformers
    ids = one.encode(render_chat(one, messages, "all").texts)[0].ids.tolist()
    assert ids == oracles[family].apply_chat_template(messages, return_dict=True)["input_ids"]
    # Answers in a prompt keep the ids that they were learned with, so only questions are compared.
    asked = oracles[family].apply_chat_template(messages[:1], return_dict=True, add_generation_prompt=True)["input_ids"]
    assert prompt(one, messages[:1]).tolist() == asked


@settings(max_examples=40, deadline=None)
@given(pairs=turns)
def test_generation_tags_mark_what_transformers_marks(
    chats: dict[str, ChatTokenizer], oracles: dict[str, Any], pairs: list[tuple[str, str]]
) -> None:
    messages, one = chat(pairs), chats["tagged"]
    assume(not one.mark_spelled(messages)[1])
    encoded = one.encode(render_chat(one, messages, "answers").texts)[0]
    expected = oracles["tagged"].apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded.learned.astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.parametrize(
    ("family", "ending"),
    [
        ("chatml", "<|im_end|>"),
        ("tagged", "<|im_end|>"),
        ("no-prompt", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("deepseek", "<｜end▁of▁sentence｜>"),
        ("mistral", "</s>"),
        ("zephyr", "</s>"),
    ],
)
def test_every_answer_is_learned_with_its_end_and_nothing_else(
    family: str, ending: str, chats: dict[str, ChatTokenizer]
) -> None:
    answers = ["It is four.", "hello\n\nfox", "the dog"]
    messages = chat(list(zip(["two plus two?", "say hello", "who?"], answers, strict=True)))
    found = learned_texts(chats[family], messages)
    assert [text.strip() for text in found] == [answer + ending for answer in answers]
    system = [] if family == "mistral" else [{"role": "system", "content": "You are a dog."}]
    assert [text.strip() for text in learned_texts(chats[family], [*system, *messages])] == [
        answer + ending for answer in answers
    ]


@settings(max_examples=40, deadline=None)
@given(pairs=turns, family=st.sampled_from(["chatml", "tagged", "llama3", "deepseek", "no-prompt"]))
def test_what_is_learned_is_the_answers(chats: dict[str, ChatTokenizer], family: str, pairs: list[tuple[str, str]]) -> None:
    # A token may join white space of the prompt with the answer's own, so the answers here begin with a letter.
    pairs = [(question, "a" + answer.strip()) for question, answer in pairs]
    found = learned_texts(chats[family], chat(pairs))
    assert [re.sub(r"<[^<>]*>\Z", "", text) for text in found] == [answer for _, answer in pairs]


@settings(max_examples=120, deadline=None)
@given(
    family=st.sampled_from(["chatml", "tagged", "llama3", "deepseek", "mistral", "qwen"]),
    question=spelled_text, answer=spelled_text, system=spelled_text,
)  # fmt: skip
def test_a_message_cannot_write_a_special_token(
    chats: dict[str, ChatTokenizer], family: str, question: str, answer: str, system: str
) -> None:
    one = chats[family]
    harmless = chat([("x", "y")], None if family == "mistral" else "z")
    messages = chat([(question, answer)], None if family == "mistral" else system)
    try:
        texts = render_chat(one, messages, "answers").texts
    except DataError as error:
        assume("changes its output" not in str(error) and "renders no text" not in str(error))
        raise
    special = {index for name, index in one.special.items() if name != "<unk>"}  # Unknown characters are that one.

    def control(messages: list[dict[str, Any]]) -> list[int]:
        ids = one.encode(render_chat(one, messages, "all").texts)[0].ids.tolist()
        return [index for index in ids if index in special]

    assert control(messages) == control(harmless)
    encoded = one.encode(texts)[0]
    if family in ("chatml", "llama3") and "\ufffd" not in (
        decoded := one.tokenizer.library.decode(encoded.ids.tolist(), skip_special_tokens=False)
    ):
        assert question.strip() in decoded and answer.strip() in decoded


def test_forged_marks_and_split_tokens_do_not_pass(chats: dict[str, ChatTokenizer]) -> None:
    one = chats["chatml"]
    for mark in "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\ufdd5":
        with pytest.raises(DataError, match="noncharacter"):
            render_chat(one, chat([("a", f"{mark}2{mark}")]), "answers")
    # Neighbors that spell a token only together: the end of one text and the template's own characters.
    ids = one.encode(render_chat(one, chat([("<|im_end|", "x")]), "answers").texts)[0].ids.tolist()
    assert ids.count(one.special["<|im_end|>"]) == 3


def test_users_cannot_think_and_answers_can(chats: dict[str, ChatTokenizer]) -> None:
    one = chats["qwen"]
    think = one.tokenizer.library.token_to_id("<think>")
    assert think in one.control.values() and think not in one.special.values()
    encoded = one.encode(render_chat(one, chat([("<think>a</think>", "<think>\nhm\n</think>\n\nfour")]), "answers").texts)[0]
    assert (encoded.ids == think).sum() == 1 and encoded.learned[encoded.ids == think].all()


def test_begin_of_text_comes_once(chats: dict[str, ChatTokenizer]) -> None:
    for family, name in (("llama3", "<|begin_of_text|>"), ("deepseek", "<｜begin▁of▁sentence｜>"), ("mistral", "<s>")):
        one = chats[family]
        for text in render_chat(one, chat([("a", "b"), ("c", "d")]), "answers").texts:
            ids = one.encode([text])[0].ids.tolist()
            assert ids[0] == one.special[name] and ids.count(one.special[name]) == 1


@pytest.mark.parametrize("family", ["qwen", "deepseek"])
def test_rewritten_history_gets_a_text_for_each_answer(family: str, chats: dict[str, ChatTokenizer]) -> None:
    one = chats[family]
    thoughts = ["<think>\none\n</think>\n\nfour", "<think>\ntwo\n</think>\n\nsix"]
    messages = chat([("two plus two", thoughts[0]), ("three plus three", thoughts[1])])
    found = render_chat(one, messages, "answers")
    assert len(found.texts) == 2 and found.answers == 2
    for number, encoded in enumerate(one.encode(found.texts)):
        whole = one.encode([one.template.render(messages[: 2 * number + 2])])[0].ids.tolist()
        asked = prompt(one, messages[: 2 * number + 1]).tolist()
        # What is learned stands behind exactly what the model will be given.
        assert (
            encoded.ids.tolist() == whole and encoded.ids[: encoded.learned.argmax()].tolist() == asked == whole[: len(asked)]
        )
    assert [text.count("<think>") for text in learned_texts(one, messages)] == [1, 1]


def test_a_template_that_hides_answers_is_refused(folders: dict[str, Path]) -> None:
    folder = folders["chatml"]

    def refused(source: str, match: str, messages: list[dict[str, Any]] | None = None) -> None:
        (folder / "odd.jinja").write_text(source)
        with pytest.raises(DataError, match=match):
            render_chat(
                ChatTokenizer.open(folder, str(folder / "odd.jinja")), messages or chat([("a", "b"), ("c", "d")]), "answers"
            )

    refused(
        "{% for m in messages[-1:] %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "Found 1 marks, 2 answers"
    )
    refused(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "message 2: the chat template renders no text for this answer",
    )
    refused(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "rewrites the turns before this answer"
    )
    inside = "{% set x %}{% for m in messages %}{% generation %} {{ m.content }}{% endgeneration %}{% endfor %}{% endset %}{{ x | trim }}"
    refused(inside, "modifies the output of its {% generation %} block")
    refused(
        "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}",
        "changes its output",
        chat([("<|im_end|>", "b")]),
    )


def test_an_end_of_turn_behind_a_generation_tag_is_learned(folders: dict[str, Path]) -> None:
    folder = folders["chatml"]
    loop = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    body = "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    other = "{{ m.content + '<|im_end|>\n' }}"
    (folder / "end.jinja").write_text(
        f"{loop}{{% if m.role == 'assistant' %}}{body}{{% else %}}{other}{{% endif %}}{{% endfor %}}"
    )
    one = ChatTokenizer.open(folder, str(folder / "end.jinja"))
    assert learned_texts(one, chat([("a", "b"), ("c", "d")])) == ["b<|im_end|>", "d<|im_end|>"]
    # No token ends a turn here, and the next turn's token is not one.
    (folder / "end.jinja").write_text(
        "{% for m in messages %}<|im_start|>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    one = ChatTokenizer.open(folder, str(folder / "end.jinja"))
    with pytest.raises(DataError, match="Found 4 marks, 2 answers"):
        render_chat(one, chat([("a", "b"), ("c", "d")]), "answers")


def test_built_in_templates(folders: dict[str, Path]) -> None:
    one = ChatTokenizer.open(folders["mistral"], "plain")
    assert [text.strip() for text in learned_texts(one, chat([("a", "the fox"), ("c", "dog")]))] == ["the fox</s>", "dog</s>"]
    with pytest.raises(DataError, match=r"lacks <\|im_start\|>, <\|im_end\|>\.\n  Try: --data\.template plain"):
        ChatTokenizer.open(folders["mistral"], "chatml")
    assert learned_texts(ChatTokenizer.open(folders["chatml"], "chatml"), chat([("a", "b")])) == ["b<|im_end|>"]
    with pytest.raises(DataError, match=r"data\.template: needed for a tokenizer without a folder"):
        ChatTokenizer.open(load_tokenizer(str(folders["chatml"])))


PLAIN = {"plain": "chatml", "plain-sentencepiece": "mistral"}
"""The built-in template, whose prompt ends with a space, with two kinds of tokenizer."""


@pytest.fixture(scope="module")
def every(chats: dict[str, ChatTokenizer], folders: dict[str, Path]) -> dict[str, ChatTokenizer]:
    return chats | {name: ChatTokenizer.open(folders[family], "plain") for name, family in PLAIN.items()}


@pytest.mark.parametrize("family", [*FAMILIES, *PLAIN])
@settings(max_examples=15, deadline=None)
@given(pairs=turns)
def test_a_prompt_begins_the_ids_that_are_learned(
    family: str, every: dict[str, ChatTokenizer], pairs: list[tuple[str, str]]
) -> None:
    one, messages = every[family], chat(pairs)
    found = [part.ids.tolist() for part in one.encode(render_chat(one, messages, "answers").texts)]
    for place in range(1, len(messages), 2):
        asked = prompt(one, messages[:place]).tolist()
        assert any(ids[: len(asked)] == asked for ids in found), place


def test_no_token_reaches_into_an_answer(every: dict[str, ChatTokenizer]) -> None:
    for name in PLAIN:
        assert learned_texts(every[name], chat([("a", "the fox")]))[0].startswith("the fox")
    # Behind a seam, SentencePiece's kind puts no second space, and behind a control token it still puts its own.
    one, oracle = every["mistral"], every["mistral"].tokenizer.library
    encoded = one.encode(render_chat(one, chat([("a", "dog"), ("the fox", "dog")]), "answers").texts)[0]
    text = oracle.decode(encoded.ids.tolist(), skip_special_tokens=False).replace("<unk>", "NS")
    assert text == "<s> [INST] a [/INST] dog</s> [INST] the fox [/INST] dog</s>"


@pytest.mark.parametrize(
    ("family", "ending"),
    [("chatml", "<|im_end|>"), ("tagged", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>"), ("qwen", "<|im_end|>"),
     ("plain", "<|im_end|>")],
)  # fmt: skip
def test_an_answers_end_stops_it(family: str, ending: str, every: dict[str, ChatTokenizer]) -> None:
    assert stops(every[family]) == {every[family].special[ending]}


def test_a_template_without_ends_stops_nothing(folders: dict[str, Path]) -> None:
    for number, source in enumerate(("{% for m in messages %}{{ m.content }}\n{% endfor %}", "{{ messages | length }}x")):
        path = folders["chatml"] / f"endless{number}.jinja"
        path.write_text(source)
        assert stops(ChatTokenizer.open(folders["chatml"], str(path))) == set()


# --- data sets


def write(path: Path, rows: list[Any]) -> Path:
    """A .jsonl file of rows; a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def some(count: int) -> list[dict[str, Any]]:
    """Conversations of different lengths."""
    return [{"messages": chat([(f"question {i} fox", "dog " * (1 + i % 5) + str(i))] * (1 + i % 3))} for i in range(count)]


def config(path: Path, **values: Any) -> DataConfig:
    """The data section of a recipe."""
    values = {"sequence_length": 64, "val_fraction": 0.25, **values}
    return DataConfig(path=str(path), format="chat", cache=str(path.parent / "cache"), **values)


def documents(table: Table) -> set[tuple[int, ...]]:
    """The documents of a table: ids of each stretch whose positions count up, padding left out."""
    out = set()
    for ids, labels, places in zip(table.arrays["input_ids"], table.arrays["labels"], table.arrays["positions"], strict=True):
        starts = [*np.flatnonzero(places == 0), len(ids)]
        for start, end in pairwise(starts):
            if (labels[start:end] != IGNORED).any():
                out.add(tuple(ids[start:end].tolist()))
    return out


def test_a_data_set_becomes_tables(tmp_path: Path, folders: dict[str, Path], chats: dict[str, ChatTokenizer]) -> None:
    path, one = write(tmp_path / "chat.jsonl", some(40)), chats["chatml"]
    tables = prepare_chat(config(path, sequence_length=200), folders["chatml"])
    expected = set()
    for row in some(40):
        encoded = one.encode(render_chat(one, row["messages"], "answers").texts)
        expected |= {tuple(part.ids.tolist()) for part in encoded}
    assert documents(tables["train"]) | documents(tables["val"]) == expected
    assert not documents(tables["train"]) & documents(tables["val"])
    stats = tables["train"].stats
    assert stats["conversations"] + tables["val"].stats["conversations"] == 40 and stats["fill"] > 0.9
    assert (
        tables["train"].arrays["input_ids"].shape[1] == 201
        and stats["learned"] == (tables["train"].arrays["labels"] >= 0).sum()
    )
    kept = tables["train"].arrays["labels"] != IGNORED
    assert (tables["train"].arrays["labels"][kept] == tables["train"].arrays["input_ids"][kept]).all()
    again = prepare_chat(config(path, sequence_length=200), folders["chatml"])
    assert again["train"].fingerprint == tables["train"].fingerprint and len(list((tmp_path / "cache").iterdir())) == 1


def test_settings_and_content_have_tables_of_their_own(tmp_path: Path, folders: dict[str, Path]) -> None:
    path = write(tmp_path / "chat.jsonl", some(12))
    base = prepare_chat(config(path, sequence_length=200), folders["chatml"])["train"]
    other = [
        prepare_chat(config(path, sequence_length=200, packing=False), folders["chatml"]),
        prepare_chat(config(path, sequence_length=200, train_on="all"), folders["chatml"]),
        prepare_chat(config(path, sequence_length=200), folders["chatml"], shape="masked-diffusion"),
        prepare_chat(config(path, sequence_length=200, template="plain"), folders["chatml"]),
    ]
    prints = [base.fingerprint, *(tables["train"].fingerprint for tables in other)]
    assert len(set(prints)) == 5 and len(list((tmp_path / "cache").iterdir())) == 5
    everything = other[1]["train"].stats
    assert everything["learned"] == everything["tokens"] - everything["documents"]  # All but what nothing comes before.
    diffusion = other[2]["train"].arrays
    assert diffusion["input_ids"].shape[1] == 200 and ((diffusion["positions"] == 0).sum(1) == 2).all()
    padding = np.cumsum(diffusion["positions"] == 0, axis=1) == 2
    last = padding.argmax(axis=1) - 1  # The line's end behind the last answer is not there: asked, the model would not see one.
    assert (diffusion["labels"][np.arange(len(last)), last] == SPECIAL["chatml"].index("<|im_end|>")).all()
    assert (diffusion["input_ids"][padding] == SPECIAL["chatml"].index("<|endoftext|>")).all() and (
        diffusion["labels"][padding] == IGNORED
    ).all()
    write(path, some(13))
    assert prepare_chat(config(path, sequence_length=200), folders["chatml"])["train"].fingerprint != base.fingerprint


def test_denoising_learns_each_answer_without_what_follows(tmp_path: Path, folders: dict[str, Path]) -> None:
    one, messages = ChatTokenizer.open(folders["chatml"]), chat([("two plus two", "four"), ("three", "the fox")])
    path = write(tmp_path / "chat.jsonl", [{"messages": messages}])
    table = prepare_chat(config(path, sequence_length=100, val_fraction=0.0), folders["chatml"], shape="masked-diffusion")[
        "train"
    ]
    assert len(table) == 2 and table.stats["conversations"] == 1 and table.stats["answers"] == 2
    for turn in (1, 3):
        asked = prompt(one, messages[:turn]).tolist()
        row = next(
            row
            for row, ids in enumerate(table.arrays["input_ids"])
            if (table.arrays["labels"][row] >= 0).argmax() == len(asked)
        )
        learned = table.arrays["labels"][row] != IGNORED
        end = len(asked) + learned.sum()
        assert table.arrays["input_ids"][row, : len(asked)].tolist() == asked and learned[len(asked) : end].all()
        text = one.tokenizer.library.decode(
            table.arrays["input_ids"][row, len(asked) : end].tolist(), skip_special_tokens=False
        )
        assert text == messages[turn]["content"] + "<|im_end|>"
        assert table.arrays["positions"][row, end] == 0  # padding


def test_validation_stays_what_it_was_when_rows_are_added(tmp_path: Path, folders: dict[str, Path]) -> None:
    path = write(tmp_path / "chat.jsonl", some(30))
    before = prepare_chat(config(path, sequence_length=200), folders["chatml"])
    write(path, [*some(60)[30:], *some(30)])
    after = prepare_chat(config(path, sequence_length=200), folders["chatml"])
    assert documents(before["val"]) < documents(after["val"]) and documents(before["train"]) < documents(after["train"])
    # Equal conversations are never on both sides.
    write(path, some(30) * 3)
    tripled = prepare_chat(config(path, sequence_length=200), folders["chatml"])
    assert documents(tripled["val"]) == documents(before["val"])


def test_validation_from_a_file_and_without_any(tmp_path: Path, folders: dict[str, Path]) -> None:
    path, val = write(tmp_path / "chat.jsonl", some(12)), write(tmp_path / "val.jsonl", some(15)[12:])
    tables = prepare_chat(config(path, sequence_length=200, val_path=str(val)), folders["chatml"])
    assert tables["train"].stats["conversations"] == 12 and tables["val"].stats["conversations"] == 3
    assert tables["val"].stats["seen"] == 0
    write(val, some(15)[10:])
    assert prepare_chat(config(path, sequence_length=200, val_path=str(val)), folders["chatml"])["val"].stats["seen"] == 2
    assert set(prepare_chat(config(path, sequence_length=200, val_fraction=0.0), folders["chatml"])) == {"train"}
    with pytest.raises(DataError, match=r"Found 1\.\n  Try: --data\.val-fraction 0"):
        prepare_chat(config(write(path, some(1)), sequence_length=200), folders["chatml"])


def test_other_forms_and_files_give_the_same_rows(tmp_path: Path, folders: dict[str, Path]) -> None:
    def rows_of(path: Path) -> set[tuple[int, ...]]:
        return documents(prepare_chat(config(path, sequence_length=200, val_fraction=0.0), folders["chatml"])["train"])

    expected = rows_of(write(tmp_path / "a.jsonl", [{"messages": chat([("what\n\nfox", "dog")], "be kind"), "id": 3}]))
    base = {"system": "be kind"}
    assert rows_of(write(tmp_path / "b.jsonl", [base | {"prompt": "what\n\nfox", "response": "dog"}])) == expected
    assert rows_of(write(tmp_path / "c.jsonl", [base | {"prompt": "what\n\nfox", "completion": "dog"}])) == expected
    assert rows_of(write(tmp_path / "d.jsonl", [base | {"instruction": "what", "input": "fox", "output": "dog"}])) == expected
    assert (
        rows_of(write(tmp_path / "e.jsonl", [base | {"instruction": "what\n\nfox", "input": "", "output": "dog"}])) == expected
    )
    assert rows_of(write(tmp_path / "f.jsonl", [base | {"question": "what\n\nfox", "answer": "dog"}])) == expected
    packed = tmp_path / "g.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert rows_of(packed) == expected
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.Table.from_pylist([json.loads(line) for line in (tmp_path / "a.jsonl").open()]), tmp_path / "h.parquet"
    )
    assert rows_of(tmp_path / "h.parquet") == expected


BAD = {
    "{": "not JSON",
    "[1]": "not a JSON object|must be",
    '{"text": "x"}': "no messages, no conversations, no prompt",
    '{"messages": []}': "messages: empty",
    '{"messages": "x"}': "list of objects",
    '{"messages": [{"role": "user", "content": "a"}]}': r"messages: no answer \(role assistant\)",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}': "message 2: empty answer",
    '{"messages": [{"role": "usr", "content": "a"}]}': r"role must be one of .* \(did you mean 'user'\?\)\. Found 'usr'",
    '{"messages": [{"role": "human", "content": "a"}]}': r"did you mean 'user'\?",
    '{"messages": [{"from": "humn", "value": "a"}]}': r"from: must be one of .* \(did you mean 'human'\?\)",
    '{"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]}': "content: has a part that is not text",
    '{"messages": [{"role": "user", "content": null}]}': r"content must be a string\. Found NoneType",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{}]}]}': "2: tool_calls is not rendered",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]}': "2: reasoning is not rendered",
    '{"messages": [{"role": "assistant", "content": "b"}]}': "message 1: an answer must follow a message of role user",
    json.dumps(
        {"messages": [*chat([("a", "b")]), {"role": "user", "content": "c"}]}
    ): r"the last message must be an answer\. Found role user",
    '{"prompt": "a", "response": "b", "completion": "c"}': r"ambiguous keys\. Found prompt \+ response and prompt \+ completion\.",
    '{"prompt": "a", "response": "b", "messages": []}': r"ambiguous keys\. Found messages and prompt \+ response",
    '{"question": "a", "answer": "b", "context": "c"}': "context: not supported with question",
    '{"prompt": ["a"], "response": "b"}': "prompt: must be a list of objects",
    '{"prompt": 1, "response": "b"}': r"prompt: must be a string or a list of messages\. Found int",
    '{"prompt": "a", "response": "b", "tools": [1]}': "tools: must be a list of objects",
    '{"messages": [{"role": ["user"], "content": "a"}]}': r"message 1: role must be one of .*\. Found list",
    '{"prompt": "a", "response": "b \\ud83d"}': "message 2: content has an unpaired surrogate",
    '{"prompt": "a", "response": "b", "system": "\\ude00"}': "message 1: content has an unpaired surrogate",
}


def test_every_bad_row_is_named_with_its_line(tmp_path: Path, folders: dict[str, Path]) -> None:
    bad = list(BAD.items())
    for part in (bad[:11], bad[11:]):
        lines = [json.dumps(some(1)[0]), ""]
        path = write(tmp_path / "bad.jsonl", lines + [row for row, _ in part])
        with pytest.raises(DataError) as caught:
            prepare_chat(config(path), folders["chatml"])
        *said, fix = str(caught.value).splitlines()
        assert f"{len(part)} invalid rows" in said[0] and fix == "  Try: correct them, or --data.bad-rows skip"
        for number, (line, (row, expected)) in enumerate(zip(said[1:], part, strict=True), 3):
            assert f"bad.jsonl:{number}: " in line and re.search(expected, line), (row, line)
    path = write(tmp_path / "many.jsonl", [{"text": "x"}] * 50)
    with pytest.raises(DataError, match="20 or more invalid rows") as caught:
        prepare_chat(config(path), folders["chatml"])
    assert len(str(caught.value).splitlines()) == PROBLEMS_SHOWN + 2
    assert not list((tmp_path / "cache").glob("*"))  # Nothing is left behind.
    with pytest.raises(DataError, match=r"not a chat data file\.\n  Try: files that end in \.jsonl"):
        (tmp_path / "x.txt").write_text("x")
        prepare_chat(config(tmp_path / "x.txt"), folders["chatml"])


def test_long_conversations_are_an_error_unless_asked_otherwise(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [*some(6), {"messages": chat([("who", "fox " * 300)])}]
    path = write(tmp_path / "chat.jsonl", rows)
    with pytest.raises(DataError, match=r"(?s)1 of 7 .*chat\.jsonl:7.*--data\.sequence-length (\d+)") as caught:
        prepare_chat(config(path, sequence_length=200, val_fraction=0.0), folders["chatml"])
    enough = int(re.findall(r"--data.sequence-length (\d+)", str(caught.value))[0])
    assert (
        prepare_chat(config(path, sequence_length=enough, val_fraction=0.0), folders["chatml"])["train"].stats["longest"]
        == enough + 1
    )
    with pytest.raises(DataError, match="are longer than"):
        prepare_chat(config(path, sequence_length=enough - 1, val_fraction=0.0), folders["chatml"])
    dropped = prepare_chat(config(path, sequence_length=200, val_fraction=0.0), folders["chatml"], too_long="drop")["train"]
    assert dropped.stats["dropped"] == 1 and dropped.stats["documents"] == dropped.stats["conversations"] == 6
    assert dropped.stats["answers"] == sum(len(row["messages"]) // 2 for row in rows[:-1])
    cut = prepare_chat(config(path, sequence_length=200, val_fraction=0.0), folders["chatml"], too_long="cut")["train"]
    assert cut.stats["cut"] == 1 and cut.stats["documents"] == 7 and cut.stats["longest"] == 201
    none = write(tmp_path / "deep.jsonl", [*rows, {"messages": chat([("fox " * 300, "deep")])}])
    left = prepare_chat(config(none, sequence_length=200, val_fraction=0.0), folders["chatml"], too_long="cut")["train"]
    assert left.stats["cut"] == 1 and left.stats["dropped"] == 1  # A row without anything to learn is none.


def test_other_names_of_tokens_keep_a_tokenizer_of_their_own(tmp_path: Path) -> None:
    """The template is the same, and what it writes for eos_token is not."""
    folder, kept = resolve_model_folder("mistral", tmp_path / "tokenizer"), []
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    for name in ("</s>", "<s>"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        data = config(tmp_path / "chat.jsonl", tokenizer=str(folder))
        place = cached_tokenizer(load_tokenizer(str(folder)), data)
        assert json.loads((place / "tokenizer_config.json").read_text())["eos_token"] == name
        kept.append(place)
    assert kept[0] != kept[1]


def test_two_makers_make_one(tmp_path: Path, folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "chat.jsonl", some(20))
    found: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(prepare_chat(config(path, sequence_length=200), folders["chatml"])["train"].fingerprint)
        )
        for _ in range(3)
    ]
    with Console(sys.stderr).logging():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert capfd.readouterr().err.count("data: tokenizing conversations of") == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, folders: dict[str, Path]) -> None:
    path = write(tmp_path / "chat.jsonl", some(8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match=r"not chat data\. Found 'mine\.txt'"):
        prepare_chat(config(path), folders["chatml"], out=tmp_path / "out")
    prepare_chat(config(path, sequence_length=200), folders["chatml"], out=tmp_path / "made")
    with pytest.raises(DataError, match="written from other data or settings"):
        prepare_chat(config(path, sequence_length=201), folders["chatml"], out=tmp_path / "made")
    (tmp_path / "made" / "index.json").unlink()  # A kill before the last file: it is made again.
    assert prepare_chat(config(path, sequence_length=200), folders["chatml"], out=tmp_path / "made")["train"].stats[
        "conversations"
    ]
    (tmp_path / "made" / "index.json").write_text("{}")
    with pytest.raises(DataError, match=r"index\.json: damaged"):
        prepare_chat(config(path, sequence_length=200), folders["chatml"], out=tmp_path / "made")
