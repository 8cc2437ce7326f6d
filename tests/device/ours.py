"""Our training loop on one job, as a child that takes turns: plan, engine, watched step, then as many steps as it is told."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gptoughts.api import ResolvedRun, decide
from gptoughts.config.model_spec import flops_per_token
from gptoughts.console import SilentConsole
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import NextToken
from gptoughts.engine.trainer import Progress, train
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.family import Family, family_of
from gptoughts.models.sources import meta_model
from gptoughts.run import evidence, step_trace
from gptoughts.run.build import build_engine
from gptoughts.run.log import Log
from gptoughts.run.throughput import Throughput, utilization
from gptoughts.run.tracking.sink import Sink
from tests.device.serving import Channel, served, settle, timed
from tests.device.text import windows

MOST_KERNELS = 40
WARM_UPDATES = 20


class Quick:
    """Weights drawn on the device: the same for the same seed and device, in a thousandth of the time that the CPU takes.

    For speed and for losses that are compared within one sitting; a run that must be the same everywhere draws on the CPU.
    """

    def __init__(self, family: Family, config: Any, seed: int, device: torch.device) -> None:
        self._family, self._config, self._seed, self._device = family, config, seed, device

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """The first value of parameter `name`."""
        assert self._family.initial is not None
        initial, size = self._family.initial(name, shape, self._config), tuple(shape)
        if initial.kind != "normal":
            return torch.full(size, float(initial.kind == "ones"), device=self._device)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.randn(size, generator=generator, device=self._device).mul_(initial.std)

    def buffer(self, name: str) -> Tensor | None:
        """Buffers stay as they were built."""
        return None

    def unused(self) -> list[str]:
        """Values are drawn when asked for."""
        return []


class Losses(Sink):
    """Keeps every loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def log(self, step: int, values: Any) -> None:
        """Keep it."""
        self.values.append(round(float(values["train/loss"]), 5))


def family_for(setting: ResolvedRun) -> Family:
    """The recipe's family, native or of transformers."""
    recipe = setting.resolved.recipe
    if recipe.model.family != "hf":
        return family_of(recipe.model.family)
    from gptoughts.models.hf.family import hf_family

    return hf_family(recipe.model, "causal")


def numbered(rows: int, length: int, count: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Global batches as the shards give them: arrays, with a cursor."""
    for number, window in enumerate(windows(rows, length, count), 1):
        yield {"input_ids": window}, number


@contextmanager
def engine_of(setting: ResolvedRun, device: torch.device) -> Iterator[Engine]:
    """The engine of the setting's plan over text in memory."""
    recipe, family = setting.resolved.recipe, family_for(setting)
    rows = decided_rows(setting)
    model = meta_model(recipe, family, rows)
    source = Quick(family, recipe.model, recipe.seed, device)
    batches = numbered(rows, recipe.data.sequence_length + 1, recipe.train.global_batch)
    ranks = Ranks(World(), device)
    with build_engine(
        model, family, NextToken(), recipe, setting.plan, CATALOG, ranks=ranks, batches=batches, source=source
    ) as engine:
        yield engine


def decided_rows(setting: ResolvedRun) -> int:
    """Rows of the embedding; jobs give model.vocab_size, or a config.json that holds it."""
    rows = setting.plan.spec.get("vocab_size")
    assert isinstance(rows, int), "the job's recipe does not say how many rows its embedding has"
    return rows


class Loop:
    """The loop with its log, as `gptoughts train` runs it, without evaluation and checkpoints."""

    def __init__(self, setting: ResolvedRun, engine: Engine, every: int) -> None:
        self.setting, self.engine = setting, engine
        self.progress, self.losses = Progress(), Losses()
        self.rate = setting.resolved.recipe.optim.learning_rate
        self.log = Log(every, self.losses, SilentConsole(), Throughput())

    def schedule(self, progress: Progress) -> float:
        """A short warm-up, then the recipe's rate."""
        return self.rate * min(1.0, (progress.step + 1) / WARM_UPDATES)

    def run(self, steps: int) -> None:
        """So many more updates."""
        goal = self.progress.step + steps
        self.progress = train(
            self.engine,
            self.progress,
            lambda now: False,
            self.schedule,
            callbacks=[self.log],
            pause=lambda now: now.step >= goal,
        )

    def watched(self) -> tuple[list[dict[str, Any]], Any]:
        """One more update under the profiler: what every layer saw of itself, and what was seen at all."""
        self.progress, _, trace = step_trace.watch(self.engine, self.progress, self.schedule)
        seen = evidence.judge(self.engine, self.setting.plan, CATALOG, trace)
        return [line.to_json() for line in seen if line.evidence.text != "baseline"], trace


def body(job: dict[str, Any], channel: Channel) -> None:
    """Build, warm, watch, then train as told; at the end say what it came to."""
    setting = decide(job["recipe"], job.get("profile", "auto"), job["fields"], job["layers"])
    on_gpu = bool(setting.machine.gpus) and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if job.get("deterministic"):
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    recipe = setting.resolved.recipe
    with engine_of(setting, device) as engine:
        loop = Loop(setting, engine, recipe.log.every)
        loop.run(1 + evidence.warmup_steps(setting.plan, CATALOG))
        settle(device.type)
        layers, trace = loop.watched()
        channel.say({"ready": {**described(setting, engine), "evidence": layers, "kernels": top(trace.kernels)}})
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        while steps := channel.heard():
            channel.say({"done": timed(steps, device.type, loop.run)})
        channel.say({"ended": ended(setting, loop, on_gpu)})


def described(setting: ResolvedRun, engine: Engine) -> dict[str, Any]:
    """The plan as it runs and the sizes that speeds are read with."""
    recipe, spec = setting.resolved.recipe, setting.plan.spec
    formula = utilization(flops_per_token(_facts(setting)), setting.machine, 1)[1]
    return {
        "profile": setting.plan.profile,
        "plan": {choice.slot: {"layer": choice.layer, **dict(choice.options)} for choice in setting.plan.choices},
        "rejected": {
            choice.slot: [f"{layer}: {'; '.join(map(str, why))}" for layer, why in choice.rejected]
            for choice in setting.plan.choices
            if choice.rejected
        },
        "model": {key: value for key, value in spec.items() if value is not None},
        "tokens_per_step": recipe.train.global_batch * recipe.data.sequence_length,
        "micro_batch": engine.micro_batch,
        "mfu_formula": formula,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "environment": {name: os.environ.get(name) for name in setting.plan.environment},
    }


def _facts(setting: ResolvedRun) -> Any:
    from gptoughts.config.model_spec import spec_for

    return spec_for(setting.resolved.recipe)


def ended(setting: ResolvedRun, loop: Loop, on_gpu: bool) -> dict[str, Any]:
    """Memory, losses and MFU per token per second."""
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    reserved = torch.cuda.max_memory_reserved() if on_gpu else None
    return {
        "peak_memory_bytes": peak,
        "reserved_memory_bytes": reserved,
        "mfu_of_one_token_per_second": utilization(flops_per_token(_facts(setting)), setting.machine, 1)[0](1.0),
        "losses": loop.losses.values,
        "updates": loop.progress.step,
        "micro_batch_at_end": loop.engine.micro_batch,
    }


def top(kernels: Any, most: int = MOST_KERNELS) -> dict[str, int]:
    """The kernels launched most often, their names cut at a length that still tells them apart."""
    ranked = sorted(kernels.items(), key=lambda pair: -pair[1])
    return {name[:240]: count for name, count in ranked[:most]}


if __name__ == "__main__":
    sys.exit(served(body))
