"""`gptoughts.fit`: train a user's own model with the engine, layers, proofs and loop of `train`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gptoughts.config.loader import Recipe
from gptoughts.console import SilentConsole
from gptoughts.data.device import to_device
from gptoughts.engine.checkpoint import state, store
from gptoughts.engine.checkpoint.writer import reason
from gptoughts.engine.objectives.base import Batch, Objective, Rows, as_objective
from gptoughts.engine.trainer import Progress, train
from gptoughts.errors import ConfigError, DataError, StorageError
from gptoughts.hardware.world import World
from gptoughts.planning.plan import Plan
from gptoughts.run.evidence import EvidenceCheck, LayerEvidence
from gptoughts.run.log import Log
from gptoughts.run.session import OwnModel, Session, TrainingJob, open_session
from gptoughts.run.step_check import StepCheck
from gptoughts.run.throughput import Throughput
from gptoughts.run.tracking.sink import CallbackSink, RunInfo, Sink, Sinks, make_sinks


@dataclass
class FitResult:
    """The result of `fit`; the model was trained in place."""

    progress: Progress
    plan: Plan
    evidence: tuple[LayerEvidence, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One row of metrics per step: `step`, `train/loss`, ..."""

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [row["train/loss"] for row in self.rows]


class _RowList(Sink):
    """Keeps rows in a list."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row."""
        self._rows.append({"step": step, **values})


def fit_model(model: nn.Module, objective: Any, batches: Iterable[Mapping[str, Any]], job: TrainingJob) -> FitResult:
    """Train `model` as `job` says. Arguments as in `gptoughts.fit`."""
    checked = _as_objective(objective)
    endless = _repeat(batches)
    first = next(endless)
    recipe = _with_batch_size(job.recipe, checked, first[0], job.world)
    job = replace(
        job,
        resolved=replace(job.resolved, recipe=recipe),
        console=SilentConsole(),
        own=OwnModel(model, checked, chain([first], endless)),
    )
    result = FitResult(Progress(), job.plan, ())
    with open_session(job) as session:
        _train(session, result)
    return result


def _train(session: Session, result: FitResult) -> None:
    job, engine, folder = session.job, session.engine, session.job.folder
    writes = folder is not None and session.ranks.first
    sinks = Sinks([_RowList(result.rows), *map(CallbackSink, job.callbacks), *(make_sinks(job.track) if writes else ())])
    out = folder.out if folder is not None else Path()
    sinks.start(RunInfo("fit", out, session.attempt, plan=job.plan.to_json()))
    log = Log(1, sinks, session.console, Throughput(session.ranks.size))
    check = EvidenceCheck(
        job.plan, job.extensions.catalog, session.ranks, session.console, out if writes else None, session.attempt, job.strict
    )
    steps = StepCheck(folder.out if folder is not None else None)
    log.counts = steps.counts
    callbacks = [steps, log, *job.callbacks]
    finished, schedule = session.length.finished, session.length.rate
    try:
        for callback in callbacks:
            callback.on_start(engine, session.start)
        progress, _ = check.run(engine, session.start, finished, schedule, callbacks)
        result.evidence = check.evidence
        result.progress = train(engine, progress, finished, schedule, callbacks=callbacks)
        for callback in callbacks:
            callback.on_end(engine, result.progress)
    finally:
        sinks.close()
    if folder is not None:
        kept = {"progress": {"step": result.progress.step}, "plan_digest": job.plan.digest()}
        documents = {"plan.json": json.dumps(job.plan.to_json(), indent=1)}
        taken = state.snapshot(engine, result.progress.step, kept, documents, {})
        if taken is not None:
            try:
                store.write(taken, folder.checkpoints)
            except (OSError, SafetensorError) as error:
                raise StorageError(f"{folder.checkpoints}: the checkpoint could not be written ({reason(error)})") from error


def _as_objective(objective: Any) -> Objective:
    """Return an objective as it is; wrap a plain function, whose weight is the number of rows. Raises ConfigError."""
    adapted = as_objective(objective)
    if adapted is not None:
        return adapted
    if not callable(objective) or isinstance(objective, type):
        raise ConfigError(
            "objective: needs a function (model, batch) -> loss summed over the rows, or an object with __call__, weight and tokens",
            found=f"{objective!r:.80}",
        )

    def checked(model: nn.Module, batch: Batch) -> Tensor:
        loss = objective(model, batch)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError("objective: must return a scalar, the sum of the batch's losses", found=found, fix="loss.sum()")
        if not loss.requires_grad:
            raise ConfigError("objective: its loss depends on no trainable weight of the model")
        return loss

    return Rows(checked)


def _repeat(batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yield batches numbered from 1, starting over when they end. Raises DataError for an invalid batch."""
    number = 0
    while True:
        before = number
        for batch in batches:
            number += 1
            _check(batch, number)
            yield batch, number
        if number == before:
            raise DataError(f"batches: ended after {number}", fix="a list or a dataset that can be read again, not a generator")


def _check(batch: Any, number: int) -> None:
    if not isinstance(batch, Mapping) or not batch:
        raise DataError(
            f"batch {number}: needs a dict of arrays or tensors", found=type(batch).__name__, fix='{"x": x, "y": y}'
        )
    rows = {key: value.shape[0] if getattr(value, "shape", ()) else None for key, value in batch.items()}
    if None in rows.values() or 0 in rows.values() or len(set(rows.values())) > 1:
        found = ", ".join(f"{key} has {count if count is not None else 'no'} rows" for key, count in rows.items())
        raise DataError(
            f"batch {number}: every entry needs the same number of rows, at least one, as first dimension", found=found
        )


def _with_batch_size(recipe: Recipe, objective: Objective, first: Mapping[str, Any], world: World) -> Recipe:
    """Return the recipe with the sizes of the first batch, from which the micro-batch is chosen: rows, and tokens per row."""
    batch = to_device(first, torch.device("cpu"))
    rows = len(next(iter(batch.values())))
    train = recipe.train.model_copy(update={"global_batch": rows * world.world_size})
    data = recipe.data.model_copy(update={"sequence_length": max(1, objective.tokens(batch) // rows)})
    return recipe.model_copy(update={"train": train, "data": data})
