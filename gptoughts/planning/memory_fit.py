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
    """Expected memory of one rank. `changes` are flags that together reach the verdict `reached`; None if no known layers do."""

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
    reached: Verdict = Verdict.FITS
    """`fits`, or `tight` where no known layers leave the whole reserve."""

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
            how = "to fit tightly" if self.changes and self.reached is Verdict.TIGHT else "to fit"
            yield f"  {how}: {other if self.changes is None else ' '.join(self.changes)}"


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


@dataclass(frozen=True)
class _Room:
    """Memory of a rank, and the verdicts that are good enough."""

    memory_bytes: int | None
    enough: tuple[Verdict, ...]

    def holds(self, budget: Budget | None) -> bool:
        return budget is not None and verdict(budget.peak, self.memory_bytes) in self.enough


def fit(case: Case, choices: Choices, catalog: Mapping[str, Layer], compatible: Callable[[Choices], bool]) -> MemoryCheck:
    """Check the memory of a plan. `compatible` returns whether other choices are compatible with each other."""
    budget, free = expected(case, choices, catalog), free_of_rank(case)
    available = memory_of_rank(case) if free is None else free
    if budget is None:
        return MemoryCheck(None, available, Verdict.UNKNOWN)
    found = verdict(budget.peak, available)
    changes: tuple[str, ...] | None = ()
    reached = Verdict.FITS
    if found in (Verdict.DOES_NOT, Verdict.TIGHT):
        changes = _changes(case, choices, catalog, compatible, _Room(available, (Verdict.FITS,)))
        if changes is None and found is Verdict.DOES_NOT:
            reached = Verdict.TIGHT
            changes = _changes(case, choices, catalog, compatible, _Room(available, (Verdict.FITS, Verdict.TIGHT)))
    strategies = tuple(_strategies(case, choices, catalog, compatible))
    otherwise = tuple(_otherwise(case, choices, catalog, available))
    return MemoryCheck(budget, available, found, changes, free is not None, strategies, otherwise, reached)


def _otherwise(case: Case, choices: Choices, catalog: Mapping[str, Layer], memory_bytes: int | None) -> Iterator[str]:
    """Yield what shrinks a step beyond layers, without what the recipe has already."""
    adapter, length = case.recipe.adapter, case.recipe.data.sequence_length
    if adapter.kind == "none" and case.recipe.model.path and task_of(case.recipe).samples:
        yield "--adapter.kind lora"
    elif adapter.kind != "none" and adapter.base != "nf4":
        yield "--adapter.base nf4"
    if length > SHORT:
        yield f"--data.sequence-length {length // 2}"
    yield "a smaller model"
    yield from _more_ranks(case, choices, catalog, memory_bytes)


def _more_ranks(case: Case, choices: Choices, catalog: Mapping[str, Layer], memory_bytes: int | None) -> Iterator[str]:
    """Yield the fewest GPUs that fit, with the first strategy that shards so that a rank shrinks enough; none if no strategy does."""
    counts = (case.world.world_size * 2**power for power in range(1, 11)) if case.on_gpu else ()
    for ranks in counts:
        if case.recipe.train.global_batch % ranks:
            return
        world = replace(case.world, world_size=ranks, local_world_size=min(ranks, len(case.machine.gpus)))
        before = {slot: choice for slot, choice in choices.items() if SLOTS.index(slot) < SLOTS.index("parallel")}
        here = replace(case, world=world, chosen=before)
        replica = expected(here, choices, catalog)
        for layer in catalog.values():
            if layer.slot != "parallel" or layer.baseline:
                continue
            options = layer.read_options({}, "memory")
            budget = expected(here, {**choices, "parallel": Choice("parallel", layer.name, options, "memory")}, catalog)
            if budget is None or replica is None or budget.peak >= replica.peak:
                continue
            fits = verdict(budget.peak, memory_bytes) is Verdict.FITS
            if fits and not any(reason.kind is Kind.UNSUPPORTED for reason in layer.rejections(here, options)):
                yield f"{ranks} GPUs with --layer.parallel {layer.name}"
                return


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
    case: Case, choices: Choices, catalog: Mapping[str, Layer], compatible: Callable[[Choices], bool], room: _Room
) -> tuple[str, ...] | None:
    """Return the flags of the fewest changes that make it fit, the cheapest of as many first; None if all together do not."""

    def changed(steps: Steps) -> Choices:
        return {**choices, **{choice.slot: choice for choice, _ in steps}}

    def fits(steps: Steps) -> bool:
        return room.holds(expected(case, changed(steps), catalog))

    def possible(steps: Steps) -> bool:
        micro_batch = next((choice.options for choice, _ in steps if choice.slot == "microbatch"), case.micro_batch)
        here = replace(case, chosen=dict(choices), micro_batch=micro_batch)
        reasons = (reason for choice, _ in steps for reason in catalog[choice.layer].rejections(here, choice.options))
        return compatible(changed(steps)) and not any(reason.kind is Kind.UNSUPPORTED for reason in reasons)

    known = list(_ladder(choices, catalog, case))
    for size in range(1, len({choice.slot for choice, _ in known}) + 1):
        for several in map(list, combinations(known, size)):
            apart = len({choice.slot for choice, _ in several}) == size
            if apart and fits(several) and possible(several):
                return (*_kept_layers(case, changed(several), several, catalog, fits), *(flag for _, flag in several))
    return None


