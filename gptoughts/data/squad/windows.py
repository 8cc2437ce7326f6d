"""Question and context become rows of one length: the question whole, the context in windows that overlap, the answer as two tokens.

The model folder's own tokenizer.json says which special tokens stand where, so BERT, RoBERTa, DeBERTa and ModernBERT need nothing of
their own here. Only the context is ever cut, and every token of it is in some window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoughts.errors import DataError

if TYPE_CHECKING:
    from gptoughts.data.squad.examples import Question

CHUNK = 256  # Questions tokenized at once.
PADDING_NAMES = ("[PAD]", "<pad>")
NOWHERE = (0, 0)
"""Start and end of a window that does not hold the whole answer: its first token, [CLS] (Devlin et al. 2019)."""


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer for pairs of texts, and the id that fills up a short row."""

    library: Any
    padding_id: int
    hash: str
    name: str

    @staticmethod
    def open(folder: Path | str) -> Reader:
        """The tokenizer.json of a model folder. Raises DataError where there is none, or none for pairs that begin with a special token."""
        import tokenizers

        path = Path(folder).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; question answering reads the model folder's tokenizer.json, which "
                "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes"
            )
        raw = path.read_bytes()
        try:
            library = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as error:  # The library raises bare Exception for whatever it cannot parse.
            raise DataError(f"{path}: not a tokenizer ({error})") from None
        padding_id = padding_of(path, library)
        # A file may bring its own lengths: MiniLM's cuts at 128 and fills up to it.
        library.no_truncation()
        library.no_padding()
        pair = library.encode("a", "b")
        if not pair.special_tokens_mask or pair.special_tokens_mask[0] != 1 or 1 not in pair.sequence_ids:
            raise DataError(
                f"{path}: does not put a special token before a pair of texts, and no answer is learned as that token; "
                "give an encoder, such as BERT or RoBERTa"
            )
        digest = hashlib.sha256(raw + b"\0" + str(padding_id).encode()).hexdigest()
        return Reader(library, padding_id, digest, str(path))


def padding_of(path: Path, library: Any) -> int:
    """The id that fills up rows: the folder's pad_token or pad_token_id, what tokenizer.json itself fills up with, or [PAD] or <pad>.

    RoBERTa counts positions by this id, so it is never guessed. Raises DataError where nothing names it.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        beside = path.parent / name
        try:
            said = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        except ValueError as error:
            raise DataError(f"{beside}: not JSON ({error})") from None
        token = said.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        index = library.token_to_id(token) if isinstance(token, str) else said.get("pad_token_id")
        if isinstance(index, int):
            return index
    if library.padding is not None:
        return int(library.padding["pad_id"])
    # A checkpoint keeps the tokenizer.json alone.
    for index, added in library.get_added_tokens_decoder().items():
        if added.special and added.content in PADDING_NAMES:
            return int(index)
    raise DataError(f'{path.parent}: nothing says which token fills up rows; add "pad_token_id" to its config.json')


def windows(questions: Sequence[Question], reader: Reader, length: int, stride: int) -> dict[str, np.ndarray]:
    """All windows of all questions, in order, as arrays of `rows` rows.

    `input_ids` (rows, length) in the narrowest unsigned type, `token_types` uint8 and `mask` bool (same shape), `starts` and `ends`
    int64 (rows,): the first and the last token of the question's first answer; `owner` int32 (rows,) and `offsets` int32
    (rows, length, 2) lead back to the characters. Windows of one context share `stride` tokens.

    Raises DataError for a question that leaves the context no room, or an answer that the tokenizer drops.
    """
    library = reader.library
    fits(questions, library, length, stride)
    library.enable_truncation(max_length=length, stride=stride, strategy="only_second")
    narrow = np.uint16 if library.get_vocab_size(with_added_tokens=True) <= 1 << 16 else np.uint32
    rows: list[dict[str, Any]] = []
    try:
        for number, question, pieces in encoded(questions, library):
            rows.extend({"owner": number, **row} for row in question_rows(question, pieces, length, reader.padding_id, narrow))
    finally:
        library.no_truncation()
    types = {"starts": np.int64, "ends": np.int64, "owner": np.int32}
    return {name: np.array([row[name] for row in rows], dtype=types.get(name)) for name in rows[0]}


def fits(questions: Sequence[Question], library: Any, length: int, stride: int) -> None:
    """Raises DataError that names the longest of the questions that leave the context too little room to move on."""
    special = library.num_special_tokens_to_add(True)
    longest, asked = -1, None
    waiting = iter(questions)
    while group := list(islice(waiting, CHUNK)):
        for question, piece in zip(
            group, library.encode_batch([_asked(one) for one in group], add_special_tokens=False), strict=True
        ):
            if len(piece.ids) > longest:
                longest, asked = len(piece.ids), question
    if asked is not None and longest + special + stride >= length:
        raise DataError(
            f"{asked.where}: its question has {longest} tokens; with {special} special ones and data.stride {stride} it leaves a row of "
            f"data.sequence_length {length} no token of the context to move on by\n"
            f"  try: --data.sequence-length {longest + special + stride + 1} or more, a smaller --data.stride, or a shorter question"
        )


def _asked(question: Question) -> str:
    """Spaces around a question are not asked; some of SQuAD's begin with hundreds."""
    return question.text.strip()


