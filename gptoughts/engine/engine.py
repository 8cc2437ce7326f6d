"""The engine: model, optimizer, batches, and the verbs of a step. Layers wrap or replace verbs; the loop only calls them.

`forward_context`, `eval_context` and `grad_sync` are only wrapped: layers push context factories, the first pushed is outermost.
`backward`, `clip`, `step` and `materialize` may be wrapped by many layers and replaced by one.
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
from gptoughts.engine.objectives.base import Batch, Objective
from gptoughts.errors import RunError
from gptoughts.models.family import Family
from gptoughts.models.sources import Source
from gptoughts.models.torch_internals import convert_tensors, parameter_table

__all__ = ["Counters", "Engine", "Source", "Stateful", "Undo", "allocate"]

Undo = Callable[[], None]


class Stateful(Protocol):
    """A layer's memory that must survive a restart, such as a loss scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, None."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""


@dataclass
class Counters:
    """What the engine itself counts; a watched step reads the difference."""

    micro_batches: int = 0
    updates: int = 0
    data_wait_seconds: float = 0.0
    call_counts: Counter[str] = field(default_factory=Counter)
    """Calls of what a layer put in place, by the layer's name."""


@dataclass
class Engine:
    """Everything that one step needs. Layers change it inside `apply` and put it back below their `yield`."""

    model: nn.Module
    """What the loop calls; a wrapper such as DDP may stand around `bare`."""
    family: Family
    objective: Objective
    recipe: Recipe
    ranks: Ranks
    device: torch.device
    _: KW_ONLY
    batches: Iterator[tuple[Any, Any]]
    """Yields this rank's share of a global batch with the cursor to resume from after it. A loader layer brings it to the device."""
    bare: nn.Module = field(init=False)
    blocks: dict[str, nn.Module] = field(init=False)
    optimizer: torch.optim.Optimizer | None = None
    micro_batch: int | None = None
    """Sequences per forward; None takes the rank's whole share at once."""
    reduced_from: int | None = None
    """Sequences per forward before memory ran out; None where it never did."""
    repeatable: bool = True
    """Whether the gradient of a batch may be taken again: not where weights change within the backward."""
    extras: dict[str, Stateful] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    _contexts: dict[str, list[Callable[..., AbstractContextManager[Any]]]] = field(init=False)
    _verbs: dict[str, Callable[..., Any]] = field(init=False)
    _wrappers: dict[str, list[Callable[..., Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self.bare = self.model
        self.blocks = self.family.blocks(self.model)
        self._contexts = {"forward_context": [], "eval_context": [], "grad_sync": []}
        self._verbs = {"backward": Tensor.backward, "clip": self._clip, "step": self._step, "materialize": self._materialize}
        self._wrappers = {verb: [] for verb in self._verbs}

    # Verbs that are only wrapped.

    def forward_context(self) -> AbstractContextManager[Any]:
        """Around the forward of a training micro-batch."""
        return self._entered("forward_context")

    def eval_context(self) -> AbstractContextManager[Any]:
        """Around a forward without gradients: validation and generation."""
        return self._entered("eval_context")

    def grad_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; ranks exchange gradients in the last one."""
        return self._entered("grad_sync", last)

    def _entered(self, verb: str, *arguments: Any) -> ExitStack:
        stack = ExitStack()
        for factory in self._contexts[verb]:
            stack.enter_context(factory(*arguments))
        return stack

    def wrap_context(self, verb: str, factory: Callable[..., AbstractContextManager[Any]]) -> Undo:
        """Push a factory of contexts inside those already there. Returns the undo."""
        self._contexts[verb].append(factory)
        return lambda: self._contexts[verb].remove(factory)

    # Verbs that may be wrapped by many and replaced by one.

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar."""
        self._verb("backward")(loss)

    def clip(self) -> Tensor:
        """Scale gradients to at most `optim.clip_norm`. Returns the norm before, on the device."""
        return self._verb("clip")()

    def step(self) -> bool:
        """Update the weights and clear gradients. Returns whether an update took place."""
        return self._verb("step")()

    def materialize(self, source: Source) -> None:
        """Give every parameter that is still on meta memory and, from `source`, its value."""
        self._verb("materialize")(source)

    def _verb(self, verb: str) -> Callable[..., Any]:
        function = self._verbs[verb]
        for wrapper in reversed(self._wrappers[verb]):
            function = partial(wrapper, function)
        return function

    def replace(self, verb: str, function: Callable[..., Any]) -> Undo:
        """Put `function` in the place of a verb, inside whatever wraps it. Returns the undo."""
        before = self._verbs[verb]
        self._verbs[verb] = function
        return lambda: self._verbs.__setitem__(verb, before)

    def wrap(self, verb: str, wrapper: Callable[..., Any]) -> Undo:
        """Put `wrapper(inner, *arguments)` around a verb, inside the wrappers already there. Returns the undo."""
        self._wrappers[verb].append(wrapper)
        return lambda: self._wrappers[verb].remove(wrapper)

    def synchronize(self) -> None:
        """Wait for the device to finish what was asked of it, so that the time belongs to the steps that asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # Batches.

    def next_batch(self) -> tuple[Batch, Any]:
        """This rank's share of the next global batch, on the device, and its cursor. The wait is counted."""
        began = perf_counter()
        batch, cursor = next(self.batches)
        self.counters.data_wait_seconds += perf_counter() - began
        return batch, cursor

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """`batch` in slices of `micro_batch` sequences."""
        rows = len(next(iter(batch.values())))
        size = self.micro_batch or rows
        return [{key: value[start : start + size] for key, value in batch.items()} for start in range(0, rows, size)]

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that are trained."""
        return [parameter for parameter in self.bare.parameters() if parameter.requires_grad]

    # Baseline verbs.

    def _clip(self) -> Tensor:
        limit = self.recipe.optim.clip_norm
        return nn.utils.clip_grad_norm_(self.parameters(), limit if limit > 0 else float("inf"))

    def _step(self) -> bool:
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _materialize(self, source: Source) -> None:
        allocate(self.bare, self.device)
        self.family.retie(self.bare)
        self.family.buffers(self.bare, self.device)
        unwritten = []
        with torch.no_grad():
            for name, parameter in self.bare.named_parameters():
                value = source.tensor(name, parameter.shape)
                if value is None:
                    unwritten.append(name)
                    continue
                if value.shape != parameter.shape:
                    raise RunError(f"{name}: the source has shape {tuple(value.shape)}, the model {tuple(parameter.shape)}")
                parameter.copy_(value)
            kept = self.bare.state_dict().keys()
            for name, buffer in self.bare.named_buffers():
                saved = source.buffer(name) if name in kept else None
                if saved is not None:
                    buffer.copy_(saved)
        problems = [f"not written by any source: {', '.join(unwritten)}"] if unwritten else []
        problems += [f"held by the source and not used: {', '.join(source.unused())}"] if source.unused() else []
        if problems:
            raise RunError("weights do not fit the model\n  " + "\n  ".join(problems))


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give memory on `device` to every parameter that is on meta; move real tensors there, keeping their values, ties and identity."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in parameter_table(module).items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                parameter_table(module)[name] = made[id(parameter)]
    # Torch's own way to move a module: recurrent layers keep flat views of their weights that only this refreshes.
    convert_tensors(model, lambda tensor: tensor if tensor.is_meta else tensor.to(device))
