"""Format the figures of `bench scaling` as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptoughts.console import bytes_in_words, count, share
from gptoughts.diagnostics.bench.text import aligned, markdown, ratio

HEAD = (
    "run", "ranks", "batch", "ms/step", "q1 - q3", "tok/s", "speed-up", "q1 - q3", "efficiency", "in coll.", "exposed", "peak/rank",
    "start s", "wall s", "wall speed-up", "loss diff.",
)  # fmt: skip
CSV_HEAD = (
    "recipe", "run", "kind", "strategy", "ranks", "threads_per_rank", "global_batch", "oversubscribed", "step_ms", "step_ms_q1", "step_ms_q3",
    "tokens_per_second", "speed_up", "speed_up_q1", "speed_up_q3", "efficiency", "in_collectives", "exposed", "peak_bytes", "start_seconds",
    "wall_seconds", "wall_speed_up", "loss_difference", "failure",
)  # fmt: skip


def scaling_text(run: Mapping[str, Any]) -> str:
    """Return the table as text."""
    return "\n".join([*_head(run), "", *aligned([HEAD, *_rows(run)]), *_notes(run), "", *_foot(run), "", *_evidence(run)])


def scaling_markdown(runs: Sequence[Mapping[str, Any]], picture: str) -> str:
    """Return all runs of a file as Markdown."""
    lines = ["# Scaling over ranks", "", "Made by `gptoughts bench scaling`; docs/scaling.md says how to read it.", ""]
    lines += [f"![speed-up over ranks]({picture})", ""]
    for run in runs:
        lines += [f"## {run['recipe']}", "", *(f"{line}  " for line in _head(run)), "", f"`{run['command']}`", ""]
        lines += [*markdown([HEAD, *_rows(run)]), ""]
        lines += [*(f"- {line.strip()}" for line in _notes(run)), ""] if _notes(run) else []
        lines += [*(f"{line}  " for line in _foot(run)), "", "### Evidence", ""]
        lines += [*(f"- {line.strip()}" for line in _evidence(run)[1:]), ""]
    return "\n".join(lines).rstrip() + "\n"


def scaling_csv(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return all runs of a file as CSV, one row per arm; a figure that was not measured is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for run in runs:
        for name, row in run["arms"].items():
            known = {"recipe": run["recipe"], "run": name, "threads_per_rank": run["threads_per_rank"], **row}
            writer.writerow([_cell(known, key) for key in CSV_HEAD])
    return text.getvalue()


def _cell(row: Mapping[str, Any], key: str) -> Any:
    """Return the value of a column: `x_q1` is the quartile of a spread `x`, `x` its median."""
    name, _, part = key.rpartition("_")
    value = row[name].get(part) if part in ("q1", "q3") and isinstance(row.get(name), Mapping) else row.get(key)
    return "" if value is None else value["median"] if isinstance(value, Mapping) else value


def _head(run: Mapping[str, Any]) -> list[str]:
    machine, model, loads = run["machine"], run["model"], run["load_averages"]
    parameters = count(model["parameters"]) if "parameters" in model else "n/a"
    plan = ", ".join(f"{slot}={layer}" for slot, layer in run["plan"].items())
    return [
        f"{run['recipe']}: {parameters} parameters, {run['global_batch']} sequences of {model.get('sequence_length', 'n/a')} tokens "
        "per step of the single process",
        f"on {machine['label']}; torch {machine['torch']}, load {min(loads)} to {max(loads)}",
        f"equal in all runs: {_threads(run['threads_per_rank'])} per rank, recipe, and {plan}",
        f"{run['rounds']} rounds of {run['steps_per_round']} steps, processes {run['processes']}, {run['seconds_in_all']:.0f} s in all",
    ]


def _threads(number: int) -> str:
    return f"{number} thread" if number == 1 else f"{number} threads"


def _rows(run: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, row in run["arms"].items():
        mark = " *" if row["oversubscribed"] else ""
        start = "n/a" if row["start_seconds"] is None else f"{row['start_seconds']:.1f}"
        begin = (name + mark, str(row["ranks"]), str(row["global_batch"]))
        if row["failure"] or "step_ms" not in row:
            yield (*begin, "not counted", *("",) * 8, start, "", "", "")
            continue
        times, difference = row["step_ms"], row.get("loss_difference")
        yield (
            *begin,
            f"{times['median']:.1f}",
            f"{times['q1']:.1f} - {times['q3']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            *ratio(row.get("speed_up")),
            share(_median(row.get("efficiency"))),
            share(_median(row["in_collectives"])),
            share(_median(row["exposed"])),
            bytes_in_words(row["peak_bytes"]),
            start,
            f"{row['wall_seconds']:.1f}",
            "n/a" if row.get("wall_speed_up") is None else f"{row['wall_speed_up']:.2f}",
            "n/a" if difference is None else f"{100 * difference:.4f} %",
        )


def _median(found: Mapping[str, float] | None) -> float | None:
    return None if found is None else found["median"]


def _notes(run: Mapping[str, Any]) -> list[str]:
    """Return what the table does not say of single rows."""
    lines = [f"  {name}: not counted, {row['failure']}" for name, row in run["arms"].items() if row["failure"]]
    lines += [f"  {name}: cannot run, {why}" for name, why in run["left_out"].items()]
    if run["busy_before"]:
        lines.append(
            f"  the machine was shared: load {run['load_averages'][0]} on {run['machine']['cores']} cores before the first run; other "
            "programs competed with the ranks for the cores, so repeat on an idle machine"
        )
    if any(row["oversubscribed"] for row in run["arms"].values()):
        lines.append(
            f"  *: oversubscribed, more threads of ranks than the {run['machine']['cores']} usable cores; not a measurement of scaling"
        )
    return lines


def _foot(run: Mapping[str, Any]) -> list[str]:
    return [
        "strong: global batch of the single process, split over ranks; weak: batch of the single process on every rank",
        "speed-up: tokens per second / those of the single process in the same round; efficiency: speed-up / ranks; medians over rounds",
        "in coll.: share of the step in which a collective is in progress on a rank, waiting for other ranks included; "
        "exposed: the part of it in which the rank computes nothing; medians over profiled steps and ranks",
        f"peak/rank: {run['memory']}",
        "start s: until the first counted step: imports, data, compilation, warm-up, profiled steps; wall s: start and counted steps",
        "loss diff.: mean relative distance of the strong run's loss from the single process's, same steps, data and seed",
    ]


def _evidence(run: Mapping[str, Any]) -> list[str]:
    lines = ["evidence of the watched steps, rank 0"]
    for name, row in run["arms"].items():
        found = [f"{slot} {text.removeprefix('active: ')}" for slot, text in row["evidence"].items()]
        lines.append(f"  {name}: {'; '.join(found) or 'baselines only'}")
    return lines
