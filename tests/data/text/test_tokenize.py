"""Tokenizing gives the same bytes however many processes ran and however often they were killed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gptoughts.cli.tokenize import tokenize as command
from gptoughts.config.loader import DataConfig
from gptoughts.console import Console
from gptoughts.data.text import job as module
from gptoughts.data.text.shards import Shards
from gptoughts.data.text.sources import open_source
from gptoughts.data.text.split import resolve_rule, split_by_position, split_documents
from gptoughts.data.text.tokenize import prepare, tokenize
from gptoughts.data.text.writer import entropy
from gptoughts.data.tokenizers.tokenizer import ByteTokenizer, CharacterTokenizer
from gptoughts.errors import DataError

CHILD = """
import sys
from gptoughts.console import Console
from gptoughts.data.text import job, tokenize
job.JOURNAL_SECONDS, job.TASK_CHARACTERS = 0.0, 3000
with Console(sys.stderr).logging():
    tokenize.tokenize(sys.argv[1], "bpe", sys.argv[2], train_bpe=300, val_fraction=0.2, shard_tokens=7001, processes=int(sys.argv[3]))
"""


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_corpus(path: Path, documents: int = 200, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = [f"w{i:x}" for i in range(400)] + ["é", "世", "<|endoftext|>", "\n"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 600))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def child(source: Path, out: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(command, env=environment)


def documents_of(folder: Path, split: str) -> list[str]:
    """The documents of a split, read back from its shards."""
    shards = Shards.open(folder)
    stream, tokenizer = shards.split(split), shards.tokenizer()
    tokens = stream.window(0, len(stream))
    starts = np.concatenate([shards.documents(split, i) + stream.starts[i] for i in range(len(stream.arrays))])
    assert (tokens[starts] == shards.index.eot_id).all()
    return [tokenizer.decode(part) for part in np.split(tokens, starts)[1:]]


def test_processes_and_kills_change_no_byte(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl")
    for name, processes in (("one", 1), ("two", 2)):
        assert child(tmp_path / "c.jsonl", tmp_path / name, processes).wait() == 0
    expected = digest(tmp_path / "one")
    assert expected == digest(tmp_path / "two")
    assert len(expected) > 10 and not [name for name in expected if "part" in name or "progress" in name]
    rng, kills, killed = random.Random(1), 0, tmp_path / "killed"
    for attempt in range(6):
        process = child(tmp_path / "c.jsonl", killed, 1 + attempt % 2)
        while not (killed / "progress.json").exists() and process.poll() is None:
            time.sleep(0.002)
        shards = len(list(killed.glob("*.npy")))
        while len(list(killed.glob("*.npy"))) < shards + 3 and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += not (killed / "index.json").exists()
        if (killed / "index.json").exists():
            break
        with pytest.raises(DataError, match=r"tokenizing was interrupted\.\n  Try: the same command again: gptoughts tokenize"):
            Shards.open(killed)
    assert kills >= 2
    assert child(tmp_path / "c.jsonl", killed).wait() == 0
    assert digest(killed) == expected
    Shards.open(killed).verify_hashes()


def test_an_interruption_after_any_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops before each rename in turn, as a kill between two system calls would, and goes on."""
    write_corpus(tmp_path / "c.jsonl", 60)
    monkeypatch.setattr(module, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(module, "TASK_CHARACTERS", 3000)
    arguments = {"val_fraction": 0.2, "shard_tokens": 20_000, "processes": 1}
    tokenize(str(tmp_path / "c.jsonl"), "bytes", tmp_path / "whole", **arguments)
    expected = digest(tmp_path / "whole")
    rename = os.replace
    for stop in range(1, 200):
        calls = 0

        def replace(source: Path, target: Path, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            rename(source, target)

        out = tmp_path / f"stopped{stop}"
        monkeypatch.setattr(os, "replace", replace)
        try:
            tokenize(str(tmp_path / "c.jsonl"), "bytes", out, **arguments)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", rename)
            tokenize(str(tmp_path / "c.jsonl"), "bytes", out, **arguments)
            assert digest(out) == expected, f"stopped at rename {stop}"
        else:
            assert stop > 30
            return
    raise AssertionError("never ran through")


@pytest.mark.parametrize("shard_tokens", [17, 97, 10**6])
def test_documents_survive_shard_borders(tmp_path: Path, shard_tokens: int) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 6)
    texts = [text[:80] for text in texts]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    index = tokenize(str(tmp_path / "c.jsonl"), "bytes", tmp_path / "o", val_fraction=0, shard_tokens=shard_tokens)
    assert documents_of(tmp_path / "o", "train") == texts
    split = index.splits["train"]
    assert split.documents == 6 and split.tokens == sum(len(text.encode()) + 1 for text in texts)
    stream = Shards.open(tmp_path / "o").split("train")
    assert split.unigram_entropy == entropy(np.bincount(stream.window(0, len(stream))))
    assert list(index.splits) == ["train"]


def test_long_documents_are_cut_for_workers_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(text := " ".join(write_corpus(tmp_path / "c.jsonl", 30)))
    results = []
    for size in (1 << 30, 500):
        monkeypatch.setattr(module, "TASK_CHARACTERS", size)
        tokenize(str(tmp_path / "a.txt"), "bpe", tmp_path / str(size), train_bpe=300, val_fraction=0.1)
        results.append(digest(tmp_path / str(size)))
    assert results[0] == results[1]
    assert "".join(documents_of(tmp_path / "500", split)[0] for split in ("train", "val")) == text


def test_the_tail_of_one_text_is_its_last_tenth(tmp_path: Path) -> None:
    text = "".join(random.Random(2).choices("abcdé\n", k=1003))
    (tmp_path / "a.txt").write_text(text)
    index = tokenize(str(tmp_path / "a.txt"), "chars", tmp_path / "o", val_fraction=0.1)
    assert documents_of(tmp_path / "o", "train") == [text[: int(1003 * 0.9)]]
    assert documents_of(tmp_path / "o", "val") == [text[int(1003 * 0.9) :]]
    assert index.settings["val_rule"] == "tail" and index.vocab_size == 7


def test_the_tail_of_several_texts_cuts_the_one_at_the_border(tmp_path: Path) -> None:
    for number, text in enumerate(("a" * 50, "b" * 30, "c" * 20)):
        (tmp_path / f"{number}.txt").write_text(text)
    tokenize(str(tmp_path), "bytes", tmp_path / "o", val_fraction=0.3)
    assert documents_of(tmp_path / "o", "train") == ["a" * 50, "b" * 20]
    assert documents_of(tmp_path / "o", "val") == ["b" * 10, "c" * 20]


def test_documents_are_chosen_by_their_position(tmp_path: Path) -> None:
    texts = write_corpus(tmp_path / "c.jsonl", 300)
    source = open_source(str(tmp_path / "c.jsonl"))
    rule = resolve_rule(source, 0.1, "auto")
    held = [document.text for split, document in split_documents(source, 0.1, rule) if split == "val"]
    assert rule == "documents" and 15 <= len(held) <= 45 and set(held) < set(texts)
    first, second = ([split for split, _ in split_documents(source, 0.1, rule)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.01), (2, 0.99), (5, 0.5)])
