"""The engine: model, optimizer, batches and step hooks. Layers wrap or replace hooks; the loop calls them.

`forward_context`, `eval_context` and `grad_sync` are context hooks: layers push context factories, the first pushed is outermost.
`attach`, `backward`, `clip`, `step` and `materialize` are function hooks: any number of layers may wrap one, and one layer may replace it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptoughts.config.loader import Recipe
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.distributed.shards import fill, whole
from gptoughts.engine.objectives.base import Batch, Objective
from gptoughts.engine.optim.update import update
from gptoughts.errors import RunError
from gptoughts.models.family import Family
from gptoughts.models.sources import Source, shape_of
from gptoughts.models.torch_internals import convert_tensors, parameter_table

__all__ = ["Counters", "Engine", "Source", "Stateful", "Undo", "allocate"]

Undo = Callable[[], None]


class Stateful(Protocol):
    """Layer state that checkpoints keep, such as a loss scale."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings and None by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class Counters:
    """Counters of the engine; evidence uses their difference over a watched step."""

    micro_batches: int = 0
    updates: int = 0
    data_wait_seconds: float = 0.0
    call_counts: Counter[str] = field(default_factory=Counter)
    """Calls of a layer's code, by the layer's name."""


@dataclass
class Engine:
    """Model, data and hooks of one step. Layers change it in `apply` and undo the change after their `yield`."""

    model: nn.Module
    """The module that the loop calls: `bare`, or a wrapper around it such as DDP."""
    family: Family
    objective: Objective
    recipe: Recipe
    ranks: Ranks
    device: torch.device
    _: KW_ONLY
    batches: Iterator[tuple[Any, Any]]
    """Yields this rank's share of a global batch and the cursor after it. A loader layer moves batches to the device."""
    bare: nn.Module = field(init=False)
    blocks: dict[str, nn.Module] = field(init=False)
    optimizer: torch.optim.Optimizer | None = None
    micro_batch: int | None = None
    """Sequences per forward; None for the rank's whole share."""
    reduced_from: int | None = None
    """Sequences per forward before the first out-of-memory error; None if there was none."""
    storage: torch.device | None = None
    """Device that holds the parameters between forwards if it is not `device`."""
    repeatable: bool = True
    """Whether a batch may be computed again: False where weights change during the backward."""
    usable: Tensor | None = None
    """Whether this step has a label, a finite loss and a finite gradient: a scalar on the device. None before the first step."""
    extras: dict[str, Stateful] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    report: Callable[[str], None] = lambda phase: None
    """Tells the failure watch that a phase began or made progress: `step`, `evaluation`, `save`, ..."""
    mark: Callable[[str], None] = lambda part: None
    """Called where a part of a step begins, by its name in `engine/progress.py`. A timer replaces it in the steps that it samples."""
    _contexts: dict[str, list[Callable[..., AbstractContextManager[Any]]]] = field(init=False)
    _hooks: dict[str, Callable[..., Any]] = field(init=False)
    _wrappers: dict[str, list[Callable[..., Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self.bare = self.model
        self.blocks = self.family.blocks(self.model)
        self._contexts = {"forward_context": [], "eval_context": [], "grad_sync": []}
        self._hooks = {
            "attach": self._attach,
            "backward": Tensor.backward,
            "clip": self._clip,
            "step": self._step,
            "materialize": self._materialize,
        }
        self._wrappers = {hook: [] for hook in self._hooks}

    # Context hooks.

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context of a training micro-batch's forward."""
        return self._entered("forward_context")

    def eval_context(self) -> AbstractContextManager[Any]:
        """Return the context of a forward without gradients: validation, generation, checkpoints."""
        return self._entered("eval_context")

    def grad_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch's forward and backward; ranks exchange gradients in the last one."""
        return self._entered("grad_sync", last)

    def _entered(self, hook: str, *arguments: Any) -> ExitStack:
        stack = ExitStack()
        for factory in self._contexts[hook]:
            stack.enter_context(factory(*arguments))
        return stack

    def wrap_context(self, hook: str, factory: Callable[..., AbstractContextManager[Any]]) -> Undo:
        """Add a context factory inside the existing ones. Returns the undo."""
        self._contexts[hook].append(factory)
        return lambda: self._contexts[hook].remove(factory)

    # Function hooks.

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Set `optimizer` over the model's parameters; a layer may shard its state first."""
        self._wrapped("attach")(optimizer)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, a scalar."""
        self._wrapped("backward")(loss)

    def clip(self) -> Tensor:
        """Clip gradients to the norm `optim.clip_norm`. Returns the norm before, on the device."""
        return self._wrapped("clip")()

    def step(self) -> bool:
        """Update the weights and clear the gradients. Returns False where the update was skipped."""
        return self._wrapped("step")()

    def materialize(self, source: Source) -> None:
        """Allocate parameters that are on meta, and copy all values from `source`. Raises RunError where they do not match."""
        self._wrapped("materialize")(source)

    def _wrapped(self, hook: str) -> Callable[..., Any]:
        function = self._hooks[hook]
        for wrapper in reversed(self._wrappers[hook]):
            function = partial(wrapper, function)
        return function

    def replace(self, hook: str, function: Callable[..., Any]) -> Undo:
        """Replace a function hook inside its wrappers. Returns the undo."""
        before = self._hooks[hook]
        self._hooks[hook] = function
        return lambda: self._hooks.__setitem__(hook, before)

    def wrap(self, hook: str, wrapper: Callable[..., Any]) -> Undo:
        """Add `wrapper(inner, *arguments)` around a function hook, inside the existing wrappers. Returns the undo."""
        self._wrappers[hook].append(wrapper)
        return lambda: self._wrappers[hook].remove(wrapper)

    @property
    def skips_bad_steps(self) -> bool:
        """Whether a step that is not `usable` must change no weight and no state."""
        return self.recipe.train.bad_step == "skip"

    def synchronize(self) -> None:
        """Wait for the device, so that queued work is counted to the step that queued it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # Batches.

    def next_batch(self) -> tuple[Batch, Any]:
        """Return this rank's share of the next global batch, on the device, and its cursor. Counts the wait."""
        began = perf_counter()
        batch, cursor = next(self.batches)
        self.counters.data_wait_seconds += perf_counter() - began
        return batch, cursor

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """Split `batch` into slices of `micro_batch` sequences."""
        rows = len(next(iter(batch.values())))
        size = self.micro_batch or rows
        return [{key: value[start : start + size] for key, value in batch.items()} for start in range(0, rows, size)]

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [parameter for parameter in self.bare.parameters() if parameter.requires_grad]

    # Baseline hooks.

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def _clip(self) -> Tensor:
        limit = self.recipe.optim.clip_norm
        return whole(nn.utils.clip_grad_norm_(self.parameters(), limit if limit > 0 else float("inf")))

    def _step(self) -> bool:
        assert self.optimizer is not None
        update(self.optimizer, self.usable if self.skips_bad_steps else None)
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _materialize(self, source: Source) -> None:
        allocate(self.bare, self.device, self.storage)
        self.family.retie(self.bare)
        self.family.buffers(self.bare, self.device)
        unwritten = []
        with torch.no_grad():
            for name, parameter in self.bare.named_parameters():
                shape = shape_of(parameter)
                value = source.tensor(name, shape)
                if value is None:
                    unwritten.append(name)
                    continue
                if value.shape != shape:
                    raise RunError(f"{name}: the model needs shape {tuple(shape)}", found=f"shape {tuple(value.shape)}")
                fill(parameter, value)
            kept = self.bare.state_dict().keys()
            for name, buffer in self.bare.named_buffers():
                saved = source.buffer(name) if name in kept else None
                if saved is not None:
                    buffer.copy_(saved)
        problems = [f"missing in the source: {', '.join(unwritten)}"] if unwritten else []
        problems += [f"unused in the source: {', '.join(source.unused())}"] if source.unused() else []
        if problems:
            raise RunError("weights: do not match the model\n  " + "\n  ".join(problems))


def allocate(model: nn.Module, device: torch.device, storage: torch.device | None = None) -> None:
    """Allocate parameters that are on meta on `storage` (default: `device`), and move all other tensors to `device`.

    Values, ties and identity stay. Of a sharded parameter only this rank's part is allocated.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in parameter_table(module).items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(
                        torch.empty_like(parameter, device=storage or device), parameter.requires_grad
                    )
                parameter_table(module)[name] = made[id(parameter)]
    # As Module.to moves tensors: only this refreshes the flat weight views of RNN modules.
    held = {id(parameter) for parameter in made.values()}
    convert_tensors(model, lambda tensor: tensor if tensor.is_meta or id(tensor) in held else tensor.to(device))
