"""Find the readable files of a folder: links are followed, each file is read once, and all others are counted by kind."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from gptoughts.data.text.objects import PLAIN, TABLES, ending_of
from gptoughts.errors import DataError

HIDDEN, BROKEN, TWICE = "hidden", "broken links", "links to files that are read anyway"


def folder_files(root: Path, follow: bool = True) -> tuple[list[Path], Counter[str]]:
    """Return the readable files below `root`, sorted by relative path, and the number of other entries by kind.

    `.json`, `.csv` and `.tsv` are read only where no file of another readable ending exists: beside text they are mostly settings.
    Raises DataError for a folder that cannot be read, and for a link that leads back to a folder above it.
    """
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    _walk(root, frozenset(), follow, found, skipped)
    tables = [path for path in found if ending_of(path) in TABLES]
    if len(tables) < len(found):
        skipped.update(f"*{ending_of(path)}" for path in tables)
        found = [path for path in found if ending_of(path) not in TABLES]
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    if not follow:
        return found, skipped
    # The file itself comes before links to it.
    places = {path: os.path.realpath(path) for path in found}
    first: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: path.is_symlink()):
        first.setdefault(places[path], path)
    once = [path for path in found if first[places[path]] == path]
    skipped.update({TWICE: len(found) - len(once)} if len(once) < len(found) else {})
    return once, skipped


def _walk(folder: Path, above: frozenset[tuple[int, int]], follow: bool, found: list[Path], skipped: Counter[str]) -> None:
    """Append the readable files of a folder and of those below it; `above` are the folders on the way from the root."""
    try:
        state = os.stat(folder)
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror})", fix="remove it, or a glob of the files to read"
        ) from None
    here = (state.st_dev, state.st_ino)
    if here in above:
        raise DataError(
            f"{folder}: a link that leads back to a folder above it", found=os.path.realpath(folder), fix="remove it"
        )
    for entry in entries:
        path = Path(folder, entry.name)
        if entry.name.startswith("."):
            skipped[HIDDEN] += 1
        elif entry.is_symlink() and (not follow or not path.exists()):
            skipped[BROKEN if follow else "links"] += 1
        elif entry.is_dir():
            _walk(path, above | {here}, follow, found, skipped)
        elif not entry.is_file():
            skipped["devices and pipes"] += 1
        elif ending_of(path) is None:
            skipped[f"*{path.suffix.lower()}" if path.suffix else "without an ending"] += 1
        else:
            found.append(path)


def is_plain(path: Path) -> bool:
    """Whether a file is one document and not compressed."""
    return path.name.lower().endswith(tuple(PLAIN))
