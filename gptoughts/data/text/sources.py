"""Documents stream out of files, folders, globs and datasets in an order that is the same on every machine.

A document is held in memory whole; a corpus never is. Nothing is skipped in silence: a file that is empty, binary or not
UTF-8 is an error that names it. Two things are passed over, because they are normal: empty `.py` modules and rows with
an empty text (counted in `Source.empty_rows`).
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from gptoughts.errors import DataError, nearest

STDLIB = "python-stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
GLOB_CHARACTERS = re.compile(r"[*?\[]")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")


@dataclass(frozen=True)
class Document:
    """One text and the place it came from: `file`, `file:line` or `file:row`."""

    id: str
    text: str


@dataclass
class Source:
    """A corpus that can be read again and again, always in the same order.

    `files` are sorted by relative path (none for a dataset of the hub); `size_bytes` is their size on disk, None where unknown.
    """

    spec: str
    files: tuple[Path, ...]
    read: Callable[[Source], Iterator[Document]] = field(repr=False)
    size_bytes: int | None = None
    empty_rows: int = 0

    def documents(self) -> Iterator[Document]:
        """Every document, once, in order. Raises DataError that names the file where a text cannot be read or none is there."""
        self.empty_rows = 0
        found = False
        try:
            for document in self.read(self):
                found = True
                yield document
        except OSError as error:
            raise DataError(f"{error.filename or self.spec}: cannot be read ({error.strerror or error})") from None
        if not found:
            raise DataError(
                f"source {self.spec!r} holds no text ({self.empty_rows} empty rows); give a source with at least one document"
            )

    def fingerprint(self) -> str:
        """Digest of the names, sizes and modification times of the files: tells a changed corpus without reading it."""
        digest = hashlib.sha256(self.spec.encode())
        for path in self.files:
            stat = path.stat()
            digest.update(f"\n{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def open_source(spec: str, text_key: str = "text") -> Source:
    """The corpus behind `spec`: a file, folder, glob, Hugging Face dataset (folder or `owner/name`) or the word python-stdlib.

    Raises DataError where nothing is there, or a folder holds no file that can be read as text.
    """
    if spec == STDLIB:
        return standard_library()
    path = Path(spec).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return saved_dataset(spec, path, text_key)
        return of_files(spec, path, folder_files(path), text_key)
    if path.exists():
        return of_files(spec, path.parent, [path], text_key)
    if GLOB_CHARACTERS.search(spec):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not found:
            raise DataError(f"source {spec!r}: no file matches this glob; quote it so that the shell leaves it alone")
        return of_files(spec, Path("."), found, text_key)
    # A typing mistake in a path must not become a call to the hub: where the first part is a folder here, a path was meant.
    if HUB_NAME.match(spec) and not Path(spec).parent.is_dir() and not spec.endswith(TEXT_SUFFIXES + ROW_SUFFIXES):
        return Source(spec, (), lambda source: hub_rows(source, text_key))
    here = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(f"source {spec!r}: no such file, folder or glob{nearest(path.name, here)}")


def of_files(spec: str, root: Path, files: list[Path], text_key: str) -> Source:
    """A source of files; their names in messages are relative to `root` where they lie below it."""

    def read(source: Source) -> Iterator[Document]:
        for path in files:
            yield from read_file(path, str(path), text_key, source)

    if not files:
        kinds = " ".join(TEXT_SUFFIXES + ROW_SUFFIXES)
        raise DataError(
            f"source {spec!r}: folder {root} holds no text; it takes {kinds} (hidden files and symlinks are ignored)"
        )
    return Source(spec, tuple(files), read, sum(path.stat().st_size for path in files))


def folder_files(root: Path) -> list[Path]:
    """Files of a folder that can be text, sorted by relative path; hidden ones and symlinks are ignored."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and name.endswith(TEXT_SUFFIXES + ROW_SUFFIXES) and not path.is_symlink():
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def standard_library() -> Source:
    """The source of the Python that runs, about 10 MB: text that every machine has.

    Tests, installed packages and generated tables of character codes are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in folder_files(root) if path.suffix == ".py" and not STDLIB_SKIPPED & set(path.relative_to(root).parts)
    ]
    if not files:
        raise DataError(
            f"source {STDLIB!r}: no .py file under {root}; install the standard library's source or name another text"
        )

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


def read_file(path: Path, name: str, text_key: str, source: Source) -> Iterator[Document]:
    """Documents of one file, by the ending of its name; what is not .jsonl or .parquet is one text."""
    if path.name.endswith(".parquet"):
        yield from parquet_rows(path, name, text_key, source)
    elif path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        yield from json_rows(path, name, text_key, source)
    else:
        raw = path.read_bytes()
        if raw or path.suffix != ".py":
            yield Document(name, decode_text(raw, name))


def decode_text(raw: bytes, name: str) -> str:
    """`raw` as text, a byte order mark removed. Raises DataError for an empty file, a NUL byte, or bytes that are not UTF-8."""
    if not raw:
        raise DataError(f"{name}: the file is empty; remove it or name another")
    zero = raw.find(b"\0")
    if zero >= 0:
        raise DataError(f"{name}: binary, not text (NUL byte at offset {zero}); remove it, or convert it to UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}: not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}, line {line}); "
            f"convert it: iconv -f latin1 -t utf-8"
        ) from None


def json_rows(path: Path, name: str, text_key: str, source: Source) -> Iterator[Document]:
    """Texts of a .jsonl file, also compressed; blank lines are ignored."""
    number = 0
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from checked_row(json_row(line, f"{name}:{number}"), text_key, f"{name}:{number}", source)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: damaged gzip after line {number} ({error}); fetch the file again") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read after line {number} ({error})") from None


def open_lines(path: Path) -> IO[bytes]:
    """The file's lines as bytes, decompressed by the ending of its name."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.name.endswith(".zst"):
        require("zstandard", "train", path.name)
        import zstandard

        class Reader(io.RawIOBase):
            """zstandard's own error type becomes ours, so that one message serves every damaged file."""

            def __init__(self) -> None:
                self.file = path.open("rb")
                self.stream = zstandard.ZstdDecompressor().stream_reader(self.file, read_across_frames=True)

            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                try:
                    return self.stream.readinto(buffer)
                except zstandard.ZstdError as error:
                    raise DataError(f"{path}: damaged zstd ({error}); fetch the file again") from None

            def close(self) -> None:
                self.file.close()
                super().close()

        return io.BufferedReader(Reader(), 1 << 20)
    return path.open("rb", buffering=1 << 20)


