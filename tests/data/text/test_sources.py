"""Every format is read in one order, and every bad input is one clear error that names its place."""

from __future__ import annotations

import gzip
import json
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gptoughts.data.text.sources import open_source
from gptoughts.errors import DataError

ROWS = [{"text": "first öne", "id": 1}, {"text": "", "id": 2}, {"text": "third\nline", "id": 3}]
TEXTS = ["first öne", "third\nline"]


def texts(spec: str | Path, text_key: str = "text") -> list[str]:
    return [document.text for document in open_source(str(spec), text_key).documents()]


def refused(spec: str | Path, text_key: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        texts(spec, text_key)
    message = str(caught.value)
    problem, _, fix = message.partition("\n  Try: ")
    assert "\n" not in problem and "\n" not in fix
    return message


def jsonl() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode() + b"\n"


def test_rows_are_read_from_every_container(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(), mtime=0))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(jsonl()[:20]) + compress(jsonl()[20:]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        source = open_source(str(tmp_path / name))
        documents = list(source.documents())
        assert [document.text for document in documents] == TEXTS
        assert documents[1].id == f"{tmp_path / name}:3"
        assert source.empty_rows == 1
    assert texts(tmp_path) == TEXTS * 4


def test_endings_are_compared_without_case(tmp_path: Path) -> None:
    (tmp_path / "ROWS.JSONL").write_bytes(jsonl())
    (tmp_path / "Rows.Jsonl.GZ").write_bytes(gzip.compress(jsonl(), mtime=0))
    (tmp_path / "b.TXT").write_text("plain")
    assert texts(tmp_path) == [*TEXTS, *TEXTS, "plain"]
    assert open_source(str(tmp_path)).skipped == {}


def test_tables_are_rows_and_compressed_text_is_text(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_bytes(jsonl())
    long = {"text": "x" * 9000}
    (tmp_path / "long.json").write_text(json.dumps(long) + "\n" + json.dumps(ROWS[0]))
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode(), mtime=0))
    (tmp_path / "rows.csv").write_text('id,text\n1,first öne\n2,\n3,"third\nline"\n', encoding="utf-8")
    (tmp_path / "rows.tsv").write_text("text\tid\nfirst öne\t1\n", encoding="utf-8")
    (tmp_path / "notes.txt.gz").write_bytes(gzip.compress(b"notes", mtime=0))
    for name in ("rows.json", "lines.json", "rows.json.gz", "rows.csv"):
        source = open_source(str(tmp_path / name))
        assert [document.text for document in source.documents()] == TEXTS, name
        assert source.empty_rows == 1
    assert texts(tmp_path / "long.json") == [long["text"], TEXTS[0]]
    assert texts(tmp_path / "rows.tsv") == TEXTS[:1]
    assert texts(tmp_path / "notes.txt.gz") == ["notes"]
    # Beside text, tables are mostly settings: they are counted, and read where nothing else is.
    assert texts(tmp_path) == ["notes"]
    assert open_source(str(tmp_path)).skipped == {"*.json": 4, "*.csv": 1, "*.tsv": 1}
    (tmp_path / "notes.txt.gz").unlink()
    assert len(texts(tmp_path)) == 11