def encoded(questions: Sequence[Question], library: Any) -> Iterator[tuple[int, Question, list[Any]]]:
    """Each question with its number and its windows, in the order of the context."""
    numbered = enumerate(questions)
    while group := list(islice(numbered, CHUNK)):
        pairs = [(_asked(question), question.context) for _, question in group]
        for (number, question), piece in zip(group, library.encode_batch(pairs), strict=True):
            yield number, question, [piece, *piece.overflowing]


def question_rows(
    question: Question, pieces: list[Any], length: int, padding_id: int, narrow: type[np.unsignedinteger]
) -> Iterator[dict[str, Any]]:
    """The rows of one question."""
    spans = [answer_span(question, piece_offsets(piece), k == 0, k == len(pieces) - 1) for k, piece in enumerate(pieces)]
    for piece, span in zip(pieces, spans, strict=True):
        size = len(piece.ids)
        input_ids = np.full(length, padding_id, dtype=narrow)
        token_types = np.zeros(length, dtype=np.uint8)
        offsets = np.full((length, 2), -1, dtype=np.int32)
        input_ids[:size], token_types[:size], offsets[:size] = piece.ids, piece.type_ids, piece_offsets(piece)
        yield {
            "input_ids": input_ids, "token_types": token_types, "mask": np.arange(length) < size,
            "starts": span[0], "ends": span[1], "offsets": offsets,
        }  # fmt: skip


def piece_offsets(piece: Any) -> np.ndarray:
    """Characters of the context for each token, (tokens, 2); -1 for the question and for special tokens."""
    offsets = np.array(piece.offsets, dtype=np.int32)
    # The library says None for special tokens, 0 for the question, 1 for the context.
    offsets[np.array([place != 1 for place in piece.sequence_ids])] = -1
    return offsets


def answer_span(question: Question, offsets: np.ndarray, first: bool, last: bool) -> tuple[int, int]:
    """The fewest tokens that cover the whole first answer, or `NOWHERE` where this window does not hold it whole.

    `first` and `last` say whether the context begins and ends in this window: what it drops there, no other window has.
    """
    context = np.flatnonzero(offsets[:, 1] >= 0)
    if not len(context):
        raise DataError(f"{question.where}: the tokenizer keeps nothing of the context; remove the question")
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
        raise DataError(f"{question.where}: the tokenizer keeps nothing of the answer {answer.text!r}; remove the question")
    return int(context[inside[0]]), int(context[inside[-1]])
