"""Reading ahead changes neither batches nor cursors, loses nothing, and passes errors on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gptoughts.data.device import to_device
from gptoughts.data.prefetch import Prefetcher
from gptoughts.errors import DataError

CPU = torch.device("cpu")


def numbered(limit: int, log: list[int] | None = None) -> Iterator[tuple[dict[str, Any], int]]:
    for number in range(1, limit + 1):
        if log is not None:
            log.append(number)
        yield {"input_ids": np.full((2, 3), number, dtype=np.uint16)}, number


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_batches_and_cursors_come_in_order_and_together(depth: int) -> None:
    prefetcher = Prefetcher(numbered(20), CPU, depth)
    for expected in range(1, 21):
        batch, cursor = next(prefetcher)
        assert cursor == expected
        assert batch["input_ids"].dtype == torch.int64
        assert int(batch["input_ids"][0, 0]) == expected
    assert prefetcher.served == 20
    with pytest.raises(StopIteration):
        next(prefetcher)
    with pytest.raises(StopIteration):  # and again, instead of waiting for ever
        next(prefetcher)
    prefetcher.close()


def test_what_was_read_ahead_and_not_used_is_not_in_the_cursor() -> None:
    read: list[int] = []
    prefetcher = Prefetcher(numbered(50, read), CPU, 4)
    cursor = [next(prefetcher)[1] for _ in range(3)][-1]
    prefetcher.close()
    assert cursor == 3
    assert len(read) > 3
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_an_error_in_the_thread_is_raised_where_the_batch_is_wanted() -> None:
    def broken() -> Iterator[tuple[dict[str, Any], int]]:
        yield from numbered(2)
        raise DataError("shard 3 is gone")

    prefetcher = Prefetcher(broken(), CPU, 2)
    next(prefetcher)
    next(prefetcher)
    for _ in range(2):
        with pytest.raises(DataError, match="shard 3 is gone"):
            next(prefetcher)
    prefetcher.close()


def test_ids_are_widened_and_read_only_arrays_are_copied() -> None:
    frozen = np.array([[1, 65535]], dtype=np.uint16)
    frozen.flags.writeable = False
    wide = np.array([[1, 4_000_000_000]], dtype=np.uint32)
    moved = to_device({"input_ids": frozen, "wide": wide, "labels": torch.tensor([[-100]])}, CPU)
    assert moved["input_ids"].tolist() == [[1, 65535]]
    assert moved["wide"].tolist() == [[1, 4_000_000_000]]
    assert moved["labels"].dtype == torch.int64
