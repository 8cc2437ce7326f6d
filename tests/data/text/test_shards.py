"""Shards give every window, and refuse what was changed, naming the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.data.text.shards import Index, Shards, npy_header
from gptoughts.data.text.tokenize import tokenize
from gptoughts.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    for number in range(8):
        (path / f"{number}.txt").write_text(chr(97 + number) * (37 * number + 5))
    tokenize(str(path), "bytes", path / "o", val_fraction=0.1, shard_tokens=101)
    return path / "o"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "copy"))


def whole(folder: Path, split: str = "train") -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{split}_??????.npy"))])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_windows_are_the_row_of_all_shards(folder: Path, data: st.DataObject) -> None:
    stream, expected = Shards.open(folder).split("train"), whole(folder)
    assert len(stream) == len(expected) and len(stream.arrays) > 5
    start = data.draw(st.integers(0, len(expected)))
    length = data.draw(st.integers(0, len(expected) - start))
    assert stream.window(start, length).tolist() == expected[start : start + length].tolist()
    starts = np.array(data.draw(st.lists(st.integers(0, len(expected) - 60), min_size=1, max_size=9)))
    gathered = stream.gather(starts, 60)
    assert gathered.dtype == np.uint16 and gathered.flags.writeable
    assert (gathered == np.stack([expected[start : start + 60] for start in starts])).all()


def test_one_shard_gathers_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 9)
    tokenize(str(tmp_path / "a.txt"), "bytes", tmp_path / "o", val_fraction=0)
    stream, starts = Shards.open(tmp_path / "o").split("train"), np.array([5, 0, 200])
    assert (stream.gather(starts, 30) == np.stack([stream.window(start, 30) for start in starts])).all()


def test_a_window_outside_is_refused(folder: Path) -> None:
    stream = Shards.open(folder).split("val")
    for start, length in ((-1, 2), (0, len(stream) + 1), (len(stream), 1)):
        with pytest.raises(DataError, match=rf"split 'val': tokens .* out of range\. Found {len(stream)} tokens"):
            stream.window(start, length)


def test_the_files_are_what_they_are_said_to_be(folder: Path) -> None:
    shards = Shards.open(folder)
    shards.verify_hashes()
    assert shards.tokenizer().hash == shards.index.tokenizer["hash"]
    assert (folder / "train_000000.npy").read_bytes()[:128] == npy_header(np.dtype(np.uint16), 101)
    assert shards.split("train").max_id == 256
    assert shards.documents("train", 0).tolist() == np.flatnonzero(np.load(folder / "train_000000.npy") == 256).tolist()
    with pytest.raises(DataError, match=r"no split 'test'\. Found splits train, val"):
        shards.split("test")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"xx")


def saved(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, array, allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "train_000002.npy: missing, but listed in index.json"),
        (truncate, "train_000002.npy: truncated, expected 330 bytes. Found 328"),
        (lengthen, "train_000002.npy: too long, expected 330 bytes. Found 332"),
        (lambda path: path.write_bytes(b""), "train_000002.npy: truncated, expected 330 bytes. Found 0"),
        (lambda path: path.write_bytes(b"x" * 330), "train_000002.npy: not a plain .npy array"),
        (saved(np.zeros(101, np.uint32)), "train_000002.npy: expected 1-D uint16. Found 1-D uint32"),
        (saved(np.zeros((101, 1), np.uint16)), "train_000002.npy: expected 1-D uint16. Found 2-D uint16"),
        (saved(np.array([object()] * 3)), "train_000002.npy: not a plain .npy array"),
        (
            lambda path: path.write_bytes(npy_header(np.dtype(np.uint16), 100) + bytes(202)),
            "train_000002.npy: expected 101 entries from index.json. Found 100",
        ),
    ],
)
def test_a_changed_shard_is_refused_by_name(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy / "train_000002.npy")
    with pytest.raises(DataError) as caught:
        Shards.open(copy)
    assert message in str(caught.value)


def test_a_changed_token_is_found_by_hash(copy: Path) -> None:
    for name in ("val_000000.npy", "train_000001.docs.npy"):
        raw = bytearray((copy / name).read_bytes())
        raw[-2] ^= 1
        (copy / name).write_bytes(raw)
        with pytest.raises(DataError, match=rf"{name}: changed since it was written"):
            Shards.open(copy).verify_hashes()
        raw[-2] ^= 1
        (copy / name).write_bytes(raw)
    Shards.open(copy).verify_hashes()


def test_documents_and_tokenizer_are_checked_too(copy: Path) -> None:
    from gptoughts.data.tokenizers.tokenizer import CharacterTokenizer

    CharacterTokenizer("abc").save(copy / "tokenizer")
    with pytest.raises(DataError, match=r"tokenizer: not the tokenizer listed in index.json"):
        Shards.open(copy).tokenizer()
    truncate(copy / "val_000000.docs.npy")
    with pytest.raises(DataError, match=r"val_000000.docs.npy: truncated"):
        Shards.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "must have format 'gptoughts-shards' version 1. Found 'gptoughts-shards' version 2"),
        ({"dtype": "uint32"}, "dtype must be uint16 for a vocabulary of 257. Found 'uint32'"),
        ({"vocab_size": 99}, "has a token id outside the vocabulary of 99. Found 256"),
        (
            {"splits": {"train": {"tokens": 1, "documents": 1, "unigram_entropy": 0, "shards": []}}},
            "lists 1 tokens, its shards 0",
        ),
        ({"splits": {"train": {}}}, "damaged (KeyError"),
        ({"splits": []}, "damaged (AttributeError"),
    ],
)
def test_an_index_that_is_wrong_is_refused(copy: Path, change: dict[str, object], message: str) -> None:
    raw = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(raw | change))
    with pytest.raises(DataError) as caught:
        Shards.open(copy)
    assert message in str(caught.value)


def test_an_index_may_not_name_files_elsewhere(copy: Path) -> None:
    text = (copy / "index.json").read_text()
    (copy / "index.json").write_text(text.replace("train_000000.npy", "../train_000000.npy"))
    with pytest.raises(DataError, match="is not a plain file name"):
        Shards.open(copy)
    (copy / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json: damaged"):
        Shards.open(copy)
    (copy / "index.json").unlink()
    with pytest.raises(DataError, match=r"no such file\.\n  Try: gptoughts tokenize SOURCE"):
        Shards.open(copy)


def test_the_fingerprint_is_of_the_tokens(folder: Path, copy: Path, tmp_path: Path) -> None:
    assert Shards.open(copy).fingerprint == Shards.open(folder).fingerprint
    (tmp_path / "a.txt").write_text("other")
    tokenize(str(tmp_path / "a.txt"), "bytes", tmp_path / "o")
    assert Shards.open(tmp_path / "o").fingerprint != Index.read(folder).fingerprint


def test_a_shard_truncated_while_it_is_read_is_noticed(copy: Path) -> None:
    stream = Shards.open(copy).split("train")
    stream.check_files()
    truncate(copy / "train_000003.npy")
    with pytest.raises(DataError, match=r"train_000003.npy: truncated"):
        stream.check_files()
