"""Set up one training: data, ranks, model, weights, layers. `train`, `fit`, `trace` and `bench` all start here."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptoughts.config.loader import Recipe, Resolved
from gptoughts.config.model_spec import ModelSpec
from gptoughts.console import Console, SilentConsole
from gptoughts.data.corpus import Corpus, open_corpus, prepare_batches, prepare_validation_batches
from gptoughts.data.device import to_device
from gptoughts.engine.callback import Callback
from gptoughts.engine.checkpoint import state
from gptoughts.engine.distributed.process_group import process_group
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.distributed.rendezvous import meet
from gptoughts.engine.distributed.watch import FailureWatch
from gptoughts.engine.engine import Engine
from gptoughts.engine.from_recipe import ModelBundle, initial_weights, model_bundle, resumed_weights
from gptoughts.engine.memory_usage import resident_bytes
from gptoughts.engine.objectives.base import Objective
from gptoughts.engine.run_length import RunLength
from gptoughts.engine.trainer import Progress
from gptoughts.errors import LayerError
from gptoughts.files import write_json, write_text
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.world import World
from gptoughts.layers.plugins import Extensions
from gptoughts.models.family import custom_family
from gptoughts.models.sources import CurrentWeights, meta_model
from gptoughts.planning.plan import Plan
from gptoughts.run import numerics_check, preflight, resume
from gptoughts.run.build import build_engine, seed_rngs, select_device
from gptoughts.run.rewinds import Start, start_after
from gptoughts.run.storage import run_storage, write_record
from gptoughts.run.tracking.jsonl import FILE, attempts
from gptoughts.run.tracking.run_dir import RunFolder

Batches = Iterator[tuple[Any, Any]]


@dataclass(frozen=True)
class OwnModel:
    """A user's model with its objective and endless batches, for `fit`."""

    model: nn.Module
    objective: Objective
    batches: Batches


@dataclass(frozen=True)
class TrainingJob:
    """One training, fully decided: recipe, plan, machine, and where and how to run."""

    resolved: Resolved
    plan: Plan
    machine: Machine
    world: World
    extensions: Extensions
    folder: RunFolder | None = None
    """Where the run writes and resumes from; None writes nothing."""
    resume: str = "auto"
    """`auto`, `never`, or the folder of a checkpoint."""
    strict: bool = False
    """Stop on layers that are unproven, not only on inactive ones."""
    numerics: str = "check"
    """`check` compares layers with the baseline before the first step; `off` does not."""
    console: Console = field(default_factory=Console)
    callbacks: tuple[Callback, ...] = ()
    track: tuple[str, ...] = ("jsonl", "plot")
    """Names of sinks."""
    collectives: str = "auto"
    """Backend of the process group: auto takes NCCL on GPUs and gloo on CPUs."""
    weights_seed: int | None = None
    """Seed of the initial weights if it is not the recipe's; data and their order stay."""
    own: OwnModel | None = None
    """Replaces the recipe's model, data and objective."""
    passed: int | None = None
    """Samples of the data order up to which the run passes over the data, after a rewind that is not recorded yet."""
    began: float = field(default_factory=time.time)
    """Unix time from which goodput counts the start: the process's own start for `gptoughts train`."""

    @property
    def recipe(self) -> Recipe:
        """The recipe without the origins of its values."""
        return self.resolved.recipe


@dataclass(frozen=True)
class Session:
    """A training that is ready to step. Valid inside `open_session`."""

    job: TrainingJob
    ranks: Ranks
    console: Console
    """Silent on all ranks but the first."""
    engine: Engine
    bundle: ModelBundle
    length: RunLength
    corpus: Corpus | None = None
    """None for a user's own model."""
    prompt: str = ""
    """Prompt of samples."""
    attempt: int = 1
    resumed: resume.ResumePoint | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """Everything that decides the next steps' numbers, to compare on resume."""
    bytes_before_model: int | None = None
    """Resident memory of the process before the model existed."""
    watch: FailureWatch = field(default_factory=lambda: FailureWatch(World()))
    """Ends all ranks if one is lost or none makes progress."""
    begin: Start = field(default_factory=Start)
    """Where training starts: step 0 or the step of the checkpoint, after the data that rewinds pass over."""

    @property
    def start(self) -> Progress:
        """Where training starts."""
        return self.begin.progress

    def validation_batches(self) -> Iterator[Any]:
        """Return this rank's validation batches, as the objective prepares them."""
        assert self.corpus is not None
        recipe, world = self.job.recipe, self.job.world
        read = self.corpus.validation(recipe, world.rank, world.world_size, self.bundle.rows)
        prepare = self.bundle.objective.prepare_validation
        return prepare_validation_batches(read, prepare, recipe.train.global_batch, world.rank, world.world_size)


