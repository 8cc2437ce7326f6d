"""Supervised fine-tuning data: conversations become tables of rows in which the answers are labels.

Made once and kept in the cache, like tokenized text. Layout: `train/` and `val/` (tables) and `index.json`, written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptoughts.config.loader import DataConfig
from gptoughts.data.chat.answers import TrainOn, Written, written
from gptoughts.data.chat.conversations import Conversation, Problem, chat_files, conversations
from gptoughts.data.chat.packing import Document, fill, laid_out, packed, single
from gptoughts.data.chat.tokenizer import ChatTokenizer, Encoded
from gptoughts.data.table import Table
from gptoughts.data.text.folder import locked
from gptoughts.data.text.shards import INDEX, sha256_of
from gptoughts.data.text.tokenize import cache_folder
from gptoughts.data.text.writer import write_json
from gptoughts.data.tokenizers.tokenizer import Tokenizer
from gptoughts.errors import DataError

FORMAT, VERSION = "gptoughts-chat", 2
TODAY = datetime(2024, 7, 26)
"""What a template that writes the date is told: the same rows whenever they are made. It is the date that Llama's falls back to."""
PROBLEMS_SHOWN = 20
ENCODED_AT_ONCE = 512
COUNTS = ("conversations", "answers", "split_conversations", "open_ends", "spelled", "dropped", "cut", "seen")

TooLong = Literal["error", "drop", "cut"]
Shape = Literal["next-token", "masked-diffusion"]


@dataclass
class Split:
    """What one split is made of, in the order of its files."""

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
    """Tables `train` and, where there is any, `val`, of the conversations in `data.path`; made once, in `out` or in the cache.

    Rows have `input_ids`, `labels` and `positions`: sequence_length + 1 tokens for next-token, packed where `data.packing` says so;
    sequence_length tokens and one answer each for masked-diffusion, with the conversation up to it and nothing but padding behind.
    Validation is `data.val_path`, or the conversations whose content hashes below `data.val_fraction`, so that the same ones are
    kept out when rows are added. Safe from several processes at once. Raises DataError that lists the rows which cannot be used.
    """
    chat = ChatTokenizer.open(tokenizer, data.template, TODAY)
    maker = Maker(chat, data, shape, too_long)
    key = maker.key()
    if out is None:
        name = "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in Path(data.path).stem)[:32] or "chat"
        out = cache_folder(data) / f"{name}-chat-{key[:16]}"
    folder = Path(out).expanduser()
    with locked(folder):
        if not (folder / INDEX).exists():
            maker.make(folder, key)
        index = read_index(folder, key)
        return {name: Table.load(folder / name) for name in index["splits"]}


