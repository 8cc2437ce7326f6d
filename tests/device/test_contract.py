"""Every layer that fits this box is seen at work on every family, undone without a trace, and not seen where it is not.

`tests/device/run.sh contract` starts it; by itself it runs too, on the first GPU: `pytest -o addopts= tests/device`.
"""

from __future__ import annotations

import faulthandler
import gc
import os
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from gptoughts.layers import CATALOG
from tests.device import contract
from tests.device.kept import LEAST_SECONDS, Deadline, Kept

TINY = bool(os.environ.get("DEVICE_TINY"))
ON_GPU = torch.cuda.is_available()
DEADLINE = Deadline(float(os.environ.get("DEVICE_SECONDS", "3600")))
MOST_SECONDS = 100 if ON_GPU else 300
"""One row may take so long; then its session ends with every thread's place printed, and the next goes on after it."""
ROWS = contract.names(TINY, os.environ.get("DEVICE_ONLY", ""))
LOST = 75

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU and not TINY, reason="no NVIDIA GPU; tests/device/run.sh contract --tiny runs on a CPU"),
]


@pytest.fixture(scope="session")
def kept() -> Kept:
    return Kept(os.environ.get("DEVICE_STAGE", "contract"))


@pytest.fixture(scope="session")
def plain() -> Iterator[contract.Plain]:
    made = contract.Plain()
    yield made
    made.close()


@pytest.mark.parametrize(("name", "family"), ROWS, ids=[f"{name}-{family}" for name, family in ROWS])
def test_layer_is_seen_is_undone_and_is_missed(name: str, family: str, kept: Kept, plain: contract.Plain) -> None:
    key = f"{name}-{family}"
    before = kept.runs.get(key)
    if before is not None and (before["passed"] or not os.environ.get("DEVICE_AGAIN")):
        pytest.skip("held")
    if DEADLINE.left() < LEAST_SECONDS:
        pytest.skip("no time left")
    kept.values["started"] = key
    kept.save()
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    try:
        row = contract.profile_row(family) if name == "profile" else contract.row_of(CATALOG[name], family, plain)
    except Exception as error:  # whatever it is, it goes into the file, and the next layer has its turn
        row = {"status": "error", "passed": False, "wrong": [f"{type(error).__name__}: {error}"[:3000]]}
    finally:
        faulthandler.cancel_dump_traceback_later()
    kept.values.pop("started")
    kept.keep(key, row)
    print(f"{key}: {row['status']} {'; '.join(row.get('wrong', []))[:300]}", flush=True)
    end_where_the_gpu_is_lost(row["passed"])
    assert row["passed"], "; ".join(row["wrong"])


def end_where_the_gpu_is_lost(passed: bool) -> None:
    """After an illegal access every later call fails, too: only a new process helps."""
    if not ON_GPU:
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        with suppress(Exception):
            faulthandler.cancel_dump_traceback_later()
        if not passed:
            pytest.exit(f"the GPU is lost to this process: {error}", returncode=LOST)
        raise
