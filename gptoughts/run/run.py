"""A whole run: data, engine, watched step, training, checkpoints, evidence. What `train` does, from the command line and from Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from gptoughts.config.loader import Resolved
from gptoughts.console import Console, SilentConsole
from gptoughts.data.corpus import Corpus, TableCorpus, opened, prepared, prepared_validation
from gptoughts.data.device import to_device
from gptoughts.engine.checkpoint import state as training_state
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.distributed.ranks import Ranks, process_group
from gptoughts.engine.engine import Engine
from gptoughts.engine.from_recipe import ModelBundle, initial_weights, kept_documents, model_bundle, resumed_weights
from gptoughts.engine.run_length import RunLength
from gptoughts.engine.trainer import Callback, Progress, train
from gptoughts.errors import LayerError, PlanError
from gptoughts.hardware.machine import Machine, World
from gptoughts.inference.eval import squad
from gptoughts.inference.generate.write import write
from gptoughts.layers.plugins import Extensions
from gptoughts.models.sources import meta_model
from gptoughts.planning.resolve import Plan
from gptoughts.run import evidence as prove
from gptoughts.run import numerics_check as numerics
from gptoughts.run import preflight as beforehand
from gptoughts.run import resume
from gptoughts.run.build import build_engine, seed_rngs
from gptoughts.run.callbacks import Evaluate, Log, Sample, Save, yardsticks
from gptoughts.run.failures import leaving
from gptoughts.run.first_steps import FirstSteps
from gptoughts.run.signals import SignalWatcher
from gptoughts.run.tracking.jsonl import Jsonl, attempts
from gptoughts.run.tracking.loss_plot import draw_losses
from gptoughts.run.tracking.run_dir import RunFolder


@dataclass(frozen=True)
class TrainingJob:
    """What is to be run, all decided: recipe, plan, and where to write."""

    resolved: Resolved
    plan: Plan
    machine: Machine
    world: World
    extensions: Extensions
    folder: RunFolder
    resume: str = "auto"
    strict: bool = False
    console: Console = field(default_factory=Console)
    numerics: str = "check"
    """Whether layers are compared with the baseline before the first step: "check" or "off"."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    progress: Progress
    val_loss: float | None
    unigram_entropy: float | None
    """Entropy of the validation tokens' own distribution in nats: what a model without context could reach at best."""
    sample: str
    checkpoint: Path | None
    out: Path
    evidence: tuple[prove.LayerEvidence, ...]
    stopped_by: int | None = None
    """The signal that ended it early."""
    objective: str = "next-token"
    prompt: str = ""
    """What its samples began with."""


