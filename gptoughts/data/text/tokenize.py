"""A corpus becomes a folder of shards: once, in order, on all cores, and with the same bytes whether or not it was interrupted.

Layout: `{split}_{index:06d}.npy` (tokens), `{split}_{index:06d}.docs.npy` (where documents start), `tokenizer/`, `index.json`
(written last: a folder that has it is complete).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gptoughts.config.loader import DataConfig
from gptoughts.data.text import split as splits
from gptoughts.data.text.folder import clear, is_ours, locked
from gptoughts.data.text.progress import Report, console, silent
from gptoughts.data.text.shards import FORMAT, INDEX, JOURNAL, TOKENIZER_FOLDER, VERSION, Index
from gptoughts.data.text.sources import TEXT_SUFFIXES, Document, Source, open_source
from gptoughts.data.text.workers import Piece, WorkerDied, encode_all
from gptoughts.data.text.writer import SplitWriter, entropy, write_json
from gptoughts.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from gptoughts.errors import DataError

TASK_CHARACTERS = 1 << 20
SHARD_TOKENS = 100_000_000
JOURNAL_SECONDS = 2.0
BYTES_WORTH_A_PROCESS = 16 << 20  # A worker takes about half a second to start.
FROM_CORPUS = ("bpe", "chars")


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a tokenized folder. Two folders with equal settings and an equal source are equal."""

    source: str
    source_files: int
    source_bytes: int | None
    text_key: str
    tokenizer: str
    train_bpe: int | None
    val_fraction: float
    val_from: str
    shard_tokens: int


def tokenize(
    source: str | Source,
    tokenizer: str | Tokenizer,
    out: Path | str,
    *,
    train_bpe: int | None = None,
    val_fraction: float = 0.05,
    val_from: str = "auto",
    shard_tokens: int = SHARD_TOKENS,
    processes: int | None = None,
    text_key: str = "text",
    overwrite: bool = False,
    progress: Literal["console", "none"] = "none",
) -> Index:
    """Writes `source` as shards into the folder `out` and returns their index.

    A folder that an interruption left is continued; a finished one with the same settings is returned as it is. `processes`
    None takes the cores that pay. Another process on the same folder waits for this one. Raises DataError for text that cannot
    be read or encoded, and for a folder made with other settings, unless `overwrite`.
    """
    corpus = open_source(source, text_key) if isinstance(source, str) else source
    if shard_tokens < 1:
        raise DataError(f"shard_tokens = {shard_tokens}: give at least 1")
    if processes is not None and processes < 1:
        raise DataError(f"processes = {processes}: give at least 1")
    word = tokenizer if isinstance(tokenizer, str) else f"{tokenizer.kind}:{tokenizer.hash}"
    settings = Settings(
        corpus.spec, len(corpus.files), corpus.size_bytes, text_key, word,
        train_bpe if word == "bpe" else None, val_fraction, val_from, shard_tokens,
    )  # fmt: skip
    folder = Path(out)
    with locked(folder):
        if overwrite:
            clear(folder)
        job = Job(corpus, tokenizer, folder, settings)
        if (folder / INDEX).exists():
            return job.finished()
        with console(text_bytes(corpus)) if progress == "console" else silent() as report:
            try:
                return job.run(processes or worthwhile_processes(corpus), report)
            except OSError as error:
                reason = f"{error.strerror or error}; what is there stays: run again to continue"
                raise DataError(f"{error.filename or folder}: cannot be written ({reason})") from None


