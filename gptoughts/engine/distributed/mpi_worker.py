"""The thread that calls MPI, and the work that torch waits for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class MPIWork(dist.Work):
    """A collective that the thread has done or will do."""

    def __init__(self, future: torch.futures.Future[Any]) -> None:
        super().__init__()
        self._future = future

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for the end of the collective; MPI has no timeout. Raises what the collective raised."""
        self._future.wait()
        return True

    def is_completed(self) -> bool:
        """Return whether the collective has ended."""
        return self._future.done()

    def get_future(self) -> torch.futures.Future[Any]:
        """Return the future of the tensors, which DDP waits for."""
        return self._future


class Worker:
    """The thread that calls MPI, one call after another, so that backward and collectives overlap.

    DDP waits for the future of a bucket, which would never complete if the requests of MPI were waited for in `Work.wait`. One
    calling thread needs MPI_THREAD_SERIALIZED only.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], torch.futures.Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mpi", daemon=True)
        self._thread.start()

    def run(self, job: Callable[[], Any], device: torch.device | None = None) -> torch.futures.Future[Any]:
        """Queue a job. Returns the future of its result; `device` is the GPU of tensors in the result."""
        future: torch.futures.Future[Any] = torch.futures.Future(devices=[device] if device else None)
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        """End the thread after the jobs that are queued."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, future = entry
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)
            del entry, job, future  # tensors live until their collective ends, not until the next one
