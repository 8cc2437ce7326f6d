"""AdamW with moments and update in host memory: gradients are copied to the host, weights back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptoughts.engine.optim.param_groups import step_one
from gptoughts.errors import CheckpointError
from gptoughts.models.torch_internals import version_of

MARK = "state-on-cpu"


class OnHost(torch.optim.Optimizer):
    """Wrapper of `inner`, a fresh AdamW over device parameters, that lets it update copies in host memory.

    Each parameter has a float32 copy and a gradient buffer there, both pinned if the device is a GPU. All gradient copies are issued before
    the first is waited for, so updates overlap with copies. A weight written elsewhere since the last update is copied again.
    """

    made_by = "AdamW"
    """The state is AdamW's own, under its own names."""

    def __init__(self, inner: torch.optim.Optimizer, call_counts: Counter[str]) -> None:
        self.inner, self.call_counts = inner, call_counts
        self._copies: dict[int, _Copy] = {}
        super().__init__(inner.param_groups, inner.defaults)
        inner.param_groups = self.param_groups  # shared, so that a changed learning rate reaches both

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        waiting = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    copy = self._copy(parameter)
                    waiting.append((group, copy, copy.fetch()))
        for group, copy, arrived in waiting:
            if arrived is not None:
                arrived.synchronize()
            step_one(self.inner, group, copy.host)
            copy.send()
            self.call_counts[MARK] += 1
        return loss

    def stored(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of `parameter`."""
        return dict(self.state[parameter])

    def take(self, parameter: Tensor, values: Mapping[str, Any]) -> None:
        """Load the state of `parameter`, from `stored` or from AdamW on the device. Raises CheckpointError for a wrong shape."""
        wrong = [key for key in ("exp_avg", "exp_avg_sq") if key not in values or values[key].shape != parameter.shape]
        if wrong:
            raise CheckpointError(
                f"optimizer state: {', '.join(wrong)} missing, or not of the weight's shape {tuple(parameter.shape)}"
            )
        state = self._copy(parameter).state
        state.clear()
        state.update({key: value.cpu() if isinstance(value, Tensor) else value for key, value in values.items()})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state; an empty one resets the optimizer. Host copies are rebuilt."""
        super().load_state_dict(dict(state_dict))
        loaded = dict(self.state)
        self._copies.clear()
        self.inner.state.clear()
        self.state.clear()
        self.inner.param_groups = self.param_groups
        for parameter, values in loaded.items():
            self.take(parameter, values)

    def _copy(self, parameter: Tensor) -> _Copy:
        if id(parameter) not in self._copies:
            copy = self._copies[id(parameter)] = _Copy(parameter)
            self.inner.state[copy.host] = self.state[parameter] = copy.state  # one state under both keys
        return self._copies[id(parameter)]


class _Copy:
    """Host copy of one parameter."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.pinned = parameter, parameter.is_cuda
        self.host = torch.nn.Parameter(self._room())
        self.host.grad = None
        self.gradient = self._room()
        self.state: dict[str, Any] = {}
        self._version = -1

    def _room(self) -> Tensor:
        return torch.empty_like(self.parameter, device="cpu", pin_memory=self.pinned, requires_grad=False)

    def fetch(self) -> torch.cuda.Event | None:
        """Start copying the gradient, and the weight if it changed on the device. Returns the event to wait for."""
        assert self.parameter.grad is not None
        if version_of(self.parameter) != self._version:
            self.host.copy_(self.parameter, non_blocking=self.pinned)
        self.gradient.copy_(self.parameter.grad, non_blocking=self.pinned)
        self.host.grad = self.gradient
        if not self.pinned:
            return None
        arrived = torch.cuda.Event()
        arrived.record()
        return arrived

    def send(self) -> None:
        """Copy the updated weight to the device."""
        self.host.grad = None
        self.parameter.copy_(self.host, non_blocking=self.pinned)
        self._version = version_of(self.parameter)
