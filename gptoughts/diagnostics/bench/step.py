"""What a training step costs: our loop, a bare PyTorch loop with the same settings, ours again, and float32 eager, taking turns.

Speeds of a shared machine drift by more than the differences that are looked for. So every variant keeps its own model, all are
warm, each round runs all of them in a rotated order, and only ratios within a round are compared. "Ours again" against "ours" is
the same thing twice: how far it is from 1 is how far any other ratio can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from gptoughts.api import ResolvedRun
from gptoughts.config.loader import Recipe
from gptoughts.console import SilentConsole
from gptoughts.data.corpus import opened
from gptoughts.diagnostics.bench.figures import machine_figures, paired, spread
from gptoughts.diagnostics.bench.outside import outside_verbs
from gptoughts.diagnostics.bench.plain import Settings, plain_loop
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.from_recipe import initial_weights, model_bundle
from gptoughts.engine.objectives.base import NextToken
from gptoughts.engine.run_length import RunLength
from gptoughts.engine.trainer import Progress, advance, train
from gptoughts.errors import ConfigError
from gptoughts.models.sources import meta_model
from gptoughts.planning.resolve import Plan
from gptoughts.run import evidence as prove
from gptoughts.run.build import build_engine
from gptoughts.run.callbacks import Log
from gptoughts.run.run import select_device
from gptoughts.run.throughput import utilization
from gptoughts.run.tracking.jsonl import Jsonl

OURS, PLAIN, AGAIN, FP32 = "ours", "plain", "ours again", "fp32 eager"
SHARED = {
    "system",
    "threads",
    "native",
    "expandable",
    "ieee",
    "tf32",
    "math",
    "sdpa",
    "fp32",
    "bf16",
    "eager",
    "compile-blocks",
}
SHARED |= {"torch-kernels", "full-ce", "keep", "resident", "single", "plain", "fused", "with-weights", "after-clip", "direct"}
SHARED |= {"prefetch", "whole", "fixed"}
"""Layers that the bare loop has too, or that both have because they belong to the process."""

Run = Callable[[int], float]
"""Trains for so many more steps; returns the last loss read."""


class Subject:
    """The recipe's data and sizes, opened once for all variants. Raises ConfigError for what a bare loop cannot do."""

    def __init__(self, setting: ResolvedRun) -> None:
        self.setting, self.recipe = setting, setting.resolved.recipe
        if setting.world.world_size > 1:
            raise ConfigError("bench step runs in one process; start it without torchrun")
        if self.recipe.objective != "next-token":
            raise ConfigError(f"bench step compares next-token training; the recipe's objective is {self.recipe.objective!r}")
        if self.recipe.optim.name != "adamw" or self.recipe.model.family == "hf" or self.recipe.adapter.kind != "none":
            raise ConfigError(
                "bench step compares AdamW on native models; leave optim.name, model.path, model.config and adapter.kind out"
            )
        if self.recipe.data.format != "text":
            raise ConfigError(f"bench step reads text; the recipe's data.format is {self.recipe.data.format!r}")
        self.corpus = opened(self.recipe)
        self.parts = model_bundle(
            self.recipe, self.corpus.tokenizer, setting.extensions.families, setting.extensions.objectives
        )
        self.spec, self.rows = self.parts.spec, self.parts.rows
        self.ranks = Ranks(setting.world, select_device(setting.machine, setting.world))
        self.length = RunLength(self.recipe, self.ranks, self.corpus.samples)
        self.mfu = utilization(self.spec, setting.machine, 1)

    @property
    def tokens_per_step(self) -> int:
        """Labels of one update."""
        return self.recipe.train.global_batch * self.recipe.data.sequence_length

    def batches(self, recipe: Recipe) -> Iterator[Any]:
        """The recipe's batches from the start, for one variant."""
        return self.corpus.train(recipe, 0, 1, None, self.rows)

    def settled(self) -> None:
        """Wait for the device."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    @contextmanager
    def engine(self, recipe: Recipe, plan: Plan) -> Iterator[Engine]:
        """An engine of its own with the plan's layers."""
        model = meta_model(recipe, self.parts.family, self.rows)
        source = initial_weights(recipe, self.parts, model, self.ranks.device)
        catalog = self.setting.extensions.catalog
        with build_engine(
            model, self.parts.family, NextToken(), recipe, plan, catalog, self.ranks, self.batches(recipe), source
        ) as engine:
            yield engine


class _LastLoss:
    """A sink that keeps the newest loss."""

    def __init__(self) -> None:
        self.value = float("nan")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep it."""
        self.value = values["train/loss"]

    def close(self) -> None:
        """Nothing to close."""


class Ours:
    """Our loop as `gptoughts train` runs it, logging included, without evaluation and checkpoints."""

    def __init__(self, subject: Subject, engine: Engine, folder: Path) -> None:
        self.engine, self._subject = engine, subject
        self.progress, self.loss = Progress(), _LastLoss()
        sinks: list[Any] = [Jsonl(folder / "metrics.jsonl", 1), self.loss]
        self.log = Log(subject.recipe.log.every, sinks, SilentConsole(), subject.mfu[0], None, lambda _: None)

    def __call__(self, steps: int) -> float:
        """So many more steps."""
        goal, rate = self.progress.step + steps, self._subject.length.rate
        self.progress = train(
            self.engine, self.progress, lambda now: False, rate, [self.log], pause=lambda now: now.step >= goal
        )
        return self.loss.value

    def watched(self, plan: Plan) -> list[prove.LayerEvidence]:
        """One more step, in which every planned layer must show itself. Raises LayerError where one does not."""
        catalog = self._subject.setting.extensions.catalog
        held: list[Any] = []
        trace = prove.watch(self.engine, lambda: held.extend(advance(self.engine, self.progress, self._subject.length.rate)))
        self.progress = held[0]
        seen = prove.evidence(self.engine, plan, catalog, trace)
        prove.demand(seen)
        return seen


@dataclass
class Measured:
    """Seconds per step of every round, by variant, and what goes with them."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    evidence: list[prove.LayerEvidence] = field(default_factory=list)


