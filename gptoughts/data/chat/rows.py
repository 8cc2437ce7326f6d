"""Supervised fine-tuning data: tables of rows in which the answers of conversations are labels.

Built once and cached, like tokenized text. Layout: `train/` and `val/` (tables) and `index.json`, written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptoughts.config.loader import DataConfig
from gptoughts.console import LOGGER
from gptoughts.data.chat.answers import RenderedChat, TrainOn, render_chat
from gptoughts.data.chat.conversations import Conversation, InvalidRow, chat_source, conversations, one_line
from gptoughts.data.chat.packing import Document, build_arrays, fill_ratio, one_per_row, pack
from gptoughts.data.chat.split import Row, count_runs, split_answers, split_by_digest
from gptoughts.data.chat.tokenizer import ChatTokenizer
from gptoughts.data.table import Table
from gptoughts.data.text.folder import folder_lock
from gptoughts.data.text.shards import INDEX
from gptoughts.data.text.tokenize import cache_folder
from gptoughts.data.tokenizers.tokenizer import Tokenizer
from gptoughts.errors import DataError
from gptoughts.files import TEMPORARY, load_json, sha256_of, write_json

FORMAT, VERSION = "gptoughts-chat", 4
TODAY = datetime(2024, 7, 26)
"""Date given to templates that print one, so that rows are reproducible. Llama's template falls back to the same date."""
PROBLEMS_SHOWN = 20
ENCODED_AT_ONCE = 512
COUNTS = ("conversations", "answers", "split_conversations", "open_ends", "spelled", "shortened", "dropped", "cut", "seen")

TooLong = Literal["error", "drop", "cut"]
Shape = Literal["next-token", "masked-diffusion"]


@dataclass
class Split:
    """Documents and counts of one split, in file order."""

    documents: list[Document] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))


def prepare_chat(
    data: DataConfig,
    tokenizer: Tokenizer | Path | str,
    *,
    shape: Shape = "next-token",
    too_long: TooLong = "error",
    out: Path | str | None = None,
) -> dict[str, Table]:
    """Return the tables `train` and, if any, `val` of the conversations in `data.path`, built once in `out` or the cache.

    Rows have `input_ids`, `labels` and `positions`: for next-token, sequence_length + 1 tokens, packed if `data.packing`; for
    masked-diffusion, sequence_length tokens with one answer, the conversation before it, and only padding after it.
    Validation is `data.val_path`, or the conversations whose content hash is below `data.val_fraction`, which keeps them the same
    when rows are added. Safe to call from several processes at once. Raises DataError that lists the invalid rows.
    """
    chat = ChatTokenizer.open(tokenizer, data.template, TODAY)
    builder = TableBuilder(chat, data, shape, too_long)
    key = builder.key()
    if out is None:
        name = "".join(char if char.isalnum() or char in "-_" else "-" for char in Path(data.path).stem)[:32] or "chat"
        out = cache_folder(data) / f"{name}-chat-{key[:16]}"
    folder = Path(out).expanduser()
    with folder_lock(folder):
        if not (folder / INDEX).exists():
            builder.build(folder, key)
        index = read_index(folder, key)
        return {name: Table.load(folder / name) for name in index["splits"]}


def read_index(folder: Path, key: str) -> dict[str, Any]:
    """Return the index of a folder written by `prepare_chat` for `key`. Raises DataError for any other."""
    try:
        index = load_json(folder / INDEX)
        stored = index["key"] if index["format"] == FORMAT and index["version"] == VERSION else None
        if any(Path(name).name != name for name in index["splits"]):
            stored = None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / INDEX}: damaged ({error})", fix=f"rm -r {folder}; it is rebuilt") from None
    if stored != key:
        raise DataError(f"{folder}: written from other data or settings", fix="remove it, or name another folder")
    return dict(index)


