"""What a run resumes from, and what has changed since: old | new, before the first step."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptoughts.config.loader import Resolved
from gptoughts.data.batches import Cursor
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.engine import Engine
from gptoughts.engine.oom import recall
from gptoughts.engine.trainer import Progress
from gptoughts.errors import CheckpointError, RunError
from gptoughts.planning.resolve import Plan
from gptoughts.run.tracking.run_dir import RunFolder

HARMLESS = (
    "note",
    "name",
    "log.every",
    "eval.every",
    "eval.batches",
    "save.every",
    "save.keep",
    "save.keep_best",
    "data.path",
    "data.cache",
)
"""Keys that may change without changing what the next steps compute. Another corpus is told by its fingerprint."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run goes on from, and what its makers wrote into it."""

    folder: Path
    state: Mapping[str, Any]

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        saved = self.state["progress"]
        return Progress(saved["step"], saved["tokens"], saved["seconds"], Cursor.from_json(saved["cursor"]))


def find(folder: RunFolder, resume: str) -> tuple[ResumePoint | None, list[str]]:
    """The checkpoint to go on from and lines about damaged ones. `resume` is auto, never, or a checkpoint's folder.

    Raises RunError where a run that has checkpoints was to start over, CheckpointError where none of them is whole.
    """
    if resume not in ("auto", "never"):
        path = checkpoint.locate(Path(resume))
        return ResumePoint(path, checkpoint.read_state(path)["run"]), []
    there = checkpoint.all_steps(folder.checkpoints)
    if resume == "never":
        if there:
            raise RunError(
                f"{folder.checkpoints} holds {len(there)} checkpoints and --resume never would overwrite them\n  try: --run NAME"
            )
        return None, []
    found, skipped = checkpoint.newest(folder.checkpoints)
    if found is None:
        if there:
            raise CheckpointError(
                "no whole checkpoint to resume from\n  " + "\n  ".join(skipped) + "\n  try: --run NAME to start over"
            )
        return None, []
    return ResumePoint(found, checkpoint.read_state(found)["run"]), skipped


def circumstances(resolved: Resolved, plan: Plan, rows: int) -> dict[str, Any]:
    """What must be the same for a resumed run to continue bit for bit."""
    return {
        "recipe": {**resolved.values(), "rows": rows},
        "layers": {choice.slot: [choice.layer, dict(choice.options)] for choice in plan.choices},
        "machine": plan.machine,
        "world_size": plan.world_size,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def check_shape(origin: ResumePoint, now: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the checkpoint's model is not the one that was asked for."""
    apart = ("model.dropout", "model.path", "model.config", "model.remote_code")  # where weights began is not what they are
    shape = ["rows", *(key for key in now["recipe"] if key.startswith("model.") and key not in apart)]
    shape += [f"adapter.{key}" for key in ("kind", "rank", "alpha", "targets", "base")]
    shape += ["seed"] if now["recipe"].get("adapter.kind") == "pissa" else []  # its base is split by draws
    if now["recipe"].get("model.positions") == "learned":
        shape.append("data.sequence_length")
    old = origin.state["circumstances"]["recipe"]
    # A key that the checkpoint's version did not have is taken as it is now.
    differing = [
        f"  {key}: {old[key]} | {now['recipe'][key]}" for key in shape if key in old and old[key] != now["recipe"][key]
    ]
    if differing:
        raise CheckpointError(
            f"{origin.folder} holds another model (checkpoint | now)\n"
            + "\n".join(differing)
            + "\n  try: --run NAME to start a new run"
        )


def changes(origin: ResumePoint, now: Mapping[str, Any]) -> list[str]:
    """One line per difference, `old | new`, harmless ones left out."""
    old, new = _flat(origin.state["circumstances"]), _flat(json.loads(json.dumps(now)))
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} | {new.get(key)}" for key in keys if key.removeprefix("recipe.") not in HARMLESS]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def state_of(
    progress: Progress,
    now: Mapping[str, Any],
    plan: Plan,
    attempt: int,
    val_loss: float | None,
    validations: Mapping[str, Any] | None = None,
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """What a checkpoint keeps beside tensors."""
    return {
        "progress": {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "cursor": progress.cursor.to_json(),
        },
        "circumstances": dict(now),
        "plan_digest": plan.digest(),
        "attempt": attempt,
        "val_loss": val_loss,
        "validations": dict(validations or {}),
        "micro_batch": micro_batch,
    }


def take_micro_batch(engine: Engine, origin: ResumePoint | None, now: Mapping[str, Any], out: Path) -> str:
    """Give `engine` the micro-batch that the run had, where nothing that decides it has changed, or the smaller one that memory left it.

    Returns a line that says so, or nothing.
    """
    planned = engine.micro_batch
    share = engine.recipe.train.global_batch // engine.ranks.size
    kept = recall(out, planned or share)
    if kept is not None:
        engine.reduced_from, engine.micro_batch = planned or share, kept.sequences
        return f"micro-batch of {kept.sequences} sequences instead of {kept.planned}: memory ran out in an earlier start"
    if origin is None or not origin.state.get("micro_batch") or share % origin.state["micro_batch"]:
        return ""
    old, new = origin.state["circumstances"], now
    same = old["world_size"] == new["world_size"] and old["recipe"]["train.global_batch"] == new["recipe"]["train.global_batch"]
    before = origin.state["micro_batch"]
    if (
        not same
        or old["layers"]["microbatch"] != json.loads(json.dumps(new["layers"]["microbatch"]))
        or before == (planned or share)
    ):
        return ""
    engine.micro_batch = before
    engine.reduced_from = planned or share if before < (planned or share) else None
    return f"micro-batch of {before} sequences, as before the resume"
