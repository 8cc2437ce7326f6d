"""Stream documents out of files, folders, globs and datasets, in the same order on every machine.

One document at a time is held in memory. A file that is empty, binary or not UTF-8 is an error that names it. Only empty `.py`
modules, rows with an empty text, and what a folder holds beside its text are skipped; all are counted.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoughts.data.text.folders import folder_files
from gptoughts.data.text.objects import COMPRESSED, PLAIN, ROWS, TABLES, Object, ending_of, is_compressed, objects
from gptoughts.data.text.rows import MAX_ROW_BYTES, hub_dataset_rows, row_text, saved_dataset_rows
from gptoughts.data.text.rows import first_line as first_line
from gptoughts.data.text.rows import json_row as json_row
from gptoughts.data.text.rows import open_lines as open_lines
from gptoughts.data.text.rows import require as require
from gptoughts.errors import DataError, nearest

STDLIB = "python-stdlib"
FOLDER_ENDINGS = f"*{' *'.join([*PLAIN, *ROWS])} (also {' and '.join(COMPRESSED)}), or only *{' *'.join(TABLES)}"
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
    skipped: Counter[str] = field(default_factory=Counter)
    """What a folder holds beside `files`, by kind."""
    skip_bad: bool = False
    """Whether rows that cannot be read are skipped and counted in `bad_rows`, instead of raising."""
    empty_rows: int = 0
    bad_rows: int = 0

    def documents(self) -> Iterator[Document]:
        """Yield every document once, in order. Raises DataError that names an unreadable file, or where the source has no text."""
        self.empty_rows = self.bad_rows = 0
        found = False
        try:
            for document in self.read(self):
                found = True
                yield document
        except OSError as error:
            raise DataError(f"{error.filename or self.spec}: cannot be read ({error.strerror or error})") from None
        if not found:
            raise DataError(f"source {self.spec!r}: no text", found=f"{self.empty_rows} empty rows")

    def describe_skipped(self) -> str:
        """Return what was skipped in a folder as text; empty if nothing was."""
        total = sum(self.skipped.values())
        kinds = [f"{count:,} {kind}" for kind, count in self.skipped.most_common(6)]
        kinds += ["others"] * (len(self.skipped) > len(kinds))
        return f"{total:,} of the entries of {self.spec} are not read: {', '.join(kinds)}" if total else ""

    def fingerprint(self) -> str:
        """Return a digest of the files' names, sizes and modification times."""
        digest = hashlib.sha256(os.fsencode(self.spec))
        for path in self.files:
            stat = path.stat()
            digest.update(os.fsencode(f"\n{path}\0{stat.st_size}\0{stat.st_mtime_ns}"))  # a name need not be UTF-8
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
        return file_source(spec, path, *folder_files(path), text_key)
    if path.exists():
        if not path.is_file():
            raise DataError(f"source {spec!r}: a pipe or device, not a file", fix="write the text to a file first")
        return file_source(spec, path.parent, [path], Counter(), text_key)
    if GLOB_CHARACTERS.search(spec):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        matches = [name for name in found if name.is_file()]
        if not matches:
            raise DataError(f"source {spec!r}: no file matches this glob", fix=f"quote it: '{spec}'")
        skipped = Counter({"folders or devices": len(found) - len(matches)} if len(found) > len(matches) else {})
        return file_source(spec, Path("."), matches, skipped, text_key)
    # A typing error in a path must not become a request to the Hub: if the first part is a local folder, `spec` is a path.
    if HUB_NAME.match(spec) and not Path(spec).parent.is_dir() and ending_of(Path(spec)) is None:
        return Source(spec, (), lambda source: texts(hub_dataset_rows(spec, text_key), text_key, source))
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"source {spec!r}: no such file, folder or glob{nearest(path.name, siblings)}")


