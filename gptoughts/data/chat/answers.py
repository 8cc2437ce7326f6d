"""Locate the answers in the text rendered by a chat template, by rendering and never by searching for strings.

A template either marks answers itself (`{% generation %}`), or is rendered twice: the prompt up to an answer, and the conversation
including it. The difference is the answer with its end-of-turn token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from gptoughts.data.chat.template import BEGIN_ANSWER, END_ANSWER, REASONING, Message, strip_marks
from gptoughts.data.chat.tokenizer import ChatTokenizer
from gptoughts.errors import DataError

TrainOn = Literal["answers", "all"]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as one text with marked answers, or as several if the template rewrites earlier turns.

    answers     number of answers over all texts
    open_ends   answers without an end-of-turn token
    spelled     special tokens spelled in messages and kept as text
    shortened   answers of which the template leaves out text or reasoning
    """

    texts: list[str]
    answers: int
    open_ends: int
    spelled: int
    shortened: int = 0


def render_chat(
    chat: ChatTokenizer, messages: Sequence[Message], train_on: TrainOn, unlearned: Collection[int] = ()
) -> RenderedChat:
    """Render a conversation with marks around the text to train on. `unlearned` are the indices of answers that are not marked.

    Raises DataError if the answers cannot be located.
    """
    found = _render_chat(chat, messages, train_on, unlearned)
    return replace(found, shortened=count_shortened(found.texts, messages))


def count_shortened(texts: Sequence[str], messages: Sequence[Message]) -> int:
    """Return the number of answers whose content or reasoning is not whole in the texts, apart from white space."""
    whole = "\0".join("".join(strip_marks(text).split()) for text in texts)
    count = 0
    for message in messages:
        parts = [message[key] for key in ("content", *REASONING) if isinstance(message.get(key), str)]
        # A template may rewrite the tags around thoughts, so the parts between tags are looked up.
        pieces = [piece for part in parts for piece in re.split(r"</?[\w|]+>", part)]
        count += message["role"] == "assistant" and any("".join(piece.split()) not in whole for piece in pieces)
    return count


def _render_chat(
    chat: ChatTokenizer, messages: Sequence[Message], train_on: TrainOn, unlearned: Collection[int]
) -> RenderedChat:
    marked, spelled = chat.mark_spelled(messages)
    if spelled and strip_marks(chat.template.render(marked)) != strip_marks(chat.template.render(messages)):
        raise DataError("chat template: a special token spelled in a message changes its output", fix="reword the message")
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    answers = len(places) - len(unlearned)
    if train_on == "all" and unlearned:
        raise DataError(
            f"message {min(unlearned) + 1}: has weight 0, but data.train_on = all learns everything",
            fix="--data.train-on answers",
        )
    if train_on == "all":
        return RenderedChat([f"{BEGIN_ANSWER}{chat.template.render(marked)}{END_ANSWER}"], answers, 0, spelled)
    if chat.template.marks_answers:
        text, open_ends = _render_tagged(chat, messages, marked, len(places))
        text = _without_marks(text, [places.index(index) for index in unlearned])
        return RenderedChat([text], answers, open_ends, spelled)
    texts, open_ends = _render_by_difference(chat, marked, unlearned)
    return RenderedChat(texts, answers, open_ends, spelled)


def _render_tagged(
    chat: ChatTokenizer, messages: Sequence[Message], marked: Sequence[Message], answers: int
) -> tuple[str, int]:
    """Render a template with `{% generation %}`; an end-of-turn token directly after a mark is moved inside."""
    text = chat.template.render(marked, tracking=True)
    if strip_marks(text) != strip_marks(chat.template.render(messages)):
        raise DataError("chat template: modifies the output of its {% generation %} block, so answers cannot be located")
    parts = text.split(END_ANSWER)
    if len(parts) - 1 != answers or any(part.count(BEGIN_ANSWER) != 1 for part in parts[:-1]) or BEGIN_ANSWER in parts[-1]:
        raise DataError(
            "chat template: {% generation %} must mark every answer once",
            found=f"{len(parts) - 1} marks, {answers} answers",
        )
    # No other turn follows the last answer, so a token there ends a turn.
    end_of_turn = chat.leading_control(parts[-1])
    out, open_ends = parts[0], 0
    for part in parts[1:]:
        if chat.end_of_turn(out[out.rindex(BEGIN_ANSWER) + 1 :]) < 0:
            moved = end_of_turn if part.startswith(end_of_turn) else ""
            out, part = out + moved, part[len(moved) :]
            open_ends += not moved
        out += END_ANSWER + part
    return out, open_ends


def _without_marks(text: str, numbers: Collection[int]) -> str:
    """Return `text` with the marks of some answers around nothing, so that they are not learned, and split as in a prompt."""
    head, *answers = text.split(BEGIN_ANSWER)
    parts = [head]
    for number, part in enumerate(answers):
        answer, after = part.split(END_ANSWER)
        parts.append(f"{BEGIN_ANSWER}{END_ANSWER}{answer}{after}" if number in numbers else f"{BEGIN_ANSWER}{part}")
    return "".join(parts)


