"""Read SQuAD 1.1 and 2.0, split into training and validation without sharing a context, and cut into tables of windows.

Two formats: the official JSON (articles, paragraphs, `qas`; Rajpurkar et al. 2016, 2018) and JSON Lines of
`{id, question, context, answers: {text, answer_start}}`, as in Hugging Face datasets. Unanswerable questions are kept.
SQuAD 2.0's `plausible_answers` are not answers and are ignored.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.config.loader import DataConfig
from gptoughts.data.batches import IGNORED
from gptoughts.data.squad.question import Answer, Question
from gptoughts.data.squad.windows import Reader, windows
from gptoughts.data.table import Table
from gptoughts.data.text.folder import folder_lock
from gptoughts.data.text.rows import numbered
from gptoughts.data.text.shards import INDEX
from gptoughts.data.text.sources import json_row, open_lines
from gptoughts.data.text.tokenize import cache_folder
from gptoughts.errors import DataError, nearest
from gptoughts.files import load_json, write_json

FORMAT, VERSION = "gptoughts-squad", 1
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TRAINED = ("input_ids", "token_types", "mask", "starts", "ends")
"""Arrays of a batch. `owner` and `offsets` map a window back to its question's text and are kept apart."""
PADDING = {"starts": IGNORED, "ends": IGNORED}


@dataclass(frozen=True)
class Questions:
    """The questions of one split, and the mapping from table rows to questions."""

    asked: tuple[Question, ...]
    owner: np.ndarray
    """Row -> index of its question in `asked`: int32 (rows,). Rows of one question are contiguous."""
    offsets: np.ndarray
    """Character span of each token in the context: int32 (rows, tokens, 2), -1 for tokens outside the context."""

    @property
    def unanswerable(self) -> bool:
        """Whether any question has no answer, as in SQuAD 2.0."""
        return any(not question.answers for question in self.asked)


