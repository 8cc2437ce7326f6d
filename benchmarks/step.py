"""Measure a training step: our loop, a plain PyTorch loop with the same settings, ours again, and float32 eager.

    python -m benchmarks.step bench-10m --rounds 8 --to docs/measurements/cpu/step.json

The speed of a shared machine drifts by more than the differences of interest. Every variant keeps its own warm model, each round runs
all variants in rotated order, and only ratios within a round are compared. "Ours again / ours" compares equal code: its distance from 1
is the error of the other ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
import torch
from torch import nn

from benchmarks import front
from benchmarks.outside import outside_verbs
from benchmarks.plain import Settings, plain_loop, plain_settings
from benchmarks.table import step_table
from gptoughts.api import ResolvedRun, decide
from gptoughts.cli.options import CONTEXT, RecipeCommand, option, recipe_options, split_flags
from gptoughts.cli.train import apply_environment
from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import flops_per_token
from gptoughts.console import SilentConsole
from gptoughts.data.corpus import open_corpus
from gptoughts.diagnostics.bench.figures import machine_figures, paired, spread
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.from_recipe import initial_weights, model_bundle
from gptoughts.engine.objectives.base import NextToken
from gptoughts.engine.run_length import RunLength
from gptoughts.engine.trainer import Progress, train
from gptoughts.errors import ConfigError
from gptoughts.models.sources import meta_model
from gptoughts.planning.resolve import Plan
from gptoughts.run.build import build_engine
from gptoughts.run.evidence import LayerEvidence, demand, judge, warmup_steps
from gptoughts.run.log import Log
from gptoughts.run.session import select_device
from gptoughts.run.step_trace import watch
from gptoughts.run.throughput import Throughput, utilization
from gptoughts.run.tracking.jsonl import Jsonl
from gptoughts.run.tracking.sink import RunInfo, Sink, Sinks

OURS, PLAIN, AGAIN, FP32 = "ours", "plain", "ours again", "fp32 eager"
SHARED = {
    "system", "threads", "native", "expandable", "ieee", "tf32", "math", "sdpa", "fp32", "bf16", "eager", "compile-blocks", "torch-kernels",
    "full-ce", "keep", "resident", "single", "plain", "fused", "with-weights", "after-clip", "direct", "prefetch", "whole", "fixed",
}  # fmt: skip
"""Layers that the plain loop has too, or that both share because they belong to the process."""

Run = Callable[[int], float]
"""Train for a number of steps and return the last logged loss."""
SAME_MEASUREMENT = ("what", "recipe", "plan", "model")
"""A run in the output file with the same values under these keys is replaced."""


class Subject:
    """The recipe's data and model spec, opened once for all variants. Raises ConfigError if the plain loop cannot train it.

    `ranks` are those of an open process group; without them the process must be alone.
    """

    def __init__(self, setting: ResolvedRun, ranks: Ranks | None = None) -> None:
        self.setting, self.recipe = setting, setting.resolved.recipe
        if setting.world.world_size > 1 and ranks is None:
            raise ConfigError("benchmarks.step: runs in one process, not under torchrun")
        if self.recipe.objective != "next-token":
            raise ConfigError("objective: benchmarks.step trains next-token only", found=repr(self.recipe.objective))
        if self.recipe.optim.name != "adamw" or self.recipe.model.family == "hf" or self.recipe.adapter.kind != "none":
            raise ConfigError(
                "benchmarks.step: AdamW on native models only",
                fix="remove optim.name, model.path, model.config and adapter.kind",
            )
        if self.recipe.data.format != "text":
            raise ConfigError("data.format: benchmarks.step reads text only", found=repr(self.recipe.data.format))
        self.corpus = open_corpus(self.recipe)
        self.parts = model_bundle(
            self.recipe, self.corpus.tokenizer, setting.extensions.families, setting.extensions.objectives
        )
        self.spec, self.rows = self.parts.spec, self.parts.rows
        self.ranks = ranks or Ranks(setting.world, select_device(setting.machine, setting.world))
        self.length = RunLength(self.recipe, self.ranks, self.corpus.samples)
        self.mfu = utilization(flops_per_token(self.spec), setting.machine, 1)

    @property
    def tokens_per_step(self) -> int:
        """Return the number of labels per update."""
        return self.recipe.train.global_batch * self.recipe.data.sequence_length

    def batches(self, recipe: Recipe) -> Iterator[Any]:
        """Return the recipe's batches from the start, for one variant."""
        world = self.ranks.world
        return self.corpus.train(recipe, world.rank, world.world_size, None, self.rows)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    @contextmanager
    def engine(self, recipe: Recipe, plan: Plan) -> Iterator[Engine]:
        """Build an engine with the plan's layers."""
        model = meta_model(recipe, self.parts.family, self.rows)
        source = initial_weights(recipe, self.parts, model, self.ranks.device)
        catalog = self.setting.extensions.catalog
        with build_engine(
            model,
            self.parts.family,
            NextToken(),
            recipe,
            plan,
            catalog,
            ranks=self.ranks,
            batches=self.batches(recipe),
            source=source,
        ) as engine:
            yield engine


