"""Templates write what transformers' apply_chat_template writes, in a sandbox, and say what is wrong when they cannot."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.data.chat.template import BUILT_IN, Template, load_template, special_token_names, strip_marks
from gptoughts.errors import DataError
from tests.support.chat_parts import CHATML, FAMILIES, LLAMA3, NAMES, TAGGED, chat

content = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30) | st.sampled_from(
    ["<think>\nhm\n</think>\n\nyes", "  padded \n", "<|im_end|>", "{{ 7 * 7 }}", "<b>&amp;</b>", "</s>[INST]"]
)
turns = st.lists(st.tuples(content, content), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def oracles(folders: dict[str, Path]) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    return {family: transformers.AutoTokenizer.from_pretrained(folder) for family, folder in folders.items()}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(pairs=turns, system=st.none() | content, prompt=st.booleans())
def test_renders_as_transformers_does(
    family: str,
    folders: dict[str, Path],
    oracles: dict[str, Any],
    pairs: list[tuple[str, str]],
    system: str | None,
    prompt: bool,
) -> None:
    template = load_template(None, folders[family], special_token_names(folders[family]))
    messages = chat(pairs, None if family == "mistral" else system)
    messages = messages[:-1] if prompt else messages
    expected = oracles[family].apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert template.render(messages, add_generation_prompt=prompt) == expected
    if strip_marks(expected) == expected:
        assert strip_marks(template.render(messages, add_generation_prompt=prompt, tracking=True)) == expected


def test_reasoning_goes_by_all_of_its_names(folders: dict[str, Path], oracles: dict[str, Any]) -> None:
    template = load_template(None, folders["qwen"], special_token_names(folders["qwen"]))
    for name in ("reasoning_content", "reasoning", "thinking"):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", name: "because"}]
        assert "<think>\nbecause\n</think>" in template.render(messages)
    messages[1]["reasoning_content"] = messages[1].pop(name)
    assert template.render(messages) == oracles["qwen"].apply_chat_template(messages, tokenize=False)


def test_filters_and_globals_are_those_of_transformers(folders: dict[str, Path], oracles: dict[str, Any]) -> None:
    source = (
        "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m | tojson }}{{ m | tojson(indent=2) }}\n"
        "{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}\n    {% set x = namespace(n=1) %}{{ x.n }}{{ eos_token }}{{ tools }}"
    )
    messages = [{"role": "user", "content": "<ä>'\"&"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    expected = oracles["chatml"].apply_chat_template(messages, chat_template=source, tokenize=False)
    assert Template(source, "test", NAMES["chatml"]).render(messages) == expected


def test_the_date_can_be_held(folders: dict[str, Path]) -> None:
    messages = chat([("q", "a")])
    held = Template(LLAMA3, "test", {}, datetime(2020, 2, 3))
    assert held.reads_clock and "Today Date: 03 Feb 2020" in held.render(messages)
    assert datetime.now().strftime("%Y") in Template(LLAMA3, "test", {}).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(DataError, match="rejects the messages"):
        Template(source, "test", {}).render(chat([("q", "a")]))


def test_a_template_that_refuses_is_quoted(folders: dict[str, Path]) -> None:
    template = load_template(None, folders["mistral"], special_token_names(folders["mistral"]))
    with pytest.raises(DataError, match="roles must alternate"):
        template.render([{"role": "assistant", "content": "a"}])
    with pytest.raises(DataError, match="rejects the messages"):
        Template("{{ messages[9].content + 'x' }}", "test", {}).render([])


def test_where_templates_come_from(tmp_path: Path) -> None:
    names = {"eos_token": "</s>"}
    with pytest.raises(DataError, match=r"no chat template\.\n  Try: --data\.template chatml"):
        load_template(None, tmp_path, names)
    assert load_template("chatml", tmp_path, names).source == BUILT_IN["chatml"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    assert load_template(None, tmp_path, names).source == CHATML
    several = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load_template(None, tmp_path, names).render([]) == "D" and load_template("rag", tmp_path, names).render([]) == "R"
    (tmp_path / "chat_template.jinja").write_text("J")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    assert load_template(None, tmp_path, names).render([]) == "J"
    assert load_template("tool_use", tmp_path, names).render([]) == "T"
    (tmp_path / "mine.jinja").write_text(TAGGED)
    assert load_template(str(tmp_path / "mine.jinja"), tmp_path, names).marks_answers
    with pytest.raises(DataError, match=r"did you mean 'chatml'"):
        load_template("chatlm", tmp_path, names)
    (tmp_path / "mine.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"mine\.jinja, line 1: not a Jinja template"):
        load_template(str(tmp_path / "mine.jinja"), tmp_path, names)


def test_named_tokens_come_as_text_or_as_objects(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "old"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": None}))
    assert special_token_names(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="not a JSON object"):
        special_token_names(tmp_path)


def test_a_saved_template_is_found_again(tmp_path: Path) -> None:
    template = Template(CHATML, "test", NAMES["chatml"])
    template.save(tmp_path)
    again = load_template(None, tmp_path, special_token_names(tmp_path))
    assert again.source == CHATML and again.tokens == NAMES["chatml"]