def test_few_documents_leave_one_in_each_split(tmp_path: Path, count: int, fraction: float) -> None:
    write_corpus(tmp_path / "c.jsonl", count)
    assert {split for split, _ in split_by_position(open_source(str(tmp_path / "c.jsonl")), fraction)} == {"train", "val"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction: must be at least 0 and below 1. Found 1.0"),
        ({"val_from": "head"}, "val_from: must be auto, tail or documents. Found 'head'"),
        ({"val_from": "documents"}, "one document cannot be split by documents.\n  Try: --val-from tail"),
        ({"shard_tokens": 0}, "shard_tokens: must be at least 1. Found 0"),
        ({"processes": 0}, "processes: must be at least 1. Found 0"),
        ({"val_fraction": 0.1}, "too short for val_fraction 0.1. Found 1 characters"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError) as caught:
        tokenize(str(tmp_path / "a.txt"), "bytes", tmp_path / "o", **change)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_an_unknown_character_names_its_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("abz")
    for processes in (1, 2):
        with pytest.raises(DataError, match=r"b.txt: character 'z' \(U\+007A\)"):
            tokenize(
                str(tmp_path),
                CharacterTokenizer("abc"),
                tmp_path / f"o{processes}",
                val_fraction=0,
                processes=processes,
            )
        assert not (tmp_path / f"o{processes}").exists()


def test_an_id_outside_the_vocabulary_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("abc")
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 99)
    with pytest.raises(DataError, match=r"a\.txt: token id 99 is outside the tokenizer's vocabulary of 99"):
        tokenize(str(tmp_path / "a.txt"), ByteTokenizer(), tmp_path / "o", val_fraction=0)


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some text to keep")
    out = tmp_path / "o"
    index = tokenize(str(source), "bytes", out)
    assert tokenize(str(source), "bytes", out) == index
    with pytest.raises(
        DataError, match=r"made with other settings\. Found val_fraction 0.05 \(requested 0.5\)\.\n  Try: --overwrite"
    ):
        tokenize(str(source), "bytes", out, val_fraction=0.5)
    assert tokenize(str(source), "bytes", out, val_fraction=0.5, overwrite=True) != index
    source.write_text("some longer text to keep")
    with pytest.raises(DataError, match=r"source_bytes 17 \(requested 24\)"):
        tokenize(str(source), "bytes", out, val_fraction=0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"not empty and not a tokenized folder\. Found 'letter.txt'"):
            tokenize(str(source), "bytes", tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(DataError, match="cannot be created or opened as a folder"):
        tokenize(str(source), "bytes", source)


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A folder in which tokenizing stopped half-way."""
    write_corpus(tmp_path / "c.jsonl", 40)
    monkeypatch.setattr(module, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(module, "TASK_CHARACTERS", 3000)
    write, calls = module.write_pieces, 0

    def stop(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        write(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "write_pieces", stop)
        tokenize(str(tmp_path / "c.jsonl"), "bytes", tmp_path / "o", val_fraction=0, shard_tokens=9000)
    return str(tmp_path / "c.jsonl"), tmp_path / "o"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("settings", "made with other settings. Found shard_tokens 9000 (requested 8000)"),
        ("source", "changed since the interruption"),
        ("journal", "progress.json: damaged"),
        ("part", "shorter than recorded in progress.json"),
        ("shard", "train_000000.npy: missing, but listed in progress.json"),
        ("docs", "train_000000.docs.npy: missing or damaged"),
    ],
)
def test_an_interrupted_folder_that_was_damaged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, message: str
) -> None:
    source, out = interrupted(tmp_path, monkeypatch)
    if damage == "source":
        os.utime(source, (1, 1))
    elif damage == "journal":
        (out / "progress.json").write_text("{")
    elif damage == "part":
        os.truncate(next(out.glob("*.part")), 200)
    elif damage == "shard":
        (out / "train_000000.npy").unlink()
    elif damage == "docs":
        (out / "train_000000.docs.npy").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        tokenize(source, "bytes", out, val_fraction=0, shard_tokens=8000 if damage == "settings" else 9000)
    assert message in str(caught.value)
    tokenize(source, "bytes", out, val_fraction=0, shard_tokens=9000, overwrite=True)
    Shards.open(out).verify_hashes()


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "c.jsonl", 40)
    arguments = {"val_fraction": 0, "shard_tokens": 9000, "processes": 1}
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)\.\n  Try: free space, then again"):
            tokenize(str(tmp_path / "c.jsonl"), "bytes", tmp_path / "o", **arguments)
    tokenize(str(tmp_path / "c.jsonl"), "bytes", tmp_path / "o", **arguments)
    tokenize(str(tmp_path / "c.jsonl"), "bytes", tmp_path / "whole", **arguments)
    assert digest(tmp_path / "o") == digest(tmp_path / "whole")


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", 20)
    (tmp_path / "o").mkdir()
    descriptor = os.open(tmp_path / "o", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "c.jsonl"), str(tmp_path / "o"), "1"], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert process.stderr is not None
    assert "another process is tokenizing into" in process.stderr.readline()
    assert not list((tmp_path / "o").iterdir())
    os.close(descriptor)
    assert process.wait() == 0
    assert (tmp_path / "o" / "index.json").exists()


def dies(*_: object) -> None:
    """A worker that is killed, as for want of memory."""
    print("about to die", flush=True)
    os.kill(os.getpid(), 9)


def test_a_dead_worker_is_an_error_and_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoughts.data.text import workers

    write_corpus(tmp_path / "c.jsonl", 40)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "SERVE", (__name__, "dies"))
        with pytest.raises(
            DataError,
            match=r"tokenizing process: killed by SIGKILL: about to die \(out of memory\?\)\.\n  Try: run again with fewer --processes",
        ):
            tokenize(str(tmp_path / "c.jsonl"), "bytes", tmp_path / "o", processes=2)
    tokenize(str(tmp_path / "c.jsonl"), "bytes", tmp_path / "o", processes=2)
    Shards.open(tmp_path / "o").verify_hashes()


def test_prepare_tokenizes_once_into_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.txt"
    source.write_text("text for the cache " * 20)
    data = DataConfig(path=str(source), tokenizer="chars", cache=str(tmp_path / "cache"))
    with Console(sys.stderr).logging():
        folder = prepare(data)
    assert folder.parent == tmp_path / "cache" and folder.name.startswith("a-")
    assert f"data: tokenizing {source} (chars) once into {folder}" in capsys.readouterr().err
    before = digest(folder)
    assert prepare(data) == folder and digest(folder) == before
    assert capsys.readouterr().err == ""
    assert prepare(DataConfig(path=str(folder))) == folder
    assert prepare(DataConfig(path=str(source), tokenizer="chars", cache=str(tmp_path / "cache"), val_fraction=0.2)) != folder
    source.write_text("other text for the cache " * 20)
    assert prepare(data) != folder
    assert prepare(data, tmp_path / "here") == tmp_path / "here"


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a text for the command " * 50)
    command(str(tmp_path / "a.txt"), tmp_path / "o", train_bpe=260)
    out = capsys.readouterr().out
    assert "tokenizer  bpe  260 ids, uint16, engine tiktoken" in out
    assert "Mtok/s" in out and "unigram entropy" in out
    assert f"next       gptoughts train RECIPE --data.path {tmp_path / 'o'}" in out
    command(str(tmp_path / "a.txt"), tmp_path / "o", train_bpe=260)
    assert "already tokenized" in capsys.readouterr().out
    with pytest.raises(DataError, match="--tokenizer bytes and --train-bpe 260: only one of them is allowed"):
        command(str(tmp_path / "a.txt"), tmp_path / "o", tokenizer="bytes", train_bpe=260)


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    words = {f"w{i}": i + 1 for i in range(70_000)} | {"</s>": 0}
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "a.txt").write_text("w1 w69999 w3 w4")
    index = tokenize(str(tmp_path / "a.txt"), str(tmp_path), tmp_path / "o", val_fraction=0)
    stream = Shards.open(tmp_path / "o").split("train")
    assert index.dtype == "uint32" and stream.window(0, 5).tolist() == [0, 2, 70_000, 4, 5] and stream.max_id == 70_000