class _LastLoss(Sink):
    """Keeps the last logged loss."""

    def __init__(self) -> None:
        self.value = float("nan")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep the loss."""
        self.value = values["train/loss"]


class Ours:
    """Our loop as `gptoughts train` runs it, logging included, without evaluation and checkpoints."""

    def __init__(self, subject: Subject, engine: Engine, folder: Path) -> None:
        self.engine, self._subject = engine, subject
        self.progress, self.loss = Progress(), _LastLoss()
        sinks = Sinks([Jsonl(), self.loss])
        sinks.start(RunInfo("bench", folder))
        self.log = Log(subject.recipe.log.every, sinks, SilentConsole(), Throughput(mfu=subject.mfu[0]))

    def __call__(self, steps: int) -> float:
        """Train for `steps` more steps and return the last logged loss."""
        goal, rate = self.progress.step + steps, self._subject.length.rate
        self.progress = train(
            self.engine, self.progress, lambda now: False, rate, callbacks=[self.log], pause=lambda now: now.step >= goal
        )
        return self.loss.value

    def watched(self, plan: Plan) -> list[LayerEvidence]:
        """Run one watched step and return its evidence. Raises LayerError if a planned layer is inactive."""
        catalog = self._subject.setting.extensions.catalog
        self.progress, _, trace = watch(self.engine, self.progress, self._subject.length.rate)
        layers = judge(self.engine, plan, catalog, trace)
        demand(layers)
        return layers


@dataclass
class Measured:
    """Seconds per step of every round by variant, last losses, evidence."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    evidence: list[LayerEvidence] = field(default_factory=list)


