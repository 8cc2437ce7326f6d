"""`fit`: the engine, the proofs and the loop around a model that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gptoughts import checkpoint, prove
from gptoughts.build import AsTheyAre, built
from gptoughts.callbacks import Log
from gptoughts.config import Resolved
from gptoughts.distributed import started
from gptoughts.engine import Engine
from gptoughts.errors import ConfigError, DataError
from gptoughts.layer import Layer
from gptoughts.machine import Machine, World
from gptoughts.models.family import custom_family
from gptoughts.objectives import Batch, Rows
from gptoughts.optim import learning_rate
from gptoughts.plan import Plan
from gptoughts.run import device_of
from gptoughts.track.console import Silent
from gptoughts.track.folder import run_folder
from gptoughts.track.jsonl import Jsonl, attempts
from gptoughts.trainer import Progress, advance, call_back, train


@dataclass
class Fitted:
    """What came of `fit`: the model was trained in place."""

    progress: Progress
    plan: Plan
    evidence: tuple[prove.Seen, ...]
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
) -> Fitted:
    """See `gptoughts.fit`, which decides and then calls this."""
    whole = objective if hasattr(objective, "weight") else _plain(objective)
    fitted = Fitted(Progress(), plan, ())
    folder = run_folder("fit", run_dir) if run_dir else None
    sinks: list[Any] = [_Memory(fitted.rows)]
    with started(world, device_of(machine, world)) as ranks:
        try:
            if folder is not None and ranks.first:
                folder.lock()
                sinks.append(Jsonl(folder.out / "metrics.jsonl", attempts(folder.out / "metrics.jsonl") + 1))
                (folder.out / "plan.json").write_text(json.dumps(plan.to_json(), indent=1) + "\n", encoding="utf-8")
            source, family = AsTheyAre(model), custom_family(model)
            endless = _again(batches)
            with built(model, family, whole, resolved.recipe, plan, catalog, ranks, endless, source) as engine:
                log = Log(1, sinks, Silent(), lambda speed: None, resolved.recipe.train.steps, lambda progress: None)
                _fit(engine, resolved, plan, catalog, fitted, log, strict)
                if folder is not None and ranks.first:
                    _write(engine, fitted, folder.out, folder.checkpoints)
        finally:
            for sink in sinks:
                sink.close()
            if folder is not None:
                folder.release()
    return fitted


def _plain(function: Callable[[nn.Module, Batch], Tensor]) -> Rows:
    if not callable(function):
        raise ConfigError(f"objective: needs a function (model, batch) -> summed loss, here {type(function).__name__}")
    return Rows(function)


def _again(batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Batches numbered from 1, from the start again whenever they end."""
    number = 0
    while True:
        before = number
        for batch in batches:
            number += 1
            yield batch, number
        if number == before:
            raise DataError(f"batches ended after {number}; give a list or a dataset that can be read again, not a generator")


def _fit(
    engine: Engine, resolved: Resolved, plan: Plan, catalog: Mapping[str, Layer], fitted: Fitted, log: Log, strict: bool
) -> None:
    steps = resolved.recipe.train.steps
    assert steps is not None
    warmup = resolved.recipe.optim.warmup_steps

    def rate(progress: Progress) -> float:
        return learning_rate(
            resolved.recipe.optim, progress.step, progress.step / max(1, steps - 1), warmup / max(1, steps - 1)
        )

    def finished(progress: Progress) -> bool:
        return progress.step >= steps

    warm = prove.warm_steps(plan, catalog)
    log.start(Progress(), engine)
    progress = train(engine, Progress(), finished, rate, [log], pause=lambda now: now.step >= warm)
    if not finished(progress):
        held: list[Any] = []
        sight = prove.watch(engine, lambda: held.extend(advance(engine, progress, rate)))
        progress, stats = held
        fitted.evidence = tuple(prove.evidence(engine, plan, catalog, sight))
        prove.demand(list(fitted.evidence), strict)
        call_back(engine, progress, stats, [log], last=finished(progress))
    fitted.progress = train(engine, progress, finished, rate, [log])


def _write(engine: Engine, fitted: Fitted, out: Path, checkpoints: Path) -> None:
    layers = [line.to_json() for line in fitted.evidence]
    (out / "evidence.json").write_text(json.dumps({"layers": layers}, indent=1) + "\n", encoding="utf-8")
    state = {"progress": {"step": fitted.progress.step}, "plan_digest": fitted.plan.digest()}
    documents = {"plan.json": json.dumps(fitted.plan.to_json(), indent=1)}
    checkpoint.write(checkpoint.snapshot(engine, fitted.progress.step, state, documents, {}), checkpoints)
