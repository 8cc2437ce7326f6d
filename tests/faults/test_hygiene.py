"""A long run gathers nothing: memory, file handles, threads, shared memory, temporary files (see hygiene.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.harness import VARIANTS, Runs, Variant
from tests.faults.hygiene import Found, Look, look, watch


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[2:], ids=lambda variant: variant.name)
def test_nothing_grows_over_ten_thousand_steps(runs: Runs, variant: Variant) -> None:
    found = watch(runs, variant, 10_000)
    assert not found.faults(), found


def test_what_grows_is_named() -> None:
    found = Found("single", 10, 1.0, 9 << 20, (5, 6), (2, 2), (0, 1), [0, 65 << 20], ["a"])
    assert found.faults() == [
        "handles grew from 5 to 6", "shared files grew from 0 to 1", "memory grew steadily by 9437184 bytes",
        "memory grew by 68157440 bytes", "left over: ['a']",
    ]  # fmt: skip


def test_a_look_counts_what_this_process_has_open(tmp_path: Path) -> None:
    before = look(os.getpid(), 0)
    with (tmp_path / "file").open("w"), Path("/dev/shm/gptoughts-look").open("w"):
        after = look(os.getpid(), 1)
    Path("/dev/shm/gptoughts-look").unlink()
    assert isinstance(after, Look) and after.resident_bytes > 1 << 20 and after.threads >= 1
    assert (after.handles - before.handles, after.shared_files - before.shared_files) == (2, 1)
