"""What a model shall say, marked in what the chat template writes: found by rendering, never by looking for words.

A template either encloses answers itself (`{% generation %}`), or is asked twice: what it writes up to an answer, waiting for one,
and what it writes with the answer. What the second has more is the answer with its end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gptoughts.data.chat.template import BEGIN_ANSWER, END_ANSWER, Message, stripped
from gptoughts.data.chat.tokenizer import ChatTokenizer
from gptoughts.errors import DataError

TrainOn = Literal["answers", "all"]


@dataclass(frozen=True)
class Written:
    """A conversation as texts with marked answers: one text, or several where the template writes earlier turns differently later.

    `answers` are counted over all texts, `open_ends` are those without an end-of-turn token, `spelled` the special tokens that
    messages spell and that stay text.
    """

    texts: list[str]
    answers: int
    open_ends: int
    spelled: int


def written(chat: ChatTokenizer, messages: Sequence[Message], train_on: TrainOn) -> Written:
    """The texts of a conversation, with marks around what is learned. Raises DataError where the template does not allow to tell."""
    marked, spelled = chat.protected(messages)
    if spelled and stripped(chat.template.render(marked)) != chat.template.render(messages):
        raise DataError("spells a special token, and the chat template treats the text differently for it; reword it")
    answers = sum(message["role"] == "assistant" for message in messages)
    if train_on == "all":
        return Written([f"{BEGIN_ANSWER}{chat.template.render(marked)}{END_ANSWER}"], answers, 0, spelled)
    if chat.template.marks_answers:
        text, open_ends = enclosed(chat, messages, marked, answers)
        return Written([text], answers, open_ends, spelled)
    texts, open_ends = compared(chat, marked)
    return Written(texts, answers, open_ends, spelled)


def enclosed(chat: ChatTokenizer, messages: Sequence[Message], marked: Sequence[Message], answers: int) -> tuple[str, int]:
    """The text of a template that marks answers itself; an end-of-turn token right behind a mark is moved inside."""
    text = chat.template.render(marked, tracking=True)
    if stripped(text) != chat.template.render(messages):
        raise DataError(
            "the chat template works on what its {% generation %} encloses, so that answers cannot be told from the rest"
        )
    parts = text.split(END_ANSWER)
    if len(parts) - 1 != answers or any(part.count(BEGIN_ANSWER) != 1 for part in parts[:-1]) or BEGIN_ANSWER in parts[-1]:
        raise DataError(f"the chat template's {{% generation %}} marks {len(parts) - 1} answers of {answers}")
    # Behind the last answer stands no other turn's token, so this one ends a turn.
    end_of_turn = chat.opening(parts[-1])
    out, open_ends = parts[0], 0
    for part in parts[1:]:
        if chat.closing(out[out.rindex(BEGIN_ANSWER) + 1 :]) < 0:
            moved = end_of_turn if part.startswith(end_of_turn) else ""
            out, part = out + moved, part[len(moved) :]
            open_ends += not moved
        out += END_ANSWER + part
    return out, open_ends


def compared(chat: ChatTokenizer, messages: Sequence[Message]) -> tuple[list[str], int]:
    """The texts that hold every answer once, each behind exactly what the model will read before it has to write that answer.

    One text holds all answers where each rendering continues the one before. A template that rewrites earlier turns, such as one
    that leaves out what was thought, gets a text of its own for each answer that it rewrites.
    """
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    spans = {place: Span.of(chat, messages, place) for place in places}
    texts = []
    while places:
        whole = spans[places[-1]].text
        here = [place for place in places if spans[place].opens(whole)]
        parts, done = [], 0
        for place, span in spans.items():
            if place > places[-1] or not span.opens(whole):
                continue
            # An answer that another text teaches is cut off all the same, as it is in a prompt.
            taught = span.end if place in here else span.start
            parts += [whole[done : span.start], BEGIN_ANSWER, whole[span.start : taught], END_ANSWER]
            done = taught
        texts.append("".join([*parts, whole[done:]]))
        places = [place for place in places if place not in here]
    return texts[::-1], sum(span.is_open for span in spans.values())


def prompt(chat: ChatTokenizer, messages: Sequence[Message]) -> np.ndarray:
    """The ids of a conversation that waits for an answer: those that stand before the answer where it is learned."""
    marked, _ = chat.protected(messages)
    text = chat.template.render(marked, add_generation_prompt=True, tracking=chat.template.marks_answers)
    if not chat.template.marks_answers:
        parts, done = [], 0
        for place, message in enumerate(marked):
            if message["role"] != "assistant":
                continue
            try:
                span = Span.of(chat, marked, place)
            except DataError:  # A template that cannot be learned from can be asked.
                continue
            if span.opens(text):
                parts += [text[done : span.start], BEGIN_ANSWER, END_ANSWER]
                done = span.start
        text = "".join([*parts, text[done:]])
    return chat.encode([text])[0].ids


def stops(chat: ChatTokenizer) -> set[int]:
    """The id that ends an answer by the template; none where it ends answers without a token, or does not allow to tell."""
    try:
        found = written(chat, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answers")
    except DataError:  # End-of-text still ends what such a template asks for.
        return set()
    if found.open_ends:
        return set()
    encoded = chat.encode(found.texts[-1:])[0]
    return {int(encoded.ids[encoded.learned][-1])}


@dataclass(frozen=True)
class Span:
    """One answer: [start, end) of `text`, which is the conversation up to it."""

    text: str
    start: int
    end: int
    is_open: bool

    def opens(self, text: str) -> bool:
        """Whether `text` begins with the conversation up to the answer's end."""
        return text.startswith(self.text[: self.end])

    @staticmethod
    def of(chat: ChatTokenizer, messages: Sequence[Any], place: int) -> Span:
        """Where the answer at `place` lies, its end-of-turn token included and white space behind that not."""
        text = chat.template.render(messages[: place + 1])
        start = answer_start(chat, messages, place, text)
        if start == len(text):
            raise DataError(f"message {place + 1}: the chat template writes nothing of this answer")
        length = chat.closing(text[start:])
        return Span(text, start, len(text) if length < 0 else start + length, length < 0)


def answer_start(chat: ChatTokenizer, messages: Sequence[Any], place: int, text: str) -> int:
    """Where the answer at `place` begins in `text`: where the model takes over when it is asked.

    That is behind the generation prompt. A template that has none, or writes another one than it then keeps, is shown two
    answers instead: what it writes before either belongs to it, as far as it is more than white space.
    """
    before = messages[:place]
    if chat.template.has_generation_prompt:
        prompt = chat.template.render(before, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
    base = chat.template.render(before)
    one, other = (chat.template.render([*before, {**messages[place], "content": content}]) for content in ("0", "1"))
    head = one[: next((end for end, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), len(one))]
    if not (head.startswith(base) and text.startswith(head)):
        raise DataError(
            f"message {place + 1}: the chat template rewrites what came before this answer, so it cannot be told where it begins"
        )
    return len(head) if head[len(base) :].strip() else len(base)
