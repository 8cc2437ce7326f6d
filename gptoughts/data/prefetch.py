"""A thread that reads batches ahead and copies them to the device on a side stream, out of pinned buffers that are used in turn."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gptoughts.data.device import as_tensor, to_device, widened


class Ring:
    """Host buffers used in turn. One is written again only when the copy out of it is over; pinning memory anew for every batch costs more
    than the copy.
    """

    def __init__(self, slots: int, allocate: Callable[[torch.Size, torch.dtype], Tensor]) -> None:
        self.allocated = 0
        """Buffers made so far; it stops growing once every slot has met the largest batch."""
        self._allocate = allocate
        self._buffers: list[dict[str, Tensor]] = [{} for _ in range(slots)]
        self._over: list[Callable[[], object]] = [lambda: None] * slots
        self._at = 0

    def filled(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`batch` in the next buffers, narrow types kept. Waits for the copy that last read them; call `sent` before the next."""
        self._over[self._at]()
        self._over[self._at] = lambda: None
        return {key: self._buffer(key, value).copy_(value) for key, value in batch.items()}

    def sent(self, over: Callable[[], object]) -> None:
        """The buffers just filled are being copied; `over` waits until they are."""
        self._over[self._at] = over
        self._at = (self._at + 1) % len(self._buffers)

    def _buffer(self, key: str, value: Tensor) -> Tensor:
        """The first elements of this slot's memory for `key`, in the shape of `value`; more memory where there is too little."""
        held = self._buffers[self._at].get(key)
        if held is None or held.dtype != value.dtype or held.numel() < value.numel():
            held = self._buffers[self._at][key] = self._allocate(torch.Size([value.numel()]), value.dtype)
            self.allocated += 1
        return held[: value.numel()].view(value.shape)


def pinned(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Page-locked host memory, which the device reads without the processor."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class Prefetcher(Iterator[tuple[dict[str, Tensor], Any]]):
    """`batches`, up to `depth` of them ahead. An error in the thread is raised where the batch was wanted.

    On CUDA each batch is written into the next pinned buffers of a ring, and copied from there to the device on a side stream. The compute
    stream waits for the copy's event; the device's memory is not reused before the compute stream is past it, the ring's not before
    the copy is over.
    """

    def __init__(self, batches: Iterator[tuple[Any, Any]], device: torch.device, depth: int) -> None:
        self.served = 0
        self._batches = batches
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ring = Ring(depth + 1, pinned)  # as many as are ready, and the one being filled
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> tuple[dict[str, Tensor], Any]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # whoever asks again gets the same answer instead of waiting for ever
            raise item
        batch, cursor, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in batch.values():
                tensor.record_stream(stream)
            batch = {key: widened(value) for key, value in batch.items()}
        self.served += 1
        return batch, cursor

    def close(self) -> None:
        """End the thread. Batches that it read ahead are dropped; the cursor of the last one served still says where to go on."""
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
            there = {key: as_tensor(value) for key, value in batch.items()}
            hosted = self.ring.filled({key: value for key, value in there.items() if not value.is_cuda})
            moved = {key: hosted.get(key, value).to(self._device, non_blocking=True) for key, value in there.items()}
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
