"""What this box can do at most, measured in the same sitting: matrix products by dtype and the copy of memory. A child of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tests.device.box import clocks
from tests.device.serving import Channel, served, settle

REPEATS, WARM = 20, 5
SIZE, COPIED_BYTES = 8192, 2**31


def seconds_of(call: Callable[[], Any], device_type: str, repeats: int = REPEATS) -> float:
    """Median seconds of one call; on a GPU by events around each, so that launching is not counted."""
    for _ in range(WARM):
        call()
    settle(device_type)
    if device_type != "cuda":
        taken = []
        for _ in range(repeats):
            began = perf_counter()
            call()
            taken.append(perf_counter() - began)
        return median(taken)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) / 1000 for begin, end in pairs)


def product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A square product on random data; zeros would run faster."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right


def scaled_product(size: int, device: torch.device) -> Callable[[], Tensor]:
    """An FP8 product with one scale a tensor and bf16 out: both operands in 8 bits, the right one column by column."""
    kind = torch.float8_e4m3fn
    left = torch.randn(size, size, device=device).to(kind)
    right = torch.randn(size, size, device=device).to(kind).t()
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def body(job: dict[str, Any], channel: Channel) -> None:
    """Every ceiling that the device has; what it cannot do is told with its error."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    size, copied = (SIZE, COPIED_BYTES) if on_gpu and not job["tiny"] else (64, 2**16)
    torch.set_float32_matmul_precision("high")
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "bf16": lambda: product(size, torch.bfloat16, device),
        "fp16": lambda: product(size, torch.float16, device),
        "tf32": lambda: product(size, torch.float32, device),
        "fp8": lambda: scaled_product(size, device),
    }
    found: dict[str, Any] = {"size": size, "clocks_before": clocks()}
    for name, make in makers.items():
        try:
            found[f"{name}_tflops"] = 2 * size**3 / seconds_of(make(), device.type) / 1e12
        except (RuntimeError, ValueError, NotImplementedError) as error:  # a dtype that this device does not multiply
            found[f"{name}_tflops"], found[f"{name}_error"] = None, str(error)[:300]
    count = copied // 4
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_second"] = 2 * 4 * count / seconds_of(lambda: target.copy_(source), device.type) / 1e9
    found["clocks_after"] = clocks()
    channel.say({"ready": json.loads(json.dumps(found))})
    while channel.heard():
        channel.say({"done": {"steps": 1, "seconds": 1.0}})
    channel.say({"ended": {}})


if __name__ == "__main__":
    sys.exit(served(body))
