"""Keep tensors that autograd saves for the backward in host memory.

On a GPU a side stream copies them to pinned memory during the forward and prefetches them in the backward, which needs them in reverse
order. On a CPU they are copied as well, so that everything but the streams can be tested.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

OUT, BACK, FORWARDS = "offload-activations", "offload-activations: back", "offload-activations: forwards"
LARGEST = "offload-activations: bytes of the largest that was too small"
WEIGHT_FORMS = (
    "ToCopyBackward",
    "TBackward",
    "TransposeBackward",
    "PermuteBackward",
    "ViewBackward",
    "UnsafeViewBackward",
    "AliasBackward",
)
"""Operators between a weight and the tensor that a matmul saves of it: autocast's cast, transposed or flattened."""
MOST_STEPS = 5


@dataclass
class Away:
    """One tensor in host memory, with the layout to restore it."""

    host: Tensor
    device: torch.device
    size: torch.Size
    stride: tuple[int, ...]
    place: int
    there: torch.cuda.Event | None = None
    """Recorded after the copy to the host."""
    fetched: tuple[Tensor, torch.cuda.Event] | None = None


@dataclass
class HostActivations:
    """Contexts for forwards, inside which saved tensors of at least `least_bytes` are offloaded.

    ahead         tensors to prefetch in the backward
    call_counts   counts offloaded and restored tensors, and forwards with at least `blocks` offloaded tensors; records the largest
                  tensor that was not offloaded because of its size alone
    """

    model: nn.Module
    least_bytes: int
    ahead: int
    blocks: int
    call_counts: Counter[str]
    _streams: tuple[Any, Any] | None = None

    def context(self) -> AbstractContextManager[None]:
        """Return the context for one forward."""
        weights = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        return _Forward(self, weights)

    def streams(self, device: torch.device) -> tuple[Any, Any]:
        """Return a stream per direction, so that neither waits for the other."""
        if self._streams is None:
            self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        return self._streams


@dataclass
class _Forward(AbstractContextManager[None]):
    """Saved tensors of one forward; lives as long as its autograd graph."""

    owner: HostActivations
    weights: set[int]
    away: dict[int, Away] = field(default_factory=dict)
    count: int = 0

    def __enter__(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        del self._hooks  # avoids a reference cycle, which only garbage collection would free
        self.owner.call_counts[FORWARDS] += self.count >= max(1, self.owner.blocks)

    def pack(self, tensor: Tensor) -> Tensor | Away:
        """Offload a tensor. Called by autograd for every saved tensor."""
        if not self._is_large(tensor):
            return tensor
        away = Away(_room(tensor), tensor.device, tensor.size(), tensor.stride(), self.count)
        if tensor.is_cuda:
            out, _ = self.owner.streams(tensor.device)
            out.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(out), torch.no_grad():
                away.host.copy_(tensor.detach(), non_blocking=True)
                away.there = out.record_event()
            tensor.record_stream(out)  # keeps its memory until the copy is done
        else:
            away.host.copy_(tensor.detach())
        self.away[self.count] = away
        self.count += 1
        self.owner.call_counts[OUT] += 1
        return away

    def unpack(self, held: Tensor | Away) -> Tensor:
        """Restore a tensor. Called by autograd in the backward."""
        if isinstance(held, Tensor):
            return held
        self.owner.call_counts[BACK] += 1
        self.away.pop(held.place, None)
        if held.device.type != "cuda":
            return held.host
        whole, ready = held.fetched or self._fetch(held)
        held.fetched = None
        for place in range(held.place - 1, held.place - 1 - self.owner.ahead, -1):
            waiting = self.away.get(place)
            if waiting is not None and waiting.fetched is None:
                waiting.fetched = self._fetch(waiting)
        current = torch.cuda.current_stream(held.device)
        current.wait_event(ready)
        whole.record_stream(current)
        return whole

    def _fetch(self, held: Away) -> tuple[Tensor, torch.cuda.Event]:
        _, back = self.owner.streams(held.device)
        assert held.there is not None
        with torch.cuda.stream(back), torch.no_grad():
            back.wait_event(held.there)
            whole = torch.empty_strided(held.size, held.stride, dtype=held.host.dtype, device=held.device)
            whole.copy_(held.host, non_blocking=True)
            return whole, back.record_event()

    def _is_large(self, tensor: Tensor) -> bool:
        """Return whether a tensor is large, non-overlapping, and neither a parameter nor a view or cast of one."""
        small, call_counts = tensor.nbytes < self.owner.least_bytes, self.owner.call_counts
        if small and tensor.nbytes <= call_counts[LARGEST]:
            return False
        if not self._could_travel(tensor):
            return False
        if small:
            call_counts[LARGEST] = tensor.nbytes
        return not small

    def _could_travel(self, tensor: Tensor) -> bool:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return False
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.size(), tensor.stride(), strict=True)):
            return False  # an expanded tensor takes less memory on the device
        return tensor.untyped_storage().data_ptr() not in self.weights and not _comes_from_a_weight(tensor)


def _room(tensor: Tensor) -> Tensor:
    """Allocate host memory with the tensor's strides: kernels depend on strides, and gradients must be bit-identical."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _comes_from_a_weight(tensor: Tensor) -> bool:
    node: Any = tensor.grad_fn
    for _ in range(MOST_STEPS):
        if node is None:
            return False
        name = node.name()
        if name.endswith("AccumulateGrad"):
            return True
        if not name.rstrip("0123456789").endswith(WEIGHT_FORMS):
            return False
        node = node.next_functions[0][0] if node.next_functions else None
    return False
