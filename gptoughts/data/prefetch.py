"""Prefetch batches in a thread and copy them to the device on a side stream, from a ring of pinned buffers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gptoughts.data.device import as_tensor, to_device, widen_ids


class Ring:
    """Ring of host buffers. A buffer is reused only after the copy from it has finished.

    Pinning memory for every batch takes longer than the copy.
    """

    def __init__(self, slots: int, allocate: Callable[[torch.Size, torch.dtype], Tensor]) -> None:
        self.allocated = 0
        """Number of buffers allocated so far; constant once every slot has held the largest batch."""
        self._allocate = allocate
        self._buffers: list[dict[str, Tensor]] = [{} for _ in range(slots)]
        self._wait: list[Callable[[], object]] = [lambda: None] * slots
        self._slot = 0

    def filled(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy `batch` to the next buffers, keeping dtypes. Waits for the last copy from them; call `sent` before the next call."""
        self._wait[self._slot]()
        self._wait[self._slot] = lambda: None
        return {key: self._buffer(key, value).copy_(value) for key, value in batch.items()}

    def sent(self, wait: Callable[[], object]) -> None:
        """Record that the filled buffers are being copied; `wait` blocks until the copy has finished."""
        self._wait[self._slot] = wait
        self._slot = (self._slot + 1) % len(self._buffers)

    def _buffer(self, key: str, value: Tensor) -> Tensor:
        """Return this slot's buffer for `key` in the shape of `value`; allocate a larger one if needed."""
        buffer = self._buffers[self._slot].get(key)
        if buffer is None or buffer.dtype != value.dtype or buffer.numel() < value.numel():
            buffer = self._buffers[self._slot][key] = self._allocate(torch.Size([value.numel()]), value.dtype)
            self.allocated += 1
        return buffer[: value.numel()].view(value.shape)


def pinned(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Allocate page-locked host memory."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class Prefetcher(Iterator[tuple[dict[str, Tensor], Any]]):
    """Iterator that reads up to `depth` batches ahead. An error in the thread is raised by `next()`.

    On CUDA each batch is written to the next pinned buffers of a ring and copied to the device on a side stream. The compute stream
    waits for the copy's event. Device memory is reused only after the compute stream has passed it, the ring's only after the copy.
    """

    def __init__(self, batches: Iterator[tuple[Any, Any]], device: torch.device, depth: int) -> None:
        self.served = 0
        self._batches = batches
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ring = Ring(depth + 1, pinned)  # `depth` batches ready and one being filled
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> tuple[dict[str, Tensor], Any]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # later calls raise the same error instead of blocking
            raise item
        batch, cursor, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in batch.values():
                tensor.record_stream(stream)
            batch = {key: widen_ids(value) for key, value in batch.items()}
        self.served += 1
        return batch, cursor

    def close(self) -> None:
        """Stop the thread and drop prefetched batches. The cursor of the last served batch stays valid for resuming."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def _fill(self) -> None:
        try:
            for batch, cursor in self._batches:
                if self._closed.is_set():
                    return
                self._put(self._copied(batch, cursor))
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _copied(self, batch: Any, cursor: Any) -> tuple[Any, Any, Any]:
        if self._stream is None:
            return to_device(batch, self._device), cursor, None
        with torch.cuda.stream(self._stream):
            tensors = {key: as_tensor(value) for key, value in batch.items()}
            pinned_batch = self.ring.filled({key: value for key, value in tensors.items() if not value.is_cuda})
            moved = {key: pinned_batch.get(key, value).to(self._device, non_blocking=True) for key, value in tensors.items()}
            event = torch.cuda.Event()
            event.record(self._stream)
        self.ring.sent(event.synchronize)
        return moved, cursor, event

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
