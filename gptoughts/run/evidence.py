"""Judge the layers of a plan by a watched step, write evidence.json, and stop the run if a planned layer was inactive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.console import GIB, Console
from gptoughts.engine.callback import Callback
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.trainer import Progress, run_callbacks, train
from gptoughts.errors import LayerError
from gptoughts.planning.evidence import Evidence, Status, StepTrace, unproven
from gptoughts.planning.layer import Layer
from gptoughts.planning.plan import Plan
from gptoughts.run.step_trace import watch
from gptoughts.run.storage import write_record

MAX_UNWATCHED = 20
"""Steps without an update (a loss scaler skips some at first) after which `watch_update` gives up."""


@dataclass(frozen=True)
class LayerEvidence:
    """One layer of the plan and what the watched step showed of it."""

    slot: str
    layer: str
    evidence: Evidence
    instead: str = "--layer.SLOT with another layer"
    """Option that runs without this layer."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "slot": self.slot,
            "layer": self.layer,
            "status": str(self.evidence.status),
            "proof": self.evidence.text,
            "figures": dict(self.evidence.figures),
        }


def warmup_steps(plan: Plan, catalog: Mapping[str, Layer]) -> int:
    """Return the number of updates before the watched step: the most that any planned layer needs."""
    return max(catalog[choice.layer].warmup_steps for choice in plan.choices)


def judge(engine: Engine, plan: Plan, catalog: Mapping[str, Layer], trace: StepTrace) -> list[LayerEvidence]:
    """Return every layer's verdict on the watched step, in slot order."""
    baselines = {layer.slot: layer.name for layer in catalog.values() if layer.baseline}
    return [
        LayerEvidence(
            choice.slot,
            choice.layer,
            catalog[choice.layer].verify(engine, trace, choice.options),
            f"--layer.{choice.slot.replace('_', '-')} {baselines[choice.slot]}",
        )
        for choice in plan.choices
    ]


def failures(evidence: Sequence[LayerEvidence], strict: bool = False) -> list[LayerEvidence]:
    """Return the layers that stop a run: inactive ones, and with `strict` unproven ones."""
    failing = [Status.INACTIVE, Status.UNPROVEN] if strict else [Status.INACTIVE]
    return [line for line in evidence if line.evidence.status in failing]


def demand(evidence: Sequence[LayerEvidence], strict: bool = False) -> None:
    """Raise LayerError if a planned layer was inactive, with `strict` also if one is unproven."""
    failed = failures(evidence, strict)
    if failed:
        lines = [f"  {line.slot}={line.layer}: {line.evidence.text}" for line in failed]
        raise LayerError(
            "watched step: planned layers were not active\n" + "\n".join(lines),
            fix=f"{' '.join(line.instead for line in failed)} (gptoughts layers lists the others)",
        )


def table(evidence: Sequence[LayerEvidence]) -> str:
    """Return the table layer | status | proof, without baselines, which have nothing to prove."""
    rows = [
        (f"{line.slot}={line.layer}", str(line.evidence.status), line.evidence.text)
        for line in evidence
        if line.evidence.text != "baseline"
    ]
    rows = [("layer", "status", "proof"), *rows]
    first, second = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return "\n".join(f"{row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows)


def watch_update(
    engine: Engine,
    progress: Progress,
    schedule: Callable[[Progress], float],
    callbacks: Sequence[Callback] = (),
) -> tuple[Progress, StepTrace]:
    """Watch steps from `progress` until one updates the weights. Raises LayerError after MAX_UNWATCHED steps without an update."""
    for _ in range(MAX_UNWATCHED):
        progress, stats, trace = watch(engine, progress, schedule)
        progress = run_callbacks(engine, progress, stats, callbacks, False)
        if trace.updated:
            return progress, trace
    raise LayerError(f"watched step: {MAX_UNWATCHED} steps made no update, so no layer could be proven")


@dataclass
class EvidenceCheck:
    """Warm up, watch one step, judge the layers, write evidence.json."""

    plan: Plan
    catalog: Mapping[str, Layer]
    ranks: Ranks
    console: Console
    out: Path | None = None
    """Folder of evidence.json; None writes no file."""
    attempt: int = 1
    strict: bool = False
    report: Callable[[Mapping[str, Any]], None] = lambda values: None
    """Receives the memory keys of metrics.jsonl after the watched step."""
    evidence: tuple[LayerEvidence, ...] = ()
    trace: StepTrace | None = None
    """The watched step."""

    def run(
        self,
        engine: Engine,
        progress: Progress,
        finished: Callable[[Progress], bool],
        schedule: Callable[[Progress], float],
        callbacks: Sequence[Callback] = (),
        stop: Callable[[Progress], bool] = lambda progress: False,
    ) -> tuple[Progress, bool]:
        """Train through the watched step. Returns the progress and whether `stop` ended the run.

        Raises LayerError if a planned layer was inactive.
        """
        warm = progress.step + warmup_steps(self.plan, self.catalog)
        stopped = False

        def ends(reached: Progress) -> bool:
            nonlocal stopped
            stopped = stop(reached)
            return stopped

        progress = train(
            engine, progress, finished, schedule, callbacks=callbacks, stop=ends, pause=lambda now: now.step >= warm
        )
        while not finished(progress) and not stopped:
            progress, stats, trace = watch(engine, progress, schedule)
            ends(progress)
            # The last update of a schedule may have the rate 0, which moves no weight.
            proves = trace.updated and stats.rate > 0
            if proves:
                self._judge(engine, progress, trace)
            progress = run_callbacks(engine, progress, stats, callbacks, finished(progress), stopped)
            if proves:
                break
        return progress, stopped

    def _judge(self, engine: Engine, progress: Progress, trace: StepTrace) -> None:
        self.trace = trace
        self.evidence = tuple(judge(engine, self.plan, self.catalog, trace))
        memory = self._memory(trace)
        self._write({"step": progress.step, "layers": [line.to_json() for line in self.evidence], "memory": memory})
        self.report({f"memory/{name}": memory[name] for name in ("predicted_bytes", "measured_bytes")})
        self.console.say(f"watched step {progress.step}\n{table(self.evidence)}")
        if memory["measured_bytes"] is not None:
            predicted = (
                "" if memory["error"] is None else f", predicted {memory['predicted_bytes'] / GIB:.2f} ({memory['error']:+.0%})"
            )
            self.console.say(f"memory: peak {memory['measured_bytes'] / GIB:.2f} GiB in the watched step{predicted}")
        failed = bool(failures(self.evidence, self.strict))
        if self.ranks.any(failed) and not failed:
            raise LayerError("watched step: a planned layer was not active on another rank, whose message names it")
        demand(self.evidence, self.strict)

    def _memory(self, trace: StepTrace) -> dict[str, Any]:
        """Return predicted and measured peak bytes, and the error as a share of the measured ones."""
        check = self.plan.memory
        predicted = check.budget.peak if check is not None and check.budget is not None else None
        error = predicted / trace.peak_bytes - 1 if predicted is not None and trace.peak_bytes else None
        return {"predicted_bytes": predicted, "measured_bytes": trace.peak_bytes, "error": error}

    def report_unwatched(self) -> None:
        """Record that the run ended before its watched step, so that no layer was proven."""
        nothing = unproven("the run ended before the watched step")
        layers = [LayerEvidence(choice.slot, choice.layer, nothing).to_json() for choice in self.plan.choices]
        self._write({"step": None, "layers": layers})
        self.console.say("note: the run ended before the watched step; no layer was proven")

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.out is not None and self.ranks.first:
            write_record(self.out / "evidence.json", {**record, "attempt": self.attempt})
