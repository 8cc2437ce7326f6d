"""Checkpoints: safetensors and JSON, written off the training path, atomic, hashed, reopened before they count. No pickle.

<folder>/step-000100/{model,optimizer,state}.safetensors, state.json, plan.json, recipe.toml, tokenizer/, manifest.json, and beside
them `latest`, which moves last. A folder without a whole manifest is not a checkpoint.
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

FORMAT = 1
TEMPORARY = ".writing-"
REPLACED = ".replaced-"
DROPPED = ".dropped-"
ABANDONED = "abandoned-"


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds, copied to host memory, so that training goes on while it is written."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File stem -> name -> tensor."""
    documents: Mapping[str, str]
    """File name -> text."""
    folders: Mapping[str, Path]
    """Name in the checkpoint -> folder to copy, such as the tokenizer's."""


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises CheckpointError for one of another format."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: format {state.get('format')!r}, this version reads {FORMAT}")
    return dict(state)


def write(snapshot: Snapshot, folder: Path) -> Path:
    """Write `folder`/step-N so that it is there whole or not at all. Returns its path.

    Temporary folder, every file synced and reopened, manifest with sizes and SHA-256, rename, then `latest`.
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
    if (
        final.exists()
    ):  # the same step again, after a resume from an older one; `clean` brings it back if a kill falls in between
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
                raise CheckpointError(f"{folder / stem}.safetensors was written and holds other names")
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
    temporary = pointer.with_name(f"{TEMPORARY}{pointer.name}")
    temporary.write_text(name + "\n", encoding="utf-8")
    _sync(temporary)
    temporary.replace(pointer)
    _sync(pointer.parent)


def damage(folder: Path) -> str:
    """Why `folder` is not a whole checkpoint; empty where it is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        return "manifest.json is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "manifest.json cannot be read"
    for name, expected in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"manifest.json names {name}, outside the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
        if _sha256(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                file.keys()
    except SafetensorError as error:
        return f"a tensor file cannot be opened: {error}"
    return ""


def all_steps(folder: Path) -> list[Path]:
    """Checkpoints of a run, newest first, whole or not."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a line for each newer one that is damaged."""
    skipped: list[str] = []
    for path in all_steps(folder):
        why = damage(path)
        if not why:
            return path, skipped
        skipped.append(f"{path} is damaged: {why}; skipped")
    return None, skipped


def locate(path: Path) -> Path:
    """The checkpoint that `path` means: a checkpoint folder, or the newest whole one of a run's folder. Raises CheckpointError."""
    if (path / "manifest.json").is_file() or (path / "model.safetensors").is_file():
        why = damage(path)
        if why:
            raise CheckpointError(f"{path} is damaged: {why}\n  try: another checkpoint beside it")
        return path
    for folder in (path, path / "checkpoints"):
        if not folder.is_dir():
            continue
        found, skipped = newest(folder)
        if found:
            return found
        if skipped:
            raise CheckpointError("no whole checkpoint\n  " + "\n  ".join(skipped))
    raise CheckpointError(f"no checkpoint in {path}\n  try: checkpoints/RUN, or a folder checkpoints/RUN/step-000100")


class Writer:
    """Writes snapshots in a thread, one at a time, and keeps the newest `keep` and the best."""

    def __init__(self, folder: Path, keep: int, keep_best: bool) -> None:
        self.folder, self._keep, self._keep_best = folder, keep, keep_best
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot, val_loss: float | None = None) -> None:
        """Start writing. Waits for the one before; raises CheckpointError if that one failed."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot, val_loss), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until what was saved is on disk. Raises CheckpointError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder}: {error}\n  the one before is whole"
            ) from error

    def _write(self, snapshot: Snapshot, val_loss: float | None) -> None:
        try:
            path = write(snapshot, self.folder)
            self._set_aside(path)
            self._note_best(path, val_loss)
            self._drop_old()
        except BaseException as error:
            self._error = error

    def _set_aside(self, written: Path) -> None:
        """Checkpoints of later steps are damaged, or of a branch that was left: resuming must not find them, and nothing is lost."""
        for path in all_steps(self.folder):
            if _step_of(path) > _step_of(written):
                aside = path.with_name(f"{ABANDONED}{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

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
                doomed = path.with_name(f"{DROPPED}{path.name}")
                path.rename(doomed)  # first out of sight, so that a kill leaves no half checkpoint under a good name
                shutil.rmtree(doomed)


def best(folder: Path) -> tuple[str, float] | None:
    """Name and validation loss of the best checkpoint, if one was noted."""
    try:
        noted = json.loads((folder / "best").read_text(encoding="utf-8"))
        return str(noted["checkpoint"]), float(noted["val_loss"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def clean(folder: Path) -> None:
    """Remove what a killed writer left behind, and bring back what it was about to replace."""
    for path in folder.glob(f"{REPLACED}*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():
            path.rename(final)
    for path in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{REPLACED}*"), *folder.glob(f"{DROPPED}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
