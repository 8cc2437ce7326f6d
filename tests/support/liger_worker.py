"""Liger's real kernels under Triton's interpreter, on engines of a few tokens: applied, proven, compared, halved, undone. Prints JSON.

Run with TRITON_INTERPRET=1. The interpreter hands Python numbers to a kernel where a GPU's compiler makes scalars of them, so RMSNorm
and SwiGLU fail on `eps.to(...)`; with `mended` the worker hands over scalars. Rotary positions run either way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from gptoughts.layers import CATALOG
from gptoughts.models.kernels import liger_places
from tests.support.engines import ROWS, engine_of, plan_of, recipe_of, steps, watched

TOKENS = 4


def mend() -> None:
    """Scalars for kernels instead of Python's floats, and Triton's rsqrt instead of CUDA's, which only a GPU's linker knows."""
    import numpy
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    inner = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if type(argument) is float:
            handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return inner(argument)

    def rsqrt(x: Any) -> Any:
        return tl.rsqrt(x)  # looked up when called, because the interpreter puts its own there

    interpreter._implicit_cvt = converted
    rms_norm.rsqrt = rsqrt


def batches() -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Endless batches of two rows; the first holds two documents."""
    generator, number = torch.Generator().manual_seed(0), 0
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    while True:
        number += 1
        yield {"input_ids": torch.randint(0, ROWS, (2, TOKENS + 1), generator=generator), "positions": positions}, number


def trained(family: str, parts: str | None) -> dict[str, Any]:
    """Losses and gradient of one step, and what the layer says of it; `parts` None is the baseline."""
    layer = CATALOG["liger"]
    options = layer.read_options({"parts": parts or "all"}, "the test")
    recipe = recipe_of(family)
    gradient: list[torch.Tensor] = []
    with engine_of(recipe, plan_of(recipe), batches()) as engine:
        inner = engine._hooks["clip"]

        def clip() -> torch.Tensor:
            gradient.append(torch.cat([parameter.grad.flatten().clone() for parameter in engine.parameters()]))
            return inner()

        engine.replace("clip", clip)
        if parts is None:
            return {"loss": steps(engine, 1)[0], "gradient": gradient[0]}
        before = state(engine.bare)
        with layer.apply(engine, options):
            loss = steps(engine, 1)[0]
            proof = layer.verify(engine, watched(engine, 0), options)
            first = next(place for place in liger_places.places(engine.bare, liger_places.PARTS)[0] if place.taken())
            put_back(first)
            half = layer.verify(engine, watched(engine, 0), options)
        told = {"proof": [str(proof.status), proof.text], "half": [str(half.status), half.text]}
        return {"loss": loss, "gradient": gradient[0], "undone": state(engine.bare) == before, **told}


def put_back(place: liger_places.Place) -> None:
    """Take the kernel out of one place, as if it had been forgotten."""
    from gptoughts.models.gpt.attention import rotate_both
    from gptoughts.models.gpt.gpt import Attention

    if isinstance(place.module, Attention):
        place.module.rotate = rotate_both
    else:
        del place.module.__dict__["forward"]


def state(model: torch.nn.Module) -> list[Any]:
    """What the layer may change."""
    return [(name, module.__dict__.get("forward"), getattr(module, "rotate", None)) for name, module in model.named_modules()]


def main(mended: str, *asked: str) -> None:
    """Every `family:parts` of the command line against its baseline."""
    if mended == "mended":
        mend()
    answers = {}
    for one in asked:
        family, parts = one.split(":")
        plain, fast = trained(family, None), trained(family, parts)
        ours, theirs = fast.pop("gradient"), plain["gradient"]
        cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=0)
        answers[one] = {**fast, "plain_loss": plain["loss"], "cosine": float(cosine)}
    print("answers", json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
