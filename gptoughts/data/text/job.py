"""Tokenize one corpus into one folder, resumable after an interruption at any point."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.console import LOGGER
from gptoughts.data.text import split as splits
from gptoughts.data.text.folder import clear, is_ours
from gptoughts.data.text.progress import Report
from gptoughts.data.text.shards import FORMAT, INDEX, JOURNAL, TOKENIZER_FOLDER, VERSION, Index
from gptoughts.data.text.sources import Document, Source
from gptoughts.data.text.tasks import Tasks
from gptoughts.data.text.workers import Encoded, Piece, WorkerDied, encode_all
from gptoughts.data.text.writer import SplitWriter, entropy
from gptoughts.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from gptoughts.errors import DataError
from gptoughts.files import load_json, write_json

TASK_CHARACTERS = 1 << 20
JOURNAL_SECONDS = 2.0
FROM_CORPUS = ("bpe", "chars")


@dataclass(frozen=True)
class Settings:
    """Settings that determine the bytes of a tokenized folder, together with the source's text."""

    source: str
    source_files: int
    source_bytes: int | None
    text_key: str
    tokenizer: str
    train_bpe: int | None
    val_fraction: float
    val_from: str
    shard_tokens: int
    bad_rows: str = "error"


DEFAULTS = {"bad_rows": "error"}
"""Settings that folders of earlier versions do not have."""


