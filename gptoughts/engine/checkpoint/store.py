"""Checkpoint files: safetensors and JSON, written in a thread, atomic, hashed and verified. No pickle.

<folder>/step-000100/{model,optimizer,state}.safetensors, state.json, plan.json, recipe.toml, tokenizer/, manifest.json, and beside
them `latest`, which is updated last. A folder without a complete manifest is not a checkpoint.

With sharded weights every rank writes its own part of model and optimizer (`parts.py`) into one folder, which all ranks must see; rank 0
waits for the parts and completes the checkpoint. The threads that write use no collectives.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptoughts.console import LOGGER, redacted
from gptoughts.engine.checkpoint.finite import not_finite_of
from gptoughts.engine.checkpoint.parts import Ranges, file_name, metadata
from gptoughts.errors import CheckpointError
from gptoughts.files import first_link, load_json, make_private, sha256_of, write_text

FORMAT = 1
FORMAT_PARTS = 2
"""Of a checkpoint whose tensors are split over the files of several ranks."""
PART_SECONDS = 1800
"""Limit of rank 0's wait for the part of another rank."""
COPIED = ("tokenizer.json", "gptoughts_tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files that tokenizers and chat templates write; whatever else is in a tokenized folder may be private."""
MANIFEST, STATE = "manifest.json", "state.json"
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
    """Return a checkpoint's `state.json`. Raises CheckpointError for a file that cannot be read, and for another format version."""
    try:
        return load_state(folder)
    except OSError as error:
        raise CheckpointError(f"{folder / STATE}: cannot be read ({error})", fix="an earlier checkpoint") from None


def load_state(folder: Path) -> dict[str, Any]:
    """Return what `read_state` returns. Raises OSError where the disk fails, which may pass, and CheckpointError for the content."""
    try:
        state = load_json(folder / STATE)
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE}: cannot be read ({error})", fix="an earlier checkpoint") from None
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, FORMAT_PARTS):
        raise CheckpointError(
            f"{folder}: this version reads formats {FORMAT} and {FORMAT_PARTS}",
            found=f"format {state.get('format') if isinstance(state, dict) else state!r:.80}",
        )
    return dict(state)


def begin(folder: Path, step: int, ranks: int = 1) -> Path:
    """Create the temporary folder of a checkpoint, before any rank writes into it, with a marker for every other rank that will write."""
    temporary = _temporary(folder, step)
    shutil.rmtree(temporary, ignore_errors=True)
    make_private(folder)
    temporary.mkdir()
    try:
        for rank in range(1, ranks):
            (temporary / _marker(rank)).touch()
    except OSError:
        _free(temporary)
        raise
    return temporary


def _temporary(folder: Path, step: int) -> Path:
    return folder / f"{TEMPORARY}{_name(step)}"


def _name(step: int) -> str:
    return f"step-{step:06d}"


def write(snapshot: Snapshot, folder: Path) -> Path:
    """Write `folder`/step-N atomically. Returns its path.

    Writes a temporary folder, syncs and reopens every file, adds a manifest with sizes and SHA-256, renames, then updates `latest`. With
    several ranks `begin` was called before, and this one waits for the parts of the others. Raises OSError, SafetensorError, or
    CheckpointError if another rank failed; then the temporary folder is gone and a checkpoint of the same step is where it was.
    """
    final = folder / _name(snapshot.step)
    temporary, replaced = _temporary(folder, snapshot.step), folder / f"{REPLACED}{final.name}"
    try:
        if snapshot.ranks == 1:
            begin(folder, snapshot.step)
        _fill(snapshot, temporary)
        if final.exists():  # the same step after a resume from an older one; after a kill in between, `clean` restores it
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        _sync(folder)
    except Exception:
        _free(temporary)
        with suppress(OSError):
            if replaced.exists() and not final.exists():
                replaced.rename(final)
        raise
    try:
        point(folder / "latest", final.name)
    except OSError as error:  # the checkpoint is complete without it
        LOGGER.warning("%s: not updated: %s", folder / "latest", error)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _free(temporary: Path) -> None:
    """Remove a checkpoint that failed. It is renamed first, because another rank may still write into it and would add files meanwhile."""
    dropped = temporary.with_name(f"{DROPPED}{temporary.name.lstrip('.')}")
    try:
        temporary.rename(dropped)
    except OSError:
        dropped = temporary
    shutil.rmtree(dropped, ignore_errors=True)