def _kept_layers(
    case: Case, choices: Choices, steps: Steps, catalog: Mapping[str, Layer], fits: Callable[[Steps], bool]
) -> Iterator[str]:
    """Yield flags that keep the profile's memory-saving layers which it would drop for a smaller micro-batch, if the step needs them."""
    smaller = [choice.options for choice, _ in steps if choice.slot == "microbatch"]
    for slot in dict.fromkeys(layer.slot for layer in ranked(catalog)) if smaller else ():
        layer, asked = catalog[choices[slot].layer], choices[slot].origin.startswith("--")
        if slot in {choice.slot for choice, _ in steps} or layer.memory_rank is None or asked:
            continue
        before = {name: choice for name, choice in choices.items() if SLOTS.index(name) < SLOTS.index(slot)}
        counted = {**before, **{name: choices[name] for name in ("parallel", "microbatch")}}
        here = replace(case, chosen=before, micro_batch=smaller[0], budget=expected(case, counted, catalog))
        plain = next(other for other in catalog.values() if other.slot == slot and other.baseline)
        without = (Choice(slot, plain.name, plain.read_options({}, "memory"), "memory"), "")
        if layer.rejections(here, choices[slot].options) and not fits([*steps, without]):
            yield f"--layer.{slot.replace('_', '-')} {layer.name}"


def ranked(catalog: Mapping[str, Layer]) -> list[Layer]:
    """Return the layers that save memory, cheapest first.

    In tok/s of torchtune's Llama-3.2-3B on an A100, a chunked loss costs nothing, 8-bit state 5 %, recomputing blocks 21 %; the
    order of the others is ours.
    """
    layers = (layer for layer in catalog.values() if layer.memory_rank is not None)
    return sorted(layers, key=lambda layer: layer.memory_rank or 0)


def _ladder(choices: Choices, catalog: Mapping[str, Layer], case: Case) -> Iterator[tuple[Choice, str]]:
    """Yield the changes one at a time, cheapest first, without layers that are chosen already."""
    for layer in ranked(catalog):
        flags = f"--layer.{layer.slot.replace('_', '-')} {layer.name}"
        if layer.slot == "microbatch":
            yield from _smaller(case, layer, flags)
        elif choices[layer.slot].layer != layer.name:
            options = layer.read_options({}, "memory")
            yield Choice(layer.slot, layer.name, options, "memory", compute_dtype=layer.compute_dtype), flags


def _smaller(case: Case, layer: Layer, flags: str) -> Iterator[tuple[Choice, str]]:
    """Halve the micro-batch down to one sequence."""
    sequences = case.forward_sequences
    while sequences > 1:
        sequences //= 2
        options = layer.read_options({"sequences": sequences}, "memory")
        yield Choice(layer.slot, layer.name, options, "memory"), f"{flags} --layer.microbatch.sequences {sequences}"
