"""The first steps of a run: warm up, watch one real step, and stop where a planned layer was not seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.console import GIB, Console
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.trainer import Callback, Progress, advance, call_back, train
from gptoughts.errors import LayerError
from gptoughts.planning.layer import Layer, StepTrace, unproven
from gptoughts.planning.resolve import Plan
from gptoughts.run import evidence as prove


@dataclass
class FirstSteps:
    """Watches a plan at work and writes evidence.json."""

    plan: Plan
    catalog: Mapping[str, Layer]
    ranks: Ranks
    console: Console
    out: Path
    attempt: int
    strict: bool
    seen: tuple[prove.LayerEvidence, ...] = ()

    def run(
        self,
        engine: Engine,
        progress: Progress,
        callbacks: Sequence[Callback],
        finished: Callable[[Progress], bool],
        rate: Callable[[Progress], float],
        stop: Callable[[Progress], bool],
        stopped: Callable[[], bool],
    ) -> Progress:
        """Train through the watched step. Returns where the run stands then. Raises LayerError for what was planned and not seen."""
        warm = progress.step + prove.warmup_steps(self.plan, self.catalog)
        progress = train(engine, progress, finished, rate, callbacks, stop, pause=lambda now: now.step >= warm)
        while not finished(progress) and not stopped():
            held: list[Any] = []
            trace = prove.watch(engine, lambda: held.extend(advance(engine, progress, rate)))  # noqa: B023
            progress, stats = held
            ends = stop(progress)
            if trace.updated:
                self._judge(engine, progress, trace)
            progress = call_back(engine, progress, stats, callbacks, finished(progress), ends)
            if trace.updated or ends:
                break
        return progress

    def _judge(self, engine: Engine, progress: Progress, trace: StepTrace) -> None:
        """Record what the watched step showed; stop where a planned layer was not seen."""
        seen = prove.evidence(engine, self.plan, self.catalog, trace)
        memory = self._memory(trace)
        if self.ranks.first:
            self._write({"step": progress.step, "layers": [line.to_json() for line in seen], "memory": memory})
        self.console.say(f"watched step {progress.step}\n{prove.table(seen)}")
        if memory["measured_bytes"] is not None:
            told = (
                "" if memory["error"] is None else f", {memory['predicted_bytes'] / GIB:.2f} predicted ({memory['error']:+.0%})"
            )
            self.console.say(f"memory: {memory['measured_bytes'] / GIB:.2f} GiB at most in that step{told}")
        mine = prove.failures(seen, self.strict)
        if self.ranks.any(bool(mine)) and not mine:
            raise LayerError("a planned layer was not active on another rank; its own message names it")
        prove.demand(seen, self.strict)
        self.seen = tuple(seen)

    def _memory(self, trace: StepTrace) -> dict[str, Any]:
        """Prediction, measurement, and the error as a share of what was measured."""
        fit = self.plan.memory
        predicted = fit.budget.peak if fit is not None and fit.budget is not None else None
        error = predicted / trace.peak_bytes - 1 if predicted is not None and trace.peak_bytes else None
        return {"predicted_bytes": predicted, "measured_bytes": trace.peak_bytes, "error": error}

    def say_unwatched(self) -> None:
        """A run that ended before its watched step proved nothing, and says so."""
        nothing = unproven("the run ended before a step could be watched")
        layers = [prove.LayerEvidence(choice.slot, choice.layer, nothing).to_json() for choice in self.plan.choices]
        self._write({"step": None, "layers": layers})
        self.console.say("note: the run ended before a step could be watched; no layer was proven")

    def _write(self, record: Mapping[str, Any]) -> None:
        content = json.dumps({**record, "attempt": self.attempt}, indent=1)
        (self.out / "evidence.json").write_text(content + "\n", encoding="utf-8")
