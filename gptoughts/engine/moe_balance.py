"""Keeps the experts of a mixture evenly loaded and says how they are: a loss on the router, or a bias that follows the loads.

The routers of a model are watched in place: their forward also leaves tokens per expert and summed probabilities behind, on the
device, without a hook (hooks are silent under torch.compile) and without waiting for the host. Dense models are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.config.recipe import ExpertsConfig
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import IGNORED, Batch, Objective, WrappedObjective
from gptoughts.errors import ConfigError, RunError
from gptoughts.models.hf.experts import Router, balance, coefficient, measured, nudge, routers
from gptoughts.models.patching import Undo, reroute
from gptoughts.models.torch_internals import set_side_effects_once


def balanced(engine: Engine, objective: Objective, config: ExpertsConfig) -> tuple[Objective, Undo]:
    """`objective` with the balance of the engine's experts, and the undo; `objective` itself for a dense model.

    Call it once the engine's model is built (meta will do) and before its first forward. Afterwards an update also moves the
    balancing biases of routers that learn. Raises ConfigError where experts are there and their routers are not understood.
    """
    found = routers(engine.bare)
    if not found:
        return objective, lambda: None
    weight = coefficient(engine.bare, found) if config.balance_weight is None else config.balance_weight
    experts = Experts(found)
    wrapped = Balanced(objective, experts, weight)

    def step(inner: Callable[[], bool]) -> bool:
        updated = inner()
        experts.reduce_loads(engine.ranks, config.bias_rate if updated else 0.0, wrapped.meters)
        return updated

    undos = [experts.watch(), engine.wrap("step", step)]

    def undo() -> None:
        for back in reversed(undos):
            back()

    return wrapped, undo


class Balanced(WrappedObjective):
    """An objective with the balance loss of its model's experts added.

    A micro-batch adds coefficient x balance x its own weight, so the step's loss is the main loss plus the coefficient times the mean
    of the micro-batches' balances, weighted as their losses are. The balance of a batch is not the mean of its parts' balances (it
    multiplies two means), so this term, and it alone, depends on the size of micro-batches: small ones ask for balance within fewer
    tokens. The main loss does not. Evaluation has the main loss alone.
    """

    def __init__(self, objective: Objective, experts: Experts, coefficient: float) -> None:
        super().__init__(objective)
        self.experts, self.coefficient = experts, coefficient

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The objective's sum plus coefficient x balance x weight; the sum alone where nothing is learned."""
        if not (model.training and torch.is_grad_enabled()):
            return self.objective(model, batch)
        self.experts.listen(counted(batch, self.objective.tokens(batch)))
        try:
            loss = self.objective(model, batch)
        finally:
            seen = self.experts.heard()
        term = balance(self.experts.complete(seen))
        weight = torch.as_tensor(self.objective.weight(batch), dtype=torch.float32, device=term.device)
        meter(self.meters, "balance_loss", term.detach() * weight, weight)
        return loss + self.coefficient * weight * term if self.coefficient else loss

    def forget(self) -> None:
        """Drop the loads since the last update: the batch that made them is taken again, or was none of the training's."""
        self.experts.forget()

    def listing(self) -> tuple[Tensor, Callable[[Sequence[float]], dict[str, list[int]]]] | None:
        """Load of every expert since the last call, on the device, and what makes a row of metrics.jsonl of it; None where nothing ran."""
        percentages = self.experts.percentages()
        return None if percentages is None else (percentages, self.experts.row)


def meter(meters: dict[str, tuple[Tensor, Tensor]], name: str, value: Tensor, weight: Tensor) -> None:
    """Add to the quotient `name`, on the device."""
    before = meters.get(name)
    meters[name] = (value, weight) if before is None else (before[0] + value, before[1] + weight)


def counted(batch: Batch, tokens: int) -> Tensor:
    """Which of a micro-batch's positions count as load, float32 (tokens,): those of documents in which any label counts.

    So a prompt counts with its answer, and padding, a document without labels, does not. Without labels all positions count.
    """
    rows = len(batch["input_ids"])
    columns = tokens // rows
    labels, positions = batch.get("labels"), batch.get("positions")
    if labels is None:
        return torch.ones(tokens, device=batch["input_ids"].device)
    kept = labels[:, -columns:] != IGNORED  # next-token batches have a column more, whose first label nobody predicts
    if positions is None:
        return kept.any(1, keepdim=True).expand(rows, columns).flatten().float()
    document = (positions[:, :columns] == 0).cumsum(1)
    labeled = torch.zeros(rows, columns + 1, device=kept.device).scatter_add(1, document, kept.float())
    return (labeled.gather(1, document) > 0).float().flatten()


class _Ear:
    """What all watched routers of a model share."""

    def __init__(self) -> None:
        self.listening = False
        self.counted: Tensor | None = None


class _Watch:
    """What one router leaves behind. Compiled code reads the same fields in every layer, so that all layers are one graph."""

    def __init__(self, router: Router, ear: _Ear, inner: Callable[..., Any] | None) -> None:
        self.router, self.ear, self.inner = router, ear, inner
        self.seen: Tensor | None = None