def test_links_are_followed_and_a_loop_is_an_error(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    (blobs / "deep").mkdir(parents=True)
    folder.mkdir()
    for name in ("0a", "0b", "deep/c.txt"):
        (blobs / name).write_text(name)
    (folder / "a.txt").symlink_to(blobs / "0a")
    (folder / "b.txt").symlink_to(blobs / "0b")
    (folder / "more").symlink_to(blobs / "deep")
    (folder / "gone.txt").symlink_to(blobs / "gone")
    assert texts(folder) == ["0a", "0b", "deep/c.txt"]
    assert open_source(str(folder)).skipped == {"broken links": 1}
    (blobs / "deep" / "up").symlink_to(folder)
    assert "more/up: a link that leads back to a folder above it" in refused(folder)


def test_a_saved_dataset_is_a_source(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": dataset.select([0]), "train": dataset}).save_to_disk(str(tmp_path / "several"))
    assert texts(tmp_path / "one") == TEXTS == texts(tmp_path / "several")
    assert "no field 'body'. Found fields text, id" in refused(tmp_path / "one", "body")
    datasets.DatasetDict({"a": dataset, "b": dataset}).save_to_disk(str(tmp_path / "none"))
    assert "no split 'train'. Found splits a, b" in refused(tmp_path / "none")


def test_a_folder_is_read_by_sorted_relative_path(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a.txt", "c.rst", "m.py", ".hidden.txt", "ignored.bin", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "a.link.txt").symlink_to(tmp_path / "b.txt")
    assert texts(tmp_path) == ["a.txt", "a/z.md", "b.txt", "c.rst", "m.py"]
    counts = {"hidden": 2, "*.bin": 1, "links to files that are read anyway": 1}
    assert open_source(str(tmp_path)).skipped == counts
    assert f"4 of the entries of {tmp_path} are not read: 2 hidden" in open_source(str(tmp_path)).describe_skipped()
    assert texts(tmp_path / "*.txt") == ["b.txt", "a.txt", "b.txt"]  # A glob is the user's own choice: it takes links.
    assert texts(tmp_path / "ignored.bin") == ["ignored.bin"]
    (tmp_path / "train.bin").write_bytes(bytes(8))
    assert "train.bin: binary; token shards of other trainers (nanoGPT, llm.c, Megatron)" in refused(tmp_path / "train.bin")


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    before = open_source(str(tmp_path)).fingerprint()
    assert before == open_source(str(tmp_path)).fingerprint()
    file.write_text("three")
    assert before != open_source(str(tmp_path)).fingerprint()


def test_the_standard_library_is_text_that_is_always_here() -> None:
    source = open_source("python-stdlib")
    documents = list(source.documents())
    assert sum(len(document.text) for document in documents) > 3_000_000
    assert not [document.id for document in documents if "test" in document.id.split("/")]
    assert [document.id for document in documents] == sorted(document.id for document in documents)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "row"}')
    assert texts(tmp_path) == ["word", "row"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("binary.txt", b"abc\0def", "binary.txt: binary, not text. Found NUL byte at offset 3"),
        ("latin.txt", b"ab\ncd\xe9f", "latin.txt: not UTF-8. Found byte 0xe9 at offset 5, line 2.\n  Try: iconv"),
        ("utf16.txt", "hello".encode("utf-16"), "utf16.txt: binary"),
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "a.jsonl:2: not UTF-8. Found byte 0xe9 at offset 10 of the line"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "a.jsonl:1: no field 'text'. Found fields body, id"),
        ("a.jsonl", b'{"texts": "x"}\n', "(did you mean 'texts'?)"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: field 'text' must be a string. Found int"),
        ("a.jsonl", b'{"text": null}\n', "a.jsonl:1: field 'text' must be a string. Found NoneType"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: not a JSON object. Found JSON list"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "field 'text' has an unpaired surrogate at character 0"),
        ("a.jsonl", b'{"text": ""}\n', ": no text. Found 1 empty rows"),
        ("a.jsonl", b"\n\n", ": no text. Found 0 empty rows"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: damaged gzip"),
        ("a.jsonl.gz", gzip.compress(jsonl(), mtime=0)[:-9], "a.jsonl.gz: damaged gzip"),
        ("a.jsonl.zst", b"not zstd at all", "a.jsonl.zst: damaged zstd"),
        ("a.parquet", b"not parquet", "a.parquet: cannot be read as parquet"),
        ("a.json", b'{"text": "x"}\n{"text": }\n', "a.json:2: not JSON"),
        (
            "a.json",
            b'{\n "key": 1\n}',
            "a.json: not a JSON array of rows. Found dict.\n  Try: a list of objects, or JSON lines",
        ),
        ("a.json", b'[{"text": "x"}, 5]', "a.json[1]: not a JSON object. Found int"),
        ("a.json", b'[{"text": "x"}', "a.json: not a JSON array of rows ("),
        ("a.csv", b"text,text\na,b\n", "a.csv: the header has a column twice. Found 'text'"),
        ("a.csv", b"text,id\na\n", "a.csv:2: another number of fields than the header has"),
        ("a.csv", b"id\n1\n", "a.csv:2: no field 'text'. Found fields id"),
        ("a.txt.gz", b"plain", "a.txt.gz: cannot be decompressed"),
        ("a.parquet.gz", b"plain", "a.parquet.gz: Parquet inside a compressed file"),
        ("state.json", b"{}", "cannot be read as a Hugging Face dataset"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_bad_rows_are_counted_and_can_be_skipped(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": text} for text in ["one", None, "three", None, *["more"] * 6]]
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    where = "a.json[1]" if name == "a.json" else f"{name}:2"
    expected = f"{where}: field 'text' must be a string. Found NoneType; 2 of 10 rows are bad.\n  Try: --data.bad-rows skip"
    assert expected in refused(tmp_path)
    source = open_source(str(tmp_path))
    source.skip_bad = True
    for _ in range(2):
        assert [document.text for document in source.documents()] == ["one", "three", *["more"] * 6]
        assert source.bad_rows == 2


def test_a_missing_field_of_parquet_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert "a.parquet: no field 'body'. Found fields text, id" in refused(tmp_path / "a.parquet", "body")


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert "no such file, folder or glob (did you mean 'shakespeare.txt'?)" in refused(tmp_path / "shakespear.txt")
    assert "no file matches this glob" in refused(tmp_path / "*.parquet")
    assert "empty. Found an empty folder.\n  Try: files named *.txt" in refused(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    assert "no such file, folder or glob" in refused(
        "empty/name"
    )  # The first part is a local folder, so this is a path, not a Hub name.


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    source = open_source(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(No such file or directory\)"):
        list(source.documents())


def test_the_hub_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = refused("nobody/nothing")
    assert "loading it from the Hugging Face Hub failed (Couldn't reach" in message


@pytest.mark.parametrize(("name", "package", "extra"), [("a.parquet", "pyarrow", "hf"), ("a.jsonl.zst", "zstandard", "train")])
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    def version(asked: str) -> str:
        raise metadata.PackageNotFoundError(asked)

    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(metadata, "version", version)
    assert f"{name}: needs the package {package}.\n  Try: pip install 'gptoughts[{extra}]'" in refused(tmp_path)


def test_nothing_heavy_is_imported_with_the_module() -> None:
    import subprocess

    heavy = "('numpy', 'datasets', 'pyarrow', 'torch', 'rich')"
    code = f"import sys, gptoughts.data.text.sources, gptoughts.cli.tokenize; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path / "caf") + b"\xe9.txt", "w", encoding="utf-8") as file:
        file.write("text")
    source = open_source(str(tmp_path))
    assert [document.text for document in source.documents()] == ["text"]
    assert len(source.fingerprint()) == 64
