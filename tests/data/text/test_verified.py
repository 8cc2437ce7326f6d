"""Tokens that changed after they were written are named when a run opens them, whatever kept their size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptoughts.data.corpus import TextCorpus
from gptoughts.data.text import verified
from gptoughts.data.text.shards import HEADER_BYTES, VERIFIED, Shards
from gptoughts.data.text.tokenize import tokenize
from gptoughts.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = np.random.default_rng(1).integers(97, 123, 3000).astype(np.uint8).tobytes().decode()
    (tmp_path / "a.txt").write_text(text)
    tokenize(str(tmp_path / "a.txt"), "bytes", tmp_path / "tokens", shard_tokens=700)
    return tmp_path / "tokens"


def tokens(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.uint16, mode="r+", offset=HEADER_BYTES)


def flip(path: Path) -> None:
    tokens(path)[5] ^= 1


def shuffle(path: Path) -> None:
    found = tokens(path)
    found[:] = np.random.default_rng(0).permutation(found)


def zero(path: Path) -> None:
    tokens(path)[:] = 0


def swap(path: Path) -> None:
    path.write_bytes(path.with_name("train_000002.npy").read_bytes())


def replace(path: Path) -> None:
    """Put another file in its place, with the times of the first."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [flip, shuffle, zero, swap, replace])
def test_changed_tokens_are_named_before_they_are_used(folder: Path, change: Callable[[Path], None]) -> None:
    TextCorpus(folder, 16)
    change(folder / "train_000001.npy")
    with pytest.raises(
        DataError, match=r"train_000001\.npy: changed since it was written \(sha256 .*\. Found .*\n  Try: restore it"
    ):
        TextCorpus(folder, 16)


@pytest.mark.parametrize("change", [flip, zero])
def test_tokens_that_change_while_they_are_read_are_named(folder: Path, change: Callable[[Path], None]) -> None:
    stream = Shards.open(folder).split("train")
    os.utime(folder / "train_000000.npy")
    stream.check_files()  # another time alone is no change
    change(folder / "train_000001.npy")
    with pytest.raises(DataError, match=r"train_000001\.npy: changed since it was written"):
        stream.check_files()


def test_unchanged_files_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    content = verified.check_content
    monkeypatch.setattr(verified, "check_content", lambda path, expected: (read.append(path.name), content(path, expected)))
    TextCorpus(folder, 16)
    assert len(read) == len({*read}) == len(list(folder.glob("*.npy")))
    TextCorpus(folder, 16)
    assert len(read) == len({*read}), "known by size, times and inode"
    os.utime(folder / "train_000000.npy")
    TextCorpus(folder, 16)
    assert read[-1] == "train_000000.npy" and read.count("train_000000.npy") == 2


@pytest.mark.parametrize("record", ["5", "{", "[]", '{"train_000000.npy": 5}'])
def test_a_damaged_record_is_no_record(folder: Path, record: str) -> None:
    (folder / VERIFIED).write_text(record)
    flip(folder / "train_000000.npy")
    with pytest.raises(DataError, match="changed since it was written"):
        TextCorpus(folder, 16)


def test_the_record_goes_to_the_cache_where_the_folder_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = verified.write_json

    def refused(path: Path, value: object, **how: bool) -> None:
        if path.parent == folder:
            raise OSError(30, "Read-only file system")
        write(path, value, **how)

    monkeypatch.setattr(verified, "write_json", refused)
    TextCorpus(folder, 16)
    assert not (folder / VERIFIED).exists()
    monkeypatch.setattr(verified, "check_content", lambda path, expected: pytest.fail("read again"))
    TextCorpus(folder, 16)


def test_a_link_in_the_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "tokenizer" / "key").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(DataError, match=r"tokenizer/key: is a link"):
        TextCorpus(folder, 16)
