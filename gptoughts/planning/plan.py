"""The plan: chosen layers, reasons for the rejected ones, environment and expected memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptoughts.console import redacted
from gptoughts.planning.layer import SLOTS, Choice
from gptoughts.planning.memory_fit import MemoryCheck

RANK_LOCAL = "GPTOUGHTS_"
"""Prefix of variables that differ between ranks, such as the NUMA node; excluded from the digest."""


@dataclass(frozen=True)
class Plan:
    """One layer per slot, with the environment it needs and the reasons."""

    profile: str
    machine: str
    world_size: int
    choices: tuple[Choice, ...]
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()
    not_repeatable: tuple[str, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)
    memory: MemoryCheck | None = None

    def choice(self, slot: str) -> Choice:
        """Return the choice of one slot."""
        return self.choices[SLOTS.index(slot)]

    @property
    def layers(self) -> dict[str, str]:
        """Slot -> layer."""
        return {choice.slot: choice.layer for choice in self.choices}

    @property
    def gemm_dtype(self) -> str:
        """Return the dtype of the matmuls, as `gptoughts bench gemm` names it. FP8 counts as bf16, as in MFU."""
        matmul = self.choice("matmul")
        return str(self.choice("precision").compute_dtype or matmul.compute_dtype or matmul.options.get("units", "fp32"))

    def digest(self) -> str:
        """Return a hash of what all ranks and a resumed run must share: layers, options, environment and world size."""
        shared = {
            "layers": {choice.slot: [choice.layer, dict(choice.options)] for choice in self.choices},
            "environment": {name: value for name, value in self.environment.items() if not name.startswith(RANK_LOCAL)},
            "world_size": self.world_size,
        }
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, with every reason, without secrets."""
        plain = {
            "profile": self.profile,
            "machine": self.machine,
            "world_size": self.world_size,
            "digest": self.digest(),
            "choices": [_choice_json(choice) for choice in self.choices],
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "not_repeatable": list(self.not_repeatable),
            "model": dict(self.spec),
            "memory": self.memory.to_json() if self.memory else {},
        }
        return dict(redacted(plain))

    def table(self) -> str:
        """Return the plan as text: slot, layer and every reason."""
        width = max(len(slot) for slot in SLOTS)
        wide = max(len(_titled(choice)) for choice in self.choices)
        lines = [f"profile {self.profile} on {self.machine}, {ranks_in_words(self.world_size)}"]
        for choice in self.choices:
            reasons = [f"not {layer}: {'; '.join(map(str, why))}" for layer, why in choice.rejected]
            reasons += [f"expected slowdown: {reason}" for reason in choice.expected_slowdown]
            first, *rest = reasons or [""]
            lines.append(f"{choice.slot:<{width}}  {_titled(choice):<{wide}}  {first}".rstrip())
            lines += [f"{'':<{width}}  {'':<{wide}}  {reason}" for reason in rest]
        lines += list(self.memory.lines()) if self.memory else []
        lines += [f"environment  {name}={value}" for name, value in self.environment.items()]
        if self.not_repeatable:
            lines.append(f"not bit-identical after a resume: {', '.join(self.not_repeatable)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def ranks_in_words(world_size: int) -> str:
    """Format a world size: `1 process` or `8 ranks`."""
    return "1 process" if world_size == 1 else f"{world_size} ranks"


def _titled(choice: Choice) -> str:
    options = ", ".join(f"{name}={value}" for name, value in choice.options.items() if value is not None)
    return f"{choice.layer} ({options})" if options else choice.layer


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {
        "slot": choice.slot,
        "layer": choice.layer,
        "options": dict(choice.options),
        "origin": choice.origin,
        "rejected": [
            {"layer": layer, "reasons": [{"kind": str(why.kind), "text": str(why)} for why in reasons]}
            for layer, reasons in choice.rejected
        ],
        "expected_slowdown": [str(reason) for reason in choice.expected_slowdown],
    }
