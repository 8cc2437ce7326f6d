"""Memory check of a plan: expected peak of a step against the memory of a rank, and the cheapest changes that make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from gptoughts.config.tasks import task_of
from gptoughts.console import GIB, bytes_in_words
from gptoughts.planning.layer import SLOTS, Case, Choice, Kind, Layer
from gptoughts.planning.memory_model import Budget, Verdict, baseline, verdict

Choices = Mapping[str, Choice]
Steps = list[tuple[Choice, str]]
"""Changes of a plan, each with its flags."""

SHORT = 512
"""Sequence length at and below which shortening is not proposed."""
SOURCE = "docs/measurements/cpu/memory.json"
"""Measured accuracy of the expected peak."""


@dataclass(frozen=True)
class MemoryCheck:
    """Expected memory of one rank. `changes` are flags that together make it fit; None if no known layers do."""

    budget: Budget | None
    memory_bytes: int | None
    verdict: Verdict
    changes: tuple[str, ...] | None = ()
    is_free: bool = False
    """Whether `memory_bytes` is the free memory rather than the total."""
    strategies: tuple[tuple[str, int], ...] = ()
    """With several ranks: (layer, peak bytes of a rank) of the other layers of the parallel slot."""
    otherwise: tuple[str, ...] = ()
    """What shrinks a step where no known layers suffice, as flags or words."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data; empty if the model's sizes are unknown."""
        if self.budget is None:
            return {}
        changes = None if self.changes is None else list(self.changes)
        kept: dict[str, Any] = {"memory_bytes": self.memory_bytes, "verdict": str(self.verdict), "changes": changes}
        return {**self.budget.to_json(), **kept, **({"strategies": dict(self.strategies)} if self.strategies else {})}

    def lines(self) -> Iterator[str]:
        """Yield the lines of the printed plan."""
        if self.budget is None:
            yield "memory n/a: model sizes are unknown until the data is read"
            return
        parts = self.budget.to_json()
        named = ", ".join(f"{name} {bytes_in_words(value)}" for name, value in parts.items() if name != "peak" and value)
        available = f"{bytes_in_words(self.memory_bytes)}{' free' if self.is_free else ''}"
        result = f" of {available}: {self.verdict}" if self.memory_bytes else ""
        yield f"memory per rank: {named}"
        yield f"  peak {bytes_in_words(parts['peak'])}{result}"
        yield from (f"  peak {bytes_in_words(peak)} with --layer.parallel {name}" for name, peak in self.strategies)
        if self.verdict in (Verdict.DOES_NOT, Verdict.TIGHT):
            lacking = "layers suffice" if self.verdict is Verdict.DOES_NOT else "layers give more room"
            other = f"no known {lacking}; try {', '.join(self.otherwise)}"
            yield f"  to fit: {other if self.changes is None else ' '.join(self.changes)}"


def memory_of_rank(case: Case) -> int | None:
    """Return the memory of one rank: that of the smallest GPU, or its share of the host memory; None if unknown."""
    if case.on_gpu:
        known = [gpu.memory_bytes for gpu in case.machine.gpus]
        return None if None in known else min(size for size in known if size is not None)
    whole = case.machine.memory_bytes
    return None if whole is None else whole // case.world.local_world_size


def free_of_rank(case: Case) -> int | None:
    """Return the free memory of one rank when the machine was probed; None for a machine file.

    Only for the printed check and its advice. It never decides a layer: a plan that depends on other processes could not be resumed.
    """
    if case.on_gpu:
        known = [gpu.free_bytes for gpu in case.machine.gpus]
        return None if None in known else min(size for size in known if size is not None)
    free = case.machine.free_bytes
    return None if free is None else free // case.world.local_world_size


@dataclass(frozen=True)
class Headroom:
    """Expected peak bytes of a step, and the bytes available."""

    need: int
    have: int
    when: str = ""
    """What can still change the figure; empty if it is final."""

    @property
    def is_enough(self) -> bool:
        """Whether it fits, with the reserve of `verdict`."""
        return verdict(self.need, self.have) is Verdict.FITS

    def __str__(self) -> str:
        return f"about {self.need / GIB:.1f} GiB of {self.have / GIB:.0f} GiB{self.when}"


