"""Questions about contexts, from SQuAD 1.1 and 2.0 files or rows of them: strictly read, divided without a leak, cut into windows once.

Two forms are read: the official JSON (articles, paragraphs, `qas`; Rajpurkar et al. 2016, 2018) and JSON Lines of
`{id, question, context, answers: {text, answer_start}}`, as Hugging Face's datasets have it. A question without an answer is kept.
`plausible_answers` of SQuAD 2.0 are not answers and are not read.
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
from gptoughts.data.squad.windows import Reader, windows
from gptoughts.data.table import Table
from gptoughts.data.text.folder import locked
from gptoughts.data.text.shards import INDEX
from gptoughts.data.text.sources import json_row, open_lines
from gptoughts.data.text.tokenize import cache_folder
from gptoughts.data.text.writer import write_json
from gptoughts.errors import DataError, nearest

FORMAT, VERSION = "gptoughts-squad", 1
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TRAINED = ("input_ids", "token_types", "mask", "starts", "ends")
"""What a batch holds; `owner` and `offsets` lead from a window back to its question's text."""
PADDING = {"starts": IGNORED, "ends": IGNORED}


@dataclass(frozen=True)
class Answer:
    """A span of the context: `text` stands at character `start`."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """One question about one context. No answers: it cannot be answered from there. Several: people gave different ones."""

    id: str
    text: str
    context: str
    answers: tuple[Answer, ...] = ()
    title: str = ""
    where: str = ""
    """File and place, for messages."""


@dataclass(frozen=True)
class Questions:
    """The questions of one split, and how the rows of its table lead back to them."""

    asked: tuple[Question, ...]
    owner: np.ndarray
    """Row -> its question's place in `asked`: int32 (rows,). Rows of one question stand together."""
    offsets: np.ndarray
    """Characters of the context that each token stands for: int32 (rows, tokens, 2), -1 where the token is not the context's."""

    @property
    def unanswerable(self) -> bool:
        """Whether some question has no answer, as in SQuAD 2.0."""
        return any(not question.answers for question in self.asked)


