"""Cut (question, context) pairs into rows of one length: the whole question, overlapping context windows, the answer as two token positions.

The model folder's tokenizer.json defines the special tokens, so BERT, RoBERTa, DeBERTa and ModernBERT need no code of their own.
Only the context is truncated, and every context token is in some window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.data.squad.question import Question
from gptoughts.data.tokenizers.spec import MAX_TOKENIZER_BYTES, library_errors, load_library, read_spec
from gptoughts.errors import DataError
from gptoughts.files import load_json, read_limited

CHUNK = 256  # questions tokenized at once
PADDING_NAMES = ("[PAD]", "<pad>")
NOWHERE = (0, 0)
"""Start and end of a window without the whole answer: its first token, [CLS] (Devlin et al. 2019)."""


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer for text pairs, and its padding id."""

    library: Any
    padding_id: int
    hash: str
    name: str

    @staticmethod
    def open(folder: Path | str) -> Reader:
        """Open the tokenizer.json of a model folder. Raises DataError if it is missing, or its pairs do not begin with a special token."""
        path = Path(folder).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; question answering needs the model folder's tokenizer.json",
                fix="transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
            )
        try:
            raw = read_limited(path, MAX_TOKENIZER_BYTES)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
        library = load_library(read_spec(raw, str(path)), str(path))
        padding_id = padding_of(path, library)
        # A file may set its own lengths: MiniLM's truncates and pads to 128.
        library.no_truncation()
        library.no_padding()
        with library_errors(str(path)):
            pair = library.encode("a", "b")
        if not pair.special_tokens_mask or pair.special_tokens_mask[0] != 1 or 1 not in pair.sequence_ids:
            raise DataError(
                f"{path}: no special token before a text pair, which is the label of unanswerable questions",
                fix="an encoder such as BERT or RoBERTa",
            )
        digest = hashlib.sha256(raw + b"\0" + str(padding_id).encode()).hexdigest()
        return Reader(library, padding_id, digest, str(path))