def bench_step(
    setting: ResolvedRun, rounds: int, steps: int, command: str, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Return all figures of one recipe under one plan as plain data; `say` receives progress lines.

    Raises ConfigError for a recipe that the plain loop cannot train, LayerError if a planned layer is inactive.
    """
    subject = Subject(setting)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        ours = Ours(subject, stack.enter_context(subject.engine(subject.recipe, setting.plan)), folder)
        again = Ours(subject, stack.enter_context(subject.engine(subject.recipe, setting.plan)), folder)
        settings = plain_settings(setting.plan, ours.engine)
        variants: dict[str, Run] = {
            OURS: ours,
            PLAIN: plain_run(subject, settings),
            AGAIN: again,
            FP32: _in_float32(plain_run(subject, Settings(settings.micro_batch))),
        }
        measured = Measured()
        warm = 1 + warmup_steps(setting.plan, setting.extensions.catalog)
        say("warming up: ours")
        ours(warm)
        measured.evidence = ours.watched(setting.plan)
        for name in (PLAIN, AGAIN, FP32):
            say(f"warming up: {name}")
            variants[name](warm + 1)  # compilation, first allocations, optimizer state; as many steps as ours
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            take_turns(subject, variants, measured, number, steps)
        say("framework overhead")
        outside = outside_verbs(subject.engine, subject.recipe, setting.plan, subject.length.rate, ours.engine.micro_batch)
    counts = {"command": command, "rounds": rounds, "steps_per_round": steps}
    return _figures(subject, measured, outside, counts)


def plain_run(subject: Subject, settings: Settings, wrap: Callable[[nn.Module], nn.Module] = lambda model: model) -> Run:
    """Return the plain loop over the subject's data."""

    def rate(step: int) -> float:
        return subject.length.rate(Progress(step=step))

    recipe = subject.recipe
    return plain_loop(
        recipe,
        subject.parts.family,
        subject.rows,
        batches=subject.batches(recipe),
        device=subject.ranks.device,
        settings=settings,
        rate=rate,
        wrap=wrap,
    )


def _in_float32(run: Run) -> Run:
    """Turn TF32 off around `run`: a plan may have enabled it for the whole process."""

    def alone(steps: int) -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return run(steps)
        finally:
            torch.set_float32_matmul_precision(before)

    return alone


def take_turns(subject: Subject, variants: dict[str, Run], measured: Measured, number: int, steps: int) -> None:
    """Run one round of all variants in rotated order."""
    names = list(variants)
    first = number % len(names)
    for name in names[first:] + names[:first]:
        subject.synchronize()
        began = perf_counter()
        loss = variants[name](steps)
        subject.synchronize()
        measured.seconds.setdefault(name, []).append((perf_counter() - began) / steps)
        measured.losses[name] = loss


def _figures(subject: Subject, measured: Measured, outside: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
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
    ratios = {  # of tokens per second: above 1 means the first is faster
        f"{OURS} / {PLAIN}": paired(seconds[PLAIN], seconds[OURS]),
        f"{AGAIN} / {OURS}": paired(seconds[OURS], seconds[AGAIN]),
        f"{OURS} / {FP32}": paired(seconds[FP32], seconds[OURS]),
    }
    setting, recipe = subject.setting, subject.recipe
    layers = setting.plan.layers
    step_seconds = variants[OURS]["step_ms"]["median"] / 1000
    return {
        "what": "bench step",
        **counts,
        "machine": machine_figures(setting.machine),
        "recipe": recipe.name,
        "model": {**{key: value for key, value in vars(subject.spec).items() if value is not None}},
        "global_batch": recipe.train.global_batch,
        "tokens_per_step": tokens,
        "profile": setting.plan.profile,
        "plan": layers,
        "only_ours": [f"{slot}={layer}" for slot, layer in layers.items() if layer not in SHARED],
        "evidence": {line.slot: line.evidence.text for line in measured.evidence if line.evidence.text != "baseline"},
        "variants": variants,
        "ratios_of_tokens_per_second": ratios,
        "outside_verbs": {**outside, "share_of_step": outside["seconds_per_step"] / step_seconds},
        "mfu_formula": subject.mfu[1],
        "losses": {name: round(loss, 4) for name, loss in measured.losses.items()},
    }


def _main(
    recipe: str | None, profile: str, plugin: tuple[str, ...], rounds: int, steps: int, out: str | None, **flags: Any
) -> None:
    fields, layers, _ = split_flags(flags)
    setting = decide(recipe, profile, fields, layers, plugin)
    for note in apply_environment(setting):
        print(f"note: {note}", flush=True)
    path = front.target(out)
    run = bench_step(setting, rounds, steps, front.typed("benchmarks.step"), front.progress)
    print(step_table(run))
    front.write(path, run, SAME_MEASUREMENT)


def main(arguments: list[str] | None = None) -> None:
    """Run `python -m benchmarks.step`."""
    own: list[click.Parameter] = [
        *recipe_options(),
        option("--rounds", type=click.IntRange(2), default=7, help="paired rounds"),
        option("--steps", type=click.IntRange(1), default=10, help="steps per round and variant"),
        option("--to", "out", metavar="FILE", help="write JSON to FILE"),
    ]
    text = "Compare our loop with a plain PyTorch loop of the same settings and with float32 eager, interleaved."
    front.run(
        RecipeCommand("step", params=own, callback=_main, help=text, context_settings=CONTEXT), "benchmarks.step", arguments
    )


if __name__ == "__main__":
    main()
