"""Format the figures of `benchmarks.step` as a text table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptoughts.console import count, share


def step_table(run: Mapping[str, Any]) -> str:
    """Return variants, ratios, machine and settings as text."""
    return "\n".join([*_head(run), "", *_variants(run), "", *_ratios(run), "", *_foot(run)])


def _head(run: Mapping[str, Any]) -> list[str]:
    machine, model = run["machine"], run["model"]
    size = count(model["parameters"]) if "parameters" in model else "n/a"
    layers = ", ".join(f"{slot}={layer}" for slot, layer in run["plan"].items() if slot in run["evidence"])
    lines = [
        f"{run['recipe']}: {size} parameters, width {model.get('width', 'n/a')}, depth {model.get('depth', 'n/a')}, "
        f"{run['global_batch']} sequences of {model.get('sequence_length', 'n/a')} tokens per step",
        f"on {machine['label']}; torch {machine['torch']}, {machine['threads']} threads, load {machine['load_average']}",
        f"ours: profile {run['profile']}, {layers}",
    ]
    if run["only_ours"]:
        lines.append(f"only in ours: {', '.join(run['only_ours'])}")
    return lines


def _variants(run: Mapping[str, Any]) -> list[str]:
    lines = [f"{'variant':<12}{'ms/step':>10}{'q1':>10}{'q3':>10}{'min':>10}{'max':>10}{'tok/s':>12}{'MFU':>8}"]
    for name, row in run["variants"].items():
        times = row["step_ms"]
        columns = "".join(f"{times[key]:>10.1f}" for key in ("median", "q1", "q3", "min", "max"))
        lines.append(f"{name:<12}{columns}{row['tokens_per_second']:>12,.0f}{share(row['mfu']):>8}")
    return lines


def _ratios(run: Mapping[str, Any]) -> list[str]:
    lines = [f"{'tok/s, paired':<22}{'median':>8}{'q1':>8}{'q3':>8}{'min':>8}{'max':>8}   over {run['rounds']} rounds"]
    for name, row in run["ratios_of_tokens_per_second"].items():
        columns = "".join(f"{row[key]:>8.3f}" for key in ("median", "q1", "q3", "min", "max"))
        lines.append(f"{name:<22}{columns}")
    return lines


def _foot(run: Mapping[str, Any]) -> list[str]:
    outside = run["outside_verbs"]
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in run["losses"].items())
    return [
        f"outside the engine: {1e6 * outside['seconds_per_step']:.0f} us per step over {outside['steps']} steps, "
        f"{100 * outside['share_of_step']:.3f} % of ours",
        f"last logged loss: {losses}",
        run["mfu_formula"],
    ]
