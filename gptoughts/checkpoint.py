"""Checkpoints: safetensors and JSON, written off the training path, atomic, hashed, reopened before they count. No pickle.

<folder>/step-000100/{model,optimizer,state}.safetensors, state.json, plan.json, recipe.toml, tokenizer/, manifest.json, and beside
them `latest`, which moves last. A folder without a whole manifest is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptoughts.engine import Engine
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


def snapshot(
    engine: Engine, step: int, state: Mapping[str, Any], documents: Mapping[str, str], folders: Mapping[str, Path]
) -> Snapshot:
    """Copy weights, optimiser, generators and layers' memory. `state` is the caller's own JSON, kept under `run`."""
    weights = {name: _host(parameter) for name, parameter in engine.bare.named_parameters()}
    weights |= {name: _host(buffer) for name, buffer in _persistent_buffers(engine)}
    moments, numbers = _optimizer_state(engine)
    extras, plain = _extras(engine)
    generators, words = _generators(engine.device)
    written = {"format": FORMAT, "step": step, "run": dict(state), "optimizer": numbers, "layers": plain, "generators": words}
    return Snapshot(
        step,
        {"model": weights, "optimizer": moments, "state": {**extras, **generators}},
        {**documents, "state.json": json.dumps(written, indent=1)},
        folders,
    )


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _persistent_buffers(engine: Engine) -> list[tuple[str, Tensor]]:
    held = engine.bare.state_dict().keys()
    return [(name, buffer) for name, buffer in engine.bare.named_buffers() if name in held]


def _names(engine: Engine) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.bare.named_parameters()}


def _optimizer_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if engine.optimizer is None:
        return {}, {}
    names = _names(engine)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, values in engine.optimizer.state.items():
        for key, value in values.items():
            place = f"{names[id(parameter)]}/{key}"
            if isinstance(value, Tensor):
                tensors[place] = _host(value)
            else:
                numbers[place] = value
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        | {"params": [names[id(p)] for p in group["params"]]}
        for group in engine.optimizer.param_groups
    ]
    return tensors, {"values": numbers, "groups": groups}


def _extras(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for layer, stateful in engine.extras.items():
        for key, value in stateful.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"layer/{layer}/{key}"] = _host(value)
            else:
                plain.setdefault(layer, {})[key] = value
    return tensors, plain


def _generators(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"generator/torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["generator/cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    words = {
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }
    return tensors, words


def restore(engine: Engine, folder: Path) -> dict[str, Any]:
    """Give the engine the optimiser, generators and layers' memory of a checkpoint. Returns the caller's own state.

    Weights came earlier, through `materialise(Weights(folder))`. Raises CheckpointError where the optimiser does not fit.
    """
    state = read_state(folder)
    _restore_optimizer(engine, _tensors(folder / "optimizer.safetensors"), state["optimizer"], folder)
    kept = _tensors(folder / "state.safetensors")
    for layer, stateful in engine.extras.items():
        prefix = f"layer/{layer}/"
        mine = {key.removeprefix(prefix): value for key, value in kept.items() if key.startswith(prefix)}
        stateful.load_state_dict({**mine, **state["layers"].get(layer, {})})
    if not engine.ranks.first:
        return dict(state["run"])  # the first rank's generators were saved; the others were seeded by rank and step
    torch.set_rng_state(kept["generator/torch"])
    if engine.device.type == "cuda" and "generator/cuda" in kept:
        torch.cuda.set_rng_state(kept["generator/cuda"], engine.device)
    kind, keys, position, has_gauss, gauss = state["generators"]["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["generators"]["python"]
    random.setstate((version, tuple(internal), gauss_next))
    return dict(state["run"])


def _restore_optimizer(engine: Engine, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], folder: Path) -> None:
    if engine.optimizer is None or not numbers:
        return
    held = {place.rpartition("/")[0] for place in [*tensors, *numbers["values"]]}
    here = _names(engine)
    missing = held - set(here.values())
    if missing:
        raise CheckpointError(f"{folder}: the optimiser holds {', '.join(sorted(missing)[:5])}, which this model does not have")
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            name = here[id(parameter)]
            values = {
                place.rpartition("/")[2]: value
                for place, value in numbers["values"].items()
                if place.rpartition("/")[0] == name
            }
            for place, tensor in tensors.items():
                if place.rpartition("/")[0] == name:
                    # Fused AdamW keeps its step counter on the device, the plain loop on the host.
                    on_host = tensor.dim() == 0 and not group.get("fused")
                    values[place.rpartition("/")[2]] = tensor if on_host else tensor.to(parameter.device)
            if values:
                engine.optimizer.state[parameter] = values


class Weights:
    """The weights of a checkpoint as a source for `materialise`."""

    def __init__(self, folder: Path) -> None:
        self._file = safe_open(folder / "model.safetensors", framework="pt")
        self._left = set(self._file.keys())

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The saved value of `name`, or None."""
        if name not in self._file.keys():  # noqa: SIM118  # not a dict
            return None
        self._left.discard(name)
        return self._file.get_tensor(name)

    def buffer(self, name: str) -> Tensor | None:
        """The saved value of a persistent buffer, or None."""
        return self.tensor(name, torch.Size())

    def unused(self) -> list[str]:
        """Names that nobody asked for."""
        return sorted(self._left)


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict


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
