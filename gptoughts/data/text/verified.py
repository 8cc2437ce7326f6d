"""Check the content of a tokenized folder once for every state of its files, so that changed tokens are named before a run uses them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptoughts.console import GIB, LOGGER, bytes_in_words
from gptoughts.data.text.shards import VERIFIED, Shards, check_content, file_state
from gptoughts.files import cache_dir, load_json, make_private, write_json


def verify_once(shards: Shards) -> None:
    """Compare the sha256 of every shard with the index, unless that was done for the same size, times and inode. Raises DataError."""
    known = _known(shards.folder)
    states: dict[str, list[Any]] = {}
    unknown: list[tuple[Path, str]] = []
    for name, expected in _files(shards):
        path = shards.folder / name
        states[name] = [*file_state(path), expected]
        if known.get(name) != states[name]:
            unknown.append((path, expected))
    if not unknown:
        return
    size = sum(states[path.name][0] for path, _ in unknown)
    if size > GIB:
        LOGGER.info("data: checking %s in %s once", bytes_in_words(size), shards.folder)
    for path, expected in unknown:
        check_content(path, expected)
    _remember(shards.folder, states)


def _files(shards: Shards) -> Iterator[tuple[str, str]]:
    for split in shards.index.splits.values():
        for shard in split.shards:
            yield shard.file, shard.sha256
            yield shard.docs_file, shard.docs_sha256


def _records(folder: Path) -> tuple[Path, Path]:
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    return folder / VERIFIED, cache_dir("verified", f"{digest}.json")


def _known(folder: Path) -> dict[str, Any]:
    for path in _records(folder):
        try:
            found = load_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _remember(folder: Path, states: dict[str, list[Any]]) -> None:
    for path in _records(folder):
        try:
            make_private(path.parent)
            write_json(path, states, shared=True)
            return
        except OSError:
            continue  # the other place; without both the next start hashes again