def read_squad(path: Path | str) -> list[Question]:
    """The questions of one file, in its order. Raises DataError with file and id for whatever cannot be trained on."""
    path = Path(path).expanduser()
    if not path.is_file():
        here = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(path.name, here)}; give SQuAD's JSON, or JSON Lines of questions")
    if not path.name.endswith((".json", *ROW_SUFFIXES)):
        raise DataError(f"{path}: SQuAD files end in .json (the official form) or {', '.join(ROW_SUFFIXES)} (a row a question)")
    try:
        questions = list(_official(path) if path.suffix == ".json" else _rows(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not questions:
        raise DataError(f"{path}: holds no question")
    seen: dict[str, str] = {}
    for question in questions:
        if question.id in seen:
            raise DataError(
                f"{question.where}: the id stands in the file twice; predictions are kept by id, so give each its own"
            )
        seen[question.id] = question.where
    return questions


def _official(path: Path) -> Iterator[Question]:
    """The official form: data[].paragraphs[].qas[]."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); rows of JSON belong in a file that ends in .jsonl") from None
    articles = _field(content, "data", list, str(path))
    for number, article in enumerate(articles):
        place = f"{path}: data[{number}]"
        title = article.get("title", "") if isinstance(article, dict) else ""
        for index, paragraph in enumerate(_field(article, "paragraphs", list, place)):
            here = f"{place}.paragraphs[{index}]"
            context = _field(paragraph, "context", str, here)
            for order, asked in enumerate(_field(paragraph, "qas", list, here)):
                id = str(_field(asked, "id", (str, int), f"{here}.qas[{order}]"))
                where = f"{path}: question {id}"
                answers = [
                    Answer(_field(answer, "text", str, where), _field(answer, "answer_start", int, where))
                    for answer in _field(asked, "answers", list, where)
                ]
                impossible = asked.get("is_impossible", False)
                if impossible is not (not answers):
                    raise DataError(
                        f"{where}: is_impossible is {json.dumps(impossible)} and it has {len(answers)} answers; "
                        + ("remove the answers, or the flag" if answers else "give an answer, or set is_impossible to true")
                    )
                yield checked(Question(id, _field(asked, "question", str, where), context, tuple(answers), str(title), where))


def _rows(path: Path) -> Iterator[Question]:
    """The form of datasets: a row a question, `answers` a table of `text` and `answer_start`, empty where there is none."""
    number = 0
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(json_row(line, f"{path}:{number}"), f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip after line {number} ({error}); fetch the file again") from None


def _row(row: dict[str, Any], place: str) -> Question:
    id = str(_field(row, "id", (str, int), place))
    where = f"{place}: question {id}"
    answers = _field(row, "answers", dict, where)
    texts, starts = (
        _field(answers, "text", list, f"{where}: answers"),
        _field(answers, "answer_start", list, f"{where}: answers"),
    )
    if len(texts) != len(starts):
        raise DataError(f"{where}: answers has {len(texts)} texts and {len(starts)} starts; give one start for each text")
    spans = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            raise DataError(f"{where}: an answer is a text and a whole number, here {text!r} and {start!r}")
        spans.append(Answer(text, start))
    asked, context = _field(row, "question", str, where), _field(row, "context", str, where)
    return checked(Question(id, asked, context, tuple(spans), str(row.get("title") or ""), where))


def _field(holder: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`holder[key]`, which must be of `kind`."""
    if not isinstance(holder, dict):
        raise DataError(f"{where}: a JSON {type(holder).__name__}, not an object with {key!r}")
    if key not in holder:
        raise DataError(f"{where}: no field {key!r}{nearest(key, holder)}; fields here: {', '.join(holder) or 'none'}")
    value = holder[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{where}: {key} is {type(value).__name__}, not {names}")
    return value


def checked(question: Question) -> Question:
    """The question, where every answer stands in the context where it says. Raises DataError that says where it stands instead."""
    where = question.where
    for name, text in (("question", question.text), ("context", question.context)):
        if not text.strip():
            raise DataError(f"{where}: the {name} is empty")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: the {name} holds half of a surrogate pair at character {error.start}") from None
    for answer in question.answers:
        if not answer.text.strip():
            raise DataError(f"{where}: an answer is empty; a question without an answer has none (SQuAD 2.0: is_impossible)")
        end = answer.start + len(answer.text)
        if answer.start < 0 or question.context[answer.start : end] != answer.text:
            stands = question.context[max(answer.start, 0) : end] if answer.start >= 0 else ""
            found = question.context.find(answer.text)
            remedy = (
                f"set it to {found}" if found >= 0 else "the context does not hold this text at all: mend or remove the answer"
            )
            raise DataError(
                f"{where}: answer {answer.text!r} does not stand at answer_start {answer.start}, there is {stands!r}; "
                f"{remedy} (answer_start counts characters, not bytes)"
            )
    return question


def divided(questions: Sequence[Question], fraction: float) -> tuple[list[Question], list[Question]]:
    """Training and validation: whole articles, or whole contexts where the articles are too few, near `fraction` of the questions.

    Which ones depends on a hash of the article's title or the context, not on their order. A context is never in both.
    """
    if fraction == 0:
        return list(questions), []
    titles: dict[str, str] = {}  # A context that two articles share belongs to the first.
    for question in questions:
        titles.setdefault(question.context, question.title)
    by_article = len(set(titles.values()) - {""}) * fraction >= 2
    groups: dict[str, list[Question]] = {}
    for question in questions:
        key = titles[question.context] if by_article else ""
        groups.setdefault(key or question.context, []).append(question)
    if len(groups) == 1:
        raise DataError(
            f"{questions[0].where}: all {len(questions)} questions are about one context, which cannot be both trained on and held out; "
            "give data.val_path, or data.val_fraction 0"
        )
    room = max(1, round(fraction * len(questions)))
    order = sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest())
    held: set[str] = set()
    for key in order:
        if len(groups[key]) <= room:
            held.add(key)
            room -= len(groups[key])
    held = held or {min(order, key=lambda key: len(groups[key]))}
    if len(held) == len(groups):
        held.remove(order[-1])
    parts: tuple[list[Question], list[Question]] = ([], [])
    for key, members in groups.items():
        parts[key in held].extend(members)
    return parts


def read_splits(data: DataConfig) -> dict[str, tuple[Question, ...]]:
    """The questions of `train` and, unless nothing is held out, `val`. Raises DataError where a context is in both."""
    train = read_squad(data.path)
    if data.val_path is None:
        train, val = divided(train, data.val_fraction)
    else:
        val = read_squad(data.val_path)
        contexts = {question.context for question in train}
        leaked = [question for question in val if question.context in contexts]
        if leaked:
            raise DataError(
                f"{leaked[0].where}: its context is in data.path {data.path} too, as are those of {len(leaked)} of {len(val)} validation "
                "questions; remove them from one of the files, or leave data.val_path unset to hold out whole contexts"
            )
    return {"train": tuple(train), **({"val": tuple(val)} if val else {})}


def prepare_squad(
    data: DataConfig, tokenizer_folder: Path | str, out: Path | str | None = None
) -> tuple[dict[str, Table], dict[str, Questions]]:
    """Tables for `train` and `val`, and the questions that their rows come from. Windows are cut once and kept in `out` or the cache.

    `tokenizer_folder` is the model's folder (or its tokenizer.json). The cache is keyed by the content of the files, the settings that
    change a row, and the tokenizer. Safe from several processes at once. Raises DataError.
    """
    splits = read_splits(data)
    reader = Reader.open(tokenizer_folder)
    facts = [VERSION, reader.hash, data.sequence_length, data.stride]
    for name, questions in splits.items():
        facts.append([name, [[q.id, q.text, q.context, [[a.text, a.start] for a in q.answers]] for q in questions]])
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    folder = Path(out).expanduser() if out is not None else cache_folder(data) / f"{Path(data.path).stem[:32]}-squad-{key[:16]}"
    with locked(folder):
        if (folder / INDEX).exists():
            _ours(folder, key)
        if not all((folder / part / INDEX).exists() for name in splits for part in (name, f"{name}-windows")):
            _cut(folder, splits, reader, data, key)
        tables = {name: Table.load(folder / name) for name in splits}
        places = {name: Table.load(folder / f"{name}-windows").arrays for name in splits}
    return tables, {name: Questions(splits[name], held["owner"], held["offsets"]) for name, held in places.items()}


def _cut(folder: Path, splits: dict[str, tuple[Question, ...]], reader: Reader, data: DataConfig, key: str) -> None:
    """Writes the tables of every split; each has its own index, written last. The folder's says what they were made for."""
    write_json(folder / INDEX, {"format": FORMAT, "version": VERSION, "key": key})
    for name, questions in splits.items():
        held = windows(questions, reader, data.sequence_length, data.stride)
        table = Table({part: held[part] for part in TRAINED}, f"{key}-{name}", PADDING, origin=f"split {name} of {data.path}")
        places = Table({part: held[part] for part in ("owner", "offsets")}, table.fingerprint, {"owner": -1})
        for part, content in ((name, table), (f"{name}-windows", places)):
            shutil.rmtree(folder / part, ignore_errors=True)  # What a kill left.
            content.save(folder / part)


def _ours(folder: Path, key: str) -> None:
    """Raises DataError for a folder that was made for something else."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        made_for = index["key"] if index["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / INDEX}: damaged ({error}); remove the folder and it is made again") from None
    if made_for != key:
        raise DataError(f"{folder}: holds other data, or was made with other settings; remove it, or name another folder")
