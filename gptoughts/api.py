"""From Python: `train` a recipe, make a `plan`, or `fit` a model of one's own with the same layers, proofs and loop."""

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
from gptoughts.hardware.machine import Machine, World, probe, read, world_from_environment
from gptoughts.layers.plugins import Extensions, extensions
from gptoughts.planning import environment
from gptoughts.planning.environment import in_effect, lacking
from gptoughts.planning.profile import pick
from gptoughts.planning.requests import wanted
from gptoughts.planning.resolve import Plan, resolve

if TYPE_CHECKING:
    from torch import nn

    from gptoughts.run.fit import FitResult
    from gptoughts.run.run import Outcome


@dataclass(frozen=True)
class ResolvedRun:
    """Everything that is decided before torch is needed."""

    resolved: Resolved
    machine: Machine
    world: World
    extensions: Extensions
    plan: Plan
    probe_seconds: float | None = None


def default_recipe(machine: Machine) -> str:
    """What is trained when nobody says what: quickstart on a CPU, gpt-1b on a GPU."""
    return "gpt-1b" if machine.gpus else "quickstart"


def decide(
    recipe: str | Mapping[str, Any] | Recipe | None,
    profile: str = "auto",
    fields: Mapping[str, Any] | None = None,
    layers: Mapping[str, Any] | None = None,
    plugins: Sequence[str] = (),
    machine: str | Machine | None = None,
    world: World | None = None,
    ranks: int | None = None,
) -> ResolvedRun:
    """Recipe, machine and profile met: the plan. Loads no torch by itself.

    `fields` are dotted keys of the recipe, `layers` slots and their options as on the command line, `machine` a machine file, `ranks` a
    number of ranks to plan for. Raises ConfigError with all that cannot be read, PlanError.
    """
    began, mistakes = time.perf_counter(), ErrorCollector()
    here = known = resolved = chosen = None
    with mistakes.collect():
        here = read(machine) if isinstance(machine, str) else machine or probe()
    seconds = None if machine is not None else time.perf_counter() - began
    with mistakes.collect():
        known = extensions(plugins)
    with mistakes.collect():
        world = world or (_ranks(ranks, here) if ranks and here else world_from_environment(os.environ))
    with mistakes.collect():
        resolved = _recipe(recipe, fields, here)
        resolved = None if resolved is None else resolve_recipe(resolved)
    with mistakes.collect():
        chosen = None if here is None else pick(profile, here)
        if chosen and known:
            wanted(chosen, known.catalog, layers or {})
    mistakes.raise_collected()
    assert here and known and world and resolved and chosen
    # Torch reads its variables once: where it is loaded, only what is in effect counts. A machine file is only planned for.
    fixed = dict(os.environ) if environment.torch_is_loaded() and machine is None else None
    spec = spec_for(resolved.recipe)
    made = resolve(
        chosen, here, spec, resolved.recipe, world, known.catalog, layers, fixed, dict(os.environ) if machine is None else None
    )
    return ResolvedRun(resolved, here, world, known, made if machine is not None else in_effect(made, os.environ), seconds)


def _ranks(ranks: int, machine: Machine) -> World:
    """The first of `ranks` ranks, one to a GPU: boxes like `machine`, as many as it takes."""
    local = min(ranks, len(machine.gpus) or ranks)
    if ranks % local:
        raise ConfigError(f"--ranks {ranks}: cannot be shared by boxes of {local} GPUs; take a multiple of {local}")
    return World(0, 0, ranks, local, "torchrun")


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
    """The plan that `train` would follow. `print(plan(...).table())` shows it."""
    return decide(recipe, profile, fields, layers, plugins, machine).plan


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
    plugins: Sequence[str] = (),
) -> Outcome:
    """Train a recipe in this process and return what came of it. The same as `gptoughts train`.

    `numerics` "off" leaves out the comparison of layers with the baseline before the first step.
    """
    setting = decide(recipe, profile, fields, layers, plugins)
    return train_setting(setting, run, run_dir, resume, strict, numerics)


def train_setting(
    setting: ResolvedRun, run: str | None, run_dir: str | None, resume: str, strict: bool, numerics: str = "check"
) -> Outcome:
    """Run what was decided. Raises ConfigError for a word that `numerics` does not know."""
    if numerics not in ("check", "off"):
        raise ConfigError(f"numerics = {numerics!r}: needs check or off")
    if not environment.torch_is_loaded():  # from Python nobody has set the plan's variables, and now they still count
        os.environ.update(lacking(setting.plan, os.environ))
    from gptoughts.run.run import TrainingJob, execute
    from gptoughts.run.tracking.run_dir import run_folder

    name = run or f"{setting.resolved.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    order = TrainingJob(
        setting.resolved,
        setting.plan,
        setting.machine,
        setting.world,
        setting.extensions,
        run_folder(name, run_dir),
        resume,
        strict,
        numerics=numerics,
    )
    return execute(order)


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
) -> FitResult:
    """Train a model of your own in place.

    objective  a function (model, batch) -> loss summed over the batch's rows, or an object as in gptoughts.engine.objectives.base.Objective
    batches    each a dict of tensors or arrays with the rows of one update first; ended ones are started again
    steps      updates; optim: keys of the recipe's [optim] table, such as {"learning_rate": 1e-3}
    run_dir    if given, plan.json, evidence.json, metrics.jsonl and a checkpoint are written there

    Layers that need a known family are passed over, with the reason in the plan. Raises ConfigError, PlanError, LayerError, RunError.
    """
    from gptoughts.run.fit import fit_model

    here, world = probe(), world_from_environment(os.environ)
    # The batches bring their own size; for the plan it is enough that ranks share it evenly.
    train = {"steps": steps, "global_batch": world.world_size}
    values = {"name": "fit", "seed": seed, "train": train, "optim": {"warmup_steps": 0, **(optim or {})}}
    resolved = from_values(values, "the call")
    known, spec = extensions(plugins), replace(spec, family=None)  # its blocks and head are not ours to change
    fixed = dict(os.environ)  # there is a model, so torch is loaded
    made = resolve(pick(profile, here), here, spec, resolved.recipe, world, known.catalog, layers, fixed)
    return fit_model(model, objective, batches, resolved, made, here, world, known.catalog, run_dir, strict)
