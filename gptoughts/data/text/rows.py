"""Read lines, also compressed, text fields of rows, and Hugging Face datasets."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from gptoughts.errors import DataError, nearest
from gptoughts.files import hub_home, parse_json, scratch_dir

MAX_ROW_BYTES = 256 << 20
"""Bytes of a row of text, decompressed; the longest books have a few millions."""
Row = tuple[str, dict[str, Any]]
"""Location (`file:row`, counted from 1) and row."""


def numbered(lines: IO[bytes], name: str, limit: int = MAX_ROW_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield every line with its number. Raises DataError for one beyond `limit`: 8 MB of gzip can hold a line of 8 GB."""
    number = 0
    while line := lines.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise DataError(f"{name}:{number}: row longer than {limit >> 20} MiB", fix="split the text into several rows")
        yield number, line


def open_lines(path: Path) -> IO[bytes]:
    """Open a file for reading lines as bytes; .gz and .zst are decompressed."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        require("zstandard", "train", path.name)
        import zstandard

        class Reader(io.RawIOBase):
            """Decompressed zstd stream that raises DataError instead of zstandard's own error."""

            def __init__(self) -> None:
                self.file = path.open("rb")
                self.stream = zstandard.ZstdDecompressor().stream_reader(self.file, read_across_frames=True)

            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                try:
                    return self.stream.readinto(buffer)
                except zstandard.ZstdError as error:
                    raise DataError(f"{path}: damaged zstd ({error})", fix="download the file again") from None

            def close(self) -> None:
                self.file.close()
                super().close()

        return io.BufferedReader(Reader(), 1 << 20)
    return path.open("rb", buffering=1 << 20)


def json_row(line: bytes, where: str) -> dict[str, Any]:
    """Parse one line as a JSON object. Raises DataError of one line that begins with `where`; chat data lists several of them."""
    try:
        text = line.decode("utf-8-sig" if where.endswith(":1") else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at offset {error.start} of the line"
        raise DataError(f"{where}: not UTF-8", found=found) from None
    try:
        row = parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except ValueError as error:  # nested too deeply, or a number of too many digits
        raise DataError(f"{where}: not JSON ({first_line(error)})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object", found=f"JSON {type(row).__name__}")
    return row


def row_text(row: dict[str, Any], text_key: str, where: str) -> str:
    """Return the text of a row. Raises DataError where the field is missing, not a string, or not valid Unicode."""
    if text_key not in row:
        raise missing_field(text_key, list(row), where)
    return checked_text(row[text_key], text_key, where)


def checked_text(value: Any, key: str, where: str) -> str:
    """Return the value of a field if it is valid Unicode text. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {key!r} must be a string", found=type(value).__name__)
    if len(value) > MAX_ROW_BYTES:
        raise DataError(f"{where}: row longer than {MAX_ROW_BYTES >> 20} MiB", fix="split the text into several rows")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {key!r} has an unpaired surrogate at character {error.start}") from None
    return value


def missing_field(text_key: str, fields: list[str], where: str) -> DataError:
    """Build the error for rows without the text field; it lists the fields that exist."""
    found = f"fields {', '.join(fields)}" if fields else "no fields"
    fix = "--data.text-key FIELD (gptoughts tokenize: --text-key FIELD)"
    return DataError(f"{where}: no field {text_key!r}{nearest(text_key, fields)}", found=found, fix=fix)


def saved_dataset_rows(path: Path, spec: str, text_key: str) -> Iterator[Row]:
    """Yield the rows of a dataset written by `save_to_disk`."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # A damaged folder raises errors of many types.
        raise DataError(f"source {spec!r}: cannot be read as a Hugging Face dataset ({first_line(error)})") from error
    yield from dataset_rows(spec, loaded, text_key)


def hub_dataset_rows(spec: str, text_key: str) -> Iterator[Row]:
    """Yield the rows of the Hugging Face Hub dataset `owner/name`."""
    yield from dataset_rows(spec, hub_dataset(spec), text_key)


def hub_dataset(spec: str) -> Any:
    """Return the Hugging Face Hub dataset `owner/name`, downloaded unless cached. Raises DataError."""
    require("datasets", "hf", spec)
    import datasets

    # datasets chooses its folder by itself, and does not know scratch.
    scratch = {"cache_dir": str(hub_home() / "datasets")} if scratch_dir() and "HF_DATASETS_CACHE" not in os.environ else {}
    try:
        return datasets.load_dataset(spec, **scratch)
    except Exception as error:  # Network, name, permission and script errors have no common type.
        raise DataError(
            f"source {spec!r}: not a local file or folder, and loading it from the Hugging Face Hub failed ({first_line(error)})"
        ) from error


def dataset_rows(spec: str, loaded: Any, text_key: str) -> Iterator[Row]:
    """Yield the rows of a loaded dataset: the `train` split, or the only one."""
    if isinstance(loaded, dict):
        split = "train" if "train" in loaded else next(iter(loaded))
        if split != "train" and len(loaded) > 1:
            found = f"splits {', '.join(loaded)}"
            raise DataError(f"source {spec!r}: no split 'train'", found=found, fix="the folder of one split")
        loaded = loaded[split]
    if text_key not in loaded.column_names:
        raise missing_field(text_key, loaded.column_names, f"source {spec!r}")
    row = 0
    for batch in loaded.select_columns([text_key]).iter(batch_size=1024):
        for text in batch[text_key]:
            row += 1
            yield f"{spec}:{row}", {text_key: text}


def require(package: str, extra: str, wanted_for: str) -> None:
    """Raise DataError with the pip command where `package` is not installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise DataError(f"{wanted_for}: needs the package {package}", fix=f"pip install 'gptoughts[{extra}]'") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where the text is empty."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
