"""What `bench scaling` measures: a single process, and every strategy at every number of ranks, equal in all but the slot `parallel`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gptoughts.api import ResolvedRun
from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import spec_for
from gptoughts.diagnostics.bench.equal_settings import UNEQUAL_SLOT
from gptoughts.diagnostics.bench.variant import Job
from gptoughts.diagnostics.bench.variants import Layers, RunRequest, job_of, layers_of, why_not, with_slot
from gptoughts.errors import ConfigError, PlanError, listed, nearest
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.world import World
from gptoughts.planning.environment import in_effect
from gptoughts.planning.layer import Layer
from gptoughts.planning.profile import pick
from gptoughts.planning.resolve import Plan, resolve

STRONG, WEAK = "strong", "weak"
BASE = "1 process"
PROFILED_STEPS = 3
MOST_THREADS_BESIDE_A_GPU = 8
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class ScalingRequest:
    """Numbers of ranks (1 is among them), strategies with their options, kinds of scaling, threads of every rank."""

    ranks: tuple[int, ...]
    strategies: Mapping[str, Layers]
    """Layer of the slot `parallel` -> its options as on the command line."""
    threads: int
    kinds: tuple[str, ...] = (STRONG, WEAK)
    demanded: bool = True
    """Whether the strategies were named: one that cannot run is an error then, otherwise it is left out."""


@dataclass(frozen=True)
class Arm:
    """One training: strategy, ranks and global batch."""

    kind: str
    strategy: str
    ranks: int
    global_batch: int

    @property
    def name(self) -> str:
        """Name in tables."""
        return BASE if self.kind == BASE else f"{self.kind} {self.strategy} x{self.ranks}"


@dataclass
class Arms:
    """Arms and their jobs by name, the single process first; left-out ones with the reason."""

    arms: dict[str, Arm] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def strategies_in(catalog: Mapping[str, Layer]) -> list[str]:
    """Return the layers that use several ranks."""
    return [layer.name for layer in catalog.values() if layer.slot == UNEQUAL_SLOT and not layer.baseline]


def split_layers(layers: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the layers of the other slots, and the options of strategies. Raises ConfigError if the slot itself is named."""
    own = {key: value for key, value in layers.items() if key.partition(".")[0] == UNEQUAL_SLOT}
    if UNEQUAL_SLOT in own:
        raise ConfigError(
            f"--layer.{UNEQUAL_SLOT}: bench scaling sets this slot",
            found=own[UNEQUAL_SLOT],
            fix=f"--strategies {own[UNEQUAL_SLOT]}",
        )
    return {key: value for key, value in layers.items() if key not in own}, own


