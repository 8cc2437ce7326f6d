"""The results of a run: final losses, speed, memory, goodput, limiter, and how the time of a step divides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptoughts.console import bytes_in_words, count, duration, share
from gptoughts.diagnostics.report.rows import number
from gptoughts.diagnostics.report.run_data import RunData

WARM = 0.1
"""Share of the steps at the start that the mean speed leaves out."""
PARTS = ("start", "compile", "productive", "data", "evaluation", "checkpoint", "sample", "restart", "redone", "other")
"""Parts of goodput.json in their order; others follow."""
STEP_TIME = "time/"
STEP_PARTS = ("data_wait", "forward", "backward", "optimizer", "communication", "other")


@dataclass(frozen=True)
class Figure:
    """One result of every run."""

    name: str
    values: tuple[Any, ...]
    """Numbers or texts, None where unknown."""
    shown: Callable[[Any], str]

    def texts(self) -> list[str]:
        """Return the values as printed; unknown ones are n/a."""
        return ["n/a" if value is None else self.shown(value) for value in self.values]

    def changes(self) -> list[str]:
        """Return each later value relative to the first, such as `+3.1 %`; empty where that says nothing."""
        first, *others = self.values
        known = isinstance(first, int | float) and first
        return [_change(one / first - 1) if known and isinstance(one, int | float) else "" for one in others]


def results(runs: list[RunData]) -> list[Figure]:
    """Return the results that at least one of the runs has."""

    def four(value: float) -> str:
        return f"{value:.4f}"

    def of(key: str) -> tuple[Any, ...]:
        return tuple(last(run, key) for run in runs)

    made = [
        Figure("steps", tuple(_last_step(run) for run in runs), lambda value: f"{value:,.0f}"),
        Figure("tokens", of("train/num_tokens"), count),
        Figure("time in steps", of("train/seconds"), duration),
        Figure("attempts", tuple(str(run.attempts) if run.attempts else None for run in runs), str),
        Figure("training loss, last (nats)", of("train/loss"), four),
        Figure("validation loss, last (nats)", of("eval/loss"), four),
        Figure("validation loss, best (nats)", tuple(_lowest(run, "eval/loss") for run in runs), four),
        Figure("tokens/s, last 90 % of the steps", tuple(map(mean_speed, runs)), count),
        Figure("tokens/s, steady", of("perf/steady_tokens_per_second"), count),
        Figure("MFU, mean", tuple(_mean(run, "perf/mfu") for run in runs), share),
        Figure("HFU, mean", tuple(_mean(run, "perf/hfu") for run in runs), share),
        Figure("GPU utilization, mean (%)", tuple(_mean(run, "gpu/utilization", system=True) for run in runs), _one),
        Figure("memory, predicted peak of a step", of("memory/predicted_bytes"), bytes_in_words),
        Figure("memory, measured peak of a step", of("memory/measured_bytes"), bytes_in_words),
        Figure("wall time", tuple(wall_seconds(run) for run in runs), duration),
        Figure("goodput (productive share of wall time)", tuple(map(_productive, runs)), share),
        Figure("limiter, most windows", tuple(_most(run, "perf/limiter") for run in runs), str),
        Figure("advice, last", tuple(run.metrics.last_word.get("perf/advice") for run in runs), str),
        *(Figure(f"{key}, last", of(key), _plain) for key in _scores(runs)),
    ]
    return [figure for figure in made if any(value is not None for value in figure.values)]


def _change(relative: float) -> str:
    text = f"{100 * relative:+.1f} %"
    return "" if text in ("+0.0 %", "-0.0 %") else text


def _one(value: float) -> str:
    return f"{value:.1f}"


def _plain(value: float) -> str:
    return f"{value:.5g}"


def last(run: RunData, key: str) -> float | None:
    """Return the newest value of a key of metrics.jsonl."""
    found = run.metrics.keys.get(key)
    return found.last if found else None


def _last_step(run: RunData) -> float | None:
    ends = [key.curve.last.x for key in run.metrics.keys.values() if key.curve.last]
    return max(ends, default=None)


def _lowest(run: RunData, key: str) -> float | None:
    found = run.metrics.keys.get(key)
    return min((point.y for point in found.curve.points()), default=None) if found else None


def _mean(run: RunData, key: str, system: bool = False) -> float | None:
    found = (run.system if system else run.metrics).keys.get(key)
    return found.mean if found else None


def _most(run: RunData, key: str) -> str | None:
    counted = run.metrics.words.get(key)
    if not counted:
        return None
    (word, rows), total = counted.most_common(1)[0], sum(counted.values())
    return f"{word} ({100 * rows / total:.0f} % of {total:,} windows)"


def _scores(runs: list[RunData]) -> list[str]:
    """Return the keys of evaluation scores beside the loss."""
    keys = {key for run in runs for key in run.metrics.keys if key.startswith("eval/")}
    return sorted(keys - {"eval/loss", "eval/labels"})


def mean_speed(run: RunData) -> float | None:
    """Return tokens per second of step time over all ranks, without the first `WARM` of the steps; None if unknown."""
    curves = [run.metrics.keys.get(key) for key in ("train/num_tokens", "train/seconds")]
    if not all(curves):
        return None
    tokens, seconds = ({point.x: point.y for point in key.curve.points()} for key in curves if key)
    steps = sorted(tokens.keys() & seconds.keys())
    if len(steps) < 2:
        return None
    limit = steps[0] + WARM * (steps[-1] - steps[0])
    start, end = next(step for step in steps if step >= limit), steps[-1]
    elapsed = seconds[end] - seconds[start]
    return (tokens[end] - tokens[start]) / elapsed if elapsed > 0 else None


def wall_seconds(run: RunData) -> float | None:
    """Return the wall time of all attempts, None if goodput.json does not say it."""
    return number(run.goodput.get("wall_seconds"))


def goodput_parts(run: RunData) -> dict[str, float]:
    """Return part -> seconds of wall time, in the order of `PARTS`; empty if unknown."""
    parts = run.goodput.get("parts")
    found = {str(name): number(value) for name, value in parts.items()} if isinstance(parts, Mapping) else {}
    names = [name for name in (*PARTS, *found) if found.get(name) is not None and (found[name] or 0) >= 0]
    return {name: found[name] or 0.0 for name in dict.fromkeys(names)}


def _productive(run: RunData) -> float | None:
    parts = goodput_parts(run)
    total = sum(parts.values())
    return parts["productive"] / total if "productive" in parts and total > 0 else None


def step_parts(run: RunData) -> dict[str, float]:
    """Return part of a step -> mean seconds, without the first row of each attempt; empty if the run did not measure it."""
    found = {
        key.removeprefix(STEP_TIME): value.mean
        for key, value in run.metrics.keys.items()
        if key.startswith(STEP_TIME) and value.mean is not None
    }
    names = [name for name in (*STEP_PARTS, *found) if name in found]
    return {name: found[name] or 0.0 for name in dict.fromkeys(names)}
