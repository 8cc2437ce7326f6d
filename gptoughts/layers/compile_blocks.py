"""Each block compiled into fused kernels, one graph for all blocks: fewer launches and less memory traffic.

The first step takes from ten seconds to a minute, again for every new shape. It hurts on short runs: on a CPU a model of GPT-2's
form saves a few per cent of a step, the modern form a quarter. `fullgraph=True, dynamic=False`, always: a part that cannot be
compiled is an error, not a slow path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gptoughts.errors import LayerError
from gptoughts.facts import flops_per_token
from gptoughts.layer import Case, Engine, Evidence, Layer, Options, Reason, Sight, active, cannot, inactive, would_not_pay

MEASURED = "docs/measurements/cpu/widths.json"
CPU_COMPILE_SECONDS = 40
# Share of an eager step that compiled blocks save on a CPU: it follows the model's form (norms, rotary and gate are many small
# operators) more than its width.
CPU_GAIN = {"rmsnorm": 0.25, "layernorm": 0.03}
CPU_FLOPS_PER_SECOND = {"bf16": 1.25e11, "fp32": 3e10}  # of one core, in a whole step


def fits(case: Case, options: Options) -> Iterator[Reason]:
    """Inductor needs a C++ compiler on a CPU and Triton on a GPU; on a CPU the run must be long enough to earn the compilation."""
    facts = case.facts
    if case.facts.family is None:
        yield cannot("needs a model of a known family, whose blocks are known to be one graph")
        return
    if case.recipe.model.family == "hf" and facts.depth == 1:
        yield cannot("one block is no repeated one, and the rest of the model is not compiled")
        return
    version = case.machine.packages.get("transformers", "")
    if facts.experts and not case.takes("precision", "bf16") and _older(version, (5, 23)):
        # Only bf16 is one grouped product under the compiler there; float32 becomes a loop that is no single graph.
        yield cannot(f"experts in float32 are not one graph with transformers {version}", remedy="--layer.precision bf16")
        return
    if case.on_gpu:
        if "triton" not in case.machine.packages:
            yield cannot("needs the package triton, not installed", remedy="pip install triton")
        return
    if "c++" not in case.machine.packages:
        yield cannot("needs a C++ compiler, found none", remedy="apt-get install g++")
        return
    seconds, gain = _run_seconds(case), CPU_GAIN.get(facts.norm or "", min(CPU_GAIN.values()))
    if seconds is None:
        yield would_not_pay("how long the run takes is not known before its data is read", MEASURED)
    elif seconds * gain < CPU_COMPILE_SECONDS:
        yield would_not_pay(
            f"the run takes about {seconds:.0f} s here, of which compiled blocks save {100 * gain:.0f} %; "
            f"compilation takes about {CPU_COMPILE_SECONDS} s",
            MEASURED,
        )


def _run_seconds(case: Case) -> float | None:
    """A rough length of the run on this CPU; None where it cannot be told before the text is read."""
    facts, train = case.facts, case.recipe.train
    if train.hours is not None:
        return train.hours * 3600
    tokens = train.tokens or (train.steps or 0) * train.global_batch * case.recipe.data.sequence_length
    if not tokens or facts.depth is None or facts.width is None:
        return None
    # Where the vocabulary is not known the blocks alone are counted: 12 C^2 weights each, 6 operations a weight and token.
    flops = flops_per_token(facts) or 72 * facts.depth * facts.width**2
    speed = CPU_FLOPS_PER_SECOND["bf16" if case.takes("precision", "bf16") else "fp32"]
    return flops * tokens / (speed * max(1, case.machine.cpu.usable_cores))


def _older(version: str, than: tuple[int, int]) -> bool:
    parts = version.split(".")[:2]
    return len(parts) == 2 and all(part.isdigit() for part in parts) and (int(parts[0]), int(parts[1])) < than


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Compile each block in place, which keeps parameter names as they are. What the compiler cannot do is told in one message."""
    for block in engine.blocks.values():
        block.compile(fullgraph=True, dynamic=False)
    undo = [engine.wrap_context(verb, _compiling) for verb in ("forward_context", "eval_context")]
    undo.append(engine.wrap("backward", _backward))  # the backward's graph is compiled when it is first needed
    yield
    for back in undo:
        back()
    for block in engine.blocks.values():
        block._compiled_call_impl = None


@contextmanager
def _compiling() -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = next(
            (line for line in reversed(lines) if "error" in line.lower() and "TORCH" not in line), lines[0] if lines else ""
        )
        raise LayerError(
            f"compile=compile-blocks: the compiler failed: {type(error).__name__}: {told[:300]}\n  try: --layer.compile eager"
        ) from error


def _backward(inner: Callable[[Any], None], loss: Any) -> None:
    with _compiling():
        inner(loss)


def verify(engine: Engine, sight: Sight, options: Options) -> Evidence:
    """Every forward of every block was a call of a compiled region. A full cache leaves blocks eager without a word: this counts."""
    wanted = sight.blocks * sight.micro_batches
    if sight.blocks == 0:
        return inactive("the model has no blocks to compile")
    if sight.regions < wanted:
        return inactive(f"{sight.regions} compiled calls in {wanted} block forwards", compiled=sight.regions, expected=wanted)
    return active(f"{sight.regions} compiled calls in {wanted} block forwards", compiled=sight.regions, expected=wanted)


LAYER = Layer(
    name="compile-blocks",
    slot="compile",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    fits=fits,
    wraps=("forward_context", "eval_context", "backward"),
    changes_numerics=True,
    warm_steps=1,
    measured="docs/measurements/cpu/widths.json on a CPU; not measured on a GPU",
)