class Job:
    """One tokenized folder in the making."""

    def __init__(self, source: Source, tokenizer: str | Tokenizer, folder: Path, settings: Settings) -> None:
        self.source, self.asked, self.folder, self.settings = source, tokenizer, folder, settings
        self.fingerprint = source.fingerprint()

    def finished(self) -> Index:
        """The index of a folder that is complete. Raises DataError where it was made with other settings."""
        index = Index.read(self.folder)
        self.compare(index.settings)
        if self.settings.tokenizer not in FROM_CORPUS and self.make_tokenizer().hash != index.tokenizer["hash"]:
            raise self.other_settings(f"tokenizer {self.settings.tokenizer!r} has changed")
        return index

    def run(self, processes: int, report: Report) -> Index:
        """Tokenizes what is left to do, then writes the index."""
        rule = splits.resolve_rule(self.source, self.settings.val_fraction, self.settings.val_from)
        journal = self.read_journal()
        tokenizer = self.keep_tokenizer(journal is not None)
        writers = self.writers(tokenizer, rule, journal)
        try:
            self.write_tokens(tokenizer, rule, writers, journal["pieces"] if journal else 0, processes, report)
        except WorkerDied:
            raise
        except DataError:
            # The same text would fail again and a mended text is another one, so there is nothing to continue.
            clear(self.folder)
            raise
        for writer in writers.values():
            writer.finish_shard()
        return self.write_index(tokenizer, rule, writers)

    def writers(self, tokenizer: Tokenizer, rule: str, journal: dict[str, Any] | None) -> dict[str, SplitWriter]:
        """A writer for each split, at the place where the journal left it."""
        start = {"shards": 0, "tokens_open": 0}
        out = {}
        for name in (splits.TRAIN,) if rule == "none" else (splits.TRAIN, splits.VAL):
            out[name] = SplitWriter(
                self.folder, name, tokenizer.dtype, tokenizer.vocab_size, tokenizer.eot_id, self.settings.shard_tokens
            )
            out[name].resume(journal["splits"][name] if journal else start)
        if journal is None:
            self.write_journal(0, out)
        return out

    def write_tokens(
        self,
        tokenizer: Tokenizer,
        rule: str,
        writers: dict[str, SplitWriter],
        done: int,
        processes: int,
        report: Report,
    ) -> None:
        """Encodes the pieces after the first `done` and hands them to the writers, with a word in the journal now and then."""
        pieces = islice(self.pieces(tokenizer, rule), done, None)
        last = time.monotonic()
        for encoded in encode_all(tokenizer, self.folder / TOKENIZER_FOLDER, tasks(pieces), processes):
            write(encoded.pieces, encoded.tokens, encoded.lengths, writers)
            done += len(encoded.pieces)
            report(sum(len(piece.text) for piece in encoded.pieces), len(encoded.tokens))
            if time.monotonic() - last >= JOURNAL_SECONDS:
                self.write_journal(done, writers)
                last = time.monotonic()

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer that was asked for."""
        if isinstance(self.asked, Tokenizer):
            return self.asked
        return build_tokenizer(self.asked, self.source, self.settings.train_bpe)

    def keep_tokenizer(self, resumed: bool) -> Tokenizer:
        """The tokenizer, saved in the folder; of an interrupted folder the one that is saved there."""
        place = self.folder / TOKENIZER_FOLDER
        if resumed:
            saved = Tokenizer.load(place)
            if self.settings.tokenizer not in FROM_CORPUS and self.make_tokenizer().hash != saved.hash:
                raise self.other_settings(f"tokenizer {self.settings.tokenizer!r} has changed")
            return saved
        tokenizer = self.make_tokenizer()
        shutil.rmtree(place, ignore_errors=True)
        tokenizer.save(place)
        return tokenizer

    def pieces(self, tokenizer: Tokenizer, rule: str) -> Iterator[Piece]:
        """Documents in order, long ones cut where the tokenizer allows it."""
        for name, document in splits.divided(self.source, self.settings.val_fraction, rule):
            yield from document_pieces(name, document, tokenizer)

    def read_journal(self) -> dict[str, Any] | None:
        """The journal of an interrupted folder, None for an empty one. Raises DataError for a folder that is something else."""
        path = self.folder / JOURNAL
        if path.exists():
            try:
                journal = json.loads(path.read_text(encoding="utf-8"))
                settings, digest = journal["settings"], journal["fingerprint"]
            except (ValueError, KeyError) as error:
                raise DataError(f"{path}: damaged ({error}); start again with --overwrite") from None
            self.compare(settings)
            if digest != self.fingerprint:
                raise self.other_settings(f"files of {self.source.spec!r} changed since the interruption")
            return journal
        others = sorted(entry.name for entry in self.folder.iterdir() if not is_ours(entry.name))
        if others:
            raise DataError(f"{self.folder}: not empty (holds {others[0]!r}) and no tokenized folder; name a new folder")
        return None

    def write_journal(self, pieces: int, writers: dict[str, SplitWriter]) -> None:
        """Records what is on the disk: where a killed run goes on."""
        state = {name: writer.state() for name, writer in writers.items()}
        content = {
            "settings": asdict(self.settings),
            "fingerprint": self.fingerprint,
            "pieces": pieces,
            "splits": state,
        }
        write_json(self.folder / JOURNAL, content)

    def write_index(self, tokenizer: Tokenizer, rule: str, writers: dict[str, SplitWriter]) -> Index:
        """The last file: from here on the folder is complete."""
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
        write_json(self.folder / INDEX, content)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        return Index.read(self.folder)

    def compare(self, there: dict[str, Any]) -> None:
        """Raises DataError that says how the folder's settings differ from those asked for."""
        asked = asdict(self.settings)
        differing = [
            f"{key} is {there.get(key)!r} there, {value!r} asked" for key, value in asked.items() if there.get(key) != value
        ]
        if differing:
            raise self.other_settings("; ".join(differing))

    def other_settings(self, reason: str) -> DataError:
        """The error for a folder that is not the one asked for."""
        return DataError(f"{self.folder}: made with other settings ({reason}); type --overwrite, or name another folder")