@contextmanager
def open_session(job: TrainingJob) -> Iterator[Session]:
    """Set up a training and undo it on exit: run folder, corpus, process group, weights, layers, checkpoint state.

    Raises what keeps a training from starting: ConfigError, DataError, PlanError, CheckpointError, RunError, LayerError.
    """
    device = select_device(job.machine, job.world)
    with ExitStack() as stack:
        console = job.console if job.world.rank == 0 else SilentConsole()
        stack.enter_context(console.logging())
        stack.enter_context(run_storage(job.folder, job.world.rank == 0))
        corpus = None if job.own else open_data(job.recipe, job.world)
        watch = stack.enter_context(FailureWatch(job.world, job.folder.out if job.folder else None))
        ranks = stack.enter_context(process_group(job.world, device, job.collectives))
        watch.start(ranks)
        ranks.same("the versions of gptoughts and torch", f"gptoughts {code_version()}, torch {torch.__version__}")
        ranks.same("the plan", job.plan.digest(), job.plan.table())
        ranks.same("the recipe", job.resolved.to_toml())
        if job.folder is not None:
            job.folder.agree(ranks.texts)
        opened = _open_own(job, ranks, console) if corpus is None else _Setup(job, ranks, console, corpus).open()
        session = stack.enter_context(opened)
        if watch.active:
            session.engine.report = watch.report
        yield replace(session, watch=watch)


def code_version() -> str:
    """Return the version of this package."""
    version: str = sys.modules["gptoughts"].__version__  # the root imports this module for types
    return version


def open_data(recipe: Recipe, world: World) -> Corpus:
    """Open the corpus before the process group exists: tokenizing can take longer than the limit of a collective.

    The first rank of a machine tokenizes. Ranks meet first, so that a rank that cannot be reached is found before hours of tokenizing.
    """
    if world.world_size == 1:
        return open_corpus(recipe)
    return meet(world).wait_for_data(lambda: open_corpus(recipe))


@contextmanager
def _open_own(job: TrainingJob, ranks: Ranks, console: Console) -> Iterator[Session]:
    assert job.own is not None
    own, family = job.own, custom_family(job.own.model)
    attempt = _record_start(job, ranks)
    bundle = ModelBundle(family, own.objective, 0, ModelSpec())
    with build_engine(
        own.model,
        family,
        own.objective,
        job.recipe,
        job.plan,
        job.extensions.catalog,
        ranks=ranks,
        batches=own.batches,
        source=CurrentWeights(own.model),
    ) as engine:
        yield Session(job, ranks, console, engine, bundle, RunLength(job.recipe, ranks, 0), attempt=attempt)