def current_budget(case: Case) -> Budget | None:
    """Return the memory of a step with the layers chosen so far; None if the model's sizes are unknown."""
    return case.budget or baseline(case.spec, case.recipe, case.forward_sequences)


def memory_headroom(case: Case, change: Callable[[Budget], Budget] = lambda budget: budget) -> Headroom | None:
    """Return the expected peak with the layers chosen so far and `change`, and the memory available; None if unknown.

    If the vocabulary is unknown until the text is read, only the blocks are counted.
    """
    have, spec = memory_of_rank(case), case.spec
    if have is None or spec.depth is None or spec.width is None or spec.sequence_length is None:
        return None
    # The compile slot is resolved later and reduces activations; whether it gets a compiling layer is not known yet.
    compiles = case.on_gpu and "compile" not in case.chosen and case.compiles
    when = " before compilation" if compiles else ""
    if case.budget is not None:
        return Headroom(change(case.budget).peak, have, when)
    blocks = replace(spec, vocab_size=spec.vocab_size or 0, parameters=spec.parameters or 12 * spec.depth * spec.width**2)
    budget = baseline(blocks, case.recipe, case.forward_sequences)
    return None if budget is None else Headroom(change(budget).peak, have, when)


def expected(case: Case, choices: Choices, catalog: Mapping[str, Layer]) -> Budget | None:
    """Return the baseline's budget, changed by every chosen layer in slot order; None if the model's sizes are unknown."""
    budget = baseline(case.spec, case.recipe, case.rank_sequences)
    if budget is None:
        return None
    here = replace(case, chosen=dict(choices))
    for choice in choices.values():
        budget = catalog[choice.layer].memory(here, choice.options, budget)
    return budget


def fit(case: Case, choices: Choices, catalog: Mapping[str, Layer], compatible: Callable[[Choices], bool]) -> MemoryCheck:
    """Check the memory of a plan. `compatible` returns whether other choices are compatible with each other."""
    budget, free = expected(case, choices, catalog), free_of_rank(case)
    available = memory_of_rank(case) if free is None else free
    if budget is None:
        return MemoryCheck(None, available, Verdict.UNKNOWN)
    found = verdict(budget.peak, available)
    changes = _changes(case, choices, catalog, compatible, available) if found in (Verdict.DOES_NOT, Verdict.TIGHT) else ()
    strategies = tuple(_strategies(case, choices, catalog, compatible))
    return MemoryCheck(budget, available, found, changes, free is not None, strategies, tuple(_otherwise(case, budget)))


def _otherwise(case: Case, budget: Budget) -> Iterator[str]:
    """Yield what shrinks a step beyond layers, without what the recipe has already."""
    adapter = case.recipe.adapter
    if adapter.kind == "none" and case.recipe.model.path and task_of(case.recipe).samples:
        yield "--adapter.kind lora"
    elif adapter.kind != "none" and adapter.base != "nf4":
        yield "--adapter.base nf4"
    if budget.sequence_length > SHORT:
        yield f"--data.sequence-length {budget.sequence_length // 2}"
    yield "a smaller model"
    yield "more GPUs with --layer.parallel fsdp2"


def _strategies(
    case: Case, choices: Choices, catalog: Mapping[str, Layer], compatible: Callable[[Choices], bool]
) -> Iterator[tuple[str, int]]:
    """Yield the other layers of the parallel slot that could run, each with the expected peak of a rank."""
    for layer in catalog.values() if case.world.world_size > 1 else ():
        if layer.slot != "parallel" or layer.baseline or layer.name == choices["parallel"].layer:
            continue
        options = layer.read_options({}, "memory")
        before = {slot: choice for slot, choice in choices.items() if SLOTS.index(slot) < SLOTS.index("parallel")}
        reasons = layer.rejections(replace(case, chosen=before), options)
        tried = {**choices, "parallel": Choice("parallel", layer.name, options, "memory")}
        if compatible(tried) and not any(reason.kind is Kind.UNSUPPORTED for reason in reasons):
            budget = expected(case, tried, catalog)
            if budget is not None:
                yield layer.name, budget.peak


