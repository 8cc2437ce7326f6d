"""The contract of an optimization layer: what it needs, what it changes, how it is undone, how it proves itself.

A layer is one file under `gptoughts/layers/` that ends in `LAYER = Layer(...)`. Nothing here imports torch, so a plan for any machine
can be made and tested on any other.
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
from gptoughts.hardware.machine import Machine, World
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
"""One layer each. The order is that of application within a moment, of the command line and of every table."""

WRAPPED_HOOKS = ("forward_context", "eval_context", "grad_sync")
REPLACED_HOOKS = ("backward", "clip", "step", "materialize")


class Phase(StrEnum):
    """When `apply` runs during `build`."""

    PROCESS = "process"
    """Before the model exists: threads, allocator, global switches of torch."""
    SHAPE = "shape"
    """The model stands on meta: modules are swapped or wrapped, no tensor has a value."""
    REAL = "real"
    """Parameters have values: data parallelism, optimizer, loader."""


_PROCESS_SLOTS = ("host", "allocator", "matmul")
_SHAPE_SLOTS = ("attention", "kernels", "precision", "loss", "recompute", "offload", "compile")


class Kind(StrEnum):
    """Why a layer is passed over."""

    UNSUPPORTED = "unsupported"
    SLOWER = "slower"


@dataclass(frozen=True)
class Reason:
    """Why a layer does not fit. `source` says who measured it, `remedy` what to type."""

    kind: Kind
    text: str
    source: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        tail = f" [{self.source}]" if self.source else ""
        return f"{self.text}{tail}{f' ({self.remedy})' if self.remedy else ''}"


def unsupported(text: str, remedy: str = "") -> Reason:
    """The layer cannot run here, whoever asks for it."""
    return Reason(Kind.UNSUPPORTED, text, remedy=remedy)


def slower(text: str, source: str) -> Reason:
    """The layer would run and cost more than it gives; only a demand by name takes it."""
    return Reason(Kind.SLOWER, text, source=source)


@dataclass(frozen=True)
class Option:
    """A value that a layer takes, with its default. `kind` is the Python type that text is read as."""

    default: Any
    help: str
    kind: type = str
    choices: tuple[str, ...] = ()

    def read(self, value: Any, where: str) -> Any:
        """`value`, or the text of one, as this option's type; none is one where the default is. Raises ConfigError naming `where`."""
        if self.default is None and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        if self.choices:
            if value not in self.choices:
                raise ConfigError(f"{where}: needs one of {', '.join(self.choices)}, here {value!r}")
            return value
        read = _as(self.kind, value)
        if read is None:
            raise ConfigError(f"{where}: needs {_NEEDS.get(self.kind, self.kind.__name__)}, here {value!r}")
        return read


_NEEDS = {int: "a whole number above 0", float: "a number", bool: "true or false", str: "text"}
_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _as(kind: type, value: Any) -> Any:
    """`value` as `kind`, None where it is not one. Whole numbers count something, so they start at 1."""
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
    count = exact or (int(number) if number.is_integer() else 0)  # 1e3 is a whole number too
    return count if count >= 1 else None


@dataclass(frozen=True)
class Choice:
    """The layer that a slot got, and the others with the reasons why not."""

    slot: str
    layer: str
    options: Mapping[str, Any]
    origin: str
    rejected: tuple[tuple[str, tuple[Reason, ...]], ...] = ()
    expected_slowdown: tuple[Reason, ...] = ()
    """Reasons why it would not pay, when it was demanded all the same."""
    compute_dtype: str | None = None
    """`Layer.compute_dtype` of the layer."""


