"""Translate a DeepSpeed configuration, for the error that `--deepspeed FILE` ends in: recipes and flags say the same, in one place."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptoughts.errors import ConfigError

Word = str | Callable[[Any], str]
"""Flags that begin with `--`, or a sentence; by the value where it depends on it."""

ALWAYS, CHOSEN = "always on", "set by the layer from the model's sizes"
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "lion": "lion", "muon": "muon", "onebitadam": "", "lamb": ""}
SCHEDULES = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}


def _on(flags: str, off: str = "off is the default") -> Callable[[Any], str]:
    return lambda value: flags if value not in (False, "false", 0) else off


def _flag(name: str) -> Callable[[Any], str]:
    return lambda value: f"{name} {shlex.quote(str(value))}"


def _named(flag: str, names: Mapping[str, str]) -> Callable[[Any], str]:
    def word(value: Any) -> str:
        ours = names.get(str(value).lower().replace("-", "").replace("_", ""), "")
        return f"{flag} {ours}" if ours else f"{flag}: there is no {value}"

    return word


def _stage(value: Any) -> str:
    return {0: "--layer.parallel ddp", 1: "--layer.parallel zero1", 2: "--layer.parallel zero2"}.get(
        value, "--layer.parallel zero3" if value == 3 else "stages are 0 to 3"
    )


def _device(flags: str) -> Callable[[Any], str]:
    return lambda value: {"cpu": flags, "none": "none is the default"}.get(
        str(value), "partitions lie on GPUs or in host memory (cpu), not on NVMe"
    )


def _bucket(value: Any) -> str:
    size = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
    return f"--layer.parallel.bucket-mb {max(1, round(size * 4 / 2**20))}"


WORDS: dict[str, Word] = {
    "train_batch_size": _flag("--train.global-batch"),
    "train_micro_batch_size_per_gpu": lambda value: f"--layer.microbatch fixed --layer.microbatch.sequences {value}",
    "gradient_accumulation_steps": "follows from --train.global-batch and --layer.microbatch.sequences",
    "gradient_clipping": _flag("--optim.clip-norm"),
    "steps_per_print": _flag("--log.every"),
    "seed": _flag("--seed"),
    "optimizer.type": _named("--optim.name", OPTIMIZERS),
    "optimizer.params.lr": _flag("--optim.learning-rate"),
    "optimizer.params.weight_decay": _flag("--optim.weight-decay"),
    "optimizer.params.eps": _flag("--optim.epsilon"),
    "optimizer.params.betas": lambda value: (
        f"--optim.beta1 {value[0]} --optim.beta2 {value[1]}"
        if isinstance(value, list) and len(value) == 2
        else "needs two numbers"
    ),
    "optimizer.params.torch_adam": "--layer.optimizer fused, or plain",
    "scheduler.type": _named("--optim.schedule", SCHEDULES),
    "scheduler.params.warmup_num_steps": _flag("--optim.warmup-steps"),
    "scheduler.params.warmup_max_lr": _flag("--optim.learning-rate"),
    "scheduler.params.warmup_min_lr": "warmup starts at 0",
    "scheduler.params.total_num_steps": _flag("--train.steps"),
    "fp16.enabled": _on("--layer.precision fp16"),
    "bf16.enabled": _on("--layer.precision bf16"),
    "torch_autocast.enabled": _on("--layer.precision bf16"),
    "zero_optimization.stage": _stage,
    "zero_optimization.offload_optimizer.device": _device("--layer.parallel.offload true"),
    "zero_optimization.offload_param.device": _device("--layer.parallel.offload-weights true"),
    "zero_optimization.reduce_bucket_size": _bucket,
    "zero_optimization.allgather_bucket_size": "as --layer.parallel.bucket-mb",
    "zero_optimization.overlap_comm": ALWAYS,
    "zero_optimization.contiguous_gradients": ALWAYS,
    "zero_optimization.reduce_scatter": ALWAYS,
    "zero_optimization.allgather_partitions": ALWAYS,
    "zero_optimization.zero_hpz_partition_size": "--layer.parallel fsdp2 --layer.parallel.replicas N shards inside groups of ranks",
    "zero_allow_untested_optimizer": ALWAYS,
    "zero_force_ds_cpu_optimizer": "--layer.optimizer selects the implementation",
    "communication_data_type": "zero3 gathers linear layers in bf16 under bf16; --layer.parallel ddp --layer.parallel.compress bf16",
    "wall_clock_breakdown": "gptoughts trace RECIPE shows where a step's time goes",
    "prescale_gradients": "losses are divided by the labels of all ranks before the backward",
}
TABLES = {
    "fp16": "set by --layer.precision fp16",
    "bf16": "set by --layer.precision bf16",
    "torch_autocast": "set by --layer.precision bf16",
    "activation_checkpointing": "--layer.recompute recompute-blocks",
    "flops_profiler": "every run prints tokens/s and MFU",
    "tensorboard": "metrics.jsonl in the run's folder",
    "wandb": "metrics.jsonl in the run's folder",
    "csv_monitor": "metrics.jsonl in the run's folder",
    "comms_logger": "gptoughts bench scaling measures collectives",
    "aio": "partitions lie on GPUs or in host memory, not on NVMe",
    "zero_optimization.offload_optimizer": "set by --layer.parallel.offload",
    "zero_optimization.offload_param": "set by --layer.parallel.offload",
    "checkpoint": "--save.every; checkpoints are safetensors, resumed with any number of ranks",
    "data_types": "gradients are accumulated in float32",
}
"""Tables all of whose other keys have the same answer."""


def refusal(path: Path) -> ConfigError:
    """Return the error for `--deepspeed path`: each key with our word for it, and a command with all flags that are clear."""
    lines, flags = [], []
    for key, value in _leaves(_read(path)):
        word = _word(key, value)
        lines.append(f"  {key} = {json.dumps(value)}: {word}")
        if word.startswith("--") and ", or" not in word and not word.endswith(" N"):
            flags.append(word)
    command = f"gptoughts plan RECIPE {' '.join(dict.fromkeys(flags))}".rstrip()
    return ConfigError(
        "--deepspeed: a recipe and flags configure a run, also with DeepSpeed",
        found="\n".join([str(path), *lines]),
        fix=command,
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--deepspeed: {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed: {path}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--deepspeed: {path}: not a DeepSpeed configuration", found=type(found).__name__)
    return found


def _leaves(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _word(key: str, value: Any) -> str:
    if key in WORDS:
        word = WORDS[key]
        if value == "auto":
            return "the recipe's value"
        return word if isinstance(word, str) else word(value)
    if key.startswith("zero_optimization.stage3_"):
        return CHOSEN
    table = key.rpartition(".")[0]
    return TABLES.get(table) or TABLES.get(key.split(".")[0]) or "no word of ours; left out"
