"""Format the figures of `bench parity` as text and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptoughts.console import count
from gptoughts.diagnostics.bench.text import Row, aligned, markdown


def parity_text(run: Mapping[str, Any]) -> str:
    """Return the tables as text, the verdict last."""
    return "\n".join([*_head(run), "", *aligned(_finals(run)), "", *aligned(_race(run)), "", *_verdict(run)])


def parity_markdown(runs: Sequence[Mapping[str, Any]], picture: str) -> str:
    """Return all runs of a file as Markdown; the picture shows the last."""
    lines = [
        "# Loss parity of low precision and its reference",
        "",
        "Made by `gptoughts bench parity`; docs/bench.md says how to read it.",
        "",
    ]
    for run in runs:
        lines += [
            f"## {run['recipe']}: {_pairs(run)}",
            "",
            *(f"{line}  " for line in _head(run)),
            "",
            f"`{run['command']}`",
            "",
        ]
        lines += [*markdown(_finals(run)), "", *markdown(_race(run)), "", *(f"- {line}" for line in _verdict(run)), ""]
    return "\n".join([*lines, f"![curves of the last run]({picture})"]) + "\n"


def _pairs(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{slot} {layer} against {run['reference'][slot]}" for slot, layer in run["in_question"].items())


def _head(run: Mapping[str, Any]) -> list[str]:
    machine, model = run["machine"], run["model"]
    parameters = count(model["parameters"]) if "parameters" in model else "n/a"
    kept = ", ".join(
        f"{slot}={layer}"
        for slot, layer in run["plan"].items()
        if slot in ("matmul", "attention", "precision", "compile", "optimizer")
    )
    return [
        f"{run['recipe']}: {parameters} parameters, {run['steps']} steps of {run['tokens_per_step']} tokens, smoothed over {run['window']}",
        f"on {machine['label']}; torch {machine['torch']}, {machine['threads']} threads, "
        f"load {min(run['load_averages'])} to {max(run['load_averages'])}",
        f"compared: {_pairs(run)}; plan: {kept}",
        *(f"evidence: {slot}: {proof}" for slot, proof in run["evidence"].items()),
    ]  # fmt: skip


def _finals(run: Mapping[str, Any]) -> list[Row]:
    reference = run["final_losses"]["reference"]
    rows: list[Row] = [("training", "final loss", "against the reference")]
    for name, value in run["final_losses"].items():
        if value is None:
            rows.append((name, "not finite", ""))
        else:
            rows.append((name, f"{value:.5f}", "" if name == "reference" else f"{100 * (value / reference - 1):+.3f} %"))
    return rows


def _race(run: Mapping[str, Any]) -> list[Row]:
    level = run["equal_loss"]
    rows: list[Row] = [
        (f"to loss {'n/a' if level is None else f'{level:.4f}'}", "steps", "tokens", "seconds", "s/step", "first step s")
    ]
    for name, row in run["to_equal_loss"].items():
        reached = [count(row["steps"]), count(row["tokens"]), f"{row['seconds']:.1f}"] if row["steps"] else ["n/a"] * 3
        rows.append(
            (
                name,
                *reached,
                "n/a" if row["step_seconds"] is None else f"{row['step_seconds']:.4f}",
                f"{row['first_step_seconds']:.1f}",
            )
        )
    return rows


def _verdict(run: Mapping[str, Any]) -> list[str]:
    difference, noise, mean = run["difference"], run["seed_noise"], run["mean_difference"]
    others = len(run["seeds"]) - 1
    return [
        f"smoothed loss, plan - reference: {'not finite' if difference is None else f'{100 * difference:+.3f} %'}"
        + ("" if mean is None else f"; mean over all steps {100 * mean:.3f} %"),
        f"seed noise: {'n/a' if noise is None else f'{100 * noise:.3f} %'} "
        + (
            f"(standard deviation over {others + 1} initial weights of the reference)"
            if noise is not None
            else "(no other initial weights)"
        ),
        f"limit: {100 * run['limit']:.3f} %, the larger of 0.5 % and twice the seed noise",
        "passed" if run["passed"] else "NOT passed",
    ]
