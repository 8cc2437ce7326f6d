"""FlashAttention-3 for Hopper: asynchronous copies and matmuls, up to twice as fast as FlashAttention-2.

Whole trainings gain less than the kernel: nanochat measured 9 % more tokens per second. Packed documents need no mask. Compiled blocks
stay one graph, because the package registers its operators with torch. It runs on compute capability 9.x only, and builds made for
serving have no backward: they are refused by name. torch's own cuDNN attention (`sdpa`, backend = "cudnn") is the rival to measure.
Sources: Shah et al. 2024 (arXiv:2407.08608), 1.5 to 2.0 times; karpathy/nanochat, dev/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.layers.support.flash_attention import HALF_PRECISION, limits, proof
from gptoughts.planning.layer import Budget, Case, Engine, Evidence, Layer, Options, Reason, StepTrace, unsupported

PACKAGES = ("flash-attn-3", "tokenspeed-fa3")
"""Distributions that bring the module flash_attn_interface; one is enough."""
SERVING_ONLY = ("3.0.0.post20251110", "3.0.0.post20260408", "3.0.0.post20260810")
"""Wheels of tokenspeed-fa3 whose flash_attn_config.py says FLASHATTENTION_DISABLE_BACKWARD; any build is asked again in `apply`."""
BUILD = "pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Hopper and nothing else, and one of the packages."""
    yield from limits(case)
    capabilities = sorted({gpu.compute_capability for gpu in case.machine.gpus if gpu.compute_capability is not None})
    if any(capability[0] != 9 for capability in capabilities):
        found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        yield unsupported(f"its kernels are written for compute capability 9.x, found {found}")
        return
    packages = case.machine.packages
    if not any(package in packages for package in PACKAGES):
        yield unsupported(f"needs one of the packages {', '.join(PACKAGES)}, none is installed", remedy=BUILD)
    elif "flash-attn-3" not in packages and packages["tokenspeed-fa3"] in SERVING_ONLY:
        yield unsupported(
            f"tokenspeed-fa3 {packages['tokenspeed-fa3']} is built without the backward, for serving", remedy=BUILD
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """No scores are kept."""
    return budget.without_scores()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Hand every attention module the package's functions, and the model what counts documents."""
    from gptoughts.models.gpt import flash

    undo = engine.family.set_attention(engine.bare, flash.attention("fa3"), "lengths")
    yield
    undo()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Forward kernels of the class FlashAttnFwdSm90."""
    return proof(trace, "fa3")


LAYER = Layer(
    name="fa3",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    min_capability=(9, 0),
    needs_slots={"precision": HALF_PRECISION},
    clashes={
        "compile-model": "the number of documents in a batch is data, and one graph of the whole model cannot hold its shape",
        "cuda-graph": "the number of documents in a batch is data, and a captured graph replays one shape",
    },
    changes_numerics=True,
    repeatable_on_gpu=False,
)
