"""A thread that reads batches ahead and copies them to the device on a side stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptoughts.data.device import as_tensor, to_device, widened


class Prefetcher(Iterator[tuple[dict[str, Tensor], Any]]):
    """`batches`, up to `depth` of them ahead. An error in the thread is raised where the batch was wanted.

    On CUDA each batch is copied into pinned memory, from there on a side stream to the device; the compute stream waits for the
    copy's event and the memory is not reused before the compute stream is past it.
    """

    def __init__(self, batches: Iterator[tuple[Any, Any]], device: torch.device, depth: int) -> None:
        self.served = 0
        self._batches = batches
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
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
            hosted = {key: as_tensor(value) for key, value in batch.items()}
            pinned = {key: value if value.is_cuda else value.pin_memory() for key, value in hosted.items()}
            moved = {key: value.to(self._device, non_blocking=True) for key, value in pinned.items()}
            event = torch.cuda.Event()
            event.record(self._stream)
        return moved, cursor, event

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
