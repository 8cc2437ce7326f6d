"""One reference run for all tests of faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import harness


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> harness.Runs:
    """Return where tiny runs are made."""
    if not harness.can_compile():
        pytest.skip("the library of faults needs Linux and gcc")
    return harness.prepare(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def reference(runs: harness.Runs) -> Path:
    """Return the folder of the run that nothing disturbed."""
    ran = runs.run(runs.folder / "reference")
    assert ran.returncode == 0, ran.stderr[-3000:]
    return runs.folder / "reference"
