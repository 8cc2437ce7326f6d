"""HellaSwag (Zellers et al. 2019): which of four endings of a text is the most likely, as lm-evaluation-harness scores it.

Cleaning, prompt and tokens are those of its task `hellaswag` (version 1.0), so `acc` and `acc_norm` are its numbers. Four scores differ in
what a log-likelihood is divided by: `acc` by nothing, `acc_norm` by the characters of the ending (as its `acc_norm` does), `acc_bytes` by
the bytes of the ending (its `acc_bytes`), `acc_token` by the tokens of the ending (as in Brown et al. 2020, GPT-3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from gptoughts.data.text.rows import checked_text
from gptoughts.engine.engine import Engine
from gptoughts.errors import DataError, RunError
from gptoughts.inference.eval.benchmark_rows import benchmark_rows
from gptoughts.inference.eval.continuations import Encoder, Pair, Report, log_likelihoods, truncated
from gptoughts.inference.eval.likelihood import DRAWS

FIELDS = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
BRACKETS = re.compile(r"\[.*?\]")
NORMALIZATIONS = {
    "acc": "log-likelihood of the ending",
    "acc_norm": "log-likelihood per character of the ending, as lm-eval's acc_norm",
    "acc_bytes": "log-likelihood per UTF-8 byte of the ending, as lm-eval's acc_bytes",
    "acc_token": "log-likelihood per token of the ending",
}
"""Score -> what the chosen ending has most of."""
CHANCE = 0.25
Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Example:
    """One row, cleaned."""

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Benchmark:
    """Rows with their tokens, ready for a model with a context of `length` tokens."""

    examples: tuple[Example, ...]
    pairs: tuple[Pair, ...]
    """One per ending, in the order of the rows."""
    truncated: int
    """Endings whose context loses its start."""

    def scores(
        self,
        engine: Engine,
        *,
        batch: int,
        mask_id: int | None = None,
        draws: int = DRAWS,
        report: Report = lambda done, total: None,
    ) -> dict[str, float]:
        """Return the share of rows whose labeled ending is chosen, for each of NORMALIZATIONS; arguments as `log_likelihoods`."""
        found = log_likelihoods(engine, self.pairs, batch=batch, mask_id=mask_id, draws=draws, report=report)
        return accuracies(self.examples, found, [len(pair.continuation) for pair in self.pairs])


def read_examples(data: str | None = None, limit: int | None = None) -> list[Example]:
    """Return the first `limit` rows (all if None) of `data`, see `benchmark_rows`. Raises DataError that names the row."""
    return [example_of(row, where) for where, row in islice(benchmark_rows("hellaswag", data), limit)]


def prepare(encoder: Encoder, length: int, examples: Sequence[Example]) -> Benchmark:
    """Tokenize the rows for a model with a context of `length` tokens. Raises ConfigError if an ending does not fit."""
    pairs = encoder.pairs([(example.context, f" {ending}") for example in examples for ending in example.endings])
    return Benchmark(tuple(examples), tuple(pairs), truncated(pairs, length))


def example_of(row: Mapping[str, Any], where: str) -> Example:
    """Clean one row of the original data set. Raises DataError for a missing or invalid field, beginning with `where`."""
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise DataError(
            f"{where}: no field {', '.join(map(repr, missing))}",
            found=f"fields {', '.join(map(str, row)) or 'none'}",
            fix="rows of the original hellaswag_val.jsonl",
        )
    activity, first, second = (checked_text(row[name], name, where) for name in FIELDS[:3])
    endings, label = row["endings"], row["label"]
    if not isinstance(endings, list) or len(endings) < 2:
        raise DataError(f"{where}: field 'endings' must be a list of at least two strings", found=type(endings).__name__)
    cleaned = tuple(clean(checked_text(ending, "endings", where)) for ending in endings)
    if not all(cleaned):
        raise DataError(f"{where}: field 'endings' has an ending without text", found=endings[cleaned.index("")])
    number = int(label) if isinstance(label, int | str) and str(label).isdecimal() else -1
    if not 0 <= number < len(endings):
        raise DataError(f"{where}: field 'label' must be from 0 to {len(endings) - 1}", found=repr(label))
    return Example(clean(f"{activity}: {first} {second.capitalize()}"), cleaned, number)


def clean(text: str) -> str:
    """Remove marks of the WikiHow rows: ` [title]` becomes a full stop, other brackets go, pairs of spaces become one."""
    return BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def accuracies(examples: Sequence[Example], found: np.ndarray, tokens: Sequence[int]) -> dict[str, float]:
    """Return the four accuracies of the log-likelihoods `found` (endings of all rows,); `tokens` counts those of each ending.

    Of equal values the first ending is chosen. Raises RunError if a value is not finite.
    """
    hits = dict.fromkeys(NORMALIZATIONS, 0)
    begin = 0
    for example in examples:
        end = begin + len(example.endings)
        values = found[begin:end]
        if not np.isfinite(values).all():
            raise RunError("hellaswag: the model's log-likelihoods are not finite", found=values.tolist())
        divisors = {
            "acc": 1.0,
            "acc_norm": np.array([float(len(ending)) for ending in example.endings]),
            "acc_bytes": np.array([float(len(ending.encode())) for ending in example.endings]),
            "acc_token": np.array(tokens[begin:end], dtype=np.float64),
        }
        for name, divisor in divisors.items():
            hits[name] += int(np.argmax(values / divisor)) == example.label
        begin = end
    return {name: count / len(examples) for name, count in hits.items()}


def interval(share: float, rows: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of `rows` independent rows (Wilson 1927)."""
    center = (share + Z_95**2 / (2 * rows)) / (1 + Z_95**2 / rows)
    half = Z_95 / (1 + Z_95**2 / rows) * math.sqrt(share * (1 - share) / rows + Z_95**2 / (4 * rows**2))
    return max(0.0, center - half), min(1.0, center + half)
