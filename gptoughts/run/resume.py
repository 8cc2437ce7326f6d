"""Find the checkpoint to resume from, and list what has changed since it was written (old | new)."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptoughts.config.loader import Resolved
from gptoughts.console import redacted
from gptoughts.data.batches import Cursor
from gptoughts.engine.checkpoint import integrity, store
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.oom import read_reduced
from gptoughts.engine.trainer import Progress
from gptoughts.errors import CheckpointError, DataError, RunError, ToldElsewhere
from gptoughts.planning.resolve import Plan
from gptoughts.run.tracking.run_dir import RunFolder

HARMLESS = (
    "note",
    "name",
    "log.every",
    "eval.every",
    "eval.batches",
    "eval.tasks",
    "eval.task_limit",
    "eval.task_data",
    "save.every",
    "save.keep",
    "save.keep_best",
    "save.failures",
    "data.path",
    "data.cache",
)
"""Recipe keys that do not affect the next steps' numbers. A different corpus is detected by its own fingerprint."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from, and the run state stored in it."""

    folder: Path
    state: Mapping[str, Any]

    @property
    def progress(self) -> Progress:
        """Return the progress at that checkpoint."""
        saved = self.state["progress"]
        return Progress(saved["step"], saved["tokens"], saved["seconds"], Cursor.from_json(saved["cursor"]))


def find(folder: RunFolder, resume: str) -> tuple[ResumePoint | None, list[str]]:
    """Return the checkpoint to resume from, and a line per damaged one. `resume` is auto, never, or a checkpoint's folder.

    Raises RunError if `never` would overwrite checkpoints, CheckpointError if none of the checkpoints is intact.
    """
    if resume not in ("auto", "never"):
        path = integrity.locate(Path(resume))
        try:
            point = read_point(path)
        except OSError as error:
            point = integrity.cause(error)
        if isinstance(point, str):
            raise CheckpointError(f"{path}: cannot be resumed from: {point}", fix="another checkpoint")
        return point, []
    there = store.all_steps(folder.checkpoints)
    if resume == "never":
        if there:
            raise RunError(
                f"--resume never: would overwrite checkpoints in {folder.checkpoints}",
                found=f"{len(there)} checkpoints",
                fix="--name with a new name",
            )
        return None, []
    if not there:
        return None, []
    skipped: list[str] = []
    for point in _candidates(there, skipped):
        return point, skipped
    raise CheckpointError(
        f"{folder.checkpoints}: no intact checkpoint to resume from\n  " + "\n  ".join(skipped),
        fix="--name with a new name, to start over",
    )


def _candidates(there: Iterable[Path], skipped: list[str]) -> Iterator[ResumePoint]:
    """Yield the checkpoints that a run can resume from; append a line to `skipped` for every other one."""
    for path in there:
        line = integrity.problem(path)
        try:
            point = line or read_point(path)
        except OSError as error:  # the check has read the same file a moment before
            point = line = f"{path}: unreadable, skipped: {integrity.cause(error)}"
        if isinstance(point, ResumePoint):
            yield point
        else:
            skipped.append(line or f"{path}: damaged, skipped: {point}")


def read_point(folder: Path) -> ResumePoint | str:
    """Return the resume point of an intact checkpoint, or which field of its state.json is missing or of another type.

    Raises OSError where the disk fails several times, CheckpointError for another format version.
    """
    state = integrity.retried(store.load_state, folder)
    for key in ("run", "optimizer", "layers", "generators"):
        if not isinstance(state.get(key), dict):
            return f"state.json has no mapping {key!r}"
    optimizer = state["optimizer"]
    if optimizer:
        if not isinstance(optimizer.get("values"), dict) or not isinstance(optimizer.get("made_by", {}), dict):
            return "state.json: optimizer.values or optimizer.made_by is not a mapping"
        groups = optimizer.get("groups", [])
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            return "state.json: optimizer.groups is not a list of mappings"
    if not all(isinstance(values, dict) for values in state["layers"].values()):
        return "state.json: layers has an entry that is not a mapping"
    run, generators = {"circumstances": {}, **state["run"]}, state["generators"]
    if not isinstance(run["circumstances"], dict) or not isinstance(run["circumstances"].get("recipe", {}), dict):
        return "state.json: circumstances is not a mapping"
    point = ResumePoint(folder, run)
    try:
        reached = point.progress
        numbers = [reached.step, reached.tokens, reached.seconds]
        if not all(isinstance(number, int | float) for number in numbers) or not {"numpy", "python"} <= set(generators):
            raise ValueError("progress or generators")
    except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
        return f"state.json: a field is missing or of another type ({type(error).__name__}: {error})"
    return point


