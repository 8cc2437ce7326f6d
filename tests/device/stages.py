"""What each stage measures, in the order of what it is worth: the first lines are there even when the time is short."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gptoughts.layers import CATALOG
from tests.device.turns import Job

HERE = Path(__file__).resolve().parent
LLAMA = str(HERE / "configs" / "llama.toml")
QUIET = {"eval.every": "0", "save.every": "0", "log.every": "10", "data.tokenizer": "bytes", "train.steps": "100000"}
GPT2 = {**QUIET, "model.vocab_size": "50304", "train.global_batch": "128"}
XL = {**QUIET, "model.vocab_size": "50304", "train.global_batch": "64"}
LLAMA_1B = {
    **QUIET, "model.config": str(HERE / "configs" / "llama-1b.json"), "data.sequence_length": "2048", "train.global_batch": "32",
}  # fmt: skip
LLAMA_8B = {
    **QUIET, "model.config": str(HERE / "configs" / "llama-8b.json"), "data.sequence_length": "2048", "train.global_batch": "8", "optim.clip_norm": "1",
}  # fmt: skip
LLAMA_3B = {**LLAMA_1B, "model.config": str(HERE / "configs" / "llama-3b.json"), "train.global_batch": "16"}
MODERN = {**QUIET, "model.vocab_size": "16384", "data.sequence_length": "2048", "train.global_batch": "8", "log.every": "1"}
"""16,384 tokens per update and per forward: the same at every width."""
WIDTHS = {768: (12, 6, 6), 1536: (12, 12, 4), 2048: (10, 16, 8), 3072: (8, 24, 8), 4096: (6, 32, 8)}
"""Width -> depth, heads, key-value heads. Shallower where wider, so that two fit beside each other up to 2048."""
WIDEST_IN_PAIRS = 2048
FP8 = ("fp8-te", "fp8-torchao")
PACKAGES = {
    "fp8-te": "transformer-engine", "fp8-torchao": "torchao", "fa3": "tokenspeed-fa3", "fa2": "flash-attn", "fa4": "flash-attn-4",
    "liger": "liger-kernel", "zero3": "deepspeed",
}  # fmt: skip
TINY = {
    "model.depth": "1", "model.width": "64", "model.heads": "2", "model.kv_heads": "2", "model.vocab_size": "512",
    "data.sequence_length": "32", "train.global_batch": "4",
}  # fmt: skip
NAMED = {"gpt2-124m", "gpt2-xl", "gpt-1b"}
"""Recipes of native models; the others name a config.json."""


@dataclass(frozen=True)
class Turns:
    """Jobs that are measured in one sitting, taking turns."""

    name: str
    jobs: tuple[Job, ...]
    rounds: int = 5
    steps: int = 6
    seconds: float = 60
    """What it takes at most, roughly; with less time left it is not begun."""
    also: dict[str, Any] = field(default_factory=dict)
    shown_tiny: bool = True
    """Whether `--tiny` runs it; of a row of sizes one is enough to find a typing error."""

    def tiny(self) -> Turns:
        """The same on models that a CPU trains in a second."""
        return replace(self, jobs=tuple(map(_tiny, self.jobs)), rounds=2, steps=2, seconds=1)


def _tiny(job: Job) -> Job:
    own = dict(TINY)
    if job.recipe not in NAMED:
        sizes = {key: value for key, value in TINY.items() if not key.startswith("model.")}
        own = {**sizes, "model.config": str(HERE / "configs" / "llama-tiny.json")}
    elif job.recipe.startswith("gpt2"):
        own.pop("model.kv_heads")
    layers = {**job.layers, **({"compile": "eager"} if job.layers.get("compile", "") != "cuda-graph" else {})}
    layers.pop("microbatch.sequences", None)
    layers.pop("microbatch", None)
    more = {**job.more, **({"sequences": 2, "compiled": False} if "hf_trainer" in job.module else {})}
    return replace(job, fields={**job.fields, **own}, layers=layers, more=more)


def installed(layer: str) -> bool:
    """Whether the layer is there and its package, if it needs one, is installed."""
    if layer not in CATALOG:
        return False
    try:
        return layer not in PACKAGES or bool(version(PACKAGES[layer]))
    except PackageNotFoundError:
        return False


def fitting(*sequences: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Layers for the micro-batch: the size that `auto` finds, and fixed ones; the best of them counts."""
    if "auto" in CATALOG:
        yield "auto", {"microbatch": "auto"}
    for count in sequences:
        yield str(count), {"microbatch": "fixed", "microbatch.sequences": str(count)}