def document_pieces(split: str, document: Document, tokenizer: Tokenizer) -> Iterator[Piece]:
    """A document, cut into parts of about a task's size where the tokenizer can promise the same ids."""
    for number, text in enumerate(tokenizer.cut(document.text, TASK_CHARACTERS)):
        yield Piece(split, document.id, text, number == 0)


def tasks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups of about `TASK_CHARACTERS`: enough work to be worth a message to another process."""
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


def write(pieces: Any, tokens: Any, lengths: list[int], writers: dict[str, SplitWriter]) -> None:
    """Hands each run of pieces of one split to that split's writer."""
    start = end = 0
    for number, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
        end += length
        if number + 1 == len(pieces) or pieces[number + 1].split != piece.split:
            writers[piece.split].append(tokens[start:end])
            start = end


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worthwhile_processes(source: Source) -> int:
    """All usable cores, fewer where the text is too small to repay their start."""
    if source.size_bytes is None:
        return usable_cores()
    return max(1, min(usable_cores(), source.size_bytes // BYTES_WORTH_A_PROCESS))


def text_bytes(source: Source) -> int | None:
    """Size of the text where files are plain text, else None."""
    plain = bool(source.files) and all(path.name.endswith(TEXT_SUFFIXES) for path in source.files)
    return source.size_bytes if plain else None


def prepare(data: DataConfig, out: Path | None = None) -> Path:
    """The tokenized folder for a recipe's data: `data.path` itself where it is one, else made once, in `out` or in the cache.

    The cache folder's name is a digest of the settings and of the source's files (names, sizes, times), so a changed text is
    tokenized anew. Safe from several processes at once.
    """
    path = Path(data.path).expanduser()
    if (path / INDEX).exists():
        return path
    if (path / JOURNAL).exists():
        Index.read(path)  # Raises, and says how to go on.
    source = open_source(data.path, data.text_key)
    if out is None:
        out = cache_folder(data) / prepared_name(data, source)
    if not (out / INDEX).exists():
        print(f"data: tokenizing {data.path} ({data.tokenizer}) once into {out}", file=sys.stderr, flush=True)
    tokenize(
        source, data.tokenizer, out, train_bpe=data.train_bpe, val_fraction=data.val_fraction, val_from=data.val_from,
        text_key=data.text_key, progress="console",
    )  # fmt: skip
    return out


def cache_folder(data: DataConfig) -> Path:
    """Where tokenized text is kept between runs."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoughts" / "data"


def prepared_name(data: DataConfig, source: Source) -> str:
    """A name for the cache: readable, and different for every text and every setting that changes the tokens."""
    tokenizer = Path(data.tokenizer).expanduser()
    files = [tokenizer] if tokenizer.is_file() else sorted(tokenizer.iterdir()) if tokenizer.is_dir() else []
    facts = [
        VERSION, source.fingerprint(), data.tokenizer, data.train_bpe if data.tokenizer == "bpe" else None, data.text_key,
        data.val_fraction, data.val_from, [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    words = "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in Path(data.path).stem)[:32] or "text"
    return f"{words}-{digest[:16]}"
