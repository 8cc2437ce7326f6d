"""Format the figures of `bench layers` as text and Markdown: variants, gains of layers, summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptoughts.console import bytes_in_words, count, share
from gptoughts.diagnostics.bench.text import aligned, markdown, ratio

HEAD = ("variant", "ms/step", "q1 - q3", "tok/s", "MFU", "of GEMM", "peak", "start s", "loss diff.", "last loss")


def layers_text(run: Mapping[str, Any]) -> str:
    """Return the tables as text."""
    parts = [*_head(run), "", *aligned([HEAD, *_rows(run)]), *_notes(run), "", *aligned(list(_gains(run))), ""]
    return "\n".join([*parts, *run["whole"]["words"], "", *_foot(run), "", *_evidence(run)])


def layers_markdown(runs: Sequence[Mapping[str, Any]], picture: str) -> str:
    """Return all runs of a file as Markdown."""
    lines = ["# Speed of each layer", "", "Made by `gptoughts bench layers`; docs/bench.md says how to read it.", ""]
    lines += [f"![tokens per second of every variant]({picture})", ""]
    for run in runs:
        lines += [f"## {run['recipe']}", "", *(f"{line}  " for line in _head(run)), "", f"`{run['command']}`", ""]
        lines += [*markdown([HEAD, *_rows(run)]), ""]
        lines += [*(f"- {line.strip()}" for line in _notes(run)), ""] if _notes(run) else []
        lines += ["### Gains", "", *markdown(list(_gains(run))), "", "### Summary", ""]
        lines += [*(f"- {line}" for line in run["whole"]["words"]), "", *(f"{line}  " for line in _foot(run)), ""]
        lines += ["### Evidence", "", *(f"- {line.strip()}" for line in _evidence(run)[1:]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _head(run: Mapping[str, Any]) -> list[str]:
    machine, model = run["machine"], run["model"]
    parameters = count(model["parameters"]) if "parameters" in model else "n/a"
    loads = run["load_averages"]
    watts = machine.get("power_limit_watts")
    power = f", power limit {watts:g} W" if watts else ", power limit n/a" if "power_limit_watts" in machine else ""
    return [
        f"{run['recipe']}: {parameters} parameters, width {model.get('width', 'n/a')}, depth {model.get('depth', 'n/a')}, "
        f"{run['global_batch']} sequences of {model.get('sequence_length', 'n/a')} tokens per step",
        f"on {machine['label']}{power}; torch {machine['torch']}, {machine['threads']} threads, load {min(loads)} to {max(loads)}",
        f"plan: profile {run['profile']}, {', '.join(f'{slot}={layer}' for slot, layer in run['parts'].items())}",
        f"{run['rounds']} rounds of {run['steps_per_round']} steps, processes {run['processes']}, {run['seconds_in_all']:.0f} s in all",
    ]


def _rows(run: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, row in run["variants"].items():
        start = "n/a" if row["start_seconds"] is None else f"{row['start_seconds']:.1f}"
        if row["failure"] or "step_ms" not in row:
            yield (name, "not counted", *("",) * 5, start, "", "")
            continue
        times = row["step_ms"]
        difference = row["loss_difference"]
        yield (
            name,
            f"{times['median']:.1f}",
            f"{times['q1']:.1f} - {times['q3']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            share(row["mfu"]),
            share(row["share_of_gemm"]),
            bytes_in_words(row["peak_bytes"]),
            start,
            "n/a" if difference is None else f"{100 * difference:.3f} %",
            f"{row['last_loss']:.4f}",
        )


def _notes(run: Mapping[str, Any]) -> list[str]:
    """Return the variants that are not in the table, with the reason."""
    lines = [f"  {name}: not counted, {row['failure']}" for name, row in run["variants"].items() if row["failure"]]
    lines += [f"  {name}: same as {twin}" for name, twin in run["same_as"].items()]
    return lines + [f"  {name}: cannot run, {why}" for name, why in run["left_out"].items()]


def _gains(run: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    yield ("layer", "alone", "q1 - q3", "in the plan", "q1 - q3", "in the plan / alone", "5 % - 95 %")
    for slot, row in run["gains"].items():
        yield (f"{slot}={row['layer']}", *ratio(row["alone"]), *ratio(row["in_plan"]), *_ranged(row["interaction"]))
    whole, products = run["whole"]["measured"], run["whole"]["products"]
    alone, beside = products["alone"]["product"], products["in_plan"]["product"]
    yield ("product of the medians", _ranged(alone)[0], "", _ranged(beside)[0], "", "", "")
    yield ("plan / baseline, measured", *ratio(whole), *ratio(whole), "", "")


def _ranged(found: Mapping[str, float] | None) -> tuple[str, str]:
    return ("n/a", "") if found is None else (f"{found['value']:.3f}", f"{found['low']:.3f} - {found['high']:.3f}")


def _foot(run: Mapping[str, Any]) -> list[str]:
    lines = [
        "alone: speed of the baseline with the layer / baseline; in the plan: plan / plan without the layer; paired by round",
        "loss diff.: mean relative distance of the smoothed loss from the baseline's, same steps, data and seed",
        f"peak: {run['memory']}",
        "start s: until the first counted step, compilation included; the first variant to compile fills the cache of the others",
        run["mfu_formula"],
    ]
    ceilings = run["gemm_ceilings"]
    lines.append(
        "of GEMM: n/a. Try: gptoughts bench gemm"
        if ceilings is None
        else "of GEMM: the model's FLOP/s / matmul rate measured on this machine: "
        + ", ".join(f"{name} {value:.4g} TFLOP/s" for name, value in ceilings["tflops"].items())
    )
    clocks = [row["clock_mhz"] for row in run["variants"].values() if row.get("clock_mhz")]
    if clocks:
        low, high = min(clock["min"] for clock in clocks), max(clock["max"] for clock in clocks)
        lines.append(f"GPU clock after each round: {low:.0f} to {high:.0f} MHz")
    return lines


def _evidence(run: Mapping[str, Any]) -> list[str]:
    lines = ["evidence of the watched steps"]
    for name, row in run["variants"].items():
        found = [f"{slot} {text.removeprefix('active: ')}" for slot, text in row["evidence"].items()]
        lines.append(f"  {name}: {'; '.join(found) or 'no layer of the plan'}")
    return lines