class _Setup:
    """The steps of opening a recipe's training, in order."""

    def __init__(self, job: TrainingJob, ranks: Ranks, console: Console, corpus: Corpus) -> None:
        self.job, self.recipe, self.ranks, self.console, self.corpus = job, job.recipe, ranks, console, corpus
        extensions = job.extensions
        self.bundle = model_bundle(self.recipe, corpus.tokenizer, extensions.families, extensions.objectives)
        self.prompt = ""
        if job.folder is not None:  # a run, which evaluates and samples
            preflight.check(self.recipe, corpus, self.bundle)
            self.prompt = preflight.sample_prompt(job.resolved, corpus)

    @contextmanager
    def open(self) -> Iterator[Session]:
        """Resume point, model on meta, weights, numerics check, layers, checkpoint state."""
        job, bundle = self.job, self.bundle
        fingerprint = resume.fingerprint(job.resolved, job.plan, bundle.rows)
        point, skipped = self._resume_point(fingerprint)
        begin = start_after(
            job.folder, self.ranks, point.progress if point else Progress(), self.corpus.fingerprint, job.passed
        )
        progress = begin.progress
        self.ranks.same("data and checkpoint", f"{self.corpus.fingerprint} at step {progress.step}")
        seed_rngs(self.recipe.seed, job.world.rank, progress.step)
        batches = self._batches(progress)
        before = resident_bytes("VmRSS")
        model = self._model()
        preflight.check_packing(self.recipe, bundle, model)
        source = self._weights(model, point.folder if point else None)
        attempt = _record_start(job, self.ranks)
        if job.folder is not None:
            self._introduce(point, skipped, fingerprint, model, source)
            if begin.line:
                self.console.say(begin.line)
        if job.numerics == "check" and (point is None or point.state.get("plan_digest") != job.plan.digest()):
            batches = self._check_numerics(batches, point.folder if point else None)
        with build_engine(
            model,
            bundle.family,
            bundle.objective,
            self.recipe,
            job.plan,
            job.extensions.catalog,
            ranks=self.ranks,
            batches=batches,
            source=source,
        ) as engine:
            if point is not None:
                state.restore(engine, point.folder)
            length = RunLength(self.recipe, self.ranks, self.corpus.samples)
            yield Session(
                job, self.ranks, self.console, engine, bundle, length, self.corpus, self.prompt, attempt, point, fingerprint, before,
                begin=begin,
            )  # fmt: skip

    def _resume_point(self, fingerprint: Mapping[str, Any]) -> tuple[resume.ResumePoint | None, list[str]]:
        if self.job.folder is None:
            return None, []
        point, skipped = resume.find_on_rank_0(self.job.folder, self.job.resume, self.ranks)
        if point is not None:
            resume.check_shape(point, fingerprint)
        return point, skipped

    def _batches(self, progress: Progress) -> Batches:
        world, bundle = self.job.world, self.bundle
        read = self.corpus.train(self.recipe, world.rank, world.world_size, progress.cursor, bundle.rows)
        return prepare_batches(read, bundle.objective.prepare, self.recipe.train.global_batch, world.rank, world.world_size)

    def _model(self) -> nn.Module:
        return meta_model(self.recipe, self.bundle.family, self.bundle.rows)

    def _weights(self, model: nn.Module, saved: Path | None) -> Any:
        if saved is not None:
            return resumed_weights(self.recipe, self.bundle, model, self.ranks.device, saved)
        seed = self.job.weights_seed
        recipe = self.recipe if seed is None else self.recipe.model_copy(update={"seed": seed})
        return initial_weights(recipe, self.bundle, model, self.ranks.device)

    def _introduce(
        self,
        point: resume.ResumePoint | None,
        skipped: Iterable[str],
        fingerprint: Mapping[str, Any],
        model: nn.Module,
        source: Any,
    ) -> None:
        for line in skipped:
            self.console.say(f"note: {line}")
        for line in preflight.introduction(self.recipe, self.corpus, self.bundle, model, source, self.console.style):
            self.console.say(line)
        for line in preflight.resume_lines(point, fingerprint, self.job.plan) if point else ():
            self.console.say(line)

    def _check_numerics(self, batches: Batches, saved: Path | None) -> Batches:
        """Compare the layers with the baseline on the first batch. Returns the batches with that one put back."""
        bundle, device = self.bundle, self.ranks.device
        first = next(batches)
        found = numerics_check.compare(
            self.recipe,
            self.job.plan,
            self.job.extensions.catalog,
            bundle.family,
            bundle.objective,
            device,
            batch=to_device(first[0], device),
            model=self._model,
            weights=lambda model: self._weights(model, saved),
            late=self.ranks.any,
        )
        for line in found.lines():
            self.console.say(line)
        if self.ranks.first and self.job.folder is not None:
            write_record(self.job.folder.out / "numerics.json", found.to_json())
        failed = not found.near
        if self.ranks.any(failed) and not failed:
            raise LayerError("numerics check: failed on another rank, whose message names the layers")
        found.demand()
        return chain([first], batches)


def _record_start(job: TrainingJob, ranks: Ranks) -> int:
    """Write plan.json and recipe.toml. Returns the number of this attempt."""
    if job.folder is None or not ranks.first:
        return 1
    out = job.folder.out
    write_json(out / "plan.json", job.plan.to_json())
    if job.own is None:
        write_text(out / "recipe.toml", job.resolved.to_toml())
    return attempts(out / FILE) + 1
