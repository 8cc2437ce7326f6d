"""The Python interface: `train` a recipe, make a `plan`, or `fit` your own model with the same layers, proofs and loop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptoughts.config.loader import Recipe, Resolved, from_values, load
from gptoughts.config.model_spec import UNKNOWN, ModelSpec, spec_for
from gptoughts.config.resolve import resolve_recipe
from gptoughts.errors import ConfigError, ErrorCollector
from gptoughts.hardware.machine import Machine, probe, read
from gptoughts.hardware.world import World, world_from_environment
from gptoughts.layers.plugins import Extensions, extensions
from gptoughts.planning import environment
from gptoughts.planning.environment import in_effect, missing_variables
from gptoughts.planning.profile import pick
from gptoughts.planning.requests import layer_requests
from gptoughts.planning.resolve import Plan, resolve
from gptoughts.run.tracking.sink import check_sinks

if TYPE_CHECKING:
    from torch import nn

    from gptoughts.engine.callback import Callback
    from gptoughts.run.fit import FitResult
    from gptoughts.run.result import RunResult


@dataclass(frozen=True)
class ResolvedRun:
    """Everything that is decided before torch is needed: recipe, machine, plan."""

    resolved: Resolved
    machine: Machine
    world: World
    extensions: Extensions
    plan: Plan
    probe_seconds: float | None = None


def default_recipe(machine: Machine) -> str:
    """Return the recipe trained by default: quickstart on a CPU, gpt-1b on a GPU."""
    return "gpt-1b" if machine.gpus else "quickstart"


def decide(
    recipe: str | Mapping[str, Any] | Recipe | None,
    profile: str = "auto",
    fields: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    plugins: Sequence[str] = (),
    machine: str | Machine | None = None,
    *,
    world: World | None = None,
    ranks: int | None = None,
    gpus: int | None = None,
    every_gpu: bool = False,
    only_planned: bool = False,
) -> ResolvedRun:
    """Resolve recipe, machine and profile to a plan, without loading torch.

    fields   dotted keys of the recipe
    layers   slots and their options, as on the command line
    machine  a machine file or a Machine; default: probe this one
    ranks, gpus  number of ranks to plan for, one per GPU, and of GPUs on each machine
    every_gpu  use all GPUs of the machine where no launcher started ranks and neither `ranks` nor `gpus` is given
    only_planned  nothing is trained: of `model.path` only config.json is needed

    Raises ConfigError with all problems at once, or PlanError.
    """
    began, mistakes = time.perf_counter(), ErrorCollector()
    here = known = resolved = chosen = None
    with mistakes.collect():
        here = read(machine) if isinstance(machine, str) else machine or probe()
    seconds = None if machine is not None else time.perf_counter() - began
    with mistakes.collect():
        known = extensions(plugins)
    with mistakes.collect():
        world = world or _world(ranks, gpus, here, every_gpu)
    with mistakes.collect():
        resolved = _recipe(recipe, fields, here)
        resolved = None if resolved is None else resolve_recipe(resolved, only_planned)
    with mistakes.collect():
        check_sinks(resolved.recipe.track.names if resolved else ())
    with mistakes.collect():
        chosen = None if here is None else pick(profile, here)
        if chosen and known:
            layer_requests(chosen, known.catalog, layers or {})
    mistakes.raise_collected()
    assert here and known and world and resolved and chosen
    # Torch reads its variables once: if it is loaded, only variables already in effect count. A machine file is only planned for.
    fixed = dict(os.environ) if environment.torch_is_loaded() and machine is None else None
    spec = spec_for(resolved.recipe)
    made = resolve(
        chosen,
        here,
        spec,
        resolved.recipe,
        world,
        known.catalog,
        flags=layers,
        fixed_environment=fixed,
        environment=dict(os.environ) if machine is None else None,
    )
    return ResolvedRun(resolved, here, world, known, made if machine is not None else in_effect(made, os.environ), seconds)


def _world(ranks: int | None, gpus: int | None, machine: Machine | None, every_gpu: bool) -> World | None:
    """Return the world that the options ask for, else the one that a launcher started, else one rank per GPU."""
    started = world_from_environment(os.environ)
    if machine is None:  # reported already
        return started
    most = len(machine.gpus)
    if gpus is not None and gpus > most:
        raise ConfigError(
            f"--gpus: {gpus} GPUs on {machine.label()}", found=most, fix=f"--gpus {most}" if most else f"--ranks {gpus}"
        )
    if started.launched:
        for flag, wanted, found in (("--ranks", ranks, started.world_size), ("--gpus", gpus, started.local_world_size)):
            if wanted is not None and wanted != found:
                raise ConfigError(
                    f"{flag} {wanted}: {started.launcher} started another number of ranks", found=found, fix=f"without {flag}"
                )
        return started
    local = gpus or (most if every_gpu else 0)
    if ranks is None:
        return World(0, 0, local, local, "torchrun") if local > 1 else started
    return _ranks(ranks, gpus or min(ranks, most or ranks))


def _ranks(ranks: int, local: int) -> World:
    """Return the first of `ranks` ranks, `local` on each machine."""
    if ranks % local:
        raise ConfigError(
            f"--ranks: must be a multiple of the {local} GPUs of a machine",
            found=ranks,
            fix=f"--ranks {ranks // local * local or local}",
        )
    return World(0, 0, ranks, local, "torchrun") if ranks > 1 else World()


def _recipe(
    recipe: str | Mapping[str, Any] | Recipe | None, fields: Mapping[str, Any] | None, here: Machine | None
) -> Resolved | None:
    if recipe is None:
        return load(default_recipe(here), fields) if here is not None else None
    if isinstance(recipe, str):
        return load(recipe, fields)
    return from_values(recipe.model_dump(exclude_unset=True) if isinstance(recipe, Recipe) else recipe, "the call", fields)


def plan(
    recipe: str | Mapping[str, Any] | Recipe | None = None,
    profile: str = "auto",
    *,
    fields: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    machine: str | Machine | None = None,
    plugins: Sequence[str] = (),
) -> Plan:
    """Return the plan that `train` would use. `print(plan(...).table())` shows it."""
    return decide(recipe, profile, fields, layers, plugins, machine, only_planned=True).plan


def train(
    recipe: str | Mapping[str, Any] | Recipe | None = None,
    profile: str = "auto",
    *,
    fields: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    run: str | None = None,
    run_dir: str | None = None,
    resume: str = "auto",
    strict: bool = False,
    numerics: str = "check",
    collectives: str = "auto",
    plugins: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    track: Sequence[str] | None = None,
    verbose: bool = True,
) -> RunResult:
    """Train a recipe in this process and return the result. The same as `gptoughts train`.

    numerics     "off" skips the comparison of layers with the baseline before the first step
    collectives  library that ranks communicate by: auto (NCCL on GPUs, gloo on CPUs), gloo, nccl or mpi
    callbacks    objects with the methods of gptoughts.Callback
    track        names of trackers that receive the metrics, besides jsonl; default: the recipe's track.sinks
    verbose      False prints nothing
    """
    job = {"strict": strict, "numerics": numerics, "callbacks": tuple(callbacks), "collectives": collectives}
    if track is not None:
        job["track"] = tuple(track)
    setting = decide(recipe, profile, fields, layers, plugins)
    return train_resolved(setting, run, run_dir, resume=resume, verbose=verbose, **job)


def check_collectives(name: str, setting: ResolvedRun) -> None:
    """Raise ConfigError for collectives that are unknown or cannot run in this process."""
    if name not in ("auto", "gloo", "nccl", "mpi"):
        raise ConfigError("collectives: must be auto, gloo, nccl or mpi", found=repr(name))
    if name == "nccl" and not setting.machine.gpus:
        raise ConfigError("--collectives nccl: needs GPUs", found=setting.machine.label(), fix="--collectives gloo")
    if name == "mpi":
        from gptoughts.engine.distributed.mpi_library import require_mpi

        require_mpi(setting.world, os.environ)


def train_resolved(
    setting: ResolvedRun, run: str | None, run_dir: str | None, *, verbose: bool = True, **job: Any
) -> RunResult:
    """Run what `decide` returned. `job` are fields of `run.session.TrainingJob`. Raises ConfigError for invalid values."""
    if job.get("numerics", "check") not in ("check", "off"):
        raise ConfigError("numerics: must be check or off", found=repr(job["numerics"]))
    check_collectives(job.get("collectives", "auto"), setting)
    if not environment.torch_is_loaded():  # from Python the plan's variables are not set yet, and still take effect
        os.environ.update(missing_variables(setting.plan, os.environ))
    from gptoughts.console import Console, SilentConsole
    from gptoughts.run.run import execute
    from gptoughts.run.session import TrainingJob
    from gptoughts.run.tracking.run_dir import run_folder

    job.setdefault("track", setting.resolved.recipe.track.names)
    check_sinks(job["track"])
    name = run or f"{setting.resolved.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    console = Console() if verbose else SilentConsole()
    return execute(
        TrainingJob(
            setting.resolved,
            setting.plan,
            setting.machine,
            setting.world,
            setting.extensions,
            run_folder(name, run_dir, fresh=run is None),
            console=console,
            **job,
        )
    )


def fit(
    model: nn.Module,
    objective: Any,
    batches: Iterable[Mapping[str, Any]],
    profile: str = "auto",
    *,
    steps: int,
    optim: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    spec: ModelSpec = UNKNOWN,
    run_dir: str | None = None,
    seed: int = 1337,
    strict: bool = False,
    plugins: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train your own model in place.

    objective  a function (model, batch) -> loss summed over the batch's rows, or a subclass of engine.objectives.base.Objective
    batches    an iterable of dicts of tensors or arrays with the rows of one update as first dimension; repeated when it ends
    steps      updates; optim: keys of the recipe's [optim] table, such as {"learning_rate": 1e-3}
    run_dir    if given, plan.json, evidence.json, metrics.jsonl, loss.png and a checkpoint are written there
    callbacks  objects with the methods of gptoughts.Callback

    Layers that need a known model family are rejected, with the reason in the plan. Raises ConfigError, PlanError, LayerError, RunError.
    """
    from gptoughts.run.fit import fit_model
    from gptoughts.run.session import TrainingJob
    from gptoughts.run.tracking.run_dir import run_folder

    here, world = probe(), world_from_environment(os.environ)
    # The batches bring their own size; for the plan it is enough that ranks share it evenly.
    train = {"steps": steps, "global_batch": world.world_size}
    values = {"name": "fit", "seed": seed, "train": train, "optim": {"warmup_steps": 0, **(optim or {})}}
    resolved = from_values(values, "the call")
    known, spec = extensions(plugins), replace(spec, family=None)  # its blocks and head are not known
    fixed = dict(os.environ)  # there is a model, so torch is loaded
    made = resolve(
        pick(profile, here), here, spec, resolved.recipe, world, known.catalog, flags=layers, fixed_environment=fixed
    )
    folder = run_folder("fit", run_dir) if run_dir else None
    job = TrainingJob(resolved, made, here, world, known, folder, strict=strict, callbacks=tuple(callbacks))
    return fit_model(model, objective, batches, job)