def select_device(machine: Machine, world: World) -> torch.device:
    """This rank's GPU, or the CPU where the plan was made for one. Raises PlanError where this torch cannot use the GPU."""
    if not machine.gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlanError(
            f"the plan is for {machine.label()} and torch {torch.__version__} sees no GPU\n"
            "  try: gptoughts doctor, which names the build that fits the driver, or CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def execute(order: TrainingJob) -> Outcome:
    """Run to the end, to a signal or to an error. Everything that was reached is on disk afterwards."""
    device = select_device(order.machine, order.world)
    try:
        if order.world.rank == 0:
            order.folder.lock()
            checkpoint.clean(order.folder.checkpoints)  # a kill may have hidden one that was being replaced
        # Before ranks meet: reading a large text may take longer than they would wait for each other. One tokenizes, a lock
        # makes the others on its box wait, and boxes without a shared disk each make their own.
        corpus = opened(order.resolved.recipe)
        with process_group(order.world, device) as ranks:
            console = order.console if ranks.first else SilentConsole()
            ranks.same("the plan", order.plan.digest())
            ranks.same("the recipe", order.resolved.to_toml())
            return _Run(order, ranks, corpus, console).execute()
    finally:
        order.folder.release()


class _Run:
    """The parts of one run that its steps share."""

    def __init__(self, order: TrainingJob, ranks: Ranks, corpus: Corpus, console: Console) -> None:
        self.order, self.ranks, self.corpus, self.console = order, ranks, corpus, console
        self.recipe, self.out = order.resolved.recipe, order.folder.out
        extensions = order.extensions
        self.parts: ModelBundle = model_bundle(self.recipe, corpus.tokenizer, extensions.families, extensions.objectives)
        beforehand.check(self.recipe, corpus, self.parts)
        self.prompt = beforehand.sample_prompt(order.resolved, corpus)
        self.length = RunLength(self.recipe, ranks, corpus.samples)
        self.stopper = SignalWatcher(ranks)
        self.seen: tuple[prove.LayerEvidence, ...] = ()

    def execute(self) -> Outcome:
        now = resume.circumstances(self.order.resolved, self.order.plan, self.parts.rows)
        origin, skipped = resume.find(self.order.folder, self.order.resume)
        if origin is not None:
            resume.check_shape(origin, now)
        progress = origin.progress if origin else Progress()
        self.ranks.same("data and checkpoint", f"{self.corpus.fingerprint} at step {progress.step}")
        seed_rngs(self.recipe.seed, self.order.world.rank, progress.step)
        batches = self._batches(progress)
        parts, order, device = self.parts, self.order, self.ranks.device
        model = meta_model(self.recipe, parts.family, parts.rows)
        beforehand.check_packing(self.recipe, parts, model)
        source = (
            resumed_weights(self.recipe, parts, model, device, origin.folder)
            if origin
            else initial_weights(self.recipe, parts, model, device)
        )
        self._record_start(skipped)
        for line in beforehand.introduced(self.recipe, self.corpus, parts, model, source, self.console.style):
            self.console.say(line)
        for line in beforehand.resuming(origin, now, order.plan) if origin else ():
            self.console.say(line)
        if order.numerics == "check" and (origin is None or origin.state["plan_digest"] != order.plan.digest()):
            batches = self._check_numerics(batches, origin.folder if origin else None)
        with build_engine(
            model,
            parts.family,
            parts.objective,
            self.recipe,
            order.plan,
            order.extensions.catalog,
            self.ranks,
            batches,
            source,
        ) as engine:
            validations = origin.state.get("validations", {}) if origin else {}
            if origin is not None:
                training_state.restore(engine, origin.folder)
                ended = validations.get("ended") is not None and validations.get("patience") == self.recipe.eval.patience
                if self.length.finished(progress) or ended:
                    more = "another --eval.patience" if ended else "--train.steps N"
                    self.console.say(f"run {order.folder.name} is complete at step {progress.step}; for more: {more}")
                    return self._outcome(progress, None, origin.folder)
            said = resume.take_micro_batch(engine, origin, now, self.out)
            if said:
                self.console.say(said)
            with self.stopper.listening(), leaving(engine, self.out):
                return self._train(engine, progress, now, validations)

    # Before the first step.

    def _batches(self, progress: Progress) -> Iterator[Any]:
        world, parts = self.order.world, self.parts
        read = self.corpus.train(self.recipe, world.rank, world.world_size, progress.cursor, parts.rows)
        return prepared(read, parts.objective.prepare, self.recipe.train.global_batch, world.rank, world.world_size)

    def _check_numerics(self, batches: Iterator[Any], saved: Path | None) -> Iterator[Any]:
        """Compare the layers with the baseline on the first batch. Returns the batches, that one among them."""
        recipe, parts, device = self.recipe, self.parts, self.ranks.device
        first = next(batches)

        def weights(model: Any) -> Any:
            return (
                resumed_weights(recipe, parts, model, device, saved) if saved else initial_weights(recipe, parts, model, device)
            )

        found = numerics.compare(
            recipe,
            self.order.plan,
            self.order.extensions.catalog,
            parts.family,
            parts.objective,
            device,
            to_device(first[0], device),
            lambda: meta_model(recipe, parts.family, parts.rows),
            weights,
            self.ranks.any,
        )
        for line in found.lines():
            self.console.say(line)
        if self.ranks.first:
            (self.out / "numerics.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
        mine = not found.near
        if self.ranks.any(mine) and not mine:
            raise LayerError("layers compute other numbers than the baseline on another rank; its own message names them")
        found.demand()
        return chain([first], batches)

    def _record_start(self, skipped: list[str]) -> None:
        metrics = self.out / "metrics.jsonl"
        self.attempt = attempts(metrics) + 1 if self.ranks.first else 1
        if not self.ranks.first:
            return
        (self.out / "plan.json").write_text(json.dumps(self.order.plan.to_json(), indent=1) + "\n", encoding="utf-8")
        (self.out / "recipe.toml").write_text(self.order.resolved.to_toml(), encoding="utf-8")
        for line in skipped:
            self.console.say(f"note: {line}")

    # Training.

    def _train(self, engine: Engine, progress: Progress, now: Mapping[str, Any], validations: Mapping[str, Any]) -> Outcome:
        sinks = [Jsonl(self.out / "metrics.jsonl", self.attempt)] if self.ranks.first else []
        evaluate = (
            Evaluate(self.recipe.eval.every, self._eval_batches, sinks, self.console, self.recipe.eval.patience, self._scores())
            if self.corpus.validates
            else None
        )
        sample = Sample(self.recipe.sample.every, self._write_sample, self.console)
        writer = (
            checkpoint.Writer(self.order.folder.checkpoints, self.recipe.save.keep, self.recipe.save.keep_best)
            if self.ranks.first
            else None
        )
        if evaluate is not None:
            evaluate.recall(validations)
        save = Save(
            self.recipe.save.every, writer, self._take(now, evaluate), (lambda: evaluate.mark) if evaluate else (lambda: None)
        )

        def finished(reached: Progress) -> bool:
            return self.length.finished(reached) or (evaluate is not None and evaluate.exhausted(reached))

        mfu, of_gemm = yardsticks(self.parts.spec, self.order.plan, self.order.machine, self.order.world, self.console)
        log = Log(self.recipe.log.every, sinks, self.console, mfu, self.length.steps, self.length.remaining, of_gemm)
        log.start(progress, engine)
        plan, catalog = self.order.plan, self.order.extensions.catalog
        first = FirstSteps(plan, catalog, self.ranks, self.console, self.out, self.attempt, self.order.strict)
        callbacks: list[Callback] = [log, *([evaluate] if evaluate else []), save, sample]
        try:
            progress = first.run(
                engine, progress, callbacks, finished, self.length.rate, self.stopper.asked, lambda: self.stopper.stopped
            )
            if not self.stopper.stopped:
                progress = train(engine, progress, finished, self.length.rate, callbacks, self.stopper.asked)
        finally:
            if writer is not None:
                writer.wait()
            for sink in sinks:
                sink.close()
        if self.ranks.first:
            if not first.seen:
                first.say_unwatched()
            draw_losses(self.out / "metrics.jsonl", self.out / "loss.png", self.order.folder.name)
        self.seen = first.seen
        newest = checkpoint.newest(self.order.folder.checkpoints)[0] if self.ranks.first else None
        return self._outcome(progress, evaluate.result if evaluate else None, newest, sample.text)

    # What callbacks need.

    def _eval_batches(self) -> Iterator[Any]:
        world, parts = self.order.world, self.parts
        read = self.corpus.validation(self.recipe, world.rank, world.world_size, parts.rows)
        prepare = parts.objective.prepare_validation
        return prepared_validation(read, prepare, self.recipe.train.global_batch, world.rank, world.world_size)

    def _write_sample(self, engine: Engine) -> str:
        if not self.ranks.first or self.recipe.objective == "question-answering":
            return ""
        # Every length of text would be another graph, so compiled blocks run as they were written.
        with engine.eval_context(), torch.compiler.set_stance("force_eager"):
            written = write(engine.bare, self.corpus.tokenizer, [self.prompt], self.recipe, self.parts.mask_id)
        return self.prompt + written[0]

    def _scores(self) -> Callable[[Engine], Mapping[str, float]] | None:
        """The task's own figures on the validation split, where it has some."""
        corpus = self.corpus
        if not isinstance(corpus, TableCorpus) or corpus.questions is None:
            return None
        table, questions = corpus.tables["val"], corpus.questions
        return lambda engine: squad.evaluate(engine, table, questions, out=self.out)

    def _take(self, now: Mapping[str, Any], evaluate: Evaluate | None) -> Callable[..., checkpoint.Snapshot]:
        documents = {"plan.json": json.dumps(self.order.plan.to_json(), indent=1), "recipe.toml": self.order.resolved.to_toml()}
        documents |= kept_documents(self.recipe)
        weights: training_state.Which = "all" if self.recipe.adapter.kind == "none" else "trained"

        def take(engine: Engine, progress: Progress) -> checkpoint.Snapshot:
            newest = evaluate.result if evaluate else None
            val_loss = newest[1] if newest and newest[0] == progress.step else None
            memory = evaluate.memory() if evaluate else {}
            state = resume.state_of(progress, now, self.order.plan, self.attempt, val_loss, memory, engine.micro_batch)
            folders = {"tokenizer": self.corpus.tokenizer_folder}
            return training_state.snapshot(engine, progress.step, state, documents, folders, weights)

        return take

    def _outcome(
        self, progress: Progress, evaluated: tuple[int, float] | None, saved: Path | None, sample: str = ""
    ) -> Outcome:
        return Outcome(
            progress,
            evaluated[1] if evaluated else None,
            self.corpus.unigram_entropy,
            sample,
            saved,
            self.out,
            self.seen,
            self.stopper.signal if self.stopper.stopped else None,
            self.recipe.objective,
            self.prompt,
        )