class TableBuilder:
    """Builder of the tables of one chat data set."""

    def __init__(self, chat: ChatTokenizer, data: DataConfig, shape: Shape, too_long: TooLong) -> None:
        self.chat, self.data, self.too_long = chat, data, too_long
        self.train_on: TrainOn = data.train_on
        self.packing = data.packing and shape == "next-token"
        # A bidirectional model would attend to the text after an answer, which does not exist at inference.
        self.one_answer_each = shape == "masked-diffusion" and self.train_on == "answers"
        self.width = data.sequence_length + (shape == "next-token")
        self.sources = {"train": chat_source(data.path)}
        if data.val_path is not None:
            self.sources["val"] = chat_source(data.val_path)
        self.files = {name: list(source.files) for name, source in self.sources.items()}
        self.unused: Counter[str] = Counter()
        self.bad_rows = 0
        self.fraction = 0.0 if data.val_path is not None else data.val_fraction

    def key(self) -> str:
        """Return the digest of all inputs that determine the rows."""
        files = {name: [sha256_of(path) for path in paths] for name, paths in self.files.items()}
        key_parts = [
            VERSION, files, self.chat.tokenizer.hash, self.chat.template.source, self.chat.template.tokens, TODAY.isoformat(),
            self.width, self.packing, self.one_answer_each, self.train_on, self.fraction, self.too_long,
            *(["skip"] if self.data.bad_rows == "skip" else []),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(key_parts, sort_keys=True).encode()).hexdigest()

    def build(self, folder: Path, key: str) -> None:
        """Write the tables and, last, the index."""
        foreign = sorted(
            entry.name for entry in folder.iterdir() if entry.name.replace(TEMPORARY, "") not in ("train", "val", INDEX)
        )
        if foreign:
            raise DataError(f"{folder}: not empty and not chat data", found=repr(foreign[0]), fix="a new folder")
        LOGGER.info(f"data: tokenizing conversations of {self.data.path} into {folder}")
        begun = time.monotonic()
        splits = self.splits()
        for name, split in splits.items():
            shutil.rmtree(folder / name, ignore_errors=True)  # left over from a killed process
            table = self.table(name, split)
            table.save(folder / name)
            LOGGER.info(f"data: {name} {summary(table.stats)}")
        if self.bad_rows:
            LOGGER.info(f"data: {self.bad_rows:,} bad rows skipped (data.bad_rows = skip)")
        for word, count in self.unused.most_common(8):
            LOGGER.info(f"data: key {word!r} is not used ({count:,} rows)")
        for text in filter(None, (source.describe_skipped() for source in self.sources.values())):
            LOGGER.info(f"data: {text}")
        tokens = sum(len(document.ids) for split in splits.values() for document in split.documents)
        seconds = time.monotonic() - begun
        LOGGER.info(f"data: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds / 1e6:.2f} Mtok/s")
        write_json(folder / INDEX, {"format": FORMAT, "version": VERSION, "key": key, "splits": list(splits)}, durable=True)

    def splits(self) -> dict[str, Split]:
        """Return the documents of every split. Raises DataError that lists up to 20 invalid rows over all files."""
        problems: list[str] = []
        read = {name: self.read(files, problems) for name, files in self.files.items()}
        if problems:
            shown = problems[:PROBLEMS_SHOWN]
            more = " or more" if len(problems) >= PROBLEMS_SHOWN else ""
            heading = f"{self.data.path}: {len(shown)}{more} invalid row{'s' * (len(shown) > 1)}"
            raise DataError("\n  ".join([f"{heading}:", *shown]), fix="correct them, or --data.bad-rows skip")
        if self.fraction:
            read = split_by_digest(read["train"], self.fraction)
        for name, rows in read.items():
            if not rows:
                raise DataError(f"{self.data.val_path if name == 'val' else self.data.path}: no conversations")
        out = {name: self.select(rows) for name, rows in read.items()}
        if self.data.val_path is not None:
            train_digests = {row.digest for row in read["train"]}
            out["val"].counts["seen"] = sum(row.digest in train_digests for row in read["val"])
        return out

    def read(self, files: Sequence[Path], problems: list[str]) -> list[Row]:
        """Return the encoded conversations of the files; append the errors of invalid rows to `problems`, up to `PROBLEMS_SHOWN`."""
        rows: list[Row] = []
        source = conversations(list(files), self.chat.template)
        while batch := list(islice(source, ENCODED_AT_ONCE)):
            rendered: list[tuple[Conversation, RenderedChat]] = []
            for item in batch:
                try:
                    if isinstance(item, InvalidRow):
                        raise item
                    rendered.append(
                        (item, render_chat(self.chat.with_tools(item.tools), item.messages, self.train_on, item.unlearned))
                    )
                    self.unused.update(item.unused)
                except DataError as error:
                    text = str(error) if isinstance(item, InvalidRow) else f"{item.where}: {one_line(error)}"
                    self.refuse(text, problems)
                    if len(problems) >= PROBLEMS_SHOWN:
                        return []
            if not problems:
                rows += self.encode(rendered, problems)
        return rows

    def refuse(self, problem: str, problems: list[str]) -> None:
        """Append the problem of a row, or count it (`data.bad_rows`)."""
        if self.data.bad_rows == "skip":
            self.bad_rows += 1
        else:
            problems.append(problem)

    def encode(self, rendered: Sequence[tuple[Conversation, RenderedChat]], problems: list[str]) -> Iterator[Row]:
        """Yield the encoded rows of rendered conversations; an answer without a token is a problem."""
        encodings = iter(self.chat.encode([text for _, chat in rendered for text in chat.texts]))
        for conversation, chat in rendered:
            said = [conversation.messages, conversation.tools] if conversation.tools else conversation.messages
            content = json.dumps(said, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
            documents: list[Document] = []
            for encoded in islice(encodings, len(chat.texts)):
                if not encoded.learned[1:].any():
                    self.refuse(f"{conversation.where}: the tokenizer drops the whole answer", problems)
                elif self.one_answer_each:
                    documents += split_answers(encoded, conversation.where)
                else:
                    documents.append(Document(encoded.ids, encoded.learned, conversation.where))
            yield Row(hashlib.sha256(content).digest(), documents, chat)

    def select(self, rows: Sequence[Row]) -> Split:
        """Return the documents that fit a row. By `data.too_long`, longer ones raise DataError, or are dropped or cut and counted."""
        split = Split()
        long = [document for row in rows for document in row.documents if len(document.ids) > self.width]
        if long and self.too_long == "error":
            longest = max(long, key=lambda document: len(document.ids))
            spare = self.width - self.data.sequence_length
            total = sum(len(row.documents) for row in rows)
            raise DataError(
                f"data.sequence_length: {len(long):,} of {total:,} conversations are longer than {self.data.sequence_length}",
                found=f"up to {len(longest.ids):,} tokens ({longest.where})",
                fix=f"--data.sequence-length {len(longest.ids) - spare}, --data.too-long drop, or --data.too-long cut",
            )
        for row in rows:
            documents, cut = self.fit_documents(row, split)
            if not documents:
                continue
            split.documents += documents
            whole = len(documents) == len(row.documents) and not cut
            split.counts["conversations"] += 1
            split.counts["answers"] += (
                row.chat.answers if whole else sum(count_runs(document.learned) for document in documents)
            )
            split.counts["split_conversations"] += len(row.chat.texts) > 1
            split.counts["open_ends"] += row.chat.open_ends
            split.counts["spelled"] += row.chat.spelled
            split.counts["shortened"] += row.chat.shortened
        if not split.documents:
            raise DataError(f"{self.data.path}: no conversation fits data.sequence_length {self.data.sequence_length}")
        return split

    def fit_documents(self, row: Row, split: Split) -> tuple[list[Document], int]:
        """Return a conversation's documents, cut or dropped to the row width, and the number cut; update the split's counts."""
        documents, cut = [], 0
        for document in row.documents:
            if len(document.ids) > self.width:
                document = Document(document.ids[: self.width], document.learned[: self.width], document.where)
                # The first token is never a label, since nothing precedes it.
                if self.too_long == "drop" or not document.learned[1:].any():
                    split.counts["dropped"] += 1
                    continue
                cut += 1
            documents.append(document)
        split.counts["cut"] += cut
        return documents, cut

    def table(self, name: str, split: Split) -> Table:
        """Build the table of one split, with statistics."""
        lengths = [len(document.ids) for document in split.documents]
        rows = (pack if self.packing else one_per_row)(lengths, self.width)
        tokenizer = self.chat.tokenizer
        arrays = build_arrays(split.documents, rows, self.width, tokenizer.eot_id, tokenizer.dtype)
        digest = hashlib.sha256(tokenizer.hash.encode())
        for array in arrays.values():
            digest.update(str(array.dtype).encode())
            digest.update(np.ascontiguousarray(array).data)
        learned = int((arrays["labels"] >= 0).sum())
        stats: dict[str, Any] = dict(split.counts, documents=len(lengths), rows=len(rows), tokens=sum(lengths), learned=learned)
        median, p95 = np.percentile(lengths, [50, 95]).astype(int).tolist()
        stats |= {
            "median": median,
            "95 %": p95,
            "longest": max(lengths),
            "fill": round(fill_ratio(lengths, len(rows), self.width), 6),
            "width": self.width,
        }
        stats |= {"template": self.chat.template.origin, "date": self.chat.template.reads_clock and TODAY.date().isoformat()}
        return Table(arrays, digest.hexdigest(), stats=stats, origin=f"split {name} of {self.data.path}")


def summary(stats: dict[str, Any]) -> str:
    """Return a table's statistics as one line, with nonzero counts of changed or unusual conversations."""
    parts = [
        f"{stats['conversations']:,} conversations, {stats['answers']:,} answers in {stats['rows']:,} rows",
        f"{stats['tokens']:,} tokens, {100 * stats['learned'] / stats['tokens']:.1f} % learned",
        f"rows {100 * stats['fill']:.1f} % full",
        f"longest {stats['longest']:,}",
    ]
    unusual = {
        "dropped": "dropped as too long",
        "cut": "cut as too long",
        "split_conversations": "conversations split into several texts (the template rewrites earlier turns)",
        "open_ends": "answers without an end-of-turn token (the model does not learn to stop)",
        "shortened": "answers of which the template leaves out text (--data.template FILE keeps it)",
        "seen": "also in the training data",
        "spelled": "special tokens spelled in messages, kept as text",
    }
    parts += [f"{stats[key]:,} {label}" for key, label in unusual.items() if stats[key]]
    if stats["date"]:
        parts.append(f"template date {stats['date']}")
    return "; ".join(parts)
