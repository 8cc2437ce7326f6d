"""Verbs of our own command line that measure by themselves: their figures become part of the stage's file."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.device import stages
from tests.device.kept import Deadline, Kept, folder
from tests.device.turns import flags


def offers(*words: str) -> bool:
    """Whether the command line here has the verb."""
    done = subprocess.run([sys.executable, "-m", "gptoughts", *words, "--help"], capture_output=True, check=False)
    return done.returncode == 0


def bench_step(kept: Kept, deadline: Deadline, tiny: bool) -> int:
    """Run `python -m benchmarks.step` on GPT-2 124M: ours and a plain PyTorch loop."""
    fields = {**stages.GPT2, "data.tokenizer": "bytes", "train.global_batch": "32", "train.steps": "5000"}
    fields |= {**stages.TINY, "model.kv_heads": "none"} if tiny else {}
    layers = {"precision": "bf16", **({"compile": "eager"} if tiny else {})}
    path = folder() / "bench-step.json"
    path.unlink(missing_ok=True)
    words = ["gpt2-124m", *flags(fields, layers), "--rounds", "3" if tiny else "7"]
    words += ["--steps", "2" if tiny else "8", "--to", str(path)]
    return _kept(kept, deadline, "bench-step", words, path, 30 if tiny else 100, module="benchmarks.step")


def bench_gemm(kept: Kept, deadline: Deadline, tiny: bool) -> int:
    """`gptoughts bench gemm`, where the command line has it; our own ceilings are there in any case."""
    if not offers("bench", "gemm"):
        return 0
    path = folder() / "bench-gemm.json"
    path.unlink(missing_ok=True)
    words = ["bench", "gemm", "--out", str(path), *(["--largest", "128"] if tiny else [])]
    return _kept(kept, deadline, "bench-gemm", words, path, 5 if tiny else 20)


def bench_layers(kept: Kept, deadline: Deadline, tiny: bool) -> int:
    """`gptoughts bench layers` for 124 M and, with time left, 1.5 B, where the command line has it."""
    if not offers("bench", "layers"):
        print("bench layers: this command line does not have it", flush=True)
        return 0
    if tiny:
        print("bench layers: a process for each variant takes minutes on a CPU; its own tests run it", flush=True)
        return 0
    missing = 0
    for name, fields, steps, seconds in (("gpt2-124m", stages.GPT2, "8", 240), ("gpt2-xl", stages.XL, "4", 300)):
        path = folder() / f"bench-layers-{name}.json"
        words = ["bench", "layers", name, *flags(fields, {}), "--out", str(path), "--rounds", "3", "--steps", steps]
        missing += _kept(kept, deadline, f"bench-layers-{name}", words, path, seconds)
    return missing


def _kept(
    kept: Kept, deadline: Deadline, name: str, words: list[str], path: Any, seconds: float, *, module: str = "gptoughts"
) -> int:
    """Run the command within the time; keep its JSON, or its output if it writes none. Return 1 if it failed."""
    if kept.holds(name):
        return 0
    if not deadline.allows(seconds):
        print(f"{name}: not begun, {deadline.left():.0f} s left", flush=True)
        return 1
    print(f"--- {name}", flush=True)
    command = [sys.executable, "-m", module, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=deadline.left())
    except subprocess.TimeoutExpired as error:
        told = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        if path is not None and path.exists():  # what was written before the time was over counts
            kept.keep(f"{name}-part", {"command": words, "figures": json.loads(path.read_text(encoding="utf-8"))})
        kept.keep_failure(name, f"not finished in time\n{told}")
        return 1
    print(done.stdout[-3000:], flush=True)
    if done.returncode:
        kept.keep_failure(name, f"exit code {done.returncode}\n{done.stderr}")
        print(f"{name}: {done.stderr[-2000:]}", flush=True)
        return 1
    figures = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else None
    kept.keep(name, {"command": words, "figures": figures, "told": done.stdout[-6000:]})
    return 0
