"""Files of runs as `train` writes them, made up: curves with a known spike, GPUs that are not here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SPIKE = 25.0
SLOTS = ("host", "matmul", "attention", "precision", "loss")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics_rows(steps: int, attempt: int = 1, first: int = 1, loss: float = 2.0, slower: float = 1.0) -> list[dict[str, Any]]:
    """Return one row per step, with a spike of the loss in the middle, and a validation every tenth of the steps."""
    rows: list[dict[str, Any]] = []
    for step in range(first, first + steps):
        seconds, tokens = 0.1 * step * slower, 1000 * step
        value = SPIKE if step == first + steps // 2 else loss + 8 * math.exp(-6 * step / steps)
        place = {"step": step, "attempt": attempt}
        x = {"train/num_tokens": tokens, "train/seconds": seconds}
        if step % max(1, steps // 10) == 0:
            rows.append(
                {**place, "eval/loss": value + 0.1, "eval/labels": 512, **x, "eval/hellaswag_acc": 0.25 + 0.1 * step / steps}
            )
        rows.append(
            {
                **place, "train/loss": value, "train/grad_norm": 1.0 + 0.1 * math.sin(step), "train/learning_rate": 1e-3, **x,
                "perf/tokens_per_second": 10_000 / slower, "perf/mfu": 0.4 / slower, "perf/of_gemm": None,
                "time/data_wait": 0.002, "time/forward": 0.03 * slower, "time/backward": 0.06 * slower, "time/optimizer": 0.008,
                "perf/limiter": "tensor cores" if step % 4 else "host launch", "perf/advice": "--layer.microbatch.sequences 8",
            }
        )  # fmt: skip
    return rows


def system_rows(count: int) -> list[dict[str, Any]]:
    """Return samples of two GPUs, two seconds apart."""
    rows = []
    for sample in range(count):
        row: dict[str, Any] = {"sample": sample, "attempt": 1, "time": 1.7e9 + 2 * sample, "step": 10 * (sample // 2)}
        for key, value in (("utilization", 90.0), ("memory_bytes", 60e9), ("power_watts", 600.0)):
            wave = value * (1 + 0.05 * math.sin(sample))
            row |= {f"gpu/{key}": wave, f"gpu/{key}_min": 0.9 * wave, f"gpu/{key}_max": 1.1 * wave}
            row |= {f"gpu/{key}_min_rank": 1, f"gpu/{key}_max_rank": 0}
        row |= {
            "gpu/throttle": ["power cap"] if sample % 3 == 0 else [],
            "cpu/process_percent": 110.0,
            "memory/process_bytes": 3e9,
        }
        rows.append(row)
    return rows


def plan(profile: str, precision: str) -> dict[str, Any]:
    """Return a plan.json."""
    layers = dict.fromkeys(SLOTS, "baseline") | {"attention": "sdpa", "precision": precision}
    choices = [
        {
            "slot": slot,
            "layer": layer,
            "options": {"backend": "auto"} if slot == "attention" else {},
            "rejected": [{"layer": "liger", "reasons": [{"kind": "unsupported", "text": "no GPU"}]}] if slot == "loss" else [],
            "expected_slowdown": [],
        }
        for slot, layer in layers.items()
    ]
    memory = {"peak": 3 << 30, "memory_bytes": 80 << 30}
    return {
        "profile": profile,
        "machine": "2 x NVIDIA H100",
        "world_size": 2,
        "choices": choices,
        "environment": {},
        "memory": memory,
    }


def evidence(precision: str) -> dict[str, Any]:
    """Return an evidence.json."""
    status = {"attention": ("active", "12 flash kernels"), "precision": ("active", f"{precision} in 48 matmuls")}
    layers = [
        {
            "slot": slot,
            "layer": "sdpa",
            "status": status.get(slot, ("active",))[0],
            "proof": status.get(slot, ("", "baseline"))[1],
        }
        for slot in SLOTS
    ]
    return {"step": 2, "layers": layers, "memory": {}, "attempt": 1}


def recipe(path: str = "books.txt", tokenizer: str = "gpt2", rate: float = 1e-3, objective: str = "next-token") -> str:
    """Return a recipe.toml."""
    data = f'[data]\npath = "{path}"\ntokenizer = "{tokenizer}"\ntrain_bpe = 4096\nsequence_length = 64\n'
    return f'name = "r"\nobjective = "{objective}"\n\n{data}\n[optim]\nlearning_rate = {rate}\n'


def write_run(
    folder: Path, steps: int = 200, profile: str = "hopper", precision: str = "bf16", slower: float = 1.0, **text: Any
) -> Path:
    """Write all files of a run into `folder`. `text` goes to `recipe`. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "metrics.jsonl", metrics_rows(steps, slower=slower))
    write_lines(folder / "system.jsonl", system_rows(max(2, steps // 4)))
    samples = [{"step": steps // 2, "attempt": 1, "name": "prompt", "text": "def f(x):\n    return x"}]
    write_lines(folder / "samples.jsonl", samples)
    parts = {"start": 5.0, "compile": 8.0, "productive": 0.1 * steps, "data": 1.0, "redone": 2.0, "other": 0.5}
    goodput = {"wall_seconds": sum(parts.values()), "parts": parts, "attempts": []}
    for name, value in (("plan", plan(profile, precision)), ("evidence", evidence(precision)), ("goodput", goodput)):
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    (folder / "recipe.toml").write_text(recipe(**text), encoding="utf-8")
    return folder
