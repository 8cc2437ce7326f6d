"""The next flag to try for what limits a run. A flag is proposed only if the planner accepts the run's plan with it, and memory fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import ModelSpec
from gptoughts.console import bytes_in_words
from gptoughts.errors import ConfigError, PlanError
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.world import World
from gptoughts.planning.layer import Layer
from gptoughts.planning.memory_model import Verdict as Fit
from gptoughts.planning.plan import Plan
from gptoughts.planning.profile import Match, Profile
from gptoughts.planning.resolve import resolve

FLAG = "--layer."
LARGER = "a larger micro-batch"
"""Stands for the largest micro-batch that fits."""
RARER = "rarer checkpoints"
DEEPER = "a deeper queue"
DOCTOR = "gptoughts doctor"

CANDIDATES: dict[str, tuple[str, ...]] = {
    "data": ("--layer.loader prefetch", DEEPER, "--data.cache DIR on a local disk"),
    "host": (LARGER, "--layer.optimizer fused", "--layer.compile compile-blocks", "--layer.compile cuda-graph"),
    "communication": (
        "--layer.parallel ddp",
        "--layer.parallel ddp --layer.parallel.compress bf16",
        "--layer.parallel fsdp2 --layer.parallel.reshard false",
    ),
    "memory bandwidth": (
        "--layer.optimizer fused",
        "--layer.precision bf16",
        "--layer.compile compile-blocks",
        "--layer.kernels liger",
        LARGER,
    ),
    "compute": (
        "--layer.recompute keep",
        "--layer.precision bf16",
        "--layer.matmul tf32",
        "--layer.attention sdpa",
        "--layer.compile compile-blocks",
        LARGER,
        "--layer.precision fp8-torchao",
    ),
    "checkpoint": (RARER,),
    "straggler": (DOCTOR,),
    "throttling": (DOCTOR,),
}
"""Limiter -> what helps, best first. `device` takes the candidates of compute."""
DESPITE_SLOWDOWN = ("data",)
"""Limiters whose candidates count although the plan expects them to be slower: it did not know how slow the data are."""
MOST_QUEUED = 16


@dataclass(frozen=True)
class Advisor:
    """Finds the next thing to try for one run."""

    machine: Machine
    spec: ModelSpec
    recipe: Recipe
    world: World
    plan: Plan
    catalog: Mapping[str, Layer]

    def advise(self, limiter: str) -> str | None:
        """Return flags of `gptoughts train`, or a command, that should help against `limiter`; None if nothing is known."""
        for candidate in CANDIDATES.get(limiter, CANDIDATES["compute"]):
            found = self._found(candidate, limiter in DESPITE_SLOWDOWN)
            if found:
                return found
        return None

    def _found(self, candidate: str, despite_slowdown: bool) -> str | None:
        if candidate == LARGER:
            return self.larger_micro_batch()
        if candidate == RARER:
            every = self.recipe.save.every
            return f"--save.every {2 * every}" if every else None
        if candidate == DEEPER:
            return self._deeper_queue()
        if not candidate.startswith(FLAG):
            return candidate
        return candidate if self.accepts(candidate, despite_slowdown) else None

    def accepts(self, flags: str, despite_slowdown: bool = False) -> bool:
        """Return whether `flags` change the plan, can run, are not expected to be slower, and fit in memory where that is known.

        Flags that set an option count only for a layer that the plan has already.
        """
        given = dict(_pairs(flags))
        slots = {key for key in given if "." not in key}
        options = [key for key in given if "." in key]
        layers = self.plan.layers
        if all(_now(self.plan, key) == _plain(value) for key, value in given.items()):
            return False
        if any(layers[key.partition(".")[0]] != given[key.partition(".")[0]] for key in options):
            return False
        changed = self.planned(given)
        if changed is None or any(changed.layers[slot] != given[slot] for slot in slots):
            return False
        if any(changed.choice(slot).expected_slowdown for slot in slots) and not despite_slowdown:
            return False
        return changed.memory is None or changed.memory.verdict in (Fit.FITS, Fit.UNKNOWN)

    def planned(self, flags: Mapping[str, Any]) -> Plan | None:
        """Return the run's plan with `flags`; None if it cannot run."""
        changed = {key.partition(".")[0] for key in flags if "." not in key}
        kept: dict[str, Any] = {}
        for choice in self.plan.choices:
            kept[choice.slot] = choice.layer
            if choice.slot not in changed or flags[choice.slot] == choice.layer:
                kept |= {f"{choice.slot}.{name}": value for name, value in choice.options.items() if value is not None}
        profile = Profile(self.plan.profile, "", False, Match(), {}, "")
        try:
            return resolve(profile, self.machine, self.spec, self.recipe, self.world, self.catalog, flags={**kept, **flags})
        except (PlanError, ConfigError):
            return None

    def larger_micro_batch(self) -> str | None:
        """Return the flags of the largest micro-batch that fits in memory, if it is larger than the plan's."""
        share = self.recipe.train.global_batch // self.world.world_size
        now = self._micro_batch(share)
        for size in range(share, now, -1):
            if share % size:
                continue
            whole = size == share
            flags = "--layer.microbatch whole" if whole else f"--layer.microbatch fixed --layer.microbatch.sequences {size}"
            changed = self.planned(dict(_pairs(flags)))
            if changed is not None and changed.memory is not None and changed.memory.verdict is Fit.FITS:
                return flags
        return None

    def upward(self, peak_bytes: int | None) -> str | None:
        """Return `9.1 GiB unused: --layer.microbatch ...` if a larger micro-batch fits; `peak_bytes` was measured, else the prediction."""
        memory, flags = self.plan.memory, self.larger_micro_batch()
        if flags is None or memory is None or memory.memory_bytes is None or memory.budget is None:
            return None
        unused = memory.memory_bytes - (peak_bytes or memory.budget.peak)
        return f"{bytes_in_words(unused)} unused: {flags}" if unused > 0 else None

    def _micro_batch(self, share: int) -> int:
        options = self.plan.choice("microbatch").options
        tokens, sequences = options.get("tokens"), options.get("sequences")
        most = sequences or (max(1, tokens // self.recipe.data.sequence_length) if tokens else share)
        return int(min(most, share))

    def _deeper_queue(self) -> str | None:
        now = self.plan.choice("loader").options.get("batches")
        if not now or 2 * now > MOST_QUEUED:
            return None
        return f"--layer.loader {self.plan.layers['loader']} --layer.loader.batches {2 * now}"


def _pairs(flags: str) -> Iterator[tuple[str, str]]:
    words = flags.split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        yield name.removeprefix(FLAG).replace("-", "_"), value


def _now(plan: Plan, key: str) -> str:
    slot, _, option = key.partition(".")
    return _plain(plan.choice(slot).options.get(option) if option else plan.layers[slot])


def _plain(value: Any) -> str:
    return str(value).lower()