def request_of(
    setting: ResolvedRun, ranks: str | None, strategies: str | None, options: Mapping[str, str], threads: int | None,
    kinds: Sequence[str] = (STRONG, WEAK),
) -> ScalingRequest:  # fmt: skip
    """Check what was typed. Raises ConfigError with all problems at once."""
    machine, catalog, batch = setting.machine, setting.extensions.catalog, setting.resolved.recipe.train.global_batch
    problems: list[str] = []
    counts = _counts(ranks, problems) if ranks is not None else default_ranks(machine, batch)
    problems += _unfit(counts, machine, batch, STRONG in kinds)
    known = strategies_in(catalog)
    names = [name.strip() for name in strategies.split(",")] if strategies is not None else known
    for name in names:
        if name not in known:
            what = (
                "measured in any case, as the base" if name == _baseline(setting) else f"no such strategy{nearest(name, known)}"
            )
            problems.append(f"--strategies: {name!r} is {what}. Strategies: {', '.join(known)}")
    problems += [f"--strategies: {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    taken = {name: _options(catalog[name], options) for name in names if name in known}
    for key in options:
        if not any(key in one for one in taken.values()):
            problems.append(f"--layer.{key}: none of the strategies {', '.join(taken) or 'given'} has this option")
    if problems:
        raise listed("bench scaling", problems)
    most = max(counts)
    each = min(MOST_THREADS_BESIDE_A_GPU, max(1, machine.cpu.usable_cores // most)) if machine.gpus else 1
    return ScalingRequest(counts, taken, threads or each, tuple(kinds), strategies is not None)


def _counts(typed: str, problems: list[str]) -> tuple[int, ...]:
    """Return the numbers of ranks in ascending order with 1 among them."""
    words = [word.strip() for word in typed.split(",")]
    wrong = [word for word in words if not word.isdecimal() or int(word) < 1]
    if wrong:
        problems.append(f"--ranks: {', '.join(map(repr, wrong))}: not whole numbers of at least 1, such as --ranks 1,2")
    counts = [int(word) for word in words if word not in wrong]
    problems += [f"--ranks: {count} is given twice" for count in dict.fromkeys(counts) if counts.count(count) > 1]
    if not wrong and max(counts, default=0) == 1:
        problems.append("--ranks: 1 alone compares nothing, such as --ranks 1,2")
    return tuple(sorted({1, *counts}))


def default_ranks(machine: Machine, batch: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to the GPUs, without a GPU up to the cores, as far as the global batch divides; 2 in any case."""
    most = max(2, len(machine.gpus) or machine.cpu.usable_cores)
    powers = [2**power for power in range(1, most.bit_length()) if 2**power <= most]
    return (1, *[count for count in powers if count == 2 or batch % count == 0])


def _unfit(counts: Sequence[int], machine: Machine, batch: int, strong: bool) -> list[str]:
    problems = []
    gpus = len(machine.gpus)
    if gpus and max(counts) > gpus:
        problems.append(f"--ranks: {max(counts)} ranks need as many GPUs, this machine has {gpus}")
    odd = [count for count in counts if batch % count]
    if odd and strong:
        near = " or ".join(str(value) for value in (batch // max(odd) * max(odd), (batch // max(odd) + 1) * max(odd)) if value)
        problems.append(
            f"train.global_batch: {batch} is not divisible by {', '.join(map(str, odd))} ranks, such as --train.global-batch {near}"
        )
    return problems


def _options(layer: Layer, options: Mapping[str, str]) -> Layers:
    return {key: value for key, value in options.items() if key.partition(".")[2].replace("-", "_") in layer.options}


def _baseline(setting: ResolvedRun) -> str:
    catalog = setting.extensions.catalog.values()
    return next(layer.name for layer in catalog if layer.slot == UNEQUAL_SLOT and layer.baseline)


def arms_of(setting: ResolvedRun, ask: RunRequest, request: ScalingRequest) -> Arms:
    """Return all arms with jobs of equal warm-up. Raises PlanError if the base, or a strategy that was named, cannot run."""
    found = Arms()
    batch = setting.resolved.recipe.train.global_batch
    base = _plan(
        setting, ask, with_slot(layers_of(setting.plan), UNEQUAL_SLOT, {UNEQUAL_SLOT: _baseline(setting)}), request.threads
    )
    plans: dict[str, list[Plan]] = {}
    found.arms[BASE], plans[BASE] = Arm(BASE, _baseline(setting), 1, batch), [base]
    for kind in request.kinds:
        for strategy, options in request.strategies.items():
            for ranks in (count for count in request.ranks if count > 1):
                arm = Arm(kind, strategy, ranks, batch if kind == STRONG else batch * ranks)
                layers = with_slot(layers_of(base), UNEQUAL_SLOT, {UNEQUAL_SLOT: strategy, **options})
                try:
                    plans[arm.name] = _plans_of_ranks(setting, ask, arm, layers, request.threads)
                    found.arms[arm.name] = arm
                except PlanError as error:
                    if request.demanded:
                        raise PlanError(f"bench scaling: {arm.name} cannot run: {why_not(error)}") from None
                    found.left_out[arm.name] = why_not(error)
    if len(found.arms) == 1:
        lines = [f"  {name}: {why}" for name, why in found.left_out.items()]
        raise PlanError("\n".join(["bench scaling: no strategy can run on this machine", *lines]))
    made = {name: _job(setting, ask, arm, plans[name], request) for name, arm in found.arms.items()}
    warm = max(job.warmup_steps for job in made.values())
    found.jobs = {name: replace(job, warmup_steps=warm) for name, job in made.items()}
    return found


def _plans_of_ranks(setting: ResolvedRun, ask: RunRequest, arm: Arm, layers: Layers, threads: int) -> list[Plan]:
    recipe = _with_batch(setting.resolved.recipe, arm.global_batch)
    worlds = [World(rank, rank, arm.ranks, arm.ranks, "torchrun") for rank in range(arm.ranks)]
    return [_plan(setting, ask, layers, threads, recipe, world) for world in worlds]


def _with_batch(recipe: Recipe, batch: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch": batch})})


def _plan(
    setting: ResolvedRun,
    ask: RunRequest,
    layers: Layers,
    threads: int,
    recipe: Recipe | None = None,
    world: World | None = None,
) -> Plan:
    """Resolve these layers as a process of this world would whose thread count is set by the user."""
    here, recipe = setting.machine, recipe or setting.resolved.recipe
    environment = {**os.environ, THREADS: str(threads)}
    made = resolve(
        pick(ask.profile, here), here, spec_for(recipe), recipe, world or World(), setting.extensions.catalog, flags=layers,
        environment=environment,
    )  # fmt: skip
    return in_effect(made, environment)


def _job(setting: ResolvedRun, ask: RunRequest, arm: Arm, plans: Sequence[Plan], request: ScalingRequest) -> Job:
    fields = ask.fields if arm.kind != WEAK else {**ask.fields, "train.global_batch": str(arm.global_batch)}
    threads = {THREADS: str(request.threads)}
    # On one machine gloo works without name resolution.
    meeting = {} if setting.machine.gpus or "GLOO_SOCKET_IFNAME" in os.environ else {"GLOO_SOCKET_IFNAME": "lo"}
    ranks = [{**plan.environment, **threads, **meeting} for plan in plans] if arm.ranks > 1 else []
    job = job_of(setting, replace(ask, fields=fields), plans[0])
    return replace(
        job, environment={**job.environment, **threads}, rank_environments=tuple(ranks), profiled_steps=PROFILED_STEPS
    )
