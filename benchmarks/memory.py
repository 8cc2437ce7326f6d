"""Compare the memory that plans predict with the peak of a real step, for the common ways to fine-tune a Llama of 25 M parameters.

    python -m benchmarks.memory --to docs/measurements/cpu/memory-finetune.json

Every run is a `gptoughts train` of its own with random weights; prediction and peak are those of its first row of metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks import front
from gptoughts.cli.options import CONTEXT
from gptoughts.diagnostics.bench.figures import machine_figures
from gptoughts.errors import RunError
from gptoughts.hardware.machine import probe

MODULE = "benchmarks.memory"
ROOT = Path(__file__).parents[1]
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256, "hidden_act": "silu",
}  # fmt: skip
RECIPE = """
name = "llama-25m"

[model]
family = "hf"
config = "{config}"

[data]
path = "text.txt"
tokenizer = "bytes"
sequence_length = 256

[train]
steps = 2
global_batch = 4

[optim]
warmup_steps = 0
"""
LORA, BLOCKS = "--adapter.kind lora --adapter.rank 16", "--layer.recompute recompute-blocks"
METHODS = {
    "full": "",
    "full, recompute": BLOCKS,
    "full, recompute-ops": "--layer.recompute recompute-ops",
    "full, 8bit": "--layer.optimizer 8bit",
    "full, in-backward": "--layer.update in-backward --optim.clip-norm 0",
    "LoRA": LORA,
    "LoRA, recompute": f"{LORA} {BLOCKS}",
    "nf4": f"{LORA} --adapter.base nf4",
    "nf4, recompute": f"{LORA} --adapter.base nf4 {BLOCKS}",
}
SHARED = (
    "--layer.precision bf16 --layer.attention sdpa --layer.compile eager --layer.microbatch fixed --layer.microbatch.sequences 4 "
    "--numerics off --eval.every 0 --eval.batches 1 --save.every 0 --sample.tokens 1 --log.every 1"
)


def measure(method: str, folder: Path) -> dict[str, Any]:
    """Train two steps. Returns predicted and measured peak in bytes, the parts of the prediction and the relative error."""
    out = folder / method.replace(", ", "-")
    words = [
        "train",
        str(folder / "llama.toml"),
        "--data.path",
        str(folder / "text.txt"),
        "--data.cache",
        str(folder / "cache"),
    ]
    words += [*SHARED.split(), *METHODS[method].split(), "--run-dir", str(out)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "gptoughts", *words], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunError(f"{MODULE}: {method} ended with {done.returncode}", found=(done.stdout + done.stderr)[-1500:])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    row = next(row for row in rows if "memory/measured_bytes" in row)
    predicted, held = row["memory/predicted_bytes"], row["memory/measured_bytes"]
    parts = json.loads((out / "plan.json").read_text(encoding="utf-8"))["memory"]
    return {"predicted_bytes": predicted, "measured_bytes": held, "error": predicted / held - 1, "parts": parts}


@click.command(context_settings=CONTEXT)
@click.option("--method", "chosen", multiple=True, type=click.Choice(list(METHODS)), help="Only these; may be repeated.")
@click.option("--to", "out", help="JSON file for the figures.")
def main(chosen: tuple[str, ...], out: str | None) -> None:
    """Compare predicted with measured peaks."""
    target = front.target(out)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "llama").mkdir()
        (folder / "llama" / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
        (folder / "llama.toml").write_text(RECIPE.format(config=folder / "llama"), encoding="utf-8")
        words = Path(json.__file__).parent.parent / "pydoc_data" / "topics.py"  # every Python has this text
        (folder / "text.txt").write_text(words.read_text(encoding="utf-8")[:200_000], encoding="utf-8")
        for method in chosen or METHODS:
            found = measure(method, folder)
            figures = {"what": "memory of fine-tuning", "method": method, "command": front.typed(MODULE), **found}
            front.write(target, {**figures, "machine": machine_figures(probe(), 1)}, ("what", "method"))
            print(f"{method}: predicted {predicted_mib(found)}, {found['error']:+.1%}", flush=True)


def predicted_mib(found: dict[str, Any]) -> str:
    """Return predicted and measured peak in MiB."""
    return f"{found['predicted_bytes'] / 2**20:.0f} MiB, measured {found['measured_bytes'] / 2**20:.0f} MiB"


if __name__ == "__main__":
    front.run(main, MODULE, None)