def _watched(module: Any, *arguments: Any, **keywords: Any) -> Any:
    watch: _Watch = module.watch
    if watch.inner is not None:
        outputs = watch.inner(*arguments, **keywords)
    else:
        outputs = type(module).forward(module, *arguments, **keywords)
    mask = watch.ear.counted
    if not module.training or not torch.is_grad_enabled() or mask is None:
        return outputs
    positions = outputs[watch.router.scores_at].numel() // watch.router.experts
    if positions == mask.numel():
        # Recomputation must save what the forward saved: what is computed may not depend on who listens, what is kept may.
        seen = measured(outputs, watch.router, mask)
        if watch.ear.listening:
            watch.seen = seen if watch.seen is None else watch.seen + seen
    elif watch.ear.listening:
        raise RunError(f"router {watch.router.name} chose experts for {positions} positions of a batch of {mask.numel()}")
    return outputs


class Experts:
    """The watched routers of a model, and how their experts are loaded.

    Loads are summed over the micro-batches of an update and, in `settle`, over ranks. What is counted says `counted`.
    """

    def __init__(self, found: Mapping[str, Router]) -> None:
        self.found = dict(found)
        self._ear = _Ear()
        self._watches: dict[str, _Watch] = {}
        self._sizes = [router.experts for router in self.found.values()]
        self._loads: Tensor | None = None
        self._since_row: Tensor | None = None

    def forget(self) -> None:
        """Begin to count the loads of this update anew."""
        self._loads = None

    def watch(self) -> Undo:
        """Have every router leave behind what it did. Returns the undo.

        Works in eager mode, under non-reentrant checkpoints and in compiled blocks; checkpoints inside compiled blocks need a switch of
        Dynamo's, which is set as long as routers are watched. A torch without that switch refuses to compile such blocks.
        """
        undos = []
        for name, router in self.found.items():
            module = router.module
            if hasattr(module, "watch"):
                raise ConfigError(f"router {name} is watched already, or has something of its own called watch")
            watch = _Watch(router, self._ear, module.__dict__.get("forward"))
            module.__dict__["watch"] = self._watches[name] = watch
            undos.append(reroute(module, MethodType(_watched, module)))
        before = set_side_effects_once(True)

        def undo() -> None:
            for back, router in zip(undos, self.found.values(), strict=True):
                back()
                del router.module.__dict__["watch"]
            if before is not None:
                set_side_effects_once(before)

        return undo

    def listen(self, positions: Tensor) -> None:
        """Keep what routers do from now on; `positions` (N,) is 1 where a position counts."""
        for watch in self._watches.values():
            watch.seen = None
        self._ear.counted, self._ear.listening = positions, True

    def heard(self) -> dict[str, Tensor | None]:
        """Stop listening; what each router left behind, with its gradient, or None where it did not run."""
        self._ear.listening = False
        seen = {name: watch.seen for name, watch in self._watches.items()}
        for watch in self._watches.values():
            watch.seen = None
        return seen

    def complete(self, seen: Mapping[str, Tensor | None]) -> list[Tensor]:
        """What every router left behind, its loads added to the update's. Raises RunError naming routers that left nothing."""
        silent = [name for name, value in seen.items() if value is None]
        if silent:
            raise RunError(
                f"routers that did not run in a training forward: {', '.join(silent)}\n"
                "  a reentrant checkpoint hides them; recompute with --layer.recompute recompute-blocks"
            )
        layers = [value for value in seen.values() if value is not None]
        loads = torch.cat([value.detach()[0] for value in layers]).long()
        self._loads = loads if self._loads is None else self._loads + loads
        return layers

    def reduce_loads(self, ranks: Ranks, rate: float, meters: dict[str, tuple[Tensor, Tensor]]) -> None:
        """After an update: sum loads over ranks, move balancing biases by `rate`, add to the meters, and start anew.

        load_max: the most tokens of an expert over its layer's mean, in the worst layer; 1 is even. dead_experts: share without a token.
        """
        if self._loads is None:
            return
        loads, self._loads = ranks.sum(self._loads), None
        layers = loads.double().split(self._sizes)
        if rate:
            for router, load in zip(self.found.values(), layers, strict=True):
                if router.trained():
                    nudge(router, load, rate)
        one = torch.ones((), device=loads.device)
        worst = torch.stack([load.max() / load.mean().clamp(min=1e-9) for load in layers]).max()
        meter(meters, "load_max", worst.float(), one)
        meter(meters, "dead_experts", (loads == 0).float().mean(), one)
        self._since_row = loads if self._since_row is None else self._since_row + loads

    def percentages(self) -> Tensor | None:
        """Load of every expert of every layer as a percentage of its layer's mean since the last call, on the device; None if none."""
        if self._since_row is None:
            return None
        layers, self._since_row = self._since_row.double().split(self._sizes), None
        return torch.cat([100 * load / load.mean().clamp(min=1e-9) for load in layers]).float()

    def row(self, percentages: Sequence[float]) -> dict[str, list[int]]:
        """`percentages`, brought to the host, for metrics.jsonl: "experts/<router>" -> whole percentages by expert; 100 is even."""
        rest, row = [round(value) for value in percentages], {}
        for name, router in self.found.items():
            row[f"experts/{name}"], rest = rest[: router.experts], rest[router.experts :]
        return row