def find_on_rank_0(folder: RunFolder, resume: str, ranks: Ranks) -> tuple[ResumePoint | None, list[str]]:
    """Return what `find` returns on rank 0, on every rank: one rank reads and hashes the files. A collective.

    Raises what `find` raises on rank 0, ToldElsewhere on the others; CheckpointError on a rank that does not see the folder.
    """
    point: ResumePoint | None = None
    skipped: list[str] = []
    failure: Exception | None = None
    if ranks.first:
        try:
            point, skipped = find(folder, resume)
        except Exception as error:
            failure = error
    if ranks.any(failure is not None):
        raise failure or ToldElsewhere
    name = ranks.texts(str(point.folder.absolute()) if point else "-")[0]
    if ranks.first or name == "-":
        return point, skipped
    path = Path(name)
    if not (path / "state.json").is_file():
        raise CheckpointError(f"{path}: rank 0 resumes from it, rank {ranks.world.rank} does not see it")
    try:
        found = read_point(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: rank 0 reads it, rank {ranks.world.rank} does not", found=integrity.cause(error)
        ) from None
    assert isinstance(found, ResumePoint)  # rank 0 read the same file
    return found, []


def fingerprint(resolved: Resolved, plan: Plan, rows: int) -> dict[str, Any]:
    """Return everything that must be equal for a resumed run to continue bit for bit."""
    values = {key: value for key, value in resolved.saved_values().items() if not key.startswith("track.")}
    here = {
        "layers": {choice.slot: [choice.layer, dict(choice.options)] for choice in plan.choices},
        "machine": plan.machine,
        "world_size": plan.world_size,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    return {"recipe": {**values, "rows": rows}, **redacted(here)}


def check_shape(point: ResumePoint, now: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the checkpoint holds a model of a different shape."""
    apart = (
        "model.dropout",
        "model.path",
        "model.config",
        "model.remote_code",
    )  # the point of the initial weights does not matter any more
    shape = ["rows", *(key for key in now["recipe"] if key.startswith("model.") and key not in apart)]
    shape += [f"adapter.{key}" for key in ("kind", "rank", "alpha", "targets", "base")]
    shape += ["seed"] if now["recipe"].get("adapter.kind") == "pissa" else []  # its base weights are split by random draws
    if now["recipe"].get("model.positions") == "learned":
        shape.append("data.sequence_length")
    old = point.state["circumstances"].get("recipe", {})
    # Keys that the version of the checkpoint did not have count as equal.
    differing = [
        f"  {key}: {old[key]} | {now['recipe'][key]}" for key in shape if key in old and old[key] != now["recipe"][key]
    ]
    if differing:
        raise CheckpointError(
            f"{point.folder}: checkpoint of a different model (checkpoint | now)\n" + "\n".join(differing),
            fix="--name with a new name, to start a new run",
        )


def changes(point: ResumePoint, now: Mapping[str, Any]) -> list[str]:
    """Return one line per difference, `key: old | new`, without the harmless keys."""
    old, new = _flat(point.state["circumstances"]), _flat(json.loads(json.dumps(now)))
    keys = [key for key in dict.fromkeys([*old, *new]) if new.get(key) not in (old.get(key), redacted(old.get(key)))]
    return [f"{key}: {old.get(key)} | {new.get(key)}" for key in keys if key.removeprefix("recipe.") not in HARMLESS]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def checkpoint_state(fingerprint: Mapping[str, Any], plan: Plan, progress: Progress, **run: Any) -> dict[str, Any]:
    """Return the part of a checkpoint that is not tensors.

    run  attempt, val_loss (None if this step was not validated), validations (see `Evaluate.state`), bad_steps (see `StepCheck.state`),
         micro_batch, run_id
    """
    return {
        "progress": {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "cursor": progress.cursor.to_json(),
        },
        "circumstances": dict(fingerprint),
        "plan_digest": plan.digest(),
        **run,
    }


def restore_micro_batch(engine: Engine, point: ResumePoint | None, now: Mapping[str, Any], out: Path) -> str:
    """Set the micro-batch that the run had before, or the smaller one written after it ran out of memory.

    The earlier one is taken if recipe, ranks and the micro-batch layer are unchanged. Returns a line for the console, or an empty one.
    """
    planned = engine.micro_batch
    share = engine.recipe.train.global_batch // engine.ranks.size
    kept = read_reduced(out, planned or share)
    if kept is not None:
        engine.reduced_from, engine.micro_batch = planned or share, kept.sequences
        return f"micro-batch of {kept.sequences} sequences instead of {kept.planned}: an earlier attempt ran out of memory"
    if point is None or not point.state.get("micro_batch") or share % point.state["micro_batch"]:
        return ""
    old, new = _flat(point.state["circumstances"]), _flat(json.loads(json.dumps(now)))
    before = point.state["micro_batch"]
    equal = ("world_size", "recipe.train.global_batch", "layers.microbatch")
    if any(old.get(key) != new.get(key) for key in equal) or before == (planned or share):
        return ""
    engine.micro_batch = before
    engine.reduced_from = planned or share if before < (planned or share) else None
    return f"micro-batch of {before} sequences, as before the resume"