def bf16() -> Iterator[Turns]:
    """Compiled bf16 through `--profile auto` at 124 M, 1.5 B, 1.1 B Llama and 3 B, and beside Hugging Face's Trainer."""
    wish = {"precision": "bf16"}
    sizes: dict[str, tuple[str, dict[str, str], tuple[int, ...], int, float]] = {
        "gpt2-124m": ("gpt2-124m", GPT2, (64, 32, 16), 6, 60),
        "gpt2-xl": ("gpt2-xl", XL, (16, 8), 3, 110),
        "llama-1b": (LLAMA, LLAMA_1B, (8, 4), 4, 80),
    }
    first, rest = [], []
    for name, (recipe, fields, counts, steps, seconds) in sizes.items():
        rows = [
            Turns(f"{name}@{label}", (Job(f"{name}@{label}", recipe, fields, {**wish, **layers}),), 5, steps, seconds)
            for label, layers in fitting(*counts)
        ]
        first.append(rows[0])
        rest += [replace(row, shown_tiny=False) for row in rows[1:]]
    yield first[0]
    yield first[1]
    yield beside_trainer()
    yield first[2]
    yield from rest[:1]
    three = next(layers for _, layers in fitting(2))
    yield Turns("llama-3b", (Job("llama-3b", LLAMA, LLAMA_3B, {**wish, **three}),), 3, 3, 120, shown_tiny=False)
    yield from rest[1:]
    alone = Job("trainer@8", LLAMA, LLAMA_1B, {}, "tests.device.hf_trainer", {"sequences": 8, "compiled": True})
    yield Turns("trainer@8", (alone,), 5, 4, 100, shown_tiny=False)


def beside_trainer() -> Turns:
    """Ours and the Trainer on the 1.1 B Llama: same config, tokens per update and per forward; both fit one 80 GB card together."""
    four = {"microbatch": "fixed", "microbatch.sequences": "4"}
    ours = Job("ours", LLAMA, LLAMA_1B, {"precision": "bf16", **four})
    theirs = Job("trainer", LLAMA, LLAMA_1B, {}, "tests.device.hf_trainer", {"sequences": 4, "compiled": True})
    return Turns("llama-1b-beside-trainer", (ours, theirs), 6, 4, 150, {"ratio": ["ours", "trainer"], "goal": 1.3})


def fp8() -> Iterator[Turns]:
    """FP8 against compiled bf16: first where it should pay, then by width, then 1.5 B and 3 B whole."""
    there = [layer for layer in FP8 if installed(layer)]
    for width in (2048, 4096, 768, 3072, 1536):
        depth, heads, kv_heads = WIDTHS[width]
        shape = {
            "model.width": str(width),
            "model.depth": str(depth),
            "model.heads": str(heads),
            "model.kv_heads": str(kv_heads),
        }
        jobs = [Job(f"{layer}-{width}", "gpt-1b", {**MODERN, **shape}, {"precision": layer}) for layer in ("bf16", *there)]
        rows = _together(f"width-{width}", jobs, width <= WIDEST_IN_PAIRS)
        yield from (replace(row, shown_tiny=width in (2048, 4096)) for row in rows)
    whole = {
        "1.5b": ("gpt2-xl", {**XL, "train.global_batch": "32"}, ("8",)),
        "3b": ("gpt-1b", {**MODERN, "model.width": "3072", "model.depth": "24", "model.heads": "24"}, ("2",)),
    }
    for name, (recipe, fields, (count,)) in whole.items():
        micro = {"microbatch": "fixed", "microbatch.sequences": count}
        for layer in ("bf16", *there):
            job = Job(f"{layer}-{name}", recipe, fields, {"precision": layer, **micro})
            yield Turns(f"whole-{name}-{layer}", (job,), 4, 4, 100, {"compare": name}, name == "1.5b")


