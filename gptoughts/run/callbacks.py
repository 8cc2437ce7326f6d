"""The callbacks of a run: evaluate, sample, save. Only callbacks that touch weights wait for the device; see run/log.py for the log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from gptoughts.console import Console, count
from gptoughts.engine.callback import Callback
from gptoughts.engine.distributed.replicas import demand_equal_weights
from gptoughts.engine.engine import Engine
from gptoughts.engine.trainer import Progress, StepStats
from gptoughts.inference.eval.perplexity import mean_loss
from gptoughts.inference.eval.text_bytes import LabelBytes
from gptoughts.run.log import every, take_meters
from gptoughts.run.signals import Interrupted
from gptoughts.run.tracking.sink import Sink


@dataclass
class Evaluate(Callback):
    """Validation loss in the precision of evaluation, and the task's own scores. Ends the run early when patience is exhausted."""

    phase = "evaluation"
    touches_weights = True
    period: int
    batches: Callable[[], Iterable[Mapping[str, Any]]]
    sinks: Sink
    console: Console
    patience: int = 0
    """Validations without improvement after which the run ends; 0 never ends it."""
    scores: Callable[[Engine], Mapping[str, float]] | None = None
    """Scores of the task and of benchmarks. `f1`, higher being better, replaces the loss as the criterion of the best checkpoint."""
    label_bytes: LabelBytes | None = None
    """Counts the bytes of the labels; None where they are not all of a text."""
    result: tuple[int, float] | None = None
    """(step, loss) of the newest validation."""
    criterion: tuple[int, float] | None = None
    """(step, value) by which the best checkpoint is chosen; lower is better."""
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context of a validation that can end it with Interrupted."""
    settle: Callable[[Engine], None] = lambda engine: None
    """Judges the steps that are not judged yet. Raises for a bad one."""
    _best: float = math.inf
    _stale: int = 0
    _ended: int | None = None

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs: best value, validations since then, patience."""
        best = self._best if math.isfinite(self._best) else None
        return {"best": best, "stale": self._stale, "ended": self._ended, "patience": self.patience}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. A different patience starts counting anew."""
        self._best = math.inf if state.get("best") is None else state["best"]
        if state.get("patience") == self.patience:
            self._stale, self._ended = state.get("stale", 0), state.get("ended")

    def exhausted(self, progress: Progress) -> bool:
        """Return whether patience ended before this step. One more step is made after it, so that the last step runs all callbacks."""
        return self._ended is not None and progress.step > self._ended

    def due(self, step: int, last: bool) -> bool:
        """Due each `period` steps and at the last."""
        return every(self.period, step, last)

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Validate and write a row."""
        self.settle(engine)
        demand_equal_weights(engine)
        batches = self.batches() if self.label_bytes is None else self.label_bytes.counted(self.batches())
        try:
            with self.within():
                loss, labels = mean_loss(engine, batches)  # type: ignore[arg-type]
                take_meters(engine)  # drop what validation added to the training meters
                scores = self.scores(engine) if self.scores else {}
        except Interrupted:
            take_meters(engine)
            self.console.say(f"step {progress.step}  validation interrupted by a signal")
            return
        self.result = (progress.step, loss)
        self.criterion = (progress.step, -scores["f1"] if "f1" in scores else loss)
        row = {"eval/loss": loss, "eval/labels": labels}
        row |= self.label_bytes.row(engine, loss, labels) if self.label_bytes else {}
        row |= {f"eval/{name}": value for name, value in scores.items()}
        axes = {"train/num_tokens": progress.tokens, "train/hours": progress.seconds / 3600}
        self.sinks.log(progress.step, {**row, **axes})
        shown = "".join(f"  {name} {value:.4g}" for name, value in scores.items())
        self.console.say(f"step {progress.step}  validation loss {loss:.4f} over {count(labels)} labels{shown}")
        self._update_best(progress.step, last)

    def _update_best(self, step: int, last: bool) -> None:
        assert self.criterion is not None
        better = self.criterion[1] < self._best
        self._best, self._stale = min(self._best, self.criterion[1]), 0 if better else self._stale + 1
        if self.patience and self._stale >= self.patience and self._ended is None and not last:
            self._ended = step
            self.console.say(f"step {step}  early stop: no improvement in {self._stale} validations (eval.patience)")


@dataclass
class Sample(Callback):
    """Prints a short text generated by the current weights."""

    phase = "sample"
    touches_weights = True
    period: int
    write: Callable[[Engine], str]
    console: Console
    sinks: Sink = field(default_factory=Sink)
    text: str = ""

    def due(self, step: int, last: bool) -> bool:
        """Due each `period` steps and at the last."""
        return every(self.period, step, last)

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Generate and print."""
        try:
            self.text = self.write(engine)
        except Interrupted:
            self.console.say(f"step {progress.step}  sample interrupted by a signal")
            return
        if self.text:
            self.console.say(f"step {progress.step}  sample:\n{self.text}\n")
            self.sinks.text(progress.step, "sample", self.text)
