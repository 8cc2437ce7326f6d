"""What the compiler makes: its failures told in one message, its graphs counted, the cause named where one is made again, all kept on disk.

Loads no torch by itself, so that layers may ask it for reasons before torch is there.
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
from gptoughts.layers.support.graph_cache import CACHE, kept
from gptoughts.models import torch_internals
from gptoughts.planning.layer import Case, Reason, slower, unsupported

MEASURED = "docs/measurements/cpu/widths.json"
CPU_COMPILE_SECONDS = 40
# Share of an eager step that compiled blocks save on a CPU: it follows the model's form (norms, rotary and gate are many small
# operators) more than its width.
CPU_GAIN = {"rmsnorm": 0.25, "layernorm": 0.03}
CPU_FLOPS_PER_SECOND = {"bf16": 1.25e11, "fp32": 3e10}  # of one core, in a whole step
NOTHING_COMPILED = "found no compiled frames"  # what torch >= 2.12 says where it passes a whole forward over
METRICS_KEPT = 1024
"""Torch keeps the records of its last 64 compilations; a step of many different blocks may make more."""

_open: list[Compilations] = []
__all__ = [
    "CACHE",
    "Compilations",
    "compiled",
    "counted",
    "counting",
    "in_graphs",
    "kept",
    "lacking",
    "newest",
    "recompiles",
    "told",
]

IN_A_GRAPH = ", traced"


# --- what it takes


def lacking(case: Case) -> Iterator[Reason]:
    """Reasons against any compiled layer: a compiler that is missing, experts that are no graph, on a CPU a run too short for it."""
    spec = case.spec
    if spec.experts and not case.takes("precision", "bf16") and case.machine.has_older("transformers", (5, 23)):
        # Only bf16 is one grouped product under the compiler there; float32 becomes a loop that is no single graph.
        yield unsupported(
            f"experts in float32 are not one graph with transformers {case.machine.packages['transformers']}",
            remedy="--layer.precision bf16",
        )
        return
    if case.on_gpu:
        if "triton" not in case.machine.packages:
            yield unsupported("needs the package triton, not installed", remedy="pip install triton")
        return
    if case.takes("attention", "math") and not case.takes("precision", "fp32"):
        # Seen with torch 2.13 at 256 tokens and width 384: the loss is right and the gradient of the keys is NaN.
        yield unsupported(
            "torch's compiler for CPUs gives attention written out in 16 bits a gradient of NaN", "--layer.attention sdpa"
        )
        return
    if "c++" not in case.machine.packages:
        yield unsupported("needs a C++ compiler, found none", remedy="apt-get install g++")
        return
    seconds, gain = _run_seconds(case), CPU_GAIN.get(spec.norm or "", min(CPU_GAIN.values()))
    if seconds is None:
        yield slower("how long the run takes is not known before its data is read", MEASURED)
    elif seconds * gain < CPU_COMPILE_SECONDS:
        yield slower(
            f"the run takes about {seconds:.0f} s here, of which compiled blocks save {100 * gain:.0f} %; "
            f"compilation takes about {CPU_COMPILE_SECONDS} s",
            MEASURED,
        )


def _run_seconds(case: Case) -> float | None:
    """A rough length of the run on this CPU; None where it cannot be told before the text is read."""
    spec, train = case.spec, case.recipe.train
    if train.hours is not None:
        return train.hours * 3600
    tokens = train.tokens or (train.steps or 0) * train.global_batch * case.recipe.data.sequence_length
    if not tokens or spec.depth is None or spec.width is None:
        return None
    # Where the vocabulary is not known the blocks alone are counted: 12 C^2 weights each, 6 operations a weight and token.
    flops = flops_per_token(spec) or 72 * spec.depth * spec.width**2
    speed = CPU_FLOPS_PER_SECOND["bf16" if case.takes("precision", "bf16") else "fp32"]
    return flops * tokens / (speed * max(1, case.machine.cpu.usable_cores))


# --- around the steps


@contextmanager
def compiled(engine: Any, layer: str, cache: str, say: Callable[[str], None]) -> Iterator[Compilations]:
    """Around all forwards and backwards of `engine` while the block lasts: failures become one LayerError, graphs are counted.

    A graph that had to be made again is told to `say` in one line after the update in which it was made.
    """

    @contextmanager
    def failing() -> Iterator[None]:
        with told(layer):
            yield

    def backward(inner: Callable[[Any], None], loss: Any) -> None:
        with told(layer):  # the backward's graph is compiled when it is first needed
            inner(loss)

    def step(inner: Callable[[], bool]) -> bool:
        updated = inner()
        for cause in made.news():
            rank = f"rank {engine.ranks.world.rank}: " if engine.ranks.size > 1 else ""
            say(f"note: {rank}compiled again by update {engine.counters.updates + updated}: {cause}")
        return updated

    with ExitStack() as stack:
        stack.enter_context(kept(cache))
        made = stack.enter_context(counted())
        for verb in ("forward_context", "eval_context"):
            stack.callback(engine.wrap_context(verb, failing))
        stack.callback(engine.wrap("backward", backward))
        stack.callback(engine.wrap("step", step))
        yield made


@contextmanager
def told(layer: str) -> Iterator[None]:
    """Turn what the compiler raises into a LayerError of a few lines that names `layer`."""
    try:
        yield
    except torch_internals.recompile_limit_error() as error:
        raise LayerError(_over_the_limit(layer)) from error
    except torch_internals.compiler_error() as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        wrong = next((line for line in reversed(lines) if "error" in line.lower() and "TORCH" not in line), (lines or [""])[0])
        raise LayerError(_failed(layer, f"{type(error).__name__}: {wrong[:300]}")) from error
    except RuntimeError as error:
        if NOTHING_COMPILED not in str(error):
            raise
        raise LayerError(_failed(layer, str(error).partition("\n")[0][:300])) from error


def _failed(layer: str, what: str) -> str:
    return f"compile={layer}: the compiler failed: {what}\n  try: --layer.compile eager"


def _over_the_limit(layer: str) -> str:
    limit = torch_internals.recompile_limit()
    causes = [metric for metric in torch_internals.compilation_metrics() if metric.recompile_reason]
    cause = f": {_cause(causes[-1])}" if causes else ""
    return (
        f"compile={layer}: {limit} graphs of one function are made, the most that torch._dynamo.config.recompile_limit allows, "
        f"and another is needed{cause}\n"
        "  what follows would run uncompiled\n"
        "  try: --layer.compile eager, or let what differs be the same everywhere"
    )


# --- counting


@dataclass
class Compilations:
    """Graphs since the count began: those made again, each with its cause, and those read from the cache or not."""

    causes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Why graphs were not recorded as CUDA graphs, as far as torch says."""
    _newest: Any = None
    _said: int = 0
    _before: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        there = torch_internals.compilation_metrics()
        self._newest = there[-1] if there else None
        self._before = _counters()

    def read(self) -> None:
        """Take up what torch has recorded since the last time."""
        there = torch_internals.compilation_metrics()
        known = next((index for index, metric in enumerate(there) if metric is self._newest), -1)
        for metric in there[known + 1 :]:
            self.causes += [_cause(metric)] if metric.recompile_reason else []
            skipped = getattr(metric, "cudagraph_skip_reason", None)
            self.skipped += [" ".join(skipped.split())] if skipped else []
        self._newest = there[-1] if there else None

    def news(self) -> list[str]:
        """Causes that were not given out before."""
        self.read()
        new, self._said = self.causes[self._said :], len(self.causes)
        return new

    @property
    def figures(self) -> dict[str, int]:
        """`cached` and `made` graphs, `recompiles`, and graphs that are not CUDA graphs though asked for: `skips`."""
        self.read()
        now = _counters() - self._before
        return {
            "cached": now["fxgraph_cache_hit"],
            "made": now["fxgraph_cache_miss"] + now["fxgraph_cache_bypass"],
            "recompiles": len(self.causes),
            "skips": now["cudagraph_skips"],
        }

    def words(self) -> str:
        """`2 graphs from the cache, 0 made; made again 1 time: ...`."""
        figures = self.figures
        text = f"{figures['cached']} graphs from the cache, {figures['made']} made"
        if self.causes:
            text += f"; compiled again {len(self.causes)} times, last for {self.causes[-1]}"
        return text