def file_source(spec: str, root: Path, files: list[Path], skipped: Counter[str], text_key: str) -> Source:
    """Return a source of files. Raises DataError where `files`, found in `root`, is empty."""

    def read(source: Source) -> Iterator[Document]:
        for path in files:
            yield from read_file(path, text_key, source)

    source = Source(spec, tuple(files), read, skipped=skipped)
    if not files:
        found = source.describe_skipped() or "an empty folder"
        raise DataError(f"source {spec!r}: no readable file in {root}", found=found, fix=f"files named {FOLDER_ENDINGS}")
    source.size_bytes = sum(path.stat().st_size for path in files)
    return source


def standard_library() -> Source:
    """Return the source code of Python's standard library, about 10 MB, as a text available on every machine.

    Tests, installed packages and generated tables of character codes are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in folder_files(root, follow=False)[0]
        if path.suffix == ".py" and not STDLIB_SKIPPED & set(path.relative_to(root).parts)
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
    return Source(spec, files, lambda source: texts(saved_dataset_rows(path, spec, text_key), text_key, source), size)


def read_file(path: Path, text_key: str, source: Source) -> Iterator[Document]:
    """Yield the documents of one file: its rows, or one document of a file without rows."""
    if ending_of(path) not in (None, *PLAIN):
        yield from texts(objects(path, column=text_key), text_key, source)
        return
    raw = decompressed(path) if is_compressed(path) else path.read_bytes()
    if raw or path.suffix.lower() != ".py":
        yield Document(str(path), decode_text(raw, str(path)))


def decompressed(path: Path) -> bytes:
    """Return the content of a compressed text. Raises DataError for a damaged file, or one beyond `MAX_ROW_BYTES`."""
    try:
        with open_lines(path) as lines:
            raw = lines.read(MAX_ROW_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be decompressed ({first_line(error)})", fix="download the file again") from None
    if len(raw) > MAX_ROW_BYTES:
        raise DataError(
            f"{path}: longer than {MAX_ROW_BYTES >> 20} MiB when decompressed", fix="split the text into several files"
        )
    return raw


def texts(rows: Iterator[Object], text_key: str, source: Source) -> Iterator[Document]:
    """Yield the rows that have a text; count the others in `source.empty_rows`. Raises DataError for a row without the field."""
    for number, (where, row) in enumerate(rows, 1):
        text = text_or_error(row, text_key, where)
        if isinstance(text, DataError):
            if not source.skip_bad:
                raise counted(text, rows, number, text_key)
            source.bad_rows += 1
        elif text:
            yield Document(where, text)
        else:
            source.empty_rows += 1


def text_or_error(row: dict[str, Any] | DataError, text_key: str, where: str) -> str | DataError:
    """Return the text of a row, or what is wrong with it."""
    try:
        return row if isinstance(row, DataError) else row_text(row, text_key, where)
    except DataError as error:
        return error


def counted(error: DataError, rest: Iterator[Object], number: int, text_key: str) -> DataError:
    """Return the error of row `number` with the count of bad rows in its file, and the way to skip them if they are few."""
    bad, total = 1, number
    for where, row in rest:
        total += 1
        bad += isinstance(text_or_error(row, text_key, where), DataError)
    if 2 * bad > total:
        return error
    problem = str(error).partition("\n")[0].rstrip(".")
    return DataError(
        f"{problem}; {bad:,} of {total:,} rows are bad", fix="--data.bad-rows skip (gptoughts tokenize: --bad-rows skip)"
    )


def decode_text(raw: bytes, name: str) -> str:
    """Decode UTF-8 and remove a byte order mark. Raises DataError for an empty file, a NUL byte, or bytes that are not UTF-8."""
    if not raw:
        raise DataError(f"{name}: the file is empty")
    zero = raw.find(b"\0")
    if zero >= 0 and name.lower().endswith((".bin", ".idx")):
        problem = f"{name}: binary; token shards of other trainers (nanoGPT, llm.c, Megatron) are not read"
        raise DataError(problem, fix="gptoughts tokenize with the text that they were made from")
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
