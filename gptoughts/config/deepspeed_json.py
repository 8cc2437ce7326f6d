"""Map the keys of a DeepSpeed configuration to our flags, for the error of `--deepspeed FILE`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptoughts.errors import ConfigError
from gptoughts.files import load_json

Answer = str | Callable[[Any], str]
"""Flags that begin with `--`, or a sentence; by the value where it depends on it."""

ALWAYS, CHOSEN = "always on", "set by the layer from the model's sizes"
STAGES = ("--layer.parallel ddp", "--layer.parallel zero1", "--layer.parallel zero2", "--layer.parallel zero3")
MOST_ELEMENTS, MOST_DEPTH = 1e15, 8
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "lion": "lion", "muon": "muon", "onebitadam": "", "lamb": ""}
SCHEDULES = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}


def _on(flags: str, off: str = "off is the default") -> Callable[[Any], str]:
    return lambda value: flags if value not in (False, "false", 0) else off


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # not infinite, not NaN


def _flag(name: str) -> Callable[[Any], str]:
    return lambda value: f"{name} {value}" if _is_number(value) else "needs a number"


def _betas(value: Any) -> str:
    known = isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
    return f"--optim.beta1 {value[0]} --optim.beta2 {value[1]}" if known else "needs two numbers"


def _named(flag: str, names: Mapping[str, str]) -> Callable[[Any], str]:
    def answer(value: Any) -> str:
        ours = names.get(str(value).lower().replace("-", "").replace("_", ""), "")
        return (
            f"{flag} {ours}"
            if ours
            else f"there is no {json.dumps(value)}; {flag} takes {', '.join(dict.fromkeys(filter(None, names.values())))}"
        )

    return answer


def _stage(value: Any) -> str:
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(STAGES)
    return STAGES[value] if known else f"stages are 0 to {len(STAGES) - 1}"


def _device(flags: str) -> Callable[[Any], str]:
    def answer(value: Any) -> str:
        if value == "cpu":
            return flags
        return (
            "none is the default" if value in ("none", None) else "partitions lie on GPUs or in host memory (cpu), not on NVMe"
        )

    return answer


def _bucket(value: Any) -> str:
    if not _is_number(value) or not 1 <= value <= MOST_ELEMENTS:
        return "needs a number of elements"
    return f"--layer.parallel.bucket-mb {max(1, round(value * 4 / 2**20))}"


ANSWERS: dict[str, Answer] = {
    "train_batch_size": _flag("--train.global-batch"),
    "train_micro_batch_size_per_gpu": _flag("--layer.microbatch fixed --layer.microbatch.sequences"),
    "gradient_accumulation_steps": "follows from --train.global-batch and --layer.microbatch.sequences",
    "gradient_clipping": _flag("--optim.clip-norm"),
    "steps_per_print": _flag("--log.every"),
    "seed": _flag("--seed"),
    "optimizer.type": _named("--optim.name", OPTIMIZERS),
    "optimizer.params.lr": _flag("--optim.learning-rate"),
    "optimizer.params.weight_decay": _flag("--optim.weight-decay"),
    "optimizer.params.eps": _flag("--optim.epsilon"),
    "optimizer.params.betas": _betas,
    "optimizer.params.torch_adam": "the implementation is a layer: --layer.optimizer fused or plain",
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
    "zero_optimization.zero_hpz_partition_size": "fsdp2 shards inside groups of ranks: --layer.parallel fsdp2 --layer.parallel.replicas N",
    "zero_allow_untested_optimizer": ALWAYS,
    "zero_force_ds_cpu_optimizer": "the implementation is a layer: --layer.optimizer fused or plain",
    "communication_data_type": "zero3 gathers linear layers in bf16 under bf16; --layer.parallel ddp --layer.parallel.compress bf16",
    "wall_clock_breakdown": "gptoughts trace RECIPE shows where a step's time goes",
    "prescale_gradients": "losses are divided by the labels of all ranks before the backward",
}
TABLES = {
    "fp16": "set by --layer.precision fp16",
    "bf16": "set by --layer.precision bf16",
    "torch_autocast": "set by --layer.precision bf16",
    "activation_checkpointing": "recomputation is a layer: --layer.recompute recompute-blocks",
    "flops_profiler": "every run prints tokens/s and MFU",
    "tensorboard": "metrics.jsonl in the run's folder",
    "wandb": "metrics.jsonl in the run's folder",
    "csv_monitor": "metrics.jsonl in the run's folder",
    "comms_logger": "gptoughts bench scaling measures collectives",
    "aio": "partitions lie on GPUs or in host memory, not on NVMe",
    "zero_optimization.offload_optimizer": "set by --layer.parallel.offload",
    "zero_optimization.offload_param": "set by --layer.parallel.offload",
    "checkpoint": "safetensors, resumed with any number of ranks; how often: --save.every",
    "data_types": "gradients are accumulated in float32",
}
"""Tables all of whose other keys have the same answer."""


def refusal(path: Path) -> ConfigError:
    """Return the error for `--deepspeed path`: each key with its answer, and a command with all flags that stand together."""
    lines, flags = [], []
    for key, value in _leaves(_read(path)):
        answer = _answer(key, value)
        lines.append(f"  {json.dumps(key)[1:-1]} = {json.dumps(value)}: {answer}")
        if answer.startswith("--"):
            flags.append(answer)
    flags = [flag for flag in dict.fromkeys(flags) if _option_of(flag) in (None, *_options(flags))]
    command = f"gptoughts plan RECIPE {' '.join(flags)}".rstrip()
    return ConfigError(
        "--deepspeed: a recipe and flags configure a run, also with DeepSpeed",
        found="\n".join([str(path), *lines]),
        fix=command,
    )


def _option_of(flag: str) -> str | None:
    """Return the option of the parallel layer that `flag` sets, or None."""
    return flag.split()[0] if flag.startswith("--layer.parallel.") else None


def _options(flags: list[str]) -> tuple[str, ...]:
    """Return the options that the parallel layer of `flags` has."""
    stage = next((number for number, flag in enumerate(STAGES) if flag in flags), None)
    offload = ("--layer.parallel.offload",) if stage else ()
    weights = ("--layer.parallel.offload-weights",) if stage == 3 else ()
    return () if stage is None else ("--layer.parallel.bucket-mb", *offload, *weights)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = load_json(path)
    except OSError as error:
        raise ConfigError(f"--deepspeed: {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed: {path}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--deepspeed: {path}: not a DeepSpeed configuration", found=type(found).__name__)
    return found


def _leaves(table: Mapping[str, Any], before: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value and depth < MOST_DEPTH:
            yield from _leaves(value, f"{before}{key}.", depth + 1)
        else:
            yield f"{before}{key}", value


def _answer(key: str, value: Any) -> str:
    if key in ANSWERS:
        if value == "auto":
            return "the recipe's value"
        if isinstance(value, dict):
            return "needs a value, not a table"
        answer = ANSWERS[key]
        return answer if isinstance(answer, str) else answer(value)
    if key.startswith("zero_optimization.stage3_"):
        return CHOSEN
    table = key.rpartition(".")[0]
    return TABLES.get(table) or TABLES.get(key.split(".")[0]) or "no equivalent"