def read_index(folder: Path, key: str) -> dict[str, Any]:
    """The index of a folder that `prepare_chat` made for `key`. Raises DataError for any other."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        made_for = index["key"] if index["format"] == FORMAT and index["version"] == VERSION else None
        if any(Path(name).name != name for name in index["splits"]):
            made_for = None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / INDEX}: damaged ({error}); remove the folder {folder} and it is made again") from None
    if made_for != key:
        raise DataError(f"{folder}: holds other data, or was made with other settings; remove it, or name another folder")
    return dict(index)


class Maker:
    """Makes the tables of one chat data set."""

    def __init__(self, chat: ChatTokenizer, data: DataConfig, shape: Shape, too_long: TooLong) -> None:
        self.chat, self.data, self.too_long = chat, data, too_long
        self.train_on: TrainOn = data.train_on
        self.packing = data.packing and shape == "next-token"
        # A model that reads both ways would see what stands behind its answer, and when it is asked nothing stands there.
        self.one_each = shape == "masked-diffusion" and self.train_on == "answers"
        self.width = data.sequence_length + (shape == "next-token")
        self.files = {"train": chat_files(data.path)}
        if data.val_path is not None:
            self.files["val"] = chat_files(data.val_path)
        self.fraction = 0.0 if data.val_path is not None else data.val_fraction

    def key(self) -> str:
        """Digest of everything that decides a row."""
        files = {name: [sha256_of(path) for path in paths] for name, paths in self.files.items()}
        facts = [
            VERSION, files, self.chat.tokenizer.hash, self.chat.template.source, self.chat.template.tokens, TODAY.isoformat(),
            self.width, self.packing, self.one_each, self.train_on, self.fraction, self.too_long,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def make(self, folder: Path, key: str) -> None:
        """Writes the tables and, last, the index."""
        foreign = sorted(
            entry.name for entry in folder.iterdir() if entry.name.removesuffix(".tmp") not in ("train", "val", INDEX)
        )
        if foreign:
            raise DataError(f"{folder}: not empty (holds {foreign[0]!r}) and no chat data; name a new folder")
        print(f"data: writing the conversations of {self.data.path} once into {folder}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        splits = self.splits()
        for name, split in splits.items():
            shutil.rmtree(folder / name, ignore_errors=True)  # What a kill left.
            table = self.table(name, split)
            table.save(folder / name)
            print(f"data: {name} {summary(table.facts)}", file=sys.stderr, flush=True)
        tokens = sum(len(document.ids) for split in splits.values() for document in split.documents)
        seconds = time.monotonic() - begun
        print(f"data: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds / 1e6:.2f} Mtok/s", file=sys.stderr, flush=True)
        write_json(folder / INDEX, {"format": FORMAT, "version": VERSION, "key": key, "splits": list(splits)})

    def splits(self) -> dict[str, Split]:
        """The documents of every split. Raises DataError that lists up to 20 rows which cannot be used, over all files."""
        problems: list[str] = []
        read = {name: self.read(files, problems) for name, files in self.files.items()}
        if problems:
            shown = problems[:PROBLEMS_SHOWN]
            more = "; there may be more" if len(problems) >= PROBLEMS_SHOWN else ""
            heading = f"{self.data.path}: {len(shown)} row{'s' * (len(shown) > 1)} cannot be used{more}"
            raise DataError("\n  ".join([f"{heading}:", *shown]))
        if self.fraction:
            read = divided(read["train"], self.fraction)
        for name, rows in read.items():
            if not rows:
                raise DataError(f"{self.data.val_path if name == 'val' else self.data.path}: holds no conversation")
        out = {name: self.fitted(rows) for name, rows in read.items()}
        if self.data.val_path is not None:
            learned = {row.digest for row in read["train"]}
            out["val"].counts["seen"] = sum(row.digest in learned for row in read["val"])
        return out

    def read(self, files: Sequence[Path], problems: list[str]) -> list[Row]:
        """The conversations of some files, encoded; what is wrong with others is added to `problems`, no more than are shown."""
        rows: list[Row] = []
        found = conversations(list(files), self.chat.template)
        while batch := list(islice(found, ENCODED_AT_ONCE)):
            rendered: list[tuple[Conversation, Written]] = []
            for one in batch:
                try:
                    if isinstance(one, Problem):
                        raise one
                    rendered.append((one, written(self.chat, one.messages, self.train_on)))
                except DataError as error:
                    problems.append(str(error) if isinstance(one, Problem) else f"{one.where}: {error}")
                    if len(problems) >= PROBLEMS_SHOWN:
                        return []
            if not problems:
                rows += self.encoded(rendered, problems)
        return rows

    def encoded(self, rendered: Sequence[tuple[Conversation, Written]], problems: list[str]) -> Iterator[Row]:
        """The rows of conversations that were rendered; those without a token to learn are problems."""
        encodings = iter(self.chat.encode([text for _, found in rendered for text in found.texts]))
        for conversation, found in rendered:
            content = json.dumps(conversation.messages, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
            documents: list[Document] = []
            for one in islice(encodings, len(found.texts)):
                if not one.learned[1:].any():
                    problems.append(
                        f"{conversation.where}: its answer is no token of this tokenizer, so that nothing could be learned"
                    )
                elif self.one_each:
                    documents += each_answer(one, conversation.where)
                else:
                    documents.append(Document(one.ids, one.learned, conversation.where))
            yield Row(hashlib.sha256(content).digest(), documents, found)

    def fitted(self, rows: Sequence[Row]) -> Split:
        """The documents that go into rows; those that do not are an error, or dropped or cut as was asked for, and counted."""
        split = Split()
        long = [document for row in rows for document in row.documents if len(document.ids) > self.width]
        if long and self.too_long == "error":
            longest = max(long, key=lambda document: len(document.ids))
            spare = self.width - self.data.sequence_length
            total = sum(len(row.documents) for row in rows)
            raise DataError(
                f"{len(long):,} of {total:,} conversations are longer than data.sequence_length {self.data.sequence_length}: the longest "
                f"has {len(longest.ids):,} tokens ({longest.where}); type: --data.sequence-length {len(longest.ids) - spare}, "
                f"or --data.too-long drop (leave them out), or --data.too-long cut (learn their beginnings)"
            )
        for row in rows:
            kept, shortened = self.kept(row, split)
            if not kept:
                continue
            split.documents += kept
            whole = len(kept) == len(row.documents) and not shortened
            split.counts["conversations"] += 1
            split.counts["answers"] += row.written.answers if whole else sum(stretches(document.learned) for document in kept)
            split.counts["split_conversations"] += len(row.written.texts) > 1
            split.counts["open_ends"] += row.written.open_ends
            split.counts["spelled"] += row.written.spelled
        if not split.documents:
            raise DataError(
                f"{self.data.path}: no conversation is left that fits data.sequence_length {self.data.sequence_length}"
            )
        return split

    def kept(self, row: Row, split: Split) -> tuple[list[Document], int]:
        """The documents of a conversation that go into rows, and how many of them were cut for that; the split counts both."""
        kept, cut = [], 0
        for document in row.documents:
            if len(document.ids) > self.width:
                document = Document(document.ids[: self.width], document.learned[: self.width], document.where)
                # Nothing is learned from the first token, which nothing comes before.
                if self.too_long == "drop" or not document.learned[1:].any():
                    split.counts["dropped"] += 1
                    continue
                cut += 1
            kept.append(document)
        split.counts["cut"] += cut
        return kept, cut

    def table(self, name: str, split: Split) -> Table:
        """The rows of one split, with facts about them."""
        lengths = [len(document.ids) for document in split.documents]
        rows = (packed if self.packing else single)(lengths, self.width)
        tokenizer = self.chat.tokenizer
        arrays = laid_out(split.documents, rows, self.width, tokenizer.eot_id, tokenizer.dtype)
        digest = hashlib.sha256(tokenizer.hash.encode())
        for array in arrays.values():
            digest.update(str(array.dtype).encode())
            digest.update(np.ascontiguousarray(array).data)
        learned = int((arrays["labels"] >= 0).sum())
        facts: dict[str, Any] = dict(split.counts, documents=len(lengths), rows=len(rows), tokens=sum(lengths), learned=learned)
        middle, long = np.percentile(lengths, [50, 95]).astype(int).tolist()
        facts |= {
            "median": middle,
            "95 %": long,
            "longest": max(lengths),
            "fill": round(fill(lengths, len(rows), self.width), 6),
            "width": self.width,
        }
        facts |= {"template": self.chat.template.origin, "date": self.chat.template.reads_clock and TODAY.date().isoformat()}
        return Table(arrays, digest.hexdigest(), facts=facts, origin=f"split {name} of {self.data.path}")


@dataclass(frozen=True)
class Row:
    """One conversation: the digest of its messages, its encoded texts and what was counted while they were written."""

    digest: bytes
    documents: list[Document]
    written: Written


def divided(rows: Sequence[Row], fraction: float) -> dict[str, list[Row]]:
    """Train and validation by the conversations' digests: equal conversations go the same way. At least one is in each.

    Raises DataError for fewer than two different conversations.
    """
    limit = int(fraction * 2**64)
    places = {row.digest: int.from_bytes(row.digest[:8], "big") for row in rows}
    if len(places) < 2:
        raise DataError(f"{len(places)} conversations cannot be shared with validation; type: --data.val-fraction 0")
    held = {digest for digest, place in places.items() if place < limit} or {min(places, key=lambda digest: places[digest])}
    if len(held) == len(places):
        held.remove(max(places, key=lambda digest: places[digest]))
    return {
        "train": [row for row in rows if row.digest not in held],
        "val": [row for row in rows if row.digest in held],
    }


def each_answer(encoded: Encoded, where: str) -> Iterator[Document]:
    """A document for each stretch of learned tokens: it ends there, and nothing else in it is learned."""
    edges = np.flatnonzero(np.diff(encoded.learned.astype(np.int8), prepend=0, append=0))
    for start, end in edges.reshape(-1, 2).tolist():
        if end > 1:  # Nothing is learned from the first token.
            yield Document(encoded.ids[:end], np.arange(end) >= start, where)


def stretches(learned: np.ndarray) -> int:
    """How many runs of learned tokens there are."""
    return int(learned[0]) + int((np.diff(learned.astype(np.int8)) == 1).sum())


def summary(facts: dict[str, Any]) -> str:
    """What a table holds, in a line; what was changed or may surprise is always said."""
    said = [
        f"{facts['conversations']:,} conversations, {facts['answers']:,} answers in {facts['rows']:,} rows",
        f"{facts['tokens']:,} tokens, {100 * facts['learned'] / facts['tokens']:.1f} % learned",
        f"rows {100 * facts['fill']:.1f} % full",
        f"longest {facts['longest']:,}",
    ]
    surprising = {
        "dropped": "too long and left out",
        "cut": "too long and cut",
        "split_conversations": "conversations written as several texts, because the template rewrites earlier turns",
        "open_ends": "answers without an end-of-turn token: the model will not learn to stop there",
        "seen": "of these conversations are in the training data, too",
        "spelled": "special tokens spelled in messages and kept as text",
    }
    said += [f"{facts[key]:,} {words}" for key, words in surprising.items() if facts[key]]
    if facts["date"]:
        said.append(f"the template's date is {facts['date']} in every row")
    return "; ".join(said)
