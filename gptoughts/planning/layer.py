"""The layer contract: requirements, changes, undo and evidence of one optimization.

A layer is one file under `gptoughts/layers/` that ends in `LAYER = Layer(...)`. This module imports no torch, so any machine can plan
for any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import ModelSpec
from gptoughts.errors import ConfigError, listed, nearest
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.world import World
from gptoughts.planning.evidence import Evidence, Operator, Status, StepTrace, active, inactive, unproven
from gptoughts.planning.memory_model import Budget

__all__ = [
    "SLOTS", "Budget", "Case", "Choice", "Engine", "Evidence", "Kind", "Layer", "Phase", "Operator", "Option", "Options", "Reason", "StepTrace",
    "Status", "active", "unsupported", "inactive", "unproven", "slower",
]  # fmt: skip

SLOTS = (
    "host",
    "allocator",
    "matmul",
    "attention",
    "kernels",
    "precision",
    "loss",
    "recompute",
    "offload",
    "compile",
    "parallel",
    "optimizer",
    "optimizer_offload",
    "update",
    "loader",
    "microbatch",
)
"""Each slot gets one layer. Layers of one phase are applied in this order; the command line and all tables use it too."""

WRAPPED_HOOKS = ("forward_context", "eval_context", "grad_sync")
REPLACED_HOOKS = ("attach", "backward", "clip", "step", "materialize")


class Phase(StrEnum):
    """The part of `build` in which `apply` runs."""

    PROCESS = "process"
    """Before the model exists: threads, allocator, global torch settings."""
    SHAPE = "shape"
    """The model is on the meta device: modules are replaced or wrapped, tensors have no values."""
    REAL = "real"
    """The parameters have values: data parallelism, optimizer, loader."""


_PROCESS_SLOTS = ("host", "allocator", "matmul")
_SHAPE_SLOTS = ("attention", "kernels", "precision", "loss", "recompute", "offload", "compile")


class Kind(StrEnum):
    """Kind of a reason to reject a layer."""

    UNSUPPORTED = "unsupported"
    SLOWER = "slower"


@dataclass(frozen=True)
class Reason:
    """A reason to reject a layer. `source` names the measurement, `remedy` a command or flag that helps."""

    kind: Kind
    text: str
    source: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        tail = f" [{self.source}]" if self.source else ""
        return f"{self.text}{tail}{f' ({self.remedy})' if self.remedy else ''}"


def unsupported(text: str, remedy: str = "") -> Reason:
    """Return a reason why the layer cannot run on this machine or model, even if requested by name."""
    return Reason(Kind.UNSUPPORTED, text, remedy=remedy)


def slower(text: str, source: str) -> Reason:
    """Return a reason why the layer is expected to be slower; it is taken only if requested by name."""
    return Reason(Kind.SLOWER, text, source=source)


@dataclass(frozen=True)
class Option:
    """An option of a layer, with its default. Text is parsed as `kind`."""

    default: Any
    help: str
    kind: type = str
    choices: tuple[str, ...] = ()

    def read(self, value: Any, where: str) -> Any:
        """Parse `value` as this option's type. None is accepted only if it is the default. Raises ConfigError that begins with `where`."""
        if self.default is None and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        if self.choices:
            if value not in self.choices:
                raise ConfigError(f"{where}: needs one of {', '.join(self.choices)}", found=repr(value))
            return value
        parsed = _as(self.kind, value)
        if parsed is None:
            raise ConfigError(f"{where}: needs {_NEEDS.get(self.kind, self.kind.__name__)}", found=repr(value))
        return parsed


_NEEDS = {int: "an integer above 0", float: "a number", bool: "true or false", str: "text"}
_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _as(kind: type, value: Any) -> Any:
    """Convert `value` to `kind`; return None if that fails. Integers are counts, so they start at 1."""
    if kind is bool:
        return value if isinstance(value, bool) else _TRUTHS.get(value.lower()) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if kind is str:
        return value if isinstance(value, str) else None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if kind is float:
        return number if math.isfinite(number) else None
    exact = int(value) if isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal()) else None
    count = exact or (int(number) if number.is_integer() else 0)  # 1e3 is an integer too
    return count if count >= 1 else None


