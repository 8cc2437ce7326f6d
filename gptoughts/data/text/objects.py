"""Read the rows of a file as objects: JSON lines, a JSON array, CSV, TSV and Parquet, also compressed. The only place that knows endings."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gptoughts.data.text.rows import MAX_ROW_BYTES, first_line, json_row, missing_field, numbered, open_lines, require
from gptoughts.errors import DataError
from gptoughts.files import MAX_BYTES, parse_json

COMPRESSED = (".gz", ".zst")
PLAIN = {".txt": "text", ".md": "text", ".py": "text", ".rst": "text"}
MOST_DECODED_BYTES = 1 << 30
"""Bytes of Parquet rows that are decoded together."""
ROWS = {".jsonl": "lines", ".ndjson": "lines", ".parquet": "parquet"}
TABLES = {".json": "json", ".csv": "csv", ".tsv": "csv"}
"""Endings of rows that folders of text also have for other reasons, such as settings."""
KINDS = {**PLAIN, **ROWS, **TABLES}
Object = tuple[str, dict[str, Any] | DataError]
"""Location (`file:line`, `file:row` or `file[index]`) and row, or what is wrong with it."""


def ending_of(path: Path) -> str | None:
    """Return the ending of a file in lower case and without compression if it is known, else None."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return next((suffix for suffix in KINDS if name.endswith(suffix)), None)


def is_compressed(path: Path) -> bool:
    """Whether a file is decompressed when read."""
    return path.name.lower().endswith(COMPRESSED)


def objects(path: Path, limit: int = MAX_ROW_BYTES, column: str | None = None) -> Iterator[Object]:
    """Yield every row of a file that holds rows; of Parquet only `column`, if given. Raises DataError for an unreadable file."""
    kind = KINDS[ending_of(path) or ""]
    if kind == "parquet":
        yield from parquet_rows(path, column)
        return
    number = 0
    try:
        with open_lines(path) as lines:
            if kind == "csv":
                yield from csv_rows(lines, path, limit)
                return
            if kind == "json" and (found := array_of(lines, path)) is not None:
                yield from array_rows(found, path)
                return
            for number, line in numbered(lines, str(path), limit):
                if line.strip():
                    yield f"{path}:{number}", row_of(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip after line {number} ({error})", fix="download the file again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read after line {number} ({first_line(error)})") from None


def row_of(line: bytes, where: str) -> dict[str, Any] | DataError:
    """Return one line as a JSON object, or an error."""
    try:
        return json_row(line, where)
    except DataError as error:
        return error


def array_of(lines: IO[bytes], path: Path) -> list[Any] | None:
    """Return the JSON array of a `.json` file; None if it holds JSON lines, which are then not read yet. Raises DataError."""
    head: bytes = lines.peek(1 << 12)[: 1 << 12].removeprefix(b"\xef\xbb\xbf").lstrip()  # type: ignore[attr-defined]
    if head.startswith(b"{") and is_object(head.split(b"\n", 1)[0]):
        return None
    fix = "a list of objects, or JSON lines; a file of another ending is read as plain text"
    content = lines.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DataError(f"{path}: larger than {MAX_BYTES >> 20} MiB", fix="JSON lines (.jsonl), which are read one by one")
    try:
        found = parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: not a JSON array of rows ({first_line(error)})", fix=fix) from None
    if not isinstance(found, list):
        raise DataError(f"{path}: not a JSON array of rows", found=type(found).__name__, fix=fix)
    return found


def is_object(line: bytes) -> bool:
    """Whether a first line can begin a file of JSON lines: a whole object, or the beginning of one that is longer than the look ahead."""
    if len(line) > 2000:
        return True
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        # `{` alone begins an object of several lines; anything longer is a damaged row, which the reader of lines names.
        return line.strip() != b"{"


def array_rows(found: list[Any], path: Path) -> Iterator[Object]:
    """Yield the rows of a JSON array."""
    for number, row in enumerate(found):
        where = f"{path}[{number}]"
        yield where, row if isinstance(row, dict) else DataError(f"{where}: not a JSON object", found=type(row).__name__)


def csv_rows(lines: IO[bytes], path: Path, limit: int) -> Iterator[Object]:
    """Yield the rows of a CSV or TSV file with a header. Raises DataError."""
    csv.field_size_limit(limit)
    delimiter = "\t" if ending_of(path) == ".tsv" else ","
    number = 0
    try:
        with io.TextIOWrapper(lines, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, delimiter=delimiter)
            names = list(reader.fieldnames or [])
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(f"{path}: the header has a column twice", found=repr(twice[0]))
            for row in reader:
                number = reader.line_num
                where = f"{path}:{number}"
                if None in row or None in row.values():
                    yield where, DataError(f"{where}: another number of fields than the header has")
                else:
                    yield where, dict(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV after line {number} ({first_line(error)})") from None


def _rows_at_once(file: Any) -> int:
    """Return how many rows of a Parquet file are decoded together: a small dictionary can hold a long text for every row."""
    groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
    longest = max(
        (group.column(place).total_uncompressed_size for group in groups for place in range(group.num_columns)), default=0
    )
    return max(1, min(1024, MOST_DECODED_BYTES // max(1, longest)))


def parquet_rows(path: Path, column: str | None = None) -> Iterator[Object]:
    """Yield the rows of a Parquet file, read by row groups, with all columns or one of them. Raises DataError."""
    if is_compressed(path):
        raise DataError(f"{path}: Parquet inside a compressed file", fix="decompress it; Parquet compresses its own columns")
    require("pyarrow", "hf", path.name)
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if column is not None and column not in file.schema_arrow.names:
                raise missing_field(column, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=_rows_at_once(file), columns=None if column is None else [column]):
                for content in batch.to_pylist():
                    row += 1
                    yield f"{path}:{row}", content
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read as parquet after row {row} ({first_line(error)})") from None
