"""One FP8 product through Transformer Engine, forward and backward, with the kernels that ran; one line of JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformer_engine.common.recipe as recipes
import transformer_engine.pytorch as te
from torch.profiler import ProfilerActivity, profile


def quantized(recipe: Any) -> Any:
    """The context in which its modules compute in FP8; renamed between versions."""
    return (
        te.autocast(enabled=True, recipe=recipe)
        if hasattr(te, "autocast")
        else te.fp8_autocast(enabled=True, fp8_recipe=recipe)
    )


def product(recipe: Any) -> dict[str, Any]:
    """Relative error against bf16, and the names of the kernels."""
    torch.manual_seed(0)
    linear = te.Linear(1024, 2048, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3):
        with quantized(recipe):
            y = linear(x)
        y.sum().backward()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler, quantized(recipe):
        y = linear(x)
        y.sum().backward()
        torch.cuda.synchronize()
    exact = x.detach().float() @ linear.weight.detach().float().t()
    error = ((y.float() - exact).norm() / exact.norm()).item()
    kernels = {event.key[:200]: event.count for event in profiler.key_averages()}
    return {"relative_error": error, "kernels": kernels}


def main() -> int:
    """Every scaling that this GPU can do."""
    names = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}
    found: dict[str, Any] = {"version": getattr(te, "__version__", None), "torch": torch.__version__}
    for scaling, name in names.items():
        try:
            found[scaling] = product(getattr(recipes, name)())
        except (RuntimeError, AttributeError, AssertionError, ValueError) as error:
            found[scaling] = {"failed": f"{type(error).__name__}: {error}"[:600]}
    print(json.dumps(found))
    return 0 if any("relative_error" in row for row in found.values() if isinstance(row, dict)) else 1


if __name__ == "__main__":
    sys.exit(main())
