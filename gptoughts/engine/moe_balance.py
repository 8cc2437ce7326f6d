"""Load balancing for mixture-of-experts models: a router loss, or a routing bias that follows the loads; and load metrics.

Each router's forward is patched to record tokens per expert and summed probabilities on the device. It uses no module hook, because
torch.compile ignores those, and never waits for the host. Dense models are unchanged.
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
from gptoughts.models.hf.experts import Router, balance, coefficient, measured, routers, update_balancing_bias
from gptoughts.models.patching import Undo, reroute
from gptoughts.models.torch_internals import set_side_effects_once


def add_balance_loss(engine: Engine, objective: Objective, config: ExpertsConfig) -> tuple[Objective, Undo]:
    """Return `objective` with the balance loss added, and the undo; `objective` itself for a dense model.

    Call it after the engine's model is built (meta is enough) and before its first forward. Each update then also moves the balancing
    biases of trainable routers. Raises ConfigError where the routers of a model's experts are not recognized.
    """
    found = routers(engine.bare)
    if not found:
        return objective, lambda: None
    weight = coefficient(engine.bare, found) if config.balance_weight is None else config.balance_weight
    experts = Experts(found)
    wrapped = Balanced(objective, experts, weight)

    def step(inner: Callable[[], bool]) -> bool:
        updated = inner()
        usable = engine.usable if engine.skips_bad_steps else None
        experts.reduce_loads(engine.ranks, config.bias_rate if updated else 0.0, wrapped.meters, usable)
        return updated

    undos = [experts.watch(), engine.wrap("step", step)]

    def undo() -> None:
        for back in reversed(undos):
            back()

    return wrapped, undo


class Balanced(WrappedObjective):
    """Objective plus the balance loss of the model's experts; the objective alone in evaluation.

    A micro-batch adds coefficient x balance x its weight to what is differentiated, so a step descends the main loss plus the coefficient
    times the weighted mean of the micro-batches' balances. The returned value is the main loss alone, as in validation; the balance has
    its own meter. The balance multiplies two means over a micro-batch, so this term, unlike the main loss, depends on the micro-batch
    size: smaller ones require balance within fewer tokens.
    """

    def __init__(self, objective: Objective, experts: Experts, coefficient: float) -> None:
        super().__init__(objective)
        self.experts, self.coefficient = experts, coefficient

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the objective's sum, whose gradient is that of the sum plus coefficient x balance x weight."""
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
        return loss + self.coefficient * weight * (term - term.detach()) if self.coefficient else loss

    def forget(self) -> None:
        """Drop the loads since the last update, and the inner objective's state."""
        self.experts.forget()
        super().forget()

    def listing(self) -> tuple[Tensor, Callable[[Sequence[float]], dict[str, list[int]]]] | None:
        """Return the load of every expert since the last call, and its formatter for metrics.jsonl; None if no update ran."""
        percentages = self.experts.percentages()
        return None if percentages is None else (percentages, self.experts.row)


def meter(meters: dict[str, tuple[Tensor, Tensor]], name: str, value: Tensor, weight: Tensor) -> None:
    """Add to the sum and weight of meter `name`, on the device."""
    before = meters.get(name)
    meters[name] = (value, weight) if before is None else (before[0] + value, before[1] + weight)


def counted(batch: Batch, tokens: int) -> Tensor:
    """Return float32 (tokens,): 1 for positions that count as load, those of documents with a label that is not ignored.

    A prompt counts with its answer; padding, a document without labels, does not. Without `labels` all positions count.
    """
    rows = len(batch["input_ids"])
    columns = tokens // rows
    labels, positions = batch.get("labels"), batch.get("positions")
    if labels is None:
        return torch.ones(tokens, device=batch["input_ids"].device)
    kept = labels[:, -columns:] != IGNORED  # next-token batches have one more column, whose first label is not predicted
    if positions is None:
        return kept.any(1, keepdim=True).expand(rows, columns).flatten().float()
    document = (positions[:, :columns] == 0).cumsum(1)
    labeled = torch.zeros(rows, columns + 1, device=kept.device).scatter_add(1, document, kept.float())
    return (labeled.gather(1, document) > 0).float().flatten()


class _Recording:
    """State shared by all patched routers of a model."""

    def __init__(self) -> None:
        self.active = False
        self.counted: Tensor | None = None


class _RouterRecord:
    """Record of one router. Compiled code reads the same fields in every layer, so that all layers share one graph."""

    def __init__(self, router: Router, recording: _Recording, inner: Callable[..., Any] | None) -> None:
        self.router, self.recording, self.inner = router, recording, inner
        self.value: Tensor | None = None