def padding_of(path: Path, library: Any) -> int:
    """Return the padding id: pad_token or pad_token_id of the folder, else the padding of tokenizer.json, else [PAD] or <pad>.

    Never guessed, because RoBERTa derives positions from it. Raises DataError if none is named.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        config_path = path.parent / name
        try:
            config = load_json(config_path) if config_path.is_file() else {}
        except (OSError, ValueError) as error:
            raise DataError(f"{config_path}: not JSON ({error})") from None
        if not isinstance(config, dict):
            raise DataError(f"{config_path}: not a JSON object")
        token = config.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        index = library.token_to_id(token) if isinstance(token, str) else config.get("pad_token_id")
        if isinstance(index, int):
            return index
    if library.padding is not None:
        return int(library.padding["pad_id"])
    # Checkpoints store tokenizer.json only.
    for index, added in library.get_added_tokens_decoder().items():
        if added.special and added.content in PADDING_NAMES:
            return int(index)
    raise DataError(f"{path.parent}: no padding token", fix='add "pad_token_id" to its config.json')


def windows(questions: Sequence[Question], reader: Reader, length: int, stride: int) -> dict[str, np.ndarray]:
    """Return all windows of all questions, in order, as arrays.

    `input_ids` (rows, length) in the narrowest unsigned type, `token_types` uint8 and `mask` bool (same shape), `starts` and `ends`
    int64 (rows,): first and last token of the question's first answer; `owner` int32 (rows,): index of the question; `offsets`
    int32 (rows, length, 2): character spans. Consecutive windows of a context overlap by `stride` tokens.

    Raises DataError for a question too long for `length`, or an answer dropped by the tokenizer.
    """
    library = reader.library
    narrow = np.uint16 if library.get_vocab_size(with_added_tokens=True) <= 1 << 16 else np.uint32
    rows: list[dict[str, Any]] = []
    with library_errors(reader.name):
        check_lengths(questions, library, length, stride)
        library.enable_truncation(max_length=length, stride=stride, strategy="only_second")
        try:
            for number, question, encodings in encoded(questions, library):
                rows.extend(
                    {"owner": number, **row} for row in question_rows(question, encodings, length, reader.padding_id, narrow)
                )
        finally:
            library.no_truncation()
    types = {"starts": np.int64, "ends": np.int64, "owner": np.int32}
    return {name: np.array([row[name] for row in rows], dtype=types.get(name)) for name in rows[0]}


def check_lengths(questions: Sequence[Question], library: Any, length: int, stride: int) -> None:
    """Raise DataError naming the longest question if it leaves no room for context beyond the stride."""
    special = library.num_special_tokens_to_add(True)
    longest, longest_question = -1, None
    remaining = iter(questions)
    while group := list(islice(remaining, CHUNK)):
        texts = [_stripped(question) for question in group]
        for question, encoding in zip(group, library.encode_batch(texts, add_special_tokens=False), strict=True):
            if len(encoding.ids) > longest:
                longest, longest_question = len(encoding.ids), question
    if longest_question is not None and longest + special + stride >= length:
        raise DataError(
            f"{longest_question.where}: question too long for data.sequence_length {length}, no room for context",
            found=f"{longest} question tokens, {special} special tokens, data.stride {stride}",
            fix=f"--data.sequence-length {longest + special + stride + 1} or more, a smaller --data.stride, or a shorter question",
        )


def _stripped(question: Question) -> str:
    """Return the question without surrounding spaces; some SQuAD questions begin with hundreds."""
    return question.text.strip()


def encoded(questions: Sequence[Question], library: Any) -> Iterator[tuple[int, Question, list[Any]]]:
    """Yield (index, question, its windows in context order)."""
    numbered = enumerate(questions)
    while group := list(islice(numbered, CHUNK)):
        pairs = [(_stripped(question), question.context) for _, question in group]
        for (number, question), encoding in zip(group, library.encode_batch(pairs), strict=True):
            yield number, question, [encoding, *encoding.overflowing]


def question_rows(
    question: Question, encodings: list[Any], length: int, padding_id: int, narrow: type[np.unsignedinteger]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one question."""
    spans = [
        answer_span(question, context_offsets(encoding), k == 0, k == len(encodings) - 1)
        for k, encoding in enumerate(encodings)
    ]
    for encoding, span in zip(encodings, spans, strict=True):
        size = len(encoding.ids)
        input_ids = np.full(length, padding_id, dtype=narrow)
        token_types = np.zeros(length, dtype=np.uint8)
        offsets = np.full((length, 2), -1, dtype=np.int32)
        input_ids[:size], token_types[:size], offsets[:size] = encoding.ids, encoding.type_ids, context_offsets(encoding)
        yield {
            "input_ids": input_ids, "token_types": token_types, "mask": np.arange(length) < size,
            "starts": span[0], "ends": span[1], "offsets": offsets,
        }  # fmt: skip


def context_offsets(encoding: Any) -> np.ndarray:
    """Return the context character span of each token, (tokens, 2); -1 for question and special tokens."""
    offsets = np.array(encoding.offsets, dtype=np.int32)
    # sequence_ids: None for special tokens, 0 for the question, 1 for the context
    offsets[np.array([sequence != 1 for sequence in encoding.sequence_ids])] = -1
    return offsets


def answer_span(question: Question, offsets: np.ndarray, first: bool, last: bool) -> tuple[int, int]:
    """Return the shortest token span that covers the whole first answer, or `NOWHERE` if this window does not contain it.

    `first` and `last`: the context begins or ends in this window, so characters dropped at that edge are in no other window.
    """
    context = np.flatnonzero(offsets[:, 1] >= 0)
    if not len(context):
        raise DataError(f"{question.where}: the tokenizer drops the whole context", fix="remove the question")
    if not question.answers:
        return NOWHERE
    answer = question.answers[0]
    begin = answer.start + len(answer.text) - len(answer.text.lstrip())
    end = answer.start + len(answer.text.rstrip())
    starts, ends = offsets[context, 0], offsets[context, 1]
    if not ((first or starts[0] <= begin) and (last or ends[-1] >= end)):
        return NOWHERE
    inside = np.flatnonzero((ends > begin) & (starts < end))
    if not len(inside):
        raise DataError(f"{question.where}: the tokenizer drops the whole answer {answer.text!r}", fix="remove the question")
    return int(context[inside[0]]), int(context[inside[-1]])