@dataclass(frozen=True)
class Choice:
    """The layer chosen for a slot, and the rejected ones with their reasons."""

    slot: str
    layer: str
    options: Mapping[str, Any]
    origin: str
    rejected: tuple[tuple[str, tuple[Reason, ...]], ...] = ()
    expected_slowdown: tuple[Reason, ...] = ()
    """Reasons why the layer is expected to be slower, if it was requested by name nevertheless."""
    compute_dtype: str | None = None
    """`Layer.compute_dtype` of the layer."""


@dataclass(frozen=True)
class Case:
    """Inputs of `Layer.unmet`, `Layer.environment` and `Layer.memory`."""

    machine: Machine
    spec: ModelSpec
    recipe: Recipe
    world: World
    chosen: Mapping[str, Choice] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set by the user, which a layer must not override; empty when planning for another machine."""
    micro_batch: Mapping[str, Any] = field(default_factory=dict)
    """Options of the first request of the micro-batch slot, which is resolved last although memory depends on it."""
    preferred: Mapping[str, str] = field(default_factory=dict)
    """First requested layer of each slot; the choices of later slots are not known yet."""
    compiles: bool = False
    """Whether the first requested layer of the compile slot uses torch.compile."""
    budget: Budget | None = None
    """Memory of a step with the layers chosen so far and the first request of the micro-batch slot; None if sizes are unknown."""

    @property
    def on_gpu(self) -> bool:
        """Whether the run uses a GPU."""
        return bool(self.machine.gpus)

    @property
    def rank_sequences(self) -> int:
        """Sequences per update and rank."""
        return self.recipe.train.global_batch // self.world.world_size

    @property
    def forward_sequences(self) -> int:
        """Sequences per forward by the first request of the micro-batch slot; otherwise the rank's whole share."""
        tokens, length = self.micro_batch.get("tokens"), self.recipe.data.sequence_length
        most = self.micro_batch.get("sequences") or (max(1, tokens // length) if tokens else self.rank_sequences)
        return min(most, self.rank_sequences)

    def takes(self, slot: str, layer: str) -> bool:
        """Return whether an earlier slot chose `layer`."""
        return slot in self.chosen and self.chosen[slot].layer == layer

    def option(self, slot: str, name: str) -> Any:
        """Return option `name` of the layer that an earlier slot chose; None if there is no such option or choice."""
        return self.chosen[slot].options.get(name) if slot in self.chosen else None


Options = Mapping[str, Any]
Engine = Any  # gptoughts.engine.engine.Engine, which planning must not import


def _no_rejections(case: Case, options: Options) -> Iterator[Reason]:
    yield from ()


def _no_environment(case: Case, options: Options) -> Mapping[str, str]:
    return {}


def _same_memory(case: Case, options: Options, budget: Budget) -> Budget:
    return budget


@dataclass(frozen=True)
class Layer:
    """One optimization. docs/write-a-layer.md explains every field."""

    name: str
    slot: str
    card: str
    """The file's docstring: first the effect, then when it is slower."""
    apply: Callable[[Engine, Options], AbstractContextManager[None]]
    verify: Callable[[Engine, StepTrace, Options], Evidence]
    unmet: Callable[[Case, Options], Iterable[Reason]] = _no_rejections
    environment: Callable[[Case, Options], Mapping[str, str]] = _no_environment
    memory: Callable[[Case, Options, Budget], Budget] = _same_memory
    """Return the budget as changed by this layer."""
    recomputes: Callable[[ModelSpec, Options], tuple[float, float]] = lambda spec, options: (0.0, 0.0)
    """Return the shares of the blocks' forward matmuls and attention that run again in the backward, for HFU."""
    phase: Phase | None = None
    baseline: bool = False
    packages: tuple[tuple[str, str], ...] = ()
    """Required distributions, each with the extra that installs it."""
    needs_gpu: bool = False
    min_capability: tuple[int, int] | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    wraps: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    clashes: Mapping[str, str] = field(default_factory=dict)
    """Incompatible layers, each with the reason."""
    needs_slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Slot -> layers, one of which must be chosen there."""
    changes_numerics: bool = False
    tolerance: tuple[float, float] | None = None
    """Maximum relative loss difference and minimum gradient cosine in the numerics check; None for float32 rounding only."""
    compute_dtype: str | None = None
    """Dtype of its matmuls, as `gptoughts bench gemm` names it (FP8 counts as bf16, as in MFU); None if another slot or an option decides."""
    compiles: bool = False
    """Whether the layer uses torch.compile, after which the forward keeps less for the backward."""
    memory_rank: int | None = None
    """Position in the ladder of changes that make a plan fit in memory, cheapest first; None if the layer is not part of it."""
    former_names: tuple[str, ...] = ()
    """Earlier names, for did-you-mean errors."""
    repeatable: bool = True
    repeatable_on_gpu: bool = True
    """False if its kernels add in no fixed order, as most attention backwards do."""
    warmup_steps: int = 0
    """Updates before the layer is fully active; the watched step comes after them."""
    permanent: str = ""
    """Why it cannot be undone; empty if it can."""
    measured: str = "not measured"
    """File under docs/measurements/ with its measured gain."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        problems = [
            f"no slot {slot!r}{nearest(slot, SLOTS)}. Slots: {', '.join(SLOTS)}"
            for slot in (self.slot, *self.needs_slots)
            if slot not in SLOTS
        ]
        for hooks, known in ((self.wraps, WRAPPED_HOOKS + REPLACED_HOOKS), (self.replaces, REPLACED_HOOKS)):
            problems += [f"{hook!r} is not one of {', '.join(known)}" for hook in hooks if hook not in known]
        if problems:
            raise listed(f"layer {self.name}", problems)

    @property
    def when(self) -> Phase:
        """The phase of `build` in which `apply` runs."""
        if self.phase is not None:
            return self.phase
        if self.slot in _PROCESS_SLOTS:
            return Phase.PROCESS
        return Phase.SHAPE if self.slot in _SHAPE_SLOTS else Phase.REAL

    def read_options(self, given: Options, where: str) -> dict[str, Any]:
        """Return the defaults overlaid with `given`. Raises ConfigError with all invalid names and values."""
        problems, read = [], {name: option.default for name, option in self.options.items()}
        for name, value in given.items():
            try:
                if name not in self.options:
                    known = ", ".join(self.options) or "none"
                    raise ConfigError(f"{where}: no option {name!r}{nearest(name, self.options)}. Options: {known}")
                read[name] = self.options[name].read(value, f"{where}.{name}")
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return read

    def rejections(self, case: Case, options: Options) -> list[Reason]:
        """Return all reasons to reject this layer: the declared requirements first; `unmet` only if those are met."""
        reasons = list(self._declared(case))
        if not any(reason.kind is Kind.UNSUPPORTED for reason in reasons):
            reasons += list(self.unmet(case, options))
        return reasons

    def _declared(self, case: Case) -> Iterator[Reason]:
        if (self.needs_gpu or self.min_capability) and not case.on_gpu:
            yield unsupported("needs an NVIDIA GPU, found none")
            return
        least = case.machine.min_capability()
        if self.min_capability and (least is None or least < self.min_capability):
            found = f"{least[0]}.{least[1]}" if least else "unknown"
            yield unsupported(f"needs compute capability {self.min_capability[0]}.{self.min_capability[1]}, found {found}")
            return  # no package would help
        for package, extra in self.packages:
            if package not in case.machine.packages:
                yield unsupported(f"needs the package {package}, not installed", remedy=f"pip install 'gptoughts[{extra}]'")
