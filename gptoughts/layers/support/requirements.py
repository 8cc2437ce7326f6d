"""Requirements that several layers share. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from gptoughts.planning.layer import Case, Reason, unsupported

HALF_PRECISION = ("bf16", "fp16", "fp8-te", "fp8-torchao")
"""Precision layers under which attention runs in half precision."""
MATH = "math"
"""The baseline of the slot attention, which every model has."""
VARIABLE_LENGTH_CLASHES = {
    "compile-model": "the number of documents per batch varies, and one graph of the whole model needs fixed shapes",
    "cuda-graph": "the number of documents per batch varies, and a CUDA graph replays one shape",
}
"""Clashes of attention that takes document bounds instead of a mask."""


def fixed_attention(case: Case) -> Iterator[Reason]:
    """Yield a reason if the model's attention function cannot be replaced: a custom module, or attention that does more."""
    if case.spec.family is None:
        yield unsupported("needs a model of a known family; a custom module calls its own attention")
    elif case.spec.attention_needs is not None:
        yield unsupported(f"the attention of {case.spec.family} has {case.spec.attention_needs}", f"--layer.attention {MATH}")


def capability(case: Case, minimum: tuple[int, int], what: str = "") -> Iterator[Reason]:
    """Yield a reason if the least capable GPU is below `minimum`; `what` names the part that needs it."""
    least = case.machine.min_capability()
    if least is None or least < minimum:
        found = f"{least[0]}.{least[1]}" if least else "unknown"
        yield unsupported(f"{what}needs compute capability {minimum[0]}.{minimum[1]}, found {found}")


def triton(case: Case) -> Iterator[Reason]:
    """Yield a reason if the machine has a GPU and no Triton."""
    if case.on_gpu and "triton" not in case.machine.packages:
        yield unsupported("needs the package triton, not installed", remedy="pip install triton")


def fixed_scales(case: Case) -> Iterator[Reason]:
    """Yield a reason if recomputing a block would use FP8 scales newer than those of its first forward."""
    if case.takes("precision", "fp8-te") and case.option("precision", "scaling") == "delayed":
        yield unsupported("delayed FP8 scales change before a block is recomputed", "--layer.precision.scaling current")


def tokens_per_forward(case: Case) -> list[int]:
    """Return the token count of a micro-batch, and of the last one if it is smaller."""
    length, most = case.spec.sequence_length or 0, case.forward_sequences
    rest = case.rank_sequences % most if most else 0
    return [count * length for count in (most, rest) if count * length]
