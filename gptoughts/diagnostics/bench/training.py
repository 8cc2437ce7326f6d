"""One variant of a training for benchmarks: a session without evaluation and checkpoints, stepped on demand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gptoughts.api import ResolvedRun
from gptoughts.console import SilentConsole
from gptoughts.diagnostics.bench.collectives import CollectiveTimes, collective_times
from gptoughts.diagnostics.bench.equal_settings import settings_of
from gptoughts.engine.callback import Callback
from gptoughts.engine.engine import Engine
from gptoughts.engine.memory_usage import proc_bytes, resident_bytes
from gptoughts.engine.trainer import Progress, StepStats, train
from gptoughts.errors import ConfigError
from gptoughts.planning.flops import model_flops
from gptoughts.run.evidence import LayerEvidence, judge, watch_update
from gptoughts.run.log import take_meters
from gptoughts.run.session import Session, TrainingJob, open_session
from gptoughts.run.throughput import utilization


@dataclass
class Losses(Callback):
    """Keeps every step's loss on the device."""

    on_stop = True
    kept: list[Tensor] = field(default_factory=list)

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Keep a copy: a replayed CUDA graph writes its next loss into the same memory."""
        self.kept.append((stats.loss_sum / stats.weight).detach().clone())

    def taken(self) -> list[float]:
        """Return the losses since the last call; waits for the device."""
        values = torch.stack(self.kept).float().tolist() if self.kept else []
        self.kept.clear()
        return values


@dataclass
class Training:
    """A session that is stepped on demand."""

    session: Session
    bytes_before: int | None
    """Resident memory of the process before the model existed; None makes `peak_bytes` None on a CPU."""
    progress: Progress = field(default_factory=Progress)
    losses: Losses = field(default_factory=Losses)

    @property
    def engine(self) -> Engine:
        """The session's engine."""
        return self.session.engine

    def steps(self, count: int) -> float:
        """Run `count` more iterations. Returns the seconds until the device has finished."""
        left = count

        def done(reached: Progress) -> bool:
            nonlocal left
            left -= 1
            return left < 0

        self.engine.synchronize()
        began = perf_counter()
        schedule = self.session.length.rate
        self.progress = train(self.engine, self.progress, lambda now: False, schedule, callbacks=[self.losses], pause=done)
        self.engine.synchronize()
        seconds = perf_counter() - began
        take_meters(self.engine)
        return seconds

    def watched(self) -> list[LayerEvidence]:
        """Watch the next step that updates the weights and return every layer's verdict. Raises LayerError if no step does."""
        job = self.session.job
        self.progress, trace = watch_update(self.engine, self.progress, self.session.length.rate, [self.losses])
        return judge(self.engine, job.plan, job.extensions.catalog, trace)

    def collectives(self, count: int) -> list[CollectiveTimes]:
        """Run `count` more steps, each under a profiler that records collectives; other ranks do the same."""
        return [collective_times(self.engine, lambda: self.steps(1)) for _ in range(count)]

    def settings(self) -> dict[str, Any]:
        """Return the settings of this process that runs must share to be compared."""
        return settings_of(self.engine, self.session.job)

    def peak_bytes(self) -> int | None:
        """Return the peak: on a GPU allocated by torch, on a CPU of the process, less what it held before the model."""
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.engine.device)
        peak, before = resident_bytes("VmHWM"), self.bytes_before
        return None if peak is None or before is None else peak - before

    def held_bytes(self) -> int | None:
        """Return the memory unavailable to others: on a GPU torch's reserve, on a CPU resident memory."""
        if self.engine.device.type == "cuda":
            return torch.cuda.memory_reserved(self.engine.device)
        return resident_bytes("VmRSS")

    def free_bytes(self) -> int | None:
        """Return the free bytes of the same memory."""
        if self.engine.device.type == "cuda":
            return torch.cuda.mem_get_info(self.engine.device)[0]
        return proc_bytes(Path("/proc/meminfo"), "MemAvailable")

    def figures(self) -> dict[str, Any]:
        """Return what is needed to interpret a speed: model, FLOPs, MFU constant, tokens per step."""
        spec, job = self.session.bundle.spec, self.session.job
        flops, terms = model_flops(spec, job.recipe)
        mfu, formula = utilization(flops, job.machine, 1, terms)
        return {
            "model": {name: value for name, value in vars(spec).items() if value is not None},
            "flops_per_token": flops,
            "mfu_per_token_per_second": mfu(1.0),
            "mfu_formula": formula,
            "tokens_per_step": job.recipe.train.global_batch * job.recipe.data.sequence_length,
        }


@contextmanager
def open_training(setting: ResolvedRun, weights_seed: int | None = None) -> Iterator[Training]:
    """Open the recipe's training under its plan. `weights_seed` replaces the seed of the initial weights; data stay the same.

    Raises what `train` raises before its first step, and ConfigError for a recipe that counts hours.
    """
    if setting.resolved.recipe.train.hours is not None:
        raise ConfigError(
            "train.hours: the learning rate would follow the clock, so that variants could not be compared",
            fix="--train.steps N",
        )
    job = TrainingJob(
        setting.resolved,
        setting.plan,
        setting.machine,
        setting.world,
        setting.extensions,
        numerics="off",
        console=SilentConsole(),
        weights_seed=weights_seed,
    )
    with open_session(job) as session:
        yield Training(session, session.bytes_before_model)
