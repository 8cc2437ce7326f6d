"""Checkpoint files: safetensors and JSON, written in a thread, atomic, hashed and verified. No pickle.

<folder>/step-000100/{model,optimizer,state}.safetensors, state.json, plan.json, recipe.toml, tokenizer/, manifest.json, and beside
them `latest`, which is updated last. A folder without a complete manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptoughts.errors import CheckpointError
from gptoughts.files import write_text

FORMAT = 1
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


def read_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`. Raises CheckpointError for another format version."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: this version reads format {FORMAT}", found=f"format {state.get('format')!r}")
    return dict(state)


def write(snapshot: Snapshot, folder: Path) -> Path:
    """Write `folder`/step-N atomically. Returns its path.

    Writes a temporary folder, syncs and reopens every file, adds a manifest with sizes and SHA-256, renames, then updates `latest`.
    """
    final = folder / f"step-{snapshot.step:06d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for stem, tensors in snapshot.tensors.items():
        save_file(dict(tensors), temporary / f"{stem}.safetensors", metadata={"format": "pt"})
    for name, text in snapshot.documents.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text(text, encoding="utf-8")
    for name, source in snapshot.folders.items():
        shutil.copytree(source, temporary / name)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    manifest = {str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    _reopen(temporary, snapshot)
    (temporary / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": manifest}, indent=1), encoding="utf-8")
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
    _point(folder / "latest", final.name)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _reopen(folder: Path, snapshot: Snapshot) -> None:
    for stem, tensors in snapshot.tensors.items():
        with safe_open(folder / f"{stem}.safetensors", framework="pt") as file:
            if set(file.keys()) != set(tensors):
                raise CheckpointError(f"{folder / stem}.safetensors: tensor names differ from those written")
    json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _point(pointer: Path, name: str) -> None:
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
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
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


class Writer:
    """Checkpoint writer: one snapshot at a time in a thread; keeps the newest `keep` checkpoints and the best one."""

    def __init__(self, folder: Path, keep: int, keep_best: bool) -> None:
        self.folder, self._keep, self._keep_best = folder, keep, keep_best
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot, val_loss: float | None = None) -> None:
        """Start writing. Waits for the write before; raises CheckpointError if that one failed."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot, val_loss), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the snapshot is on disk. Raises CheckpointError if writing failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"{self.folder}: writing a checkpoint failed: {error}; the previous one is intact") from error

    def _write(self, snapshot: Snapshot, val_loss: float | None) -> None:
        try:
            path = write(snapshot, self.folder)
            self._abandon_later(path)
            self._note_best(path, val_loss)
            self._drop_old()
        except BaseException as error:
            self._error = error

    def _abandon_later(self, written: Path) -> None:
        """Rename checkpoints of later steps, which are damaged or of an abandoned branch, so that resuming does not find them."""
        for path in all_steps(self.folder):
            if _step_of(path) > _step_of(written):
                target = path.with_name(f"{ABANDONED}{path.name}")
                shutil.rmtree(target, ignore_errors=True)
                path.rename(target)

    def _note_best(self, path: Path, val_loss: float | None) -> None:
        if val_loss is None or not math.isfinite(val_loss):
            return
        before = best(self.folder)
        if before is not None and not (self.folder / before[0]).is_dir():
            before = None
        if before is None or val_loss < before[1]:
            _point(self.folder / "best", json.dumps({"checkpoint": path.name, "val_loss": val_loss}))

    def _drop_old(self) -> None:
        chosen = best(self.folder) if self._keep_best else None
        for path in all_steps(self.folder)[self._keep :]:
            if chosen is None or path.name != chosen[0]:
                target = path.with_name(f"{DROPPED}{path.name}")
                path.rename(target)  # renamed first, so that a kill leaves no half-deleted checkpoint
                shutil.rmtree(target)


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
