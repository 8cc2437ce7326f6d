"""Tokenize a corpus into a folder of shards, on all cores; the bytes do not depend on processes or interruptions.

Layout: `{split}_{index:06d}.npy` (tokens), `{split}_{index:06d}.docs.npy` (document starts), `tokenizer/`, `index.json`
(written last: a folder that has it is complete).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

from gptoughts.config.loader import DataConfig
from gptoughts.console import LOGGER
from gptoughts.data.text.folder import clear, folder_lock
from gptoughts.data.text.folders import is_plain
from gptoughts.data.text.job import Job, Settings
from gptoughts.data.text.progress import console, silent
from gptoughts.data.text.shards import INDEX, JOURNAL, VERSION, Index
from gptoughts.data.text.sources import Source, open_source
from gptoughts.data.text.tasks import Tasks
from gptoughts.data.tokenizers.tokenizer import Tokenizer
from gptoughts.errors import DataError
from gptoughts.files import cache_dir, make_private
from gptoughts.hardware.world import World

SHARD_TOKENS = 100_000_000
MIN_BYTES_PER_PROCESS = 16 << 20  # A worker takes about half a second to start.


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
    bad_rows: str = "error",
    overwrite: bool = False,
    progress: Literal["console", "none"] = "none",
    world: World | None = None,
) -> Index:
    """Write `source` as shards into the folder `out` and return their index.

    An interrupted folder is resumed; a finished one with the same settings is returned unchanged. `processes` None chooses a
    number by cores and text size. With the `world` of a launched job its tasks divide the work; the folder must be seen by all of
    them. A second process on the same folder waits for the first. Raises DataError for text that cannot be read or encoded, for a
    disk that cannot be written, and for a folder made with other settings, unless `overwrite`.
    """
    if bad_rows not in ("error", "skip"):
        raise DataError("bad_rows: must be error or skip", found=repr(bad_rows))
    corpus = open_source(source, text_key) if isinstance(source, str) else source
    corpus.skip_bad = bad_rows == "skip"
    if shard_tokens < 1:
        raise DataError("shard_tokens: must be at least 1", found=shard_tokens)
    if processes is not None and processes < 1:
        raise DataError("processes: must be at least 1", found=processes)
    tokenizer_name = tokenizer if isinstance(tokenizer, str) else f"{tokenizer.kind}:{tokenizer.hash}"
    settings = Settings(
        corpus.spec, len(corpus.files), corpus.size_bytes, text_key, tokenizer_name,
        train_bpe if tokenizer_name == "bpe" else None, val_fraction, val_from, shard_tokens, bad_rows,
    )  # fmt: skip
    folder = Path(out)
    tasks = Tasks.of(world or World(), os.environ, folder)
    job = Job(corpus, tokenizer, folder, settings)
    if tasks is not None and not tasks.first:
        with disk_errors(folder):
            return job.assist(processes or default_processes(corpus), tasks, overwrite)
    with folder_lock(folder), tasks.leading() if tasks else nullcontext():
        if overwrite:
            clear(folder)
        if (folder / INDEX).exists():
            return job.finished()
        with console(text_bytes(corpus)) if progress == "console" else silent() as report, disk_errors(folder):
            return job.run(processes or default_processes(corpus), report, tasks)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        problem = f"{error.filename or folder}: cannot be written ({error.strerror or error})"
        raise DataError(problem, fix="free space, then again: it continues from here") from None


def usable_cores() -> int:
    """Return the number of cores this process can run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes(source: Source) -> int:
    """Return the usable cores, or fewer if the text is too small to amortize the start of a process."""
    if source.size_bytes is None:
        return usable_cores()
    return max(1, min(usable_cores(), source.size_bytes // MIN_BYTES_PER_PROCESS))


def text_bytes(source: Source) -> int | None:
    """Return the size of the text if all files are plain text, else None."""
    plain = bool(source.files) and all(map(is_plain, source.files))
    return source.size_bytes if plain else None


def prepare(data: DataConfig, out: Path | None = None) -> Path:
    """Return the tokenized folder for a recipe's data: `data.path` itself if tokenized, else `out` or a cache folder, made once.

    The cache folder's name is a digest of the settings and of the source's files (names, sizes, times), so a changed text is
    tokenized again. Safe from several processes at once.
    """
    path = Path(data.path).expanduser()
    if (path / INDEX).exists():
        return path
    if (path / JOURNAL).exists():
        Index.read(path)  # Raises the error for an interrupted folder.
    source = open_source(data.path, data.text_key)
    if out is None:
        out = cache_folder(data) / prepared_name(data, source)
    if not (out / INDEX).exists():
        LOGGER.info(f"data: tokenizing {data.path} ({data.tokenizer}) once into {out}")
    tokenize(
        source, data.tokenizer, out, train_bpe=data.train_bpe, val_fraction=data.val_fraction, val_from=data.val_from,
        text_key=data.text_key, bad_rows=data.bad_rows, progress="console",
    )  # fmt: skip
    return out


def cache_folder(data: DataConfig) -> Path:
    """Return the folder that caches tokenized text between runs, created for this user alone."""
    folder = Path(data.cache).expanduser() if data.cache is not None else cache_dir("data")
    with suppress(OSError):  # the folder's lock tells why
        make_private(folder)
    return folder


def prepared_name(data: DataConfig, source: Source) -> str:
    """Return a readable folder name that is unique per text and per setting that changes the tokens."""
    tokenizer = Path(data.tokenizer).expanduser()
    files = [tokenizer] if tokenizer.is_file() else sorted(tokenizer.iterdir()) if tokenizer.is_dir() else []
    key = [
        VERSION, source.fingerprint(), data.tokenizer, data.train_bpe if data.tokenizer == "bpe" else None, data.text_key,
        data.val_fraction, data.val_from, [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        *(["skip"] if data.bad_rows == "skip" else []),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    stem = "".join(character if character.isalnum() or character in "-_" else "-" for character in Path(data.path).stem)[:32]
    return f"{stem or 'text'}-{digest[:16]}"