def read_squad(path: Path | str) -> list[Question]:
    """Return the questions of one file, in file order. Raises DataError with file and question id."""
    path = Path(path).expanduser()
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(path.name, siblings)}", fix="SQuAD JSON, or JSON Lines of questions")
    if not path.name.lower().endswith((".json", *ROW_SUFFIXES)):
        raise DataError(
            f"{path}: not a SQuAD file name",
            fix=f".json (official format) or {', '.join(ROW_SUFFIXES)} (one question per line)",
        )
    try:
        questions = list(_read_official(path) if path.suffix.lower() == ".json" else _read_rows(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not questions:
        raise DataError(f"{path}: no questions")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"{question.where}: duplicate id", fix="a unique id per question; predictions are keyed by id")
        seen.add(question.id)
    return questions


def _read_official(path: Path) -> Iterator[Question]:
    """Read the official format: data[].paragraphs[].qas[]."""
    try:
        content = load_json(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8", found=f"byte 0x{error.object[error.start]:02x} at offset {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})", fix="the suffix .jsonl for JSON Lines") from None
    articles = _field(content, "data", list, str(path))
    for number, article in enumerate(articles):
        article_where = f"{path}: data[{number}]"
        title = article.get("title", "") if isinstance(article, dict) else ""
        for index, paragraph in enumerate(_field(article, "paragraphs", list, article_where)):
            paragraph_where = f"{article_where}.paragraphs[{index}]"
            context = _field(paragraph, "context", str, paragraph_where)
            for order, entry in enumerate(_field(paragraph, "qas", list, paragraph_where)):
                id = str(_field(entry, "id", (str, int), f"{paragraph_where}.qas[{order}]"))
                where = f"{path}: question {id}"
                answers = [
                    Answer(_field(answer, "text", str, where), _field(answer, "answer_start", int, where))
                    for answer in _field(entry, "answers", list, where)
                ]
                impossible = entry.get("is_impossible", False)
                if impossible is not (not answers):
                    raise DataError(
                        f"{where}: is_impossible contradicts answers",
                        found=f"is_impossible {json.dumps(impossible)}, {len(answers)} answers",
                        fix="remove the answers, or is_impossible"
                        if answers
                        else "add an answer, or set is_impossible to true",
                    )
                yield check_answers(
                    Question(id, _field(entry, "question", str, where), context, tuple(answers), str(title), where)
                )


def _read_rows(path: Path) -> Iterator[Question]:
    """Read JSON Lines: one question per line, `answers` an object of lists `text` and `answer_start`, empty if unanswerable."""
    number = 0
    try:
        with open_lines(path) as lines:
            for number, line in numbered(lines, str(path)):
                if line.strip():
                    yield _parse_row(json_row(line, f"{path}:{number}"), f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip after line {number} ({error})", fix="download the file again") from None


def _parse_row(row: dict[str, Any], place: str) -> Question:
    id = str(_field(row, "id", (str, int), place))
    where = f"{place}: question {id}"
    answers = _field(row, "answers", dict, where)
    texts = _field(answers, "text", list, f"{where}: answers")
    starts = _field(answers, "answer_start", list, f"{where}: answers")
    if len(texts) != len(starts):
        raise DataError(
            f"{where}: answers.text and answers.answer_start differ in length",
            found=f"{len(texts)} texts and {len(starts)} starts",
        )
    spans = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            raise DataError(f"{where}: an answer must be a string and an integer start", found=f"{text!r} and {start!r}")
        spans.append(Answer(text, start))
    text, context = _field(row, "question", str, where), _field(row, "context", str, where)
    return check_answers(Question(id, text, context, tuple(spans), str(row.get("title") or ""), where))


def _field(holder: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return `holder[key]`. Raises DataError unless it has type `kind`."""
    if not isinstance(holder, dict):
        raise DataError(f"{where}: must be a JSON object with {key!r}", found=type(holder).__name__)
    if key not in holder:
        raise DataError(f"{where}: no field {key!r}{nearest(key, holder)}", found=f"fields {', '.join(holder) or 'none'}")
    value = holder[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}: {key} must be {names}", found=type(value).__name__)
    return value


def check_answers(question: Question) -> Question:
    """Return the question if each answer matches the context at its start. Raises DataError with the correct start."""
    where = question.where
    for name, text in (("question", question.text), ("context", question.context)):
        if not text.strip():
            raise DataError(f"{where}: the {name} is empty")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: the {name} has an unpaired surrogate at character {error.start}") from None
    for answer in question.answers:
        if not answer.text.strip():
            raise DataError(f"{where}: empty answer text", fix="an empty list of answers (SQuAD 2.0: is_impossible true)")
        end = answer.start + len(answer.text)
        if answer.start < 0 or question.context[answer.start : end] != answer.text:
            actual = question.context[max(answer.start, 0) : end] if answer.start >= 0 else ""
            start = question.context.find(answer.text)
            raise DataError(
                f"{where}: answer {answer.text!r} is not at answer_start {answer.start} (characters, not bytes)",
                found=repr(actual),
                fix=f"answer_start {start}" if start >= 0 else "correct or remove the answer; the context does not contain it",
            )
    return question


def split_questions(questions: Sequence[Question], fraction: float) -> tuple[list[Question], list[Question]]:
    """Split into training and validation: whole articles, or whole contexts if there are too few articles, near `fraction`.

    The split depends on a hash of the article's title or the context, not on file order. No context is in both.
    """
    if fraction == 0:
        return list(questions), []
    titles: dict[str, str] = {}  # A context shared by two articles belongs to the first.
    for question in questions:
        titles.setdefault(question.context, question.title)
    by_article = len(set(titles.values()) - {""}) * fraction >= 2
    groups: dict[str, list[Question]] = {}
    for question in questions:
        key = titles[question.context] if by_article else ""
        groups.setdefault(key or question.context, []).append(question)
    if len(groups) == 1:
        raise DataError(
            f"{questions[0].where}: all {len(questions)} questions share one context, which cannot be split",
            fix="data.val_path, or --data.val-fraction 0",
        )
    remaining = max(1, round(fraction * len(questions)))
    order = sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest())
    val_keys: set[str] = set()
    for key in order:
        if len(groups[key]) <= remaining:
            val_keys.add(key)
            remaining -= len(groups[key])
    val_keys = val_keys or {min(order, key=lambda key: len(groups[key]))}
    if len(val_keys) == len(groups):
        val_keys.remove(order[-1])
    parts: tuple[list[Question], list[Question]] = ([], [])
    for key, members in groups.items():
        parts[key in val_keys].extend(members)
    return parts


def read_splits(data: DataConfig) -> dict[str, tuple[Question, ...]]:
    """Return the questions of `train` and, unless nothing is held out, `val`. Raises DataError if a context is in both."""
    train = read_squad(data.path)
    if data.val_path is None:
        train, val = split_questions(train, data.val_fraction)
    else:
        val = read_squad(data.val_path)
        contexts = {question.context for question in train}
        leaked = [question for question in val if question.context in contexts]
        if leaked:
            raise DataError(
                f"{leaked[0].where}: its context is also in data.path {data.path}",
                found=f"{len(leaked)} of {len(val)} validation questions with training contexts",
                fix="remove them from one file, or leave data.val_path unset to hold out whole contexts",
            )
    return {"train": tuple(train), **({"val": tuple(val)} if val else {})}


def prepare_squad(
    data: DataConfig, tokenizer_folder: Path | str, out: Path | str | None = None
) -> tuple[dict[str, Table], dict[str, Questions]]:
    """Return the tables of `train` and `val` and the questions of their rows, cut into windows once and stored in `out` or the cache.

    `tokenizer_folder` is the model's folder (or its tokenizer.json). The cache key covers the content of the files, the settings
    that change a row, and the tokenizer. Safe to call from several processes at once. Raises DataError.
    """
    splits = read_splits(data)
    reader = Reader.open(tokenizer_folder)
    key_parts = [VERSION, reader.hash, data.sequence_length, data.stride]
    for name, questions in splits.items():
        key_parts.append([name, [[q.id, q.text, q.context, [[a.text, a.start] for a in q.answers]] for q in questions]])
    key = hashlib.sha256(json.dumps(key_parts).encode()).hexdigest()
    folder = Path(out).expanduser() if out is not None else cache_folder(data) / f"{Path(data.path).stem[:32]}-squad-{key[:16]}"
    with folder_lock(folder):
        if (folder / INDEX).exists():
            _check_key(folder, key)
        if not all((folder / part / INDEX).exists() for name in splits for part in (name, f"{name}-windows")):
            _write_tables(folder, splits, reader, data, key)
        tables = {name: Table.load(folder / name) for name in splits}
        mappings = {name: Table.load(folder / f"{name}-windows").arrays for name in splits}
    return tables, {name: Questions(splits[name], arrays["owner"], arrays["offsets"]) for name, arrays in mappings.items()}


def _write_tables(folder: Path, splits: dict[str, tuple[Question, ...]], reader: Reader, data: DataConfig, key: str) -> None:
    """Write the tables of every split. Each has its own index, written last; the folder's index holds the cache key."""
    write_json(folder / INDEX, {"format": FORMAT, "version": VERSION, "key": key}, durable=True)
    for name, questions in splits.items():
        arrays = windows(questions, reader, data.sequence_length, data.stride)
        table = Table({part: arrays[part] for part in TRAINED}, f"{key}-{name}", PADDING, origin=f"split {name} of {data.path}")
        mapping = Table({part: arrays[part] for part in ("owner", "offsets")}, table.fingerprint, {"owner": -1})
        for part, content in ((name, table), (f"{name}-windows", mapping)):
            shutil.rmtree(folder / part, ignore_errors=True)  # left over from a killed process
            content.save(folder / part)


def _check_key(folder: Path, key: str) -> None:
    """Raise DataError if the folder was written for another cache key."""
    try:
        index = load_json(folder / INDEX)
        stored = index["key"] if index["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / INDEX}: damaged ({error})", fix=f"rm -r {folder}; it is rebuilt") from None
    if stored != key:
        raise DataError(f"{folder}: written from other data or settings", fix="remove it, or name another folder")