def _fill(snapshot: Snapshot, temporary: Path) -> None:
    """Write all files of a checkpoint into its temporary folder, the manifest last."""
    for name, text in snapshot.documents.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text(text, encoding="utf-8")
    for name, source in snapshot.folders.items():
        _copy_folder(source, temporary / name)
    own = {
        str(path.relative_to(temporary))
        for name in (*snapshot.documents, *snapshot.folders)
        for path in _files(temporary / name)
    }
    manifest = _hashed(temporary, own) | _write_tensors(snapshot, temporary)
    json.loads((temporary / STATE).read_text(encoding="utf-8"))
    for rank in range(1, snapshot.ranks):
        manifest |= _wait_for_part(temporary, rank)
    content = {"format": FORMAT, "files": dict(sorted(manifest.items()))}
    (temporary / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(temporary / MANIFEST)
    for inner in (path for path in temporary.rglob("*") if path.is_dir()):
        _sync(inner)
    _sync(temporary)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer's folder, no others. Raises CheckpointError for a link, which can lead to any file of this machine."""
    link = first_link(source)
    if link is not None:
        raise CheckpointError(f"{link}: is a link, which a checkpoint does not follow", fix="a copy of the file in its place")
    target.mkdir()
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_part(snapshot: Snapshot, folder: Path) -> None:
    """Write the files of a rank above 0, then tell rank 0 by a small file.

    After a failure the rank's marker is removed, too, because that needs no space on a full disk.
    """
    temporary = _temporary(folder, snapshot.step)
    record = temporary / _part_name(snapshot.rank)
    try:
        write_text(record, json.dumps({"files": _write_tensors(snapshot, temporary)}), durable=True)
    except BaseException as error:
        with suppress(OSError):
            write_text(record, json.dumps({"error": redacted(f"{type(error).__name__}: {error}")}))
        with suppress(OSError):
            (temporary / _marker(snapshot.rank)).unlink(missing_ok=True)
        raise


def _part_name(rank: int) -> str:
    return f"part-{rank + 1:05d}.json"


def _marker(rank: int) -> str:
    return f"part-{rank + 1:05d}.expected"


def _wait_for_part(temporary: Path, rank: int) -> dict[str, Any]:
    """Return the manifest entries of a rank, when it has written them. Raises CheckpointError if it failed or is late."""
    path, marker, deadline = temporary / _part_name(rank), temporary / _marker(rank), time.monotonic() + PART_SECONDS
    while marker.exists() and not path.is_file():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{temporary}: rank {rank} wrote no part in {PART_SECONDS} s; is the folder on a file system that all nodes share?"
            )
        time.sleep(0.02)
    if not path.is_file():
        raise CheckpointError(f"{temporary}: rank {rank} could not write its part")
    record = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    marker.unlink(missing_ok=True)
    if "error" in record:
        raise CheckpointError(f"{temporary}: rank {rank} could not write its part: {record['error']}")
    return dict(record["files"])


def _write_tensors(snapshot: Snapshot, folder: Path) -> dict[str, Any]:
    """Write, sync and reopen the safetensors files of a rank. Returns their manifest entries.

    Raises CheckpointError for values with which no run would resume.
    """
    state = json.loads(snapshot.documents[STATE]) if STATE in snapshot.documents else {}
    wrong = not_finite_of(snapshot.tensors, state.get("buffers", ()))
    if wrong:
        raise CheckpointError(f"{folder}: {wrong}")
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
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point(pointer: Path, name: str) -> None:
    """Write a small file that names a checkpoint."""
    write_text(pointer, name + "\n", durable=True)


def all_steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first, damaged ones included."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(path.name.removeprefix("step-"))


def best(folder: Path) -> tuple[str, float] | None:
    """Return name and validation loss of the best checkpoint, or None where none is noted or the note is damaged."""
    try:
        noted = load_json(folder / "best")
        name, loss = str(noted["checkpoint"]), float(noted["val_loss"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return (name, loss) if Path(name).name == name and math.isfinite(loss) else None


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
