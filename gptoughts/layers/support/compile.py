"""torch.compile: requirements, one message per failure, counts of graphs, causes of recompilations, and the graph cache.

Imports no torch at module level, so that plans can be made without torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoughts.config.model_spec import flops_per_token
from gptoughts.errors import LayerError
from gptoughts.layers.support.graph_cache import CACHE, cached_graphs
from gptoughts.layers.support.requirements import triton
from gptoughts.models import torch_internals
from gptoughts.planning.layer import Case, Reason, slower, unsupported

MEASURED = "docs/measurements/cpu/widths.json"
CPU_COMPILE_SECONDS = 40
# Share of an eager step that compiled blocks save on a CPU: it depends on the architecture (norms, rotary and gate are many small
# operators) more than on the width.
CPU_GAIN = {"rmsnorm": 0.25, "layernorm": 0.03}
CPU_FLOPS_PER_SECOND = {"bf16": 1.25e11, "fp32": 3e10}  # of one core, in a whole step
NOTHING_COMPILED = "found no compiled frames"  # message of torch >= 2.12 if it skips a whole forward
METRICS_KEPT = 1024
"""Torch keeps records of its last 64 compilations; a step with many different blocks may have more."""

_open: list[Compilations] = []
__all__ = [
    "CACHE",
    "Compilations",
    "compiled",
    "count_compilations",
    "counting",
    "in_graphs",
    "compiler_errors",
    "cached_graphs",
    "newest",
    "recompiles",
    "unmet_by_compiler",
]

IN_A_GRAPH = ", traced"


# --- requirements


def unmet_by_compiler(case: Case) -> Iterator[Reason]:
    """Yield reasons against any compiled layer: no compiler, experts that are not one graph, on a CPU a run that is too short."""
    spec = case.spec
    if spec.experts and not case.takes("precision", "bf16") and case.machine.has_older("transformers", (5, 23)):
        # Only bf16 compiles to one grouped matmul there; float32 becomes a loop, which is not one graph.
        yield unsupported(
            f"experts in float32 are not one graph with transformers {case.machine.packages['transformers']}",
            remedy="--layer.precision bf16",
        )
        return
    if case.on_gpu:
        yield from triton(case)
        return
    if case.takes("attention", "math") and not case.takes("precision", "fp32"):
        # Seen with torch 2.13 at 256 tokens and width 384: the loss is right and the gradient of the keys is NaN.
        yield unsupported(
            "torch's CPU compiler computes NaN gradients for unfused attention in 16 bits", "--layer.attention sdpa"
        )
        return
    if "c++" not in case.machine.packages:
        yield unsupported("needs a C++ compiler, found none", remedy="apt-get install g++")
        return
    seconds, gain = _run_seconds(case), CPU_GAIN.get(spec.norm or "", min(CPU_GAIN.values()))
    if seconds is None:
        yield slower("run time unknown before the data is read", MEASURED)
    elif seconds * gain < CPU_COMPILE_SECONDS:
        yield slower(
            f"compiled blocks save {100 * gain:.0f} % of about {seconds:.0f} s; compilation takes about {CPU_COMPILE_SECONDS} s",
            MEASURED,
        )


def _run_seconds(case: Case) -> float | None:
    """Estimate the run time on this CPU in seconds; None if it is unknown before the data is read."""
    spec, train = case.spec, case.recipe.train
    if train.hours is not None:
        return train.hours * 3600
    tokens = train.tokens or (train.steps or 0) * train.global_batch * case.recipe.data.sequence_length
    if not tokens or spec.depth is None or spec.width is None:
        return None
    # If the vocabulary is unknown, count the blocks only: 12 C^2 weights each, 6 operations per weight and token.
    flops = flops_per_token(spec) or 72 * spec.depth * spec.width**2
    speed = CPU_FLOPS_PER_SECOND["bf16" if case.takes("precision", "bf16") else "fp32"]
    return flops * tokens / (speed * max(1, case.machine.cpu.usable_cores))


# --- around the steps


@contextmanager
def compiled(engine: Any, layer: str, cache: str, say: Callable[[str], None]) -> Iterator[Compilations]:
    """Wrap all forwards and backwards of `engine`: failures become one LayerError, graphs are counted.

    Each recompilation is passed to `say` as one line after the update in which it happened.
    """

    @contextmanager
    def failing() -> Iterator[None]:
        with compiler_errors(layer):
            yield

    def backward(inner: Callable[[Any], None], loss: Any) -> None:
        with compiler_errors(layer):  # the backward's graph is compiled on first use
            inner(loss)

    def step(inner: Callable[[], bool]) -> bool:
        updated = inner()
        for cause in made.news():
            rank = f"rank {engine.ranks.world.rank}: " if engine.ranks.size > 1 else ""
            say(f"{rank}recompiled in update {engine.counters.updates + updated}: {cause}")
        return updated

    with ExitStack() as stack:
        stack.enter_context(cached_graphs(cache))
        made = stack.enter_context(count_compilations())
        for verb in ("forward_context", "eval_context"):
            stack.callback(engine.wrap_context(verb, failing))
        stack.callback(engine.wrap("backward", backward))
        stack.callback(engine.wrap("step", step))
        yield made


@contextmanager
def compiler_errors(layer: str) -> Iterator[None]:
    """Turn errors of the compiler into a short LayerError that names `layer`."""
    try:
        yield
    except torch_internals.recompile_limit_error() as error:
        raise _over_the_limit(layer) from error
    except torch_internals.compiler_error() as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        wrong = next((line for line in reversed(lines) if "error" in line.lower() and "TORCH" not in line), (lines or [""])[0])
        raise _failed(layer, f"{type(error).__name__}: {wrong[:300]}") from error
    except RuntimeError as error:
        if NOTHING_COMPILED not in str(error):
            raise
        raise _failed(layer, str(error).partition("\n")[0][:300]) from error


def _failed(layer: str, message: str) -> LayerError:
    return LayerError(f"compile={layer}: the compiler failed: {message}", fix="--layer.compile eager")


def _over_the_limit(layer: str) -> LayerError:
    limit = torch_internals.recompile_limit()
    causes = [metric for metric in torch_internals.compilation_metrics() if metric.recompile_reason]
    cause = f" for {_cause(causes[-1])}" if causes else ""
    return LayerError(
        f"compile={layer}: recompile limit ({limit}) reached{cause}",
        fix="keep the shape constant, or use --layer.compile eager",
    )


# --- counting


@dataclass
class Compilations:
    """Graphs since the count began: recompilations with their causes, cache hits and misses."""

    causes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Torch's reasons for graphs that were not recorded as CUDA graphs."""
    _newest: Any = None
    _said: int = 0
    _before: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        there = torch_internals.compilation_metrics()
        self._newest = there[-1] if there else None
        self._before = _counters()

    def read(self) -> None:
        """Read torch's compilation records since the last call."""
        there = torch_internals.compilation_metrics()
        known = next((index for index, metric in enumerate(there) if metric is self._newest), -1)
        for metric in there[known + 1 :]:
            self.causes += [_cause(metric)] if metric.recompile_reason else []
            skipped = getattr(metric, "cudagraph_skip_reason", None)
            self.skipped += [" ".join(skipped.split())] if skipped else []
        self._newest = there[-1] if there else None

    def news(self) -> list[str]:
        """Return causes that were not returned before."""
        self.read()
        new, self._said = self.causes[self._said :], len(self.causes)
        return new

    @property
    def figures(self) -> dict[str, int]:
        """Return counts: `cached` and `made` graphs, `recompiles`, and `skips` (requested CUDA graphs that were not recorded)."""
        self.read()
        now = _counters() - self._before
        return {
            "cached": now["fxgraph_cache_hit"],
            "made": now["fxgraph_cache_miss"] + now["fxgraph_cache_bypass"],
            "recompiles": len(self.causes),
            "skips": now["cudagraph_skips"],
        }

    def words(self) -> str:
        """Return `2 graphs from the cache, 0 compiled; 1 recompilations, last for ...`."""
        figures = self.figures
        text = f"{figures['cached']} graphs from the cache, {figures['made']} compiled"
        if self.causes:
            text += f"; {len(self.causes)} recompilations, last for {self.causes[-1]}"
        return text


