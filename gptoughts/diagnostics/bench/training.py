"""One variant of a training, as `train` would set it up, without evaluation and checkpoints: warm, watched, then stepped on demand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gptoughts.api import ResolvedRun
from gptoughts.config.model_spec import flops_per_token
from gptoughts.data.corpus import opened, prepared
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.from_recipe import ModelBundle, initial_weights, model_bundle
from gptoughts.engine.run_length import RunLength
from gptoughts.engine.trainer import Progress, StepStats, advance, call_back, train
from gptoughts.errors import ConfigError, LayerError
from gptoughts.models.sources import meta_model
from gptoughts.run import evidence as prove
from gptoughts.run import preflight as beforehand
from gptoughts.run.build import build_engine, seed_rngs
from gptoughts.run.callbacks import take_meters
from gptoughts.run.run import select_device
from gptoughts.run.throughput import utilization

MOST_UNWATCHED = 20
"""Steps without an update, as a loss scaler skips them at first, after which the watch is given up."""


@dataclass
class Losses:
    """A callback that keeps every step's loss on the device until somebody asks."""

    touches_weights = False
    on_stop = True
    kept: list[Tensor] = field(default_factory=list)

    def due(self, step: int, last: bool) -> bool:
        """Each step."""
        return True

    def run(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """A copy: a replayed graph writes its next loss into the same memory."""
        self.kept.append((stats.loss_sum / stats.weight).detach().clone())

    def taken(self) -> list[float]:
        """The losses since they were last taken; waits for the device."""
        values = torch.stack(self.kept).float().tolist() if self.kept else []
        self.kept.clear()
        return values


@dataclass
class Training:
    """An engine of the plan with what its steps need."""

    engine: Engine
    setting: ResolvedRun
    parts: ModelBundle
    rate: Callable[[Progress], float]
    bytes_before: int | None
    progress: Progress = field(default_factory=Progress)
    losses: Losses = field(default_factory=Losses)

    def steps(self, count: int) -> float:
        """So many more iterations; seconds until the device is done with them."""
        left = count

        def done(reached: Progress) -> bool:
            nonlocal left
            left -= 1
            return left < 0

        self.engine.synchronize()
        began = perf_counter()
        self.progress = train(self.engine, self.progress, lambda now: False, self.rate, [self.losses], pause=done)
        self.engine.synchronize()
        seconds = perf_counter() - began
        take_meters(self.engine)
        return seconds

    def watched(self) -> list[prove.LayerEvidence]:
        """The first step from here that makes an update, under the profiler, and what every layer says to it. Raises LayerError."""
        for _ in range(MOST_UNWATCHED):
            held: list[Any] = []
            trace = prove.watch(self.engine, lambda: held.extend(advance(self.engine, self.progress, self.rate)))  # noqa: B023
            self.progress = call_back(self.engine, held[0], held[1], [self.losses], False)
            if trace.updated:
                return prove.evidence(self.engine, self.setting.plan, self.setting.extensions.catalog, trace)
        raise LayerError(f"none of {MOST_UNWATCHED} steps made an update, so no layer could be watched")

    def peak_bytes(self) -> int | None:
        """Most that was held: on a GPU of what torch allocated, on a CPU by the process, less what it held before there was a model."""
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.engine.device)
        peak = resident_bytes("VmHWM")
        return None if peak is None or self.bytes_before is None else peak - self.bytes_before

    def held_bytes(self) -> int | None:
        """What the process keeps from others: on a GPU torch's reserve, on a CPU resident memory."""
        if self.engine.device.type == "cuda":
            return torch.cuda.memory_reserved(self.engine.device)
        return resident_bytes("VmRSS")

    def free_bytes(self) -> int | None:
        """What others could still take of the same memory."""
        if self.engine.device.type == "cuda":
            return torch.cuda.mem_get_info(self.engine.device)[0]
        return _first_number(Path("/proc/meminfo"), "MemAvailable")

    def figures(self) -> dict[str, Any]:
        """What has to be known of the model to read a speed."""
        mfu, formula = utilization(self.parts.spec, self.setting.machine, 1)
        recipe = self.setting.resolved.recipe
        return {
            "model": {name: value for name, value in vars(self.parts.spec).items() if value is not None},
            "flops_per_token": flops_per_token(self.parts.spec),
            "mfu_per_token_per_second": mfu(1.0),
            "mfu_formula": formula,
            "tokens_per_step": recipe.train.global_batch * recipe.data.sequence_length,
        }


@contextmanager
def opened_training(setting: ResolvedRun, weights_seed: int | None = None) -> Iterator[Training]:
    """The recipe's training under its plan. `weights_seed` draws other first weights than the recipe's seed; data stay as they are.

    Raises what `train` raises before its first step, and ConfigError for a recipe that counts hours: its learning rate follows the clock.
    """
    recipe, extensions = setting.resolved.recipe, setting.extensions
    if recipe.train.hours is not None:
        raise ConfigError("train.hours: the learning rate would follow the clock, and no two variants would train alike\n"
                          "  try: --train.steps N")  # fmt: skip
    ranks = Ranks(setting.world, select_device(setting.machine, setting.world))
    corpus = opened(recipe)
    parts = model_bundle(recipe, corpus.tokenizer, extensions.families, extensions.objectives)
    seed_rngs(recipe.seed, 0, 0)
    read = corpus.train(recipe, 0, 1, None, parts.rows)
    batches = prepared(read, parts.objective.prepare, recipe.train.global_batch, 0, 1)
    bytes_before = resident_bytes("VmRSS")
    model = meta_model(recipe, parts.family, parts.rows)
    beforehand.check_packing(recipe, parts, model)
    drawn = recipe if weights_seed is None else recipe.model_copy(update={"seed": weights_seed})
    source = initial_weights(drawn, parts, model, ranks.device)
    length = RunLength(recipe, ranks, corpus.samples)
    with build_engine(
        model, parts.family, parts.objective, recipe, setting.plan, extensions.catalog, ranks, batches, source
    ) as engine:
        yield Training(engine, setting, parts, length.rate, bytes_before)


def resident_bytes(which: str) -> int | None:
    """VmRSS (now) or VmHWM (the most so far) of this process; None where the system has no /proc.

    The high-water mark of `getrusage` is not used: a started process inherits that of its parent.
    """
    return _first_number(Path("/proc/self/status"), which)


def _first_number(file: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
