"""Run a training from start to end: session, callbacks, evidence, checkpoints, result."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptoughts.config.tasks import task_of
from gptoughts.console import LOGGER
from gptoughts.data.order import samples_at
from gptoughts.engine.callback import Callback
from gptoughts.engine.checkpoint import integrity, state, store
from gptoughts.engine.checkpoint.writer import Writer
from gptoughts.engine.distributed.shards import gathered_outside_blocks, is_sharded
from gptoughts.engine.engine import Engine
from gptoughts.engine.from_recipe import checkpoint_documents
from gptoughts.engine.trainer import Progress, train
from gptoughts.inference.generate.write import generate_text
from gptoughts.run import resume
from gptoughts.run.advice import Advisor
from gptoughts.run.callbacks import Evaluate, Sample
from gptoughts.run.evidence import EvidenceCheck, LayerEvidence, warmup_steps
from gptoughts.run.failures import report_failures
from gptoughts.run.goodput import Goodput
from gptoughts.run.limiter import SAMPLES, Limiter, Pauses, gpu_fields
from gptoughts.run.log import Log
from gptoughts.run.result import RunResult
from gptoughts.run.saving import Save
from gptoughts.run.scores import label_bytes, scores_of
from gptoughts.run.session import Session, TrainingJob, open_session
from gptoughts.run.signals import SignalWatcher
from gptoughts.run.step_check import Rewind, StepCheck
from gptoughts.run.storage import checkpoint_bytes, space_problem
from gptoughts.run.throughput import throughput
from gptoughts.run.tracking.jsonl import SYSTEM_FILE, newest_sample
from gptoughts.run.tracking.run_dir import run_id
from gptoughts.run.tracking.sink import CallbackSink, RunInfo, Sinks, make_sinks
from gptoughts.run.tracking.system import SystemMetrics


def execute(job: TrainingJob) -> RunResult:
    """Run until the end, a signal or an error. Everything reached by then is on disk. A rewind opens another session."""
    while True:
        outcome = _attempt(job)
        if isinstance(outcome, RunResult):
            return outcome
        job = outcome
        gc.collect()  # the model of the session before


def _attempt(job: TrainingJob) -> RunResult | TrainingJob:
    """Run in one session. Returns the result, or the job to go on with after a rewind."""
    with open_session(job) as session:
        return _Run(session).execute()


class _Run:
    """The parts of one run: sinks, callbacks, writer of checkpoints."""

    def __init__(self, session: Session) -> None:
        assert session.corpus is not None and session.job.folder is not None
        self.session, self.job, self.recipe, self.engine = session, session.job, session.job.recipe, session.engine
        self.corpus, self.folder, self.first = session.corpus, session.job.folder, session.ranks.first
        self.signals = SignalWatcher(session.ranks, self.folder.out)
        own = [*make_sinks(self.job.track), *map(CallbackSink, self.job.callbacks)]
        self.sinks = Sinks(own if self.first else ())
        self.run_id = ""
        self.steps = self._step_check()
        self.evaluate = self._evaluate() if self.corpus.validates else None
        self.sharded = is_sharded(self.engine.bare)
        self.writer = self._open_writer()
        self.goodput: Goodput | None = None
        """None on ranks that write nothing, as is `limiter`."""
        self.limiter: Limiter | None = None

    def execute(self) -> RunResult | TrainingJob:
        """Resume, train, and return the result, or the job to go on with after a rewind."""
        session, point = self.session, self.session.resumed
        validations = point.state.get("validations", {}) if point else {}
        if point is not None and self._is_complete(point, validations):
            return self._result(point.progress, point.folder)
        line = resume.restore_micro_batch(self.engine, point, session.fingerprint, self.folder.out)
        if line:
            session.console.say(line)
        if self.evaluate is not None:
            self.evaluate.load_state(validations)
        self.steps.load_state(point.state.get("bad_steps", {}) if point else {})
        self._check_space(point)
        with self.signals.listening(), report_failures(self.engine, self.folder.out):
            try:
                return self._train(session.start)
            except Rewind as rewind:
                session.ranks.barrier()  # rank 0 may still write its checkpoint
                resumes = "auto" if self.writer is not None and self.writer.wrote else self.job.resume
                folder = replace(self.folder, fresh=False, _lock=None)
                return replace(self.job, folder=folder, passed=rewind.samples, resume=resumes, began=time.time())
            except RuntimeError as error:
                session.watch.end_if_lost(error)
                raise

    def _is_complete(self, point: resume.ResumePoint, validations: Mapping[str, Any]) -> bool:
        early = validations.get("ended") is not None and validations.get("patience") == self.recipe.eval.patience
        complete = early or self.session.length.finished(point.progress)
        if complete:
            more = "another --eval.patience" if early else "--train.steps N"
            self.session.console.say(
                f"run {self.folder.name} is complete at step {point.progress.step}; to train longer: {more}"
            )
        return complete

    def _check_space(self, point: resume.ResumePoint | None) -> None:
        if not self.first:
            return
        one = checkpoint_bytes(self.engine, point.folder if point else None, self.recipe.adapter.kind != "none")
        problem = space_problem(self.folder.checkpoints, one)
        if problem:
            LOGGER.warning(problem)

    def _train(self, progress: Progress) -> RunResult:
        session, job = self.session, self.job
        figures = throughput(session.bundle.spec, job.recipe, job.plan, job.machine, job.world, job.extensions.catalog)
        for line in figures.notes:
            session.console.say(line)
        catalog = job.extensions.catalog
        warm = warmup_steps(job.plan, catalog) + 1
        log = Log(self.recipe.log.every, self.sinks, session.console, figures, session.length, warm)
        log.counts = self.steps.counts
        if self.first:
            self.goodput = Goodput(self.folder.out, session.attempt, job.began, progress.step, warm)
        sample = Sample(self.recipe.sample.every, self._write_sample, session.console, self.sinks)
        system = self._system_metrics()
        save = Save(
            self.recipe.save.every,
            self.writer,
            self._snapshot,
            lambda: self.evaluate.criterion if self.evaluate else None,
            self.recipe.save.failures,
            self.signals.save_asked,
            self.steps.settle,
            self.steps.broken,
        )
        callbacks = [system, self.steps, log, *([self.evaluate] if self.evaluate else []), save, sample, *job.callbacks]
        callbacks += [self.goodput] if self.goodput else []
        check = EvidenceCheck(
            job.plan, catalog, session.ranks, session.console, self.folder.out, session.attempt, job.strict, report=log.add
        )
        end = "failed"
        with Pauses() as pauses:
            if self.goodput is not None:
                log.judge = self.limiter = self._limiter(self.goodput, check, pauses)
                log.live = lambda: gpu_fields(self.folder.out / SAMPLES)
            try:
                self._start_sinks(progress)
                progress = self._loop(progress, callbacks, check)
                end = "interrupted" if self.signals.stopped else "finished"
            except Rewind:
                end = "rewound"
                raise
            finally:
                system.close()
                self._close(end)
        session.ranks.barrier()  # launchers end the ranks that remain when one exits; rank 0 may still write its checkpoint
        if self.first and not check.evidence:
            check.report_unwatched()
        newest = integrity.newest(self.folder.checkpoints)[0] if self.first else None
        return self._result(progress, newest, check.evidence, sample.text)

    def _limiter(self, goodput: Goodput, check: EvidenceCheck, pauses: Pauses) -> Limiter:
        job = self.job
        spec, catalog = self.session.bundle.spec, job.extensions.catalog
        advisor = Advisor(job.machine, spec, job.recipe, job.world, job.plan, catalog)
        samples = self.folder.out / SAMPLES
        return Limiter(advisor, self.session.console, goodput.attempt_parts, pauses, lambda: check.trace, samples)

    def _close(self, end: str) -> None:
        """Wait for the last checkpoint, and close what the run writes to. `end` is finished, interrupted, rewound or failed."""
        if self.goodput is not None:
            self.goodput.waiting_for_disk()
        if self.writer is not None:
            self.writer.failure()  # reported when it happened; the last write of a run raises its own
        self.session.console.end_row()
        self.sinks.close()
        for line in self.limiter.summary() if self.limiter is not None else ():
            self.session.console.say(line)
        if self.goodput is not None:
            self.session.console.say(self.goodput.close(end))

    def _loop(self, progress: Progress, callbacks: list[Callback], check: EvidenceCheck) -> Progress:
        engine, schedule = self.engine, self.session.length.rate

        def finished(reached: Progress) -> bool:
            return self.session.length.finished(reached) or (self.evaluate is not None and self.evaluate.exhausted(reached))

        for callback in callbacks:
            callback.on_start(engine, progress)
        progress, stopped = check.run(engine, progress, finished, schedule, callbacks, self.signals.asked)
        if not stopped:
            progress = train(engine, progress, finished, schedule, callbacks=callbacks, stop=self.signals.asked)
        for callback in callbacks:
            callback.on_end(engine, progress)
        return progress

    def _start_sinks(self, progress: Progress) -> None:
        if not self.first:
            return
        point, folder = self.session.resumed, self.folder
        self.run_id = run_id(folder, point.folder if point else None, point.state.get("run_id") if point else None)
        recipe, plan = self.recipe.model_dump(mode="json"), self.job.plan.to_json()
        track = recipe["track"]
        info = RunInfo(folder.name, folder.out, self.session.attempt, recipe, plan, self.run_id, progress.step, track)
        self.sinks.start(info)

    def _system_metrics(self) -> SystemMetrics:
        before = newest_sample(self.folder.out / SYSTEM_FILE) if self.first else 0
        return SystemMetrics(self.session.ranks, self.sinks, self.recipe.track.sample_seconds, before)

    def _open_writer(self) -> Writer | None:
        """Return the writer of checkpoints; None on ranks that write nothing."""
        split = state.is_split(self.engine)
        if not (self.first or split):
            return None
        save, ranks = self.recipe.save, self.session.ranks
        together = ranks if split and ranks.size > 1 else None
        return Writer(self.folder.checkpoints, save.keep, save.keep_best, together)

    def _evaluate(self) -> Evaluate:
        settings, session = self.recipe.eval, self.session
        return Evaluate(
            settings.every,
            lambda: self.signals.until_asked(session.validation_batches()),
            self.sinks,
            session.console,
            settings.patience,
            scores_of(session, self.folder.out),
            label_bytes(session),
            within=self.signals.interruptible,
            settle=self.steps.settle,
        )

    def _step_check(self) -> StepCheck:
        recipe, session, samples = self.recipe, self.session, self.corpus.samples
        random = session.resumed is None and recipe.model.path is None and recipe.adapter.kind == "none"
        return StepCheck(
            self.folder.out,
            session.begin.rewinds,
            lambda positions: samples_at(positions, samples, recipe.seed),
            rows=session.bundle.rows if random else None,
        )

    def _write_sample(self, engine: Engine) -> str:
        # With sharded weights every rank computes the sample, because each forward gathers weights.
        if not (self.first or self.sharded) or not task_of(self.recipe).samples:
            return ""
        prompt = self.session.prompt
        # Each text length would compile another graph, so compiled blocks run eagerly here.
        alone = nullcontext() if self.sharded else self.signals.interruptible(engine.bare)
        eager = torch.compiler.set_stance("force_eager")
        with engine.eval_context(), gathered_outside_blocks(engine.bare), eager, alone:
            written = generate_text(engine.bare, self.corpus.tokenizer, [prompt], self.recipe, self.session.bundle.mask_id)
        return prompt + written[0]

    def _snapshot(self, engine: Engine, progress: Progress) -> store.Snapshot | None:
        job, evaluate = self.job, self.evaluate
        documents = {"plan.json": json.dumps(job.plan.to_json(), indent=1), "recipe.toml": job.resolved.to_toml()}
        documents |= checkpoint_documents(self.recipe)
        newest = evaluate.result if evaluate else None
        kept = resume.checkpoint_state(
            self.session.fingerprint,
            job.plan,
            progress,
            attempt=self.session.attempt,
            val_loss=newest[1] if newest and newest[0] == progress.step else None,
            validations=evaluate.state() if evaluate else {},
            bad_steps=self.steps.state(),
            micro_batch=engine.micro_batch,
            run_id=self.run_id,
        )
        if self.goodput is not None:
            self.goodput.checkpoint(progress.step)
        weights: state.Which = "all" if self.recipe.adapter.kind == "none" else "trained"
        return state.snapshot(engine, progress.step, kept, documents, {"tokenizer": self.corpus.tokenizer_folder}, weights)

    def _result(
        self, progress: Progress, checkpoint: Path | None, evidence: tuple[LayerEvidence, ...] = (), sample: str = ""
    ) -> RunResult:
        newest = self.evaluate.result if self.evaluate else None
        return RunResult(
            progress,
            newest[1] if newest else None,
            self.corpus.unigram_entropy,
            sample,
            checkpoint,
            self.folder.out,
            evidence,
            self.signals.signal if self.signals.stopped else None,
            self.recipe.objective,
            self.session.prompt,
        )