def _recording_forward(module: Any, *arguments: Any, **keywords: Any) -> Any:
    record: _RouterRecord = module.watch
    if record.inner is not None:
        outputs = record.inner(*arguments, **keywords)
    else:
        outputs = type(module).forward(module, *arguments, **keywords)
    mask = record.recording.counted
    if not module.training or not torch.is_grad_enabled() or mask is None:
        return outputs
    positions = outputs[record.router.scores_at].numel() // record.router.experts
    if positions == mask.numel():
        # Recomputation must save the same tensors as the forward, so this is computed even where it is not recorded.
        value = measured(outputs, record.router, mask)
        if record.recording.active:
            record.value = value if record.value is None else record.value + value
    elif record.recording.active:
        raise RunError(f"router {record.router.name}: must route {mask.numel()} positions", found=positions)
    return outputs


class Experts:
    """Patched routers of a model and the loads of their experts.

    Loads are summed over the micro-batches of an update and, in `reduce_loads`, over ranks. `counted` selects the positions.
    """

    def __init__(self, found: Mapping[str, Router]) -> None:
        self.found = dict(found)
        self._recording = _Recording()
        self._records: dict[str, _RouterRecord] = {}
        self._sizes = [router.experts for router in self.found.values()]
        self._loads: Tensor | None = None
        self._since_row: Tensor | None = None

    def forget(self) -> None:
        """Reset the loads of this update."""
        self._loads = None

    def watch(self) -> Undo:
        """Patch every router's forward to record its output. Returns the undo.

        Works in eager mode, under non-reentrant checkpoints and in compiled blocks. Checkpoints inside compiled blocks need a Dynamo
        setting, which is set until the undo; a torch without it does not compile such blocks.
        """
        undos = []
        for name, router in self.found.items():
            module = router.module
            if hasattr(module, "watch"):
                raise ConfigError(f"router {name}: already patched, or has its own attribute `watch`")
            record = _RouterRecord(router, self._recording, module.__dict__.get("forward"))
            module.__dict__["watch"] = self._records[name] = record
            undos.append(reroute(module, MethodType(_recording_forward, module)))
        before = set_side_effects_once(True)

        def undo() -> None:
            for back, router in zip(undos, self.found.values(), strict=True):
                back()
                del router.module.__dict__["watch"]
            if before is not None:
                set_side_effects_once(before)

        return undo

    def listen(self, positions: Tensor) -> None:
        """Start recording; `positions` (N,) is 1 where a position counts."""
        for record in self._records.values():
            record.value = None
        self._recording.counted, self._recording.active = positions, True

    def heard(self) -> dict[str, Tensor | None]:
        """Stop recording. Returns each router's record, differentiable, or None where it did not run."""
        self._recording.active = False
        values = {name: record.value for name, record in self._records.items()}
        for record in self._records.values():
            record.value = None
        return values

    def complete(self, seen: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Return all routers' records and add their loads to the update's. Raises RunError naming routers without a record."""
        silent = [name for name, value in seen.items() if value is None]
        if silent:
            raise RunError(
                f"{', '.join(silent)}: routers without a record of the training forward, as inside a reentrant checkpoint",
                fix="--layer.recompute recompute-blocks",
            )
        layers = [value for value in seen.values() if value is not None]
        loads = torch.cat([value.detach()[0] for value in layers]).long()
        self._loads = loads if self._loads is None else self._loads + loads
        return layers

    def reduce_loads(
        self, ranks: Ranks, rate: float, meters: dict[str, tuple[Tensor, Tensor]], usable: Tensor | None = None
    ) -> None:
        """After an update: sum loads over ranks, move balancing biases by `rate`, add to the meters, and reset.

        Where `usable`, a scalar on the device, is False, the step counts as one without loads, which moves no bias.

        load_max: the most tokens of an expert over its layer's mean, in the worst layer; 1 is balanced.
        dead_experts: fraction of experts without a token.
        """
        if self._loads is None:
            return
        loads, self._loads = ranks.sum(self._loads), None
        one = torch.ones((), device=loads.device)
        if usable is not None:
            loads, one = loads * usable, one * usable
        layers = loads.double().split(self._sizes)
        if rate:
            for router, load in zip(self.found.values(), layers, strict=True):
                if router.trained():
                    update_balancing_bias(router, load, rate)
        worst = torch.stack([load.max() / load.mean().clamp(min=1e-9) for load in layers]).max()
        meter(meters, "load_max", worst.float() * one, one)
        meter(meters, "dead_experts", (loads == 0).float().mean() * one, one)
        self._since_row = loads if self._since_row is None else self._since_row + loads

    def percentages(self) -> Tensor | None:
        """Return each expert's load since the last call as a percentage of its layer's mean, on the device; None if no update ran."""
        if self._since_row is None:
            return None
        layers, self._since_row = self._since_row.double().split(self._sizes), None
        return torch.cat([100 * load / load.mean().clamp(min=1e-9) for load in layers]).float()

    def row(self, percentages: Sequence[float]) -> dict[str, list[int]]:
        """Format `percentages` for metrics.jsonl: "experts/<router>" -> rounded percentages by expert; 100 is balanced."""
        rest, row = [round(value) for value in percentages], {}
        for name, router in self.found.items():
            row[f"experts/{name}"], rest = rest[: router.experts], rest[router.experts :]
        return row
