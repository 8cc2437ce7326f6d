"""A tiny training for the tests of `gptoughts bench`, with the baseline in every slot that a test does not name."""

from __future__ import annotations

from pathlib import Path

from gptoughts.api import ResolvedRun, decide
from gptoughts.diagnostics.bench.variants import RunRequest

PLUGIN = str(Path(__file__).with_name("bench_plugin.py"))
PLAIN = {
    "host": "system", "allocator": "native", "matmul": "ieee", "attention": "math", "kernels": "torch-kernels", "precision": "fp32",
    "loss": "full-ce", "recompute": "keep", "compile": "eager", "optimizer": "plain", "loader": "direct", "microbatch": "whole",
}  # fmt: skip


def fields_in(folder: Path) -> dict[str, str]:
    """A tiny recipe over a text of its own."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    values = {"data.path": text, "data.cache": folder / "cache", "data.tokenizer": "bytes", "data.sequence_length": 16}
    values |= {"model.depth": 1, "model.width": 32, "model.heads": 2, "train.global_batch": 4, "optim.warmup_steps": 0}
    return {key: str(value) for key, value in values.items()}


def flags_of(fields: dict[str, str], **layers: str) -> list[str]:
    """The same as flags."""
    words = [word for key, value in fields.items() for word in (f"--{key}", value)]
    return words + [word for slot, layer in {**PLAIN, **layers}.items() for word in (f"--layer.{slot}", layer)]


def asked(fields: dict[str, str], *plugins: str, **layers: str) -> tuple[ResolvedRun, RunRequest]:
    """What a command line with these fields, plugins and layers asks for."""
    ask = RunRequest("quickstart", "auto", fields, plugins)
    return decide("quickstart", "auto", fields, {**PLAIN, **layers}, plugins), ask