def _changes(
    case: Case, choices: Choices, catalog: Mapping[str, Layer], compatible: Callable[[Choices], bool], memory_bytes: int | None
) -> tuple[str, ...] | None:
    """Return one step of the ladder that makes it fit, else two, else its first steps without those that are not needed; None if all
    together do not.
    """

    def changed(steps: Steps) -> Choices:
        return {**choices, **{choice.slot: choice for choice, _ in steps}}

    def fits(steps: Steps) -> bool:
        budget = expected(case, changed(steps), catalog)
        return budget is not None and verdict(budget.peak, memory_bytes) is Verdict.FITS

    def flags(steps: Steps) -> tuple[str, ...]:
        return (*_kept_layers(choices, steps, catalog, fits), *(flag for _, flag in steps))

    known = list(_ladder(case, choices, catalog, []))
    for size in (1, 2):
        for several in map(list, combinations(known, size)):
            apart = len({choice.slot for choice, _ in several}) == size
            if apart and fits(several) and compatible(changed(several)):
                return flags(several)
    steps: Steps = []
    for choice, flag in _ladder(case, choices, catalog, steps):
        more = [*(step for step in steps if step[0].slot != choice.slot), (choice, flag)]
        if not compatible(changed(more)):
            continue
        steps[:] = more
        if fits(steps):
            for step in list(steps[:-1]):
                rest = [other for other in steps if other is not step]
                steps = rest if fits(rest) else steps
            return flags(steps)
    return None


def _kept_layers(choices: Choices, steps: Steps, catalog: Mapping[str, Layer], fits: Callable[[Steps], bool]) -> Iterator[str]:
    """Yield flags that keep the plan's memory-saving layers where it would not fit without them: with a smaller micro-batch the profile
    might drop them.
    """
    changed = {choice.slot for choice, _ in steps}
    dropped: Steps = []
    for slot in dict.fromkeys(layer.slot for layer in ranked(catalog)) if "microbatch" in changed else ():
        name = choices[slot].layer
        if slot in changed or catalog[name].memory_rank is None:
            continue
        plain = next(layer for layer in catalog.values() if layer.slot == slot and layer.baseline)
        without = (Choice(slot, plain.name, plain.read_options({}, "memory"), "memory"), "")
        if fits([*steps, *dropped, without]):
            dropped.append(without)
        else:
            yield f"--layer.{slot.replace('_', '-')} {name}"


def ranked(catalog: Mapping[str, Layer]) -> list[Layer]:
    """Return the layers that save memory, cheapest first.

    In tok/s of torchtune's Llama-3.2-3B on an A100, a chunked loss costs nothing, 8-bit state 5 %, recomputing blocks 21 %; the
    order of the others is ours.
    """
    layers = (layer for layer in catalog.values() if layer.memory_rank is not None)
    return sorted(layers, key=lambda layer: layer.memory_rank or 0)


def _ladder(case: Case, choices: Choices, catalog: Mapping[str, Layer], taken: Steps) -> Iterator[tuple[Choice, str]]:
    """Yield the changes one at a time; each is checked with the micro-batch already `taken`."""
    for layer in ranked(catalog):
        flags = f"--layer.{layer.slot.replace('_', '-')} {layer.name}"
        if layer.slot == "microbatch":
            yield from _smaller(case, layer, flags)
            continue
        if choices[layer.slot].layer == layer.name:
            continue
        options = layer.read_options({}, "memory")
        micro_batch = next((choice.options for choice, _ in taken if choice.slot == "microbatch"), case.micro_batch)
        reasons = layer.rejections(replace(case, chosen=dict(choices), micro_batch=micro_batch), options)
        if not any(reason.kind is Kind.UNSUPPORTED for reason in reasons):
            yield Choice(layer.slot, layer.name, options, "memory", compute_dtype=layer.compute_dtype), flags


def _smaller(case: Case, layer: Layer, flags: str) -> Iterator[tuple[Choice, str]]:
    """Halve the micro-batch down to one sequence."""
    sequences = case.forward_sequences
    while sequences > 1:
        sequences //= 2
        options = layer.read_options({"sequences": sequences}, "memory")
        yield Choice(layer.slot, layer.name, options, "memory"), f"{flags} --layer.microbatch.sequences {sequences}"
