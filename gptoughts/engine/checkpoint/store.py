"""Checkpoint files: safetensors and JSON, written in a thread, atomic, hashed and verified. No pickle.

<folder>/step-000100/{model,optimizer,state}.safetensors, state.json, plan.json, recipe.toml, tokenizer/, manifest.json, and beside
them `latest`, which is updated last. A folder without a complete manifest is not a checkpoint.

With sharded weights every rank writes its own part of model and optimizer (`parts.py`) into one folder, which all ranks must see; rank 0
waits for the parts and completes the checkpoint. The threads that write use no collectives.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptoughts.engine.checkpoint.parts import Ranges, file_name, metadata
from gptoughts.errors import CheckpointError
from gptoughts.files import write_text

FORMAT = 1
FORMAT_PARTS = 2
"""Of a checkpoint whose tensors are split over the files of several ranks."""
PART_SECONDS = 1800
"""Limit of rank 0's wait for the part of another rank."""
TEMPORARY = ".writing-"
REPLACED = ".replaced-"
DROPPED = ".dropped-"
ABANDONED = "abandoned-"


@dataclass(frozen=True)
class Snapshot:
    """Content of a checkpoint in host memory, so that training continues while it is written."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File stem -> name -> tensor."""
    documents: Mapping[str, str]
    """File name -> text."""
    folders: Mapping[str, Path]
    """Name in the checkpoint -> folder to copy, such as the tokenizer's."""
    rank: int = 0
    ranks: int = 1
    """Ranks that write a part; 1 if rank 0 holds all tensors."""
    ranges: Mapping[str, Ranges] = field(default_factory=dict)
    """File stem -> ranges of its tensors that are parts."""

    def file(self, stem: str) -> str:
        """Return the name of this rank's file."""
        return file_name(stem, self.rank, self.ranks if stem in self.ranges else 1)


def read_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`. Raises CheckpointError for another format version."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("format") not in (FORMAT, FORMAT_PARTS):
        raise CheckpointError(
            f"{folder}: this version reads formats {FORMAT} and {FORMAT_PARTS}", found=f"format {state.get('format')!r}"
        )
    return dict(state)


def begin(folder: Path, step: int) -> Path:
    """Create the empty temporary folder of a checkpoint, before any rank writes into it."""
    temporary = _temporary(folder, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _temporary(folder: Path, step: int) -> Path:
    return folder / f"{TEMPORARY}{_name(step)}"


def _name(step: int) -> str:
    return f"step-{step:06d}"


def write(snapshot: Snapshot, folder: Path) -> Path:
    """Write `folder`/step-N atomically. Returns its path.

    Writes a temporary folder, syncs and reopens every file, adds a manifest with sizes and SHA-256, renames, then updates `latest`. With
    several ranks `begin` was called before, and this one waits for the parts of the others; raises CheckpointError if one failed.
    """
    final = folder / _name(snapshot.step)
    temporary = begin(folder, snapshot.step) if snapshot.ranks == 1 else _temporary(folder, snapshot.step)
    for name, text in snapshot.documents.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text(text, encoding="utf-8")
    for name, source in snapshot.folders.items():
        shutil.copytree(source, temporary / name)
    own = {
        str(path.relative_to(temporary))
        for name in (*snapshot.documents, *snapshot.folders)
        for path in _files(temporary / name)
    }
    manifest = _hashed(temporary, own) | _write_tensors(snapshot, temporary)
    json.loads((temporary / "state.json").read_text(encoding="utf-8"))
    for rank in range(1, snapshot.ranks):
        manifest |= _wait_for_part(temporary, rank)
    content = {"format": FORMAT, "files": dict(sorted(manifest.items()))}
    (temporary / "manifest.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(temporary / "manifest.json")
    for inner in (path for path in temporary.rglob("*") if path.is_dir()):
        _sync(inner)
    _sync(temporary)
    replaced = folder / f"{REPLACED}{final.name}"
    if final.exists():  # the same step after a resume from an older one; after a kill in between, `clean` restores it
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _sync(folder)
    point(folder / "latest", final.name)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def write_part(snapshot: Snapshot, folder: Path) -> None:
    """Write the files of a rank above 0, then tell rank 0 by a small file, also if that failed."""
    temporary = _temporary(folder, snapshot.step)
    try:
        record: dict[str, Any] = {"files": _write_tensors(snapshot, temporary)}
    except BaseException as error:
        write_text(temporary / _part_name(snapshot.rank), json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    write_text(temporary / _part_name(snapshot.rank), json.dumps(record), durable=True)


def _part_name(rank: int) -> str:
    return f"part-{rank + 1:05d}.json"


def _wait_for_part(temporary: Path, rank: int) -> dict[str, Any]:
    """Return the manifest entries of a rank, when it has written them. Raises CheckpointError if it failed or is late."""
    path, deadline = temporary / _part_name(rank), time.monotonic() + PART_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{temporary}: rank {rank} wrote no part in {PART_SECONDS} s; is the folder on a file system that all nodes share?"
            )
        time.sleep(0.02)
    record = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    if "error" in record:
        raise CheckpointError(f"{temporary}: rank {rank} could not write its part: {record['error']}")
    return dict(record["files"])


def _write_tensors(snapshot: Snapshot, folder: Path) -> dict[str, Any]:
    """Write, sync and reopen the safetensors files of a rank. Returns their manifest entries."""
    for stem, tensors in snapshot.tensors.items():
        path = folder / snapshot.file(stem)
        save_file(dict(tensors), path, metadata=metadata(snapshot.ranges.get(stem, {})))
    manifest = _hashed(folder, [snapshot.file(stem) for stem in snapshot.tensors])
    for stem, tensors in snapshot.tensors.items():
        path = folder / snapshot.file(stem)
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(tensors):
                raise CheckpointError(f"{path}: tensor names differ from those written")
    return manifest


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())


def _hashed(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Sync files. Returns name -> size and SHA-256."""
    for name in names:
        _sync(folder / name)
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def point(pointer: Path, name: str) -> None:
    """Write a small file that names a checkpoint."""
    write_text(pointer, name + "\n", durable=True)


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint folder; an empty string if it is intact."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        return "manifest.json is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "manifest.json is not readable"
    for name, expected in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"manifest.json lists {name}, outside the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{name} has another SHA-256 than when written"
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                file.keys()
    except SafetensorError as error:
        return f"not a safetensors file: {error}"
    return ""


def all_steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first, damaged ones included."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint of a run, or None, and a line for each newer damaged one."""
    skipped: list[str] = []
    for path in all_steps(folder):
        why = damage(path)
        if not why:
            return path, skipped
        skipped.append(f"{path}: damaged, skipped: {why}")
    return None, skipped


def locate(path: Path) -> Path:
    """Return `path` if it is a checkpoint folder, else the newest intact one of the run folder. Raises CheckpointError."""
    if (path / "manifest.json").is_file() or (path / "model.safetensors").is_file():
        why = damage(path)
        if why:
            raise CheckpointError(f"{path}: damaged: {why}", fix="another checkpoint in the same folder")
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


def best(folder: Path) -> tuple[str, float] | None:
    """Return name and validation loss of the best checkpoint, or None."""
    try:
        noted = json.loads((folder / "best").read_text(encoding="utf-8"))
        return str(noted["checkpoint"]), float(noted["val_loss"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def clean(folder: Path) -> None:
    """Remove a killed writer's leftovers, and restore the checkpoint that it was about to replace."""
    for path in folder.glob(f"{REPLACED}*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():
            path.rename(final)
    for path in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{REPLACED}*"), *folder.glob(f"{DROPPED}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