def _counters() -> Counter[str]:
    return Counter(torch_internals.inductor_counters())


def _cause(metric: Any) -> str:
    """One line: function and place, what differed from the graph that was there, and the seconds that it took."""
    reason = str(metric.recompile_reason).strip().partition("\n")[0]
    reason = re.sub(r"^\d+/\d+: ", "", reason)  # number of the graph whose guard failed
    reason = " ".join(re.split(r"\s+# |\(HINT", reason)[0].split())
    if reason.startswith("GLOBAL_STATE changed: grad_mode"):
        reason = "a forward without gradients, as in validation, has a graph of its own"
    place = f"{metric.co_name} ({Path(metric.co_filename or '').name}:{metric.co_firstlineno})"
    seconds = f", {metric.duration_us / 1e6:.1f} s" if metric.duration_us and not metric.fail_type else ""
    return f"{place}: {reason}{seconds}"


@contextmanager
def counted() -> Iterator[Compilations]:
    """Count compilations while the block lasts; the innermost block counts."""
    made, limit = Compilations(), torch_internals.compilation_metrics_limit() or METRICS_KEPT
    torch_internals.set_compilation_metrics_limit(max(limit, METRICS_KEPT))
    _open.append(made)
    try:
        yield made
    finally:
        _open.remove(made)
        torch_internals.set_compilation_metrics_limit(limit)


def newest() -> Compilations | None:
    """The count in progress; None where nothing is compiled."""
    return _open[-1] if _open else None


def recompiles() -> tuple[str, ...]:
    """Causes of all graphs that were made again since the count in progress began."""
    made = newest()
    if made is None:
        return ()
    made.read()
    return tuple(made.causes)


def counting(call_counts: Counter[str], name: str) -> Callable[[], bool]:
    """A function that adds one to `marks[name]` and may be called in compiled graphs, too; see `in_graphs`.

    Written out in a compiled forward, `marks[name] += 1` would be a guard on the value: a new graph for every call. The compiler runs
    this one itself, once, while it traces, and the graph holds nothing of it.
    """

    def mark() -> bool:
        call_counts[f"{name}{IN_A_GRAPH}" if torch_internals.is_tracing() else name] += 1
        return True

    torch_internals.constant_when_traced(mark)
    return mark


def in_graphs(call_counts: Mapping[str, int], name: str) -> int:
    """Graphs that were traced with a call of the `counting` function of this name in them, since the engine was built."""
    return call_counts.get(f"{name}{IN_A_GRAPH}", 0)
