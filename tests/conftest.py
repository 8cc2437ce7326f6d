"""Options and fixtures of all tests: the slow tier and the long set, property tests without deadlines, and garbage collection."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any-speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-speed")


# A shell ignores Ctrl-C in what it starts with `&`, and children inherit that: tests that send the signal would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--all` and `--long`."""
    parser.addoption("--all", action="store_true", help="run the slow tier too (tests marked slow)")
    parser.addoption("--long", action="store_true", help="run the slow tier and the long set too (tests marked long)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what the tier leaves out, except tests that a node id names; an expression of `-m` decides alone."""
    if config.option.long or config.option.markexpr:
        return
    others = ("long",) if config.option.all else ("slow", "long")
    named = [_node_id(config, argument) for argument in config.args if "::" in argument]
    left_out = [
        item for item in items if any(map(item.get_closest_marker, others)) and not any(_names(one, item) for one in named)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _node_id(config: pytest.Config, argument: str) -> str:
    """Return `tests/test_x.py::test_y`, given from any folder, as an absolute path and a name."""
    path, _, name = argument.partition("::")
    return f"{(config.invocation_params.dir / path).resolve()}::{name}"


def _names(node_id: str, item: pytest.Item) -> bool:
    full = f"{item.path}::{item.nodeid.partition('::')[2]}"
    return full == node_id or full.startswith(f"{node_id}[")


@pytest.fixture(autouse=True)
def _small_collections() -> Iterator[None]:
    """Exclude existing objects from collections: most are torch's and transformers', and a pass over them takes half a second,
    a fifth of the time of the layer tests.
    """
    gc.freeze()
    yield
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _garbage_of_the_module() -> Iterator[None]:
    """Collect cycles that the tests of a file left behind, including frozen ones."""
    yield
    gc.unfreeze()
    gc.collect()
