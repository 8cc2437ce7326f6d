"""Stream documents out of files, folders, globs and datasets, in the same order on every machine.

One document at a time is held in memory. A file that is empty, binary or not UTF-8 is an error that names it; only empty `.py`
modules and rows with an empty text are skipped (rows are counted in `Source.empty_rows`).
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gptoughts.data.text.rows import Row, hub_dataset_rows, json_rows, parquet_rows, saved_dataset_rows
from gptoughts.data.text.rows import first_line as first_line
from gptoughts.data.text.rows import json_row as json_row
from gptoughts.data.text.rows import open_lines as open_lines
from gptoughts.data.text.rows import require as require
from gptoughts.errors import DataError, nearest

STDLIB = "python-stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
GLOB_CHARACTERS = re.compile(r"[*?\[]")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")


@dataclass(frozen=True)
class Document:
    """One text and its location: `file`, `file:line` or `file:row`."""

    id: str
    text: str


@dataclass
class Source:
    """A corpus that can be read repeatedly, always in the same order.

    `files` are sorted by relative path (none for a Hub dataset); `size_bytes` is their size on disk, None where unknown.
    """

    spec: str
    files: tuple[Path, ...]
    read: Callable[[Source], Iterator[Document]] = field(repr=False)
    size_bytes: int | None = None
    empty_rows: int = 0

    def documents(self) -> Iterator[Document]:
        """Yield every document once, in order. Raises DataError that names an unreadable file, or where the source has no text."""
        self.empty_rows = 0
        found = False
        try:
            for document in self.read(self):
                found = True
                yield document
        except OSError as error:
            raise DataError(f"{error.filename or self.spec}: cannot be read ({error.strerror or error})") from None
        if not found:
            raise DataError(f"source {self.spec!r}: no text", found=f"{self.empty_rows} empty rows")

    def fingerprint(self) -> str:
        """Return a digest of the files' names, sizes and modification times."""
        digest = hashlib.sha256(self.spec.encode())
        for path in self.files:
            stat = path.stat()
            digest.update(f"\n{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def open_source(spec: str, text_key: str = "text") -> Source:
    """Open a file, folder, glob, Hugging Face dataset (folder or `owner/name`) or the word python-stdlib.

    Raises DataError where `spec` does not exist, or a folder has no readable file.
    """
    if spec == STDLIB:
        return standard_library()
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return saved_dataset(spec, path, text_key)
        return file_source(spec, path, folder_files(path), text_key)
    if path.exists():
        if not path.is_file():
            raise DataError(f"source {spec!r}: a pipe or device, not a file", fix="write the text to a file first")
        return file_source(spec, path.parent, [path], text_key)
    if GLOB_CHARACTERS.search(spec):
        matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not matches:
            raise DataError(f"source {spec!r}: no file matches this glob", fix=f"quote it: '{spec}'")
        return file_source(spec, Path("."), matches, text_key)
    # A typing error in a path must not become a request to the Hub: if the first part is a local folder, `spec` is a path.
    if HUB_NAME.match(spec) and not Path(spec).parent.is_dir() and not spec.endswith(TEXT_SUFFIXES + ROW_SUFFIXES):
        return Source(spec, (), lambda source: nonempty(hub_dataset_rows(spec, text_key), source))
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"source {spec!r}: no such file, folder or glob{nearest(path.name, siblings)}")


def file_source(spec: str, root: Path, files: list[Path], text_key: str) -> Source:
    """Return a source of files. Raises DataError where `files`, found in `root`, is empty."""

    def read(source: Source) -> Iterator[Document]:
        for path in files:
            yield from read_file(path, str(path), text_key, source)

    if not files:
        raise DataError(
            f"source {spec!r}: no readable file in {root} (hidden files and symlinks are ignored)",
            fix=f"files named *{' *'.join(TEXT_SUFFIXES + ROW_SUFFIXES)}",
        )
    return Source(spec, tuple(files), read, sum(path.stat().st_size for path in files))


def folder_files(root: Path) -> list[Path]:
    """Return the readable files of a folder, sorted by relative path; hidden files and symlinks are ignored."""
    files = []
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if (
                not name.startswith(".")
                and name.endswith(TEXT_SUFFIXES + ROW_SUFFIXES)
                and not path.is_symlink()
                and path.is_file()
            ):
                files.append(path)
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def standard_library() -> Source:
    """Return the source code of Python's standard library, about 10 MB, as a text available on every machine.

    Tests, installed packages and generated tables of character codes are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in folder_files(root) if path.suffix == ".py" and not STDLIB_SKIPPED & set(path.relative_to(root).parts)
    ]
    if not files:
        raise DataError(f"source {STDLIB!r}: no .py file in {root}", fix="install the standard library's source")

    def read(source: Source) -> Iterator[Document]:
        for path in files:
            raw = path.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                continue  # A few modules of the standard library are written in Latin-1 on purpose.
            if text and "\0" not in text:
                yield Document(path.relative_to(root).as_posix(), text)

    return Source(STDLIB, tuple(files), read, sum(path.stat().st_size for path in files))


def saved_dataset(spec: str, path: Path, text_key: str) -> Source:
    """Return the source for a dataset written by `save_to_disk`."""
    require("datasets", "hf", spec)
    files = tuple(sorted(file for file in path.rglob("*") if file.is_file()))
    size = sum(file.stat().st_size for file in files if file.suffix == ".arrow")
    return Source(spec, files, lambda source: nonempty(saved_dataset_rows(path, spec, text_key), source), size)


def read_file(path: Path, name: str, text_key: str, source: Source) -> Iterator[Document]:
    """Yield the documents of one file: rows of .jsonl and .parquet, one document of any other file."""
    if path.name.endswith(".parquet"):
        yield from nonempty(parquet_rows(path, name, text_key), source)
    elif path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        yield from nonempty(json_rows(path, name, text_key), source)
    else:
        raw = path.read_bytes()
        if raw or path.suffix != ".py":
            yield Document(name, decode_text(raw, name))


def nonempty(rows: Iterator[Row], source: Source) -> Iterator[Document]:
    """Yield the rows that have a text; count the others in `source.empty_rows`."""
    for where, text in rows:
        if text:
            yield Document(where, text)
        else:
            source.empty_rows += 1


def decode_text(raw: bytes, name: str) -> str:
    """Decode UTF-8 and remove a byte order mark. Raises DataError for an empty file, a NUL byte, or bytes that are not UTF-8."""
    if not raw:
        raise DataError(f"{name}: the file is empty")
    zero = raw.find(b"\0")
    if zero >= 0:
        raise DataError(f"{name}: binary, not text", found=f"NUL byte at offset {zero}", fix="convert it to UTF-8 or remove it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}: not UTF-8",
            found=f"byte 0x{raw[error.start]:02x} at offset {error.start}, line {line}",
            fix="iconv -f latin1 -t utf-8",
        ) from None