def _render_by_difference(
    chat: ChatTokenizer, messages: Sequence[Message], unlearned: Collection[int] = ()
) -> tuple[list[str], int]:
    """Return texts that contain every answer once, each after exactly the prompt that the model gets at inference.

    One text has all answers if each rendering is a prefix of the next. For a template that rewrites earlier turns, such as one
    that drops reasoning, each rewritten answer gets its own text.
    """
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    spans = {index: Span.locate(chat, messages, index) for index in indices}
    texts = []
    while indices:
        whole = spans[indices[-1]].text
        included = [index for index in indices if spans[index].is_prefix_of(whole)]
        parts, done = [], 0
        for index, span in spans.items():
            if index > indices[-1] or not span.is_prefix_of(whole):
                continue
            # An answer that is not labeled here is still split off, as in a prompt, so that its tokens are the same.
            end = span.end if index in included and index not in unlearned else span.start
            parts += [whole[done : span.start], BEGIN_ANSWER, whole[span.start : end], END_ANSWER]
            done = end
        if not set(included) <= set(unlearned):
            texts.append("".join([*parts, whole[done:]]))
        indices = [index for index in indices if index not in included]
    return texts[::-1], sum(span.is_open for span in spans.values())


def prompt(chat: ChatTokenizer, messages: Sequence[Message]) -> np.ndarray:
    """Return the token ids of a conversation up to the next answer, identical to the ids before that answer in training."""
    marked, _ = chat.mark_spelled(messages)
    text = chat.template.render(marked, add_generation_prompt=True, tracking=chat.template.marks_answers)
    if not chat.template.marks_answers:
        parts, done = [], 0
        for index, message in enumerate(marked):
            if message["role"] != "assistant":
                continue
            try:
                span = Span.locate(chat, marked, index)
            except DataError:  # a template unusable for training can still be prompted
                continue
            if span.is_prefix_of(text):
                parts += [text[done : span.start], BEGIN_ANSWER, END_ANSWER]
                done = span.start
        text = "".join([*parts, text[done:]])
    return chat.encode([text])[0].ids


def stops(chat: ChatTokenizer) -> set[int]:
    """Return the id of the template's end-of-turn token; empty if answers end without one, or cannot be located."""
    try:
        rendered = render_chat(chat, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answers")
    except DataError:  # end-of-text still ends generation
        return set()
    if rendered.open_ends:
        return set()
    encoded = chat.encode(rendered.texts[-1:])[0]
    return {int(encoded.ids[encoded.learned][-1])}


@dataclass(frozen=True)
class Span:
    """One answer: [start, end) of `text`, the conversation up to and including it."""

    text: str
    start: int
    end: int
    is_open: bool
    """No end-of-turn token."""

    def is_prefix_of(self, text: str) -> bool:
        """Whether `text` begins with the conversation up to the end of this answer."""
        return text.startswith(self.text[: self.end])

    @staticmethod
    def locate(chat: ChatTokenizer, messages: Sequence[Any], index: int) -> Span:
        """Return the span of the answer `messages[index]`, with its end-of-turn token and without white space after it."""
        text = chat.template.render(messages[: index + 1])
        start = answer_start(chat, messages, index, text)
        if start == len(text):
            raise DataError(f"message {index + 1}: the chat template renders no text for this answer")
        length = chat.end_of_turn(text[start:])
        inner = chat.end_before(text[start : start + length]) if length > 0 else -1
        if inner > 0 and not _stays(chat, messages[: index + 1], text[: start + length], text[: start + inner]):
            length = inner
        return Span(text, start, len(text) if length < 0 else start + length, length < 0)


def _stays(chat: ChatTokenizer, messages: Sequence[Any], text: str, shorter: str) -> bool:
    """Whether the last of two tokens at the end of an answer stays when another turn follows. Phi writes end-of-text only at the very end."""
    try:
        longer = chat.template.render([*messages, {"role": "user", "content": "0"}])
    except DataError:
        return True
    return longer.startswith(text) or not longer.startswith(shorter)


def answer_start(chat: ChatTokenizer, messages: Sequence[Any], index: int, text: str) -> int:
    """Return the position in `text` at which the answer `messages[index]` begins: the end of the generation prompt.

    For a template without a generation prompt, or with one that is not in the final text, two renderings with different answers
    are compared: their common prefix precedes the answer, if it adds more than white space.
    """
    before = messages[:index]
    if chat.template.has_generation_prompt:
        prompt = chat.template.render(before, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
    base = chat.template.render(before)
    one, other = (chat.template.render([*before, {**messages[index], "content": content}]) for content in ("0", "1"))
    head = one[: next((end for end, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), len(one))]
    if not (head.startswith(base) and text.startswith(head)):
        raise DataError(
            f"message {index + 1}: the chat template rewrites the turns before this answer, so its start is unknown"
        )
    return len(head) if head[len(base) :].strip() else len(base)
