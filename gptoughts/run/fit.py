"""`fit`: the engine, the proofs and the loop around a model that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.config.loader import Recipe, Resolved
from gptoughts.console import SilentConsole
from gptoughts.data.device import to_device
from gptoughts.engine.checkpoint import state as training_state
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.distributed.ranks import process_group
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import Batch, Objective, Rows, as_objective
from gptoughts.engine.optim.lr_schedule import learning_rate
from gptoughts.engine.trainer import Progress, advance, call_back, train
from gptoughts.errors import ConfigError, DataError
from gptoughts.hardware.machine import Machine, World
from gptoughts.models.family import custom_family
from gptoughts.models.sources import AsTheyAre
from gptoughts.planning.layer import Layer
from gptoughts.planning.resolve import Plan
from gptoughts.run import evidence as prove
from gptoughts.run.build import build_engine
from gptoughts.run.callbacks import Log
from gptoughts.run.run import select_device
from gptoughts.run.tracking.jsonl import Jsonl, attempts
from gptoughts.run.tracking.run_dir import run_folder


@dataclass
class FitResult:
    """What came of `fit`: the model was trained in place."""

    progress: Progress
    plan: Plan
    evidence: tuple[prove.LayerEvidence, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Logged steps: `step`, `train/loss`, ..."""

    @property
    def losses(self) -> list[float]:
        """Loss of every step."""
        return [row["train/loss"] for row in self.rows]


class _Memory:
    """Rows kept in a list, beside those in a file."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep one row."""
        self._rows.append({"step": step, **values})

    def close(self) -> None:
        """Nothing to close."""


def fit_model(
    model: nn.Module,
    objective: Any,
    batches: Iterable[Mapping[str, Any]],
    resolved: Resolved,
    plan: Plan,
    machine: Machine,
    world: World,
    catalog: Mapping[str, Layer],
    run_dir: str | None,
    strict: bool,
) -> FitResult:
    """See `gptoughts.fit`, which decides and then calls this."""
    whole = _whole(objective)
    endless = _again(batches)
    first = next(endless)
    recipe = _sized(resolved.recipe, whole, first[0], world)
    fitted = FitResult(Progress(), plan, ())
    folder = run_folder("fit", run_dir) if run_dir else None
    sinks: list[Any] = [_Memory(fitted.rows)]
    with process_group(world, select_device(machine, world)) as ranks:
        try:
            if folder is not None and ranks.first:
                folder.lock()
                sinks.append(Jsonl(folder.out / "metrics.jsonl", attempts(folder.out / "metrics.jsonl") + 1))
                (folder.out / "plan.json").write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")
            source, family = AsTheyAre(model), custom_family(model)
            with build_engine(model, family, whole, recipe, plan, catalog, ranks, chain([first], endless), source) as engine:
                log = Log(1, sinks, SilentConsole(), lambda speed: None, recipe.train.steps, lambda progress: None)
                _fit(engine, plan, catalog, fitted, log, strict, folder.out if folder and ranks.first else None)
                if folder is not None and ranks.first:
                    _save(engine, fitted, folder.checkpoints)
        finally:
            for sink in sinks:
                sink.close()
            if folder is not None:
                folder.release()
    return fitted


def _whole(objective: Any) -> Objective:
    """A plain function as an objective whose weight is the number of rows; an objective as it is. Raises ConfigError."""
    adapted = as_objective(objective)
    if adapted is not None:
        return adapted
    if not callable(objective) or isinstance(objective, type):
        raise ConfigError(
            "objective: needs a function (model, batch) -> loss summed over the batch's rows, or an object with __call__, "
            f"weight and tokens; here {objective!r:.80}"
        )

    def checked(model: nn.Module, batch: Batch) -> Tensor:
        loss = objective(model, batch)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            here = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"objective: must return the batch's losses summed to one number (loss.sum()), here {here}")
        if not loss.requires_grad:
            raise ConfigError("objective: its loss does not depend on a weight of the model that wants a gradient")
        return loss

    return Rows(checked)


def _again(batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Batches numbered from 1, from the start again whenever they end. Raises DataError for what is no batch."""
    number = 0
    while True:
        before = number
        for batch in batches:
            number += 1
            _check(batch, number)
            yield batch, number
        if number == before:
            raise DataError(f"batches ended after {number}; give a list or a dataset that can be read again, not a generator")


def _check(batch: Any, number: int) -> None:
    if not isinstance(batch, Mapping) or not batch:
        raise DataError(
            f'batch {number}: needs a dict of arrays or tensors such as {{"x": x, "y": y}}, here {type(batch).__name__}'
        )
    rows = {key: value.shape[0] if getattr(value, "shape", ()) else None for key, value in batch.items()}
    if None in rows.values() or 0 in rows.values() or len(set(rows.values())) > 1:
        told = ", ".join(f"{key} has {count if count is not None else 'no'}" for key, count in rows.items())
        raise DataError(f"batch {number}: every entry needs the same number of rows first, at least one; here {told}")


def _sized(recipe: Recipe, objective: Objective, first: Mapping[str, Any], world: World) -> Recipe:
    """The recipe with the sizes of the first batch, by which the micro-batch is chosen: rows, and tokens per row."""
    batch = to_device(first, torch.device("cpu"))
    rows = len(next(iter(batch.values())))
    train = recipe.train.model_copy(update={"global_batch": rows * world.world_size})
    data = recipe.data.model_copy(update={"sequence_length": max(1, objective.tokens(batch) // rows)})
    return recipe.model_copy(update={"train": train, "data": data})


def _fit(
    engine: Engine, plan: Plan, catalog: Mapping[str, Layer], fitted: FitResult, log: Log, strict: bool, out: Path | None
) -> None:
    optim, steps = engine.recipe.optim, engine.recipe.train.steps
    assert steps is not None
    last = max(1, steps - 1)

    def rate(progress: Progress) -> float:
        return learning_rate(optim, progress.step, progress.step / last, optim.warmup_steps / last)

    def finished(progress: Progress) -> bool:
        return progress.step >= steps

    warm = prove.warmup_steps(plan, catalog)
    log.start(Progress(), engine)
    progress = train(engine, Progress(), finished, rate, [log], pause=lambda now: now.step >= warm)
    if not finished(progress):
        held: list[Any] = []
        trace = prove.watch(engine, lambda: held.extend(advance(engine, progress, rate)))
        progress, stats = held
        fitted.evidence = tuple(prove.evidence(engine, plan, catalog, trace))
        if out is not None:
            record = {"step": progress.step, "layers": [line.to_json() for line in fitted.evidence]}
            (out / "evidence.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        prove.demand(list(fitted.evidence), strict)
        progress = call_back(engine, progress, stats, [log], last=finished(progress))
    fitted.progress = train(engine, progress, finished, rate, [log])


def _save(engine: Engine, fitted: FitResult, checkpoints: Path) -> None:
    state = {"progress": {"step": fitted.progress.step}, "plan_digest": fitted.plan.digest()}
    documents = {"plan.json": json.dumps(fitted.plan.to_json(), indent=1)}
    checkpoint.write(training_state.snapshot(engine, fitted.progress.step, state, documents, {}), checkpoints)