def _together(name: str, jobs: list[Job], at_once: bool) -> Iterator[Turns]:
    """Five rounds of 24 updates: more than 100, so losses can be compared."""
    if at_once and len(jobs) > 1:
        for other in jobs[1:]:
            yield Turns(f"{name}-{other.layers['precision']}", (jobs[0], other), 5, 24, 90, {"parity": True})
        return
    for job in jobs:
        yield Turns(f"{name}-{job.layers['precision']}", (job,), 5, 24, 90, {"compare": name})


def ablation() -> Iterator[Turns]:
    """Attention backends, allocator, determinism: each beside the plan without the change, on GPT-2 124M."""
    base = {"precision": "bf16", "microbatch": "fixed", "microbatch.sequences": "32"}
    plan = Job("plan", "gpt2-124m", GPT2, base)
    for label, layers in attention_layers():
        jobs = (plan, Job(label, "gpt2-124m", GPT2, {**base, **layers}))
        yield Turns(f"attention-{label}", jobs, 4, 4, 60, shown_tiny=label == "sdpa-flash")
    still = Job(
        "deterministic", "gpt2-124m", GPT2, base, more={"deterministic": True},
        environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    )  # fmt: skip
    yield Turns("determinism", (plan, still), 4, 4, 60)
    native = Job("native", "gpt2-124m", GPT2, {**base, "allocator": "native"})
    yield Turns("allocator", (plan, native), 4, 4, 60, shown_tiny=False)
    if installed("liger"):
        eager = {"precision": "bf16", "compile": "eager", "microbatch": "fixed", "microbatch.sequences": "4"}
        jobs = (Job("eager", LLAMA, LLAMA_1B, eager), Job("liger", LLAMA, LLAMA_1B, {**eager, "kernels": "liger"}))
        yield Turns("liger", jobs, 4, 3, 90)


def attention_layers() -> Iterator[tuple[str, dict[str, str]]]:
    """Every attention layer that is here, and every backend that `sdpa` can be told."""
    backend = CATALOG["sdpa"].options["backend"]
    for choice in backend.choices or ():
        if choice != backend.default:
            yield f"sdpa-{choice}", {"attention": "sdpa", "attention.backend": choice}
    for layer in ("fa3", "flex", "fa2", "fa4", "varlen"):
        if installed(layer):
            yield layer, {"attention": layer}


def sharding() -> Iterator[Turns]:
    """One GPU as one rank, with weights, gradients and optimizer state in host memory: FSDP2 and ZeRO-3 on Llama 1.1 B and 8 B."""
    saving = {"precision": "bf16", "compile": "eager", "recompute": "recompute-blocks", "loss": "fused-ce"}
    small = {**saving, "microbatch": "fixed", "microbatch.sequences": "4"}
    plain = Job("single-1b", LLAMA, LLAMA_1B, small)
    ways = {
        "fsdp2": {"parallel": "fsdp2", "parallel.offload": "true"},
        "zero3": {"parallel": "zero3", "parallel.offload_weights": "true"},
    }
    for name, layers in ways.items():
        if installed(name):
            job = Job(f"{name}-1b", LLAMA, LLAMA_1B, {**small, **layers})
            yield Turns(f"offload-{name}-1b", (plain, job), 3, 2, 120, {"parity": True})
    for name, layers in ways.items():
        if installed(name):
            job = Job(f"{name}-8b", LLAMA, LLAMA_8B, {**saving, **layers, "microbatch": "fixed", "microbatch.sequences": "2"})
            yield Turns(f"offload-{name}-8b", (job,), 2, 1, 240, {"goal_bytes": 24 * 10**9}, shown_tiny=False)


STAGES = {"bf16": bf16, "fp8": fp8, "ablation": ablation, "sharding": sharding}
