"""Find the newest intact checkpoint: every file against the manifest, the manifest itself, and values that are not finite.

A file that cannot be read is tried again, because network disks fail for moments. Nothing is renamed or removed here: a checkpoint that
is skipped stays. It counts again when it can be read, until a run saves at an earlier step, which renames it to `abandoned-step-N`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from gptoughts.engine.checkpoint.finite import not_finite_in
from gptoughts.engine.checkpoint.store import MANIFEST, STATE, all_steps, step_of
from gptoughts.errors import CheckpointError
from gptoughts.files import load_json, sha256_of

Result = TypeVar("Result")
ATTEMPTS = 3
PAUSE_SECONDS = 0.2
MOST_BYTES = 64 << 20
"""Largest manifest and state.json that are parsed."""


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint folder, or why it cannot be read; an empty string if it is intact."""
    return _check(folder)[1]


def problem(path: Path) -> str:
    """Return a line about a checkpoint that must be skipped, an empty string for an intact one."""
    state, why = _check(path)
    return f"{path}: {state}, skipped: {why}" if why else ""


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint of a run, or None, and a line for each newer one that is damaged or unreadable."""
    skipped: list[str] = []
    for path in all_steps(folder):
        line = problem(path)
        if not line:
            return path, skipped
        skipped.append(line)
    return None, skipped


def locate(path: Path) -> Path:
    """Return `path` if it is a checkpoint folder, else the newest intact one of the run folder. Raises CheckpointError."""
    if (path / MANIFEST).is_file() or (path / "model.safetensors").is_file():
        state, why = _check(path)
        if why:
            raise CheckpointError(f"{path}: {state}: {why}", fix="another checkpoint in the same folder")
        return path
    for folder in (path, path / "checkpoints"):
        if not folder.is_dir():
            continue
        found, skipped = newest(folder)
        if found:
            return found
        if skipped:
            raise CheckpointError(f"{folder}: no intact checkpoint\n  " + "\n  ".join(skipped))
    raise CheckpointError(f"{path}: no checkpoint", fix="checkpoints/RUN, or a folder checkpoints/RUN/step-000100")


def retried(read: Callable[[Path], Result], folder: Path) -> Result:
    """Return `read(folder)`, tried `ATTEMPTS` times, with pauses, while the disk fails. Raises the last OSError."""
    for _ in range(ATTEMPTS - 1):
        try:
            return read(folder)
        except OSError:
            time.sleep(PAUSE_SECONDS)
    return read(folder)


def cause(error: OSError) -> str:
    """Return `FILE: reason` of a read that failed."""
    return f"{Path(error.filename).name if isinstance(error.filename, str) else 'a file'}: {error.strerror or error}"


def _check(folder: Path) -> tuple[str, str]:
    """Return ("damaged" or "unreadable", reason), two empty strings for an intact checkpoint."""
    try:
        why = retried(_damage, folder)
    except OSError as error:
        return "unreadable", cause(error)
    return ("damaged" if why else "", why)


def _damage(folder: Path) -> str:
    try:
        files = _listed(load_json(folder / MANIFEST, MOST_BYTES))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError) as error:
        return f"{MANIFEST} is not readable: {str(error)[:200]}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if sha256_of(path) != digest:
            return f"{name} has another SHA-256 than when written"
    extra = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in files)
    if extra:
        return f"{extra[0]} is not in {MANIFEST}"
    return _content_damage(folder)


def _listed(manifest: Any) -> dict[str, tuple[int, str]]:
    """Return name -> (size, SHA-256) of a manifest. Raises ValueError for content that does not describe a checkpoint."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    found = {}
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"it lists {name[:80]!r}, outside the checkpoint")
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise ValueError(f"it has no size and SHA-256 of {name[:80]!r}")
        found[name] = size, digest
    if STATE not in found:
        raise ValueError(f"it does not list {STATE}")
    return found


def _content_damage(folder: Path) -> str:
    """Return what is wrong with files whose hashes are right: another step's state, a file that is not safetensors, NaN."""
    try:
        state = load_json(folder / STATE, MOST_BYTES)
    except ValueError as error:
        return f"{STATE} is not readable: {str(error)[:200]}"
    if not isinstance(state, dict):
        return f"{STATE} is not a mapping"
    if not isinstance(state.get("buffers"), list | None):
        return f"{STATE} has no list of buffers"
    if folder.name.removeprefix("step-").isdecimal() and state.get("step", step_of(folder)) != step_of(folder):
        return f"{STATE} is of step {state['step']!r:.80}"
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                file.keys()
        return not_finite_in(folder, state)
    except (SafetensorError, CheckpointError) as error:
        return str(error)