def _counters() -> Counter[str]:
    return Counter(torch_internals.inductor_counters())


def _cause(metric: Any) -> str:
    """Return one line: function and location, the failed guard, and seconds."""
    reason = str(metric.recompile_reason).strip().partition("\n")[0]
    reason = re.sub(r"^\d+/\d+: ", "", reason)  # graph number
    reason = " ".join(re.split(r"\s+# |\(HINT", reason)[0].split())
    if reason.startswith("GLOBAL_STATE changed: grad_mode"):
        reason = "a forward without gradients, as in validation, has its own graph"
    place = (
        f"{metric.co_name} ({Path(metric.co_filename).name}:{metric.co_firstlineno})" if metric.co_filename else "a function"
    )
    seconds = f", {metric.duration_us / 1e6:.1f} s" if metric.duration_us and not metric.fail_type else ""
    return f"{place}: {reason}{seconds}"


@contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Count compilations inside the block; only the innermost block counts."""
    made, limit = Compilations(), torch_internals.compilation_metrics_limit() or METRICS_KEPT
    torch_internals.set_compilation_metrics_limit(max(limit, METRICS_KEPT))
    _open.append(made)
    try:
        yield made
    finally:
        _open.remove(made)
        torch_internals.set_compilation_metrics_limit(limit)


def newest() -> Compilations | None:
    """Return the count in progress; None outside of compiled runs."""
    return _open[-1] if _open else None


def recompiles() -> tuple[str, ...]:
    """Return the causes of all recompilations since the count in progress began."""
    made = newest()
    if made is None:
        return ()
    made.read()
    return tuple(made.causes)


def counting(call_counts: Counter[str], name: str) -> Callable[[], bool]:
    """Return a function that increments `call_counts[name]` and may be called in compiled graphs; see `in_graphs`.

    In a compiled forward, `call_counts[name] += 1` would guard on the value and recompile at every call. The compiler runs this function
    once while it traces, and the graph does not contain it.
    """

    def mark() -> bool:
        call_counts[f"{name}{IN_A_GRAPH}" if torch_internals.is_tracing() else name] += 1
        return True

    torch_internals.constant_when_traced(mark)
    return mark


def in_graphs(call_counts: Mapping[str, int], name: str) -> int:
    """Count graphs traced with a call of the `counting` function of this name, since the engine was built."""
    return call_counts.get(f"{name}{IN_A_GRAPH}", 0)