class Job:
    """Tokenization of one source into one folder."""

    def __init__(self, source: Source, tokenizer: str | Tokenizer, folder: Path, settings: Settings) -> None:
        self.source, self.requested_tokenizer, self.folder, self.settings = source, tokenizer, folder, settings
        self.fingerprint = source.fingerprint()

    def finished(self) -> Index:
        """Return the index of a complete folder. Raises DataError where it was made with other settings."""
        index = Index.read(self.folder)
        self.check_settings(index.settings)
        self.check_tokenizer(index.tokenizer["hash"])
        return index

    def run(self, processes: int, report: Report, tasks: Tasks | None = None) -> Index:
        """Tokenize the remaining text, together with other tasks if there are some, then write the index."""
        if skipped := self.source.describe_skipped():
            LOGGER.info(f"data: {skipped}")
        rule = splits.resolve_rule(self.source, self.settings.val_fraction, self.settings.val_from)
        journal = self.read_journal()
        tokenizer = self.save_tokenizer(journal is not None)
        writers = self.open_writers(tokenizer, rule, journal)
        done = journal["pieces"] if journal else 0

        def encode(groups: Iterator[list[Piece]]) -> Iterator[Encoded]:
            return encode_all(tokenizer, self.folder / TOKENIZER_FOLDER, groups, processes)

        if tasks is not None:
            tasks.begin(done, self.described())
        together = partial(tasks.collect, encode=encode) if tasks else encode
        try:
            self.write_tokens(tokenizer, rule, writers, done, together, report)
        except WorkerDied:
            raise
        except DataError:
            # The same text fails again, and a corrected text needs a new folder: nothing to resume.
            clear(self.folder)
            raise
        for writer in writers.values():
            writer.finish_shard()
        return self.write_index(tokenizer, rule, writers)

    def assist(self, processes: int, tasks: Tasks, overwrite: bool) -> Index:
        """Encode this task's share of the text for task 0. Returns the index that task 0 wrote."""
        plan = tasks.follow(overwrite)
        if plan is None:
            return self.finished()
        with tasks.reporting():
            self.check_settings(plan["settings"])
            if plan["fingerprint"] != self.fingerprint:
                raise DataError(f"{self.source.spec}: differs between tasks; do all nodes see these files?")
            tokenizer = Tokenizer.load(self.folder / TOKENIZER_FOLDER)
            rule = splits.resolve_rule(self.source, self.settings.val_fraction, self.settings.val_from)
            groups = group_pieces(islice(self.pieces(tokenizer, rule), plan["pieces"], None))
            tasks.contribute(groups, lambda own: encode_all(tokenizer, self.folder / TOKENIZER_FOLDER, own, processes))
        return Index.read(self.folder)

    def open_writers(self, tokenizer: Tokenizer, rule: str, journal: dict[str, Any] | None) -> dict[str, SplitWriter]:
        """Open a writer for each split at the position recorded in the journal."""
        start = {"shards": 0, "tokens_open": 0}
        writers = {}
        for name in (splits.TRAIN,) if rule == "none" else (splits.TRAIN, splits.VAL):
            writers[name] = SplitWriter(
                self.folder, name, tokenizer.dtype, tokenizer.vocab_size, tokenizer.eot_id, self.settings.shard_tokens
            )
            writers[name].resume(journal["splits"][name] if journal else start)
        if journal is None:
            self.write_journal(0, writers)
        return writers

    def write_tokens(
        self,
        tokenizer: Tokenizer,
        rule: str,
        writers: dict[str, SplitWriter],
        done: int,
        encode: Callable[[Iterator[list[Piece]]], Iterator[Encoded]],
        report: Report,
    ) -> None:
        """Encode and write the pieces after the first `done`; update the journal every `JOURNAL_SECONDS`."""
        groups = group_pieces(islice(self.pieces(tokenizer, rule), done, None))
        last = time.monotonic()
        for encoded in encode(groups):
            write_pieces(encoded.pieces, encoded.tokens, encoded.lengths, writers)
            done += len(encoded.pieces)
            report(sum(len(piece.text) for piece in encoded.pieces), len(encoded.tokens))
            if time.monotonic() - last >= JOURNAL_SECONDS:
                self.write_journal(done, writers)
                last = time.monotonic()

    def make_tokenizer(self) -> Tokenizer:
        """Return the requested tokenizer."""
        if isinstance(self.requested_tokenizer, Tokenizer):
            return self.requested_tokenizer
        return build_tokenizer(self.requested_tokenizer, self.source, self.settings.train_bpe)

    def save_tokenizer(self, resumed: bool) -> Tokenizer:
        """Save the tokenizer in the folder and return it; load the saved one if resumed."""
        path = self.folder / TOKENIZER_FOLDER
        if resumed:
            saved = Tokenizer.load(path)
            self.check_tokenizer(saved.hash)
            return saved
        tokenizer = self.make_tokenizer()
        shutil.rmtree(path, ignore_errors=True)
        tokenizer.save(path)
        return tokenizer

    def pieces(self, tokenizer: Tokenizer, rule: str) -> Iterator[Piece]:
        """Yield documents in order, long ones cut where the tokenizer allows it."""
        for name, document in splits.split_documents(self.source, self.settings.val_fraction, rule):
            yield from document_pieces(name, document, tokenizer)

    def read_journal(self) -> dict[str, Any] | None:
        """Return the journal of an interrupted folder, None for an empty one. Raises DataError for a folder with other files."""
        path = self.folder / JOURNAL
        if path.exists():
            try:
                journal = load_json(path)
                settings, fingerprint = journal["settings"], journal["fingerprint"]
            except (ValueError, KeyError) as error:
                raise DataError(f"{path}: damaged ({error})", fix="tokenize again with --overwrite") from None
            self.check_settings(settings)
            if fingerprint != self.fingerprint:
                raise self.other_settings(f"files of {self.source.spec!r} changed since the interruption")
            return journal
        others = sorted(entry.name for entry in self.folder.iterdir() if not is_ours(entry.name))
        if others:
            raise DataError(f"{self.folder}: not empty and not a tokenized folder", found=repr(others[0]), fix="a new folder")
        return None

    def write_journal(self, pieces: int, writers: dict[str, SplitWriter]) -> None:
        """Sync the written tokens and record the position from which a killed run resumes."""
        state = {name: writer.state() for name, writer in writers.items()}
        write_json(self.folder / JOURNAL, {**self.described(), "pieces": pieces, "splits": state}, durable=True)

    def described(self) -> dict[str, Any]:
        """Return what must be equal for another process to go on here: settings, and a digest of the source's files."""
        return {"settings": asdict(self.settings), "fingerprint": self.fingerprint}

    def write_index(self, tokenizer: Tokenizer, rule: str, writers: dict[str, SplitWriter]) -> Index:
        """Write the index, which completes the folder, and remove the journal."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": tokenizer.dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id,
            "tokenizer": {key: value for key, value in tokenizer.card().items() if key not in ("format", "version")},
            "source": {
                "spec": self.source.spec,
                "files": len(self.source.files),
                "bytes": self.source.size_bytes,
                "empty_rows": self.source.empty_rows,
                "bad_rows": self.source.bad_rows,
                "skipped": dict(self.source.skipped),
            },
            "settings": asdict(self.settings) | {"val_rule": rule},
            "splits": {
                name: {
                    "tokens": writer.tokens,
                    "documents": sum(shard.documents for shard in writer.finished),
                    "unigram_entropy": entropy(writer.histogram),
                    "shards": [asdict(shard) for shard in writer.finished],
                }
                for name, writer in writers.items()
            },
        }
        write_json(self.folder / INDEX, content, durable=True)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        return Index.read(self.folder)

    def check_settings(self, saved: dict[str, Any]) -> None:
        """Raise DataError with the settings of the folder that differ from the requested ones."""
        differing = [
            f"{key} {saved.get(key)!r} (requested {value!r})"
            for key, value in asdict(self.settings).items()
            if saved.get(key, DEFAULTS.get(key)) != value
        ]
        if differing:
            raise self.other_settings(", ".join(differing))

    def check_tokenizer(self, saved_hash: str) -> None:
        """Raise DataError where a tokenizer that does not depend on the corpus differs from the saved one."""
        if self.settings.tokenizer not in FROM_CORPUS and self.make_tokenizer().hash != saved_hash:
            raise self.other_settings(f"another tokenizer {self.settings.tokenizer!r}")

    def other_settings(self, found: str) -> DataError:
        """Build the error for a folder made with other settings."""
        return DataError(f"{self.folder}: made with other settings", found=found, fix="--overwrite, or another folder")


def document_pieces(split: str, document: Document, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Cut a document into pieces of about `TASK_CHARACTERS` where the tokenizer guarantees the same ids."""
    for number, text in enumerate(tokenizer.cut(document.text, TASK_CHARACTERS)):
        yield Piece(split, document.id, text, number == 0)


def group_pieces(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into tasks of at least `TASK_CHARACTERS`, to amortize the messages to a worker."""
    task: list[Piece] = []
    size = 0
    for piece in pieces:
        task.append(piece)
        size += len(piece.text)
        if size >= TASK_CHARACTERS:
            yield task
            task, size = [], 0
    if task:
        yield task


def write_pieces(pieces: Sequence[Piece], tokens: np.ndarray, lengths: list[int], writers: dict[str, SplitWriter]) -> None:
    """Append each run of pieces of one split to that split's writer."""
    start = end = 0
    for number, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
        end += length
        if number + 1 == len(pieces) or pieces[number + 1].split != piece.split:
            writers[piece.split].append(tokens[start:end])
            start = end
