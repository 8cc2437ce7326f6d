"""What holds for every test: no property test fails for a slow machine, and collections of garbage look at the test's own objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")


@pytest.fixture(autouse=True)
def _small_collections() -> Iterator[None]:
    """Keep what is here already out of the collections: most of it is torch and transformers, and to look at it takes half a second,
    which came to a fifth of all the time of the tests of layers.
    """
    gc.freeze()
    yield
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _garbage_of_the_module() -> Iterator[None]:
    """Free after each file what its tests left in cycles, the frozen ones too."""
    yield
    gc.unfreeze()
    gc.collect()
