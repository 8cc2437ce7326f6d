"""The result of a run: what it reached and where its files are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gptoughts.engine.progress import Progress
from gptoughts.run.evidence import LayerEvidence
from gptoughts.run.tracking.history import columns, figures_of, summary_html
from gptoughts.run.tracking.jsonl import FILE


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    progress: Progress
    val_loss: float | None
    unigram_entropy: float | None
    """Entropy of the validation tokens' frequencies in nats: the loss of the best model without context."""
    sample: str
    """The last generated sample."""
    checkpoint: Path | None
    out: Path
    evidence: tuple[LayerEvidence, ...]
    stopped_by: int | None = None
    """The signal that ended the run early."""
    objective: str = "next-token"
    prompt: str = ""
    """The prompt of its samples."""

    @cached_property
    def history(self) -> dict[str, list[Any]]:
        """Columns of metrics.jsonl: key -> value of every row in step order, None where a row has none. Read when first asked for."""
        return columns(self.out / FILE)

    def _repr_html_(self) -> str:
        """Show a notebook the newest figures and the losses."""
        active = [line.layer for line in self.evidence if line.evidence.text != "baseline"]
        layers = {"layers": ", ".join(active)} if active else {}
        folders = {"files": str(self.out), **({"checkpoint": str(self.checkpoint)} if self.checkpoint else {})}
        return summary_html(self.out.name, {**figures_of(self.history), **layers, **folders}, self.out / FILE)