def json_row(line: bytes, where: str) -> dict[str, Any]:
    """One line as a JSON object."""
    try:
        text = line.decode("utf-8-sig" if where.endswith(":1") else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte 0x{line[error.start]:02x} at offset {error.start} of the line)") from None
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); each line must be one JSON object") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply; each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a JSON {type(row).__name__}, not an object with a text field; each line must be one JSON object"
        )
    return row


def checked_row(row: dict[str, Any], text_key: str, where: str, source: Source) -> Iterator[Document]:
    """The text of a row; nothing, and a count, where it is empty. Raises DataError where the key is missing or no string."""
    if text_key not in row:
        raise missing_key(text_key, list(row), where)
    text = row[text_key]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_key!r} is {type(text).__name__}, not a string")
    if not text:
        source.empty_rows += 1
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {text_key!r} holds half of a surrogate pair at character {error.start}") from None
    yield Document(where, text)


def missing_key(text_key: str, keys: list[str], where: str) -> DataError:
    """The error for rows without the text's field; it names the fields that are there."""
    there = ", ".join(keys) or "none"
    return DataError(f"{where}: no field {text_key!r}; fields here: {there}{nearest(text_key, keys)}; choose one with text_key")


def parquet_rows(path: Path, name: str, text_key: str, source: Source) -> Iterator[Document]:
    """Texts of a .parquet file, read by row groups; rows count from 1."""
    require("pyarrow", "hf", path.name)
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise missing_key(text_key, file.schema_arrow.names, name)
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield from checked_row({text_key: text}, text_key, f"{name}:{row}", source)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read as parquet after row {row} ({first_line(error)})") from None


def saved_dataset(spec: str, path: Path, text_key: str) -> Source:
    """A dataset that `save_to_disk` wrote."""
    require("datasets", "hf", spec)

    def read(source: Source) -> Iterator[Document]:
        import datasets

        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # What the library raises for a damaged folder is not one type.
            raise DataError(f"source {spec!r}: cannot be read as a Hugging Face dataset ({first_line(error)})") from error
        yield from dataset_rows(spec, loaded, text_key, source)

    files = tuple(sorted(file for file in path.rglob("*") if file.is_file()))
    return Source(spec, files, read, sum(file.stat().st_size for file in files if file.suffix == ".arrow"))


def hub_rows(source: Source, text_key: str) -> Iterator[Document]:
    """Texts of a dataset of the Hugging Face hub, which the user named as owner/name."""
    require("datasets", "hf", source.spec)
    import datasets

    try:
        loaded = datasets.load_dataset(source.spec)
    except Exception as error:  # Network, name, permission and script errors have no common type.
        raise DataError(
            f"source {source.spec!r}: no such file or folder here, and the Hugging Face hub gave no dataset of this name ({first_line(error)})"
        ) from error
    yield from dataset_rows(source.spec, loaded, text_key, source)


def dataset_rows(spec: str, loaded: Any, text_key: str, source: Source) -> Iterator[Document]:
    """Texts of a loaded dataset; of several splits `train` is taken, or the only one."""
    if isinstance(loaded, dict):
        split = "train" if "train" in loaded else next(iter(loaded))
        if split != "train" and len(loaded) > 1:
            raise DataError(
                f"source {spec!r}: no split 'train'; splits here: {', '.join(loaded)}; name the folder of one split"
            )
        loaded = loaded[split]
    if text_key not in loaded.column_names:
        raise missing_key(text_key, loaded.column_names, f"source {spec!r}")
    row = 0
    for batch in loaded.select_columns([text_key]).iter(batch_size=1024):
        for text in batch[text_key]:
            row += 1
            yield from checked_row({text_key: text}, text_key, f"{spec}:{row}", source)


def require(package: str, extra: str, wanted_for: str) -> None:
    """Raises DataError that names the extra to install where `package` is not installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise DataError(f"{wanted_for} needs the package {package}; type: pip install 'gptoughts[{extra}]'") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