def bench_step(
    setting: ResolvedRun, rounds: int, steps: int, command: str, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """All figures of one recipe under one plan, as plain data. Nothing is asserted; `say` is told how far it is.

    Raises ConfigError for a recipe that a bare loop cannot train, LayerError where the plan is not what runs.
    """
    subject = Subject(setting)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        ours = Ours(subject, stack.enter_context(subject.engine(subject.recipe, setting.plan)), folder)
        again = Ours(subject, stack.enter_context(subject.engine(subject.recipe, setting.plan)), folder)
        settings = plain_settings(setting.plan, ours.engine)
        variants: dict[str, Run] = {
            OURS: ours,
            PLAIN: _plain(subject, settings),
            AGAIN: again,
            FP32: _in_float32(_plain(subject, Settings(settings.micro_batch))),
        }
        measured = Measured()
        warm = 1 + prove.warmup_steps(setting.plan, setting.extensions.catalog)
        say("warming up: ours")
        ours(warm)
        measured.evidence = ours.watched(setting.plan)
        for name in (PLAIN, AGAIN, FP32):
            say(f"warming up: {name}")
            variants[name](warm + 1)  # compilation, first allocations, the optimizer's state; as far as ours is
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            _take_turns(subject, variants, measured, number, steps)
        say("outside the verbs")
        outside = outside_verbs(subject, setting.plan, ours.engine.micro_batch)
    return _figures(subject, measured, outside, rounds, steps, command)


def plain_settings(plan: Plan, engine: Engine) -> Settings:
    """The bare loop's settings that say the same as the plan. FP8 has no one-line switch: there it computes in bf16."""
    layers = plan.layers
    return Settings(
        micro_batch=engine.micro_batch or engine.recipe.train.global_batch,
        autocast=None if layers["precision"] == "fp32" else torch.bfloat16,
        compiled=layers["compile"] != "eager",
        fused_attention=layers["attention"] != "math",
        fused_optimizer=layers["optimizer"] != "plain",
    )


def _plain(subject: Subject, settings: Settings) -> Run:
    def rate(step: int) -> float:
        return subject.length.rate(Progress(step=step))

    recipe = subject.recipe
    return plain_loop(recipe, subject.parts.family, subject.rows, subject.batches(recipe), subject.ranks.device, settings, rate)


def _in_float32(run: Run) -> Run:
    """Without TensorFloat-32, which a plan may have switched on for the whole process."""

    def alone(steps: int) -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return run(steps)
        finally:
            torch.set_float32_matmul_precision(before)

    return alone


def _take_turns(subject: Subject, variants: dict[str, Run], measured: Measured, number: int, steps: int) -> None:
    """One round; the order is another than in the last."""
    names = list(variants)
    first = number % len(names)
    for name in names[first:] + names[:first]:
        subject.settled()
        began = perf_counter()
        loss = variants[name](steps)
        subject.settled()
        measured.seconds.setdefault(name, []).append((perf_counter() - began) / steps)
        measured.losses[name] = loss


def _figures(
    subject: Subject, measured: Measured, outside: dict[str, Any], rounds: int, steps: int, command: str
) -> dict[str, Any]:
    seconds, tokens = measured.seconds, subject.tokens_per_step
    variants: dict[str, Any] = {}
    for name, values in ((name, seconds[name]) for name in (OURS, PLAIN, AGAIN, FP32)):
        milliseconds = spread([1000 * value for value in values], 3)
        speed = tokens / (milliseconds["median"] / 1000)
        variants[name] = {
            "step_ms": milliseconds,
            "tokens_per_second": round(speed, 1),
            "mfu": subject.mfu[0](speed),
        }
    ratios = {  # of tokens per second: above 1 the first is faster
        f"{OURS} / {PLAIN}": paired(seconds[PLAIN], seconds[OURS]),
        f"{AGAIN} / {OURS}": paired(seconds[OURS], seconds[AGAIN]),
        f"{OURS} / {FP32}": paired(seconds[FP32], seconds[OURS]),
    }
    setting, recipe = subject.setting, subject.recipe
    layers = setting.plan.layers
    step_seconds = variants[OURS]["step_ms"]["median"] / 1000
    return {
        "what": "bench step",
        "command": command,
        "machine": machine_figures(setting.machine),
        "recipe": recipe.name,
        "model": {**{key: value for key, value in vars(subject.spec).items() if value is not None}},
        "global_batch": recipe.train.global_batch,
        "tokens_per_step": tokens,
        "profile": setting.plan.profile,
        "plan": layers,
        "only_ours": [f"{slot}={layer}" for slot, layer in layers.items() if layer not in SHARED],
        "evidence": {line.slot: line.evidence.text for line in measured.evidence if line.evidence.text != "baseline"},
        "rounds": rounds,
        "steps_per_round": steps,
        "variants": variants,
        "ratios_of_tokens_per_second": ratios,
        "outside_verbs": {**outside, "share_of_step": outside["seconds_per_step"] / step_seconds},
        "mfu_formula": subject.mfu[1],
        "losses": {name: round(loss, 4) for name, loss in measured.losses.items()},
    }