@dataclass(frozen=True)
class Case:
    """Everything a layer may look at to say whether it fits."""

    machine: Machine
    spec: ModelSpec
    recipe: Recipe
    world: World
    chosen: Mapping[str, Choice] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are set here, and that a layer must not overrule; empty for a machine that is not here."""
    micro_batch: Mapping[str, Any] = field(default_factory=dict)
    """Options of the layer that the micro-batch slot would like first; that slot comes last, and memory depends on it."""
    wishes: Mapping[str, str] = field(default_factory=dict)
    """The layer that each slot would like first; what a later slot will choose is not known yet."""
    compiles: bool = False
    """Whether the first wish for the compile slot uses torch.compile."""
    budget: Budget | None = None
    """Memory of a step with the micro-batch slot's first wish and the layers chosen so far; None where sizes are not known."""

    @property
    def on_gpu(self) -> bool:
        """Whether the run takes place on a GPU."""
        return bool(self.machine.gpus)

    @property
    def rank_sequences(self) -> int:
        """Sequences of one update that this rank computes."""
        return self.recipe.train.global_batch // self.world.world_size

    @property
    def forward_sequences(self) -> int:
        """Sequences per forward, as far as the micro-batch slot's first wish says; else the rank's whole share."""
        tokens, length = self.micro_batch.get("tokens"), self.recipe.data.sequence_length
        most = self.micro_batch.get("sequences") or (max(1, tokens // length) if tokens else self.rank_sequences)
        return min(most, self.rank_sequences)

    def takes(self, slot: str, layer: str) -> bool:
        """Whether an earlier slot has chosen `layer`."""
        return slot in self.chosen and self.chosen[slot].layer == layer

    def option(self, slot: str, name: str) -> Any:
        """The option `name` of the layer that an earlier slot has chosen; None where it has none of that name."""
        return self.chosen[slot].options.get(name) if slot in self.chosen else None


Options = Mapping[str, Any]
Engine = Any  # gptoughts.engine.engine.Engine: floor 1, so floor 0 cannot name it


def _fits_everywhere(case: Case, options: Options) -> Iterator[Reason]:
    yield from ()


def _no_environment(case: Case, options: Options) -> Mapping[str, str]:
    return {}


def _as_it_was(case: Case, options: Options, budget: Budget) -> Budget:
    return budget


@dataclass(frozen=True)
class Layer:
    """One optimization. `docs/write-a-layer.md` walks through every field."""

    name: str
    slot: str
    card: str
    """The file's docstring: the effect first, then when it hurts."""
    apply: Callable[[Engine, Options], AbstractContextManager[None]]
    verify: Callable[[Engine, StepTrace, Options], Evidence]
    unmet: Callable[[Case, Options], Iterable[Reason]] = _fits_everywhere
    environment: Callable[[Case, Options], Mapping[str, str]] = _no_environment
    memory: Callable[[Case, Options, Budget], Budget] = _as_it_was
    """What it changes of the memory that a step is expected to hold."""
    phase: Phase | None = None
    baseline: bool = False
    packages: tuple[tuple[str, str], ...] = ()
    """Distributions that must be installed, each with the extra that brings it."""
    needs_gpu: bool = False
    min_capability: tuple[int, int] | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    wraps: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    clashes: Mapping[str, str] = field(default_factory=dict)
    """Names of other layers, each with the reason why both cannot be."""
    needs_slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For a slot, the layers of which one must be chosen there."""
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
    """False where its kernels add in no fixed order, as most attention backwards do."""
    warmup_steps: int = 0
    """Updates before the layer does its real work, so that the watched step comes after them."""
    permanent: str = ""
    """Why it cannot be undone; empty where it can."""
    measured: str = "not measured"
    """Where its gain was measured: a file under docs/measurements/."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        problems = [
            f"no slot {slot!r}{nearest(slot, SLOTS)}; slots: {', '.join(SLOTS)}"
            for slot in (self.slot, *self.needs_slots)
            if slot not in SLOTS
        ]
        for verbs, known in ((self.wraps, WRAPPED_HOOKS + REPLACED_HOOKS), (self.replaces, REPLACED_HOOKS)):
            problems += [f"{verb!r} is not one of {', '.join(known)}" for verb in verbs if verb not in known]
        if problems:
            raise listed(f"layer {self.name}", problems)

    @property
    def when(self) -> Phase:
        """The moment of `build` at which `apply` runs."""
        if self.phase is not None:
            return self.phase
        if self.slot in _PROCESS_SLOTS:
            return Phase.PROCESS
        return Phase.SHAPE if self.slot in _SHAPE_SLOTS else Phase.REAL

    def read_options(self, given: Options, where: str) -> dict[str, Any]:
        """Defaults overlaid with `given`. Raises ConfigError for a name or value that the layer does not take."""
        problems, read = [], {name: option.default for name, option in self.options.items()}
        for name, value in given.items():
            try:
                if name not in self.options:
                    known = ", ".join(self.options) or "none"
                    raise ConfigError(f"{where}: no option {name!r}{nearest(name, self.options)}; options: {known}")
                read[name] = self.options[name].read(value, f"{where}.{name}")
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return read

    def rejections(self, case: Case, options: Options) -> list[Reason]:
        """Every reason against this layer in this case: the declared needs first, then `fits`."""
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
