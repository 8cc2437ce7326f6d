"""The tiers of tests: which tests run when, and which files may be slow as a whole."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.golden_files import ROOT

pytest_plugins = ["pytester"]
TESTS = ROOT / "tests"
WORDS = ("-p", "no:cacheprovider")
SAMPLE = """
import pytest

def test_quick(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.long
def test_long(): pass

@pytest.mark.parametrize("x", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_some(x): pass
"""
"""Tests of both tiers."""
QUICK, SLOW = {"test_quick", "test_some[a]"}, {"test_slow", "test_some[b]"}
WHOLLY_SLOW = {"benchmarks/test_trackers.py", "project/test_wheel.py"}
"""Files without a test in the default tier."""
MARKS = ("pytest.mark.slow", "slow_unless(", "slow_except(", "slow_or_long(")
"""What puts a test, or some of its parameters, into the slow tier."""


@pytest.fixture
def sample(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with one file of tests and the conftest.py of these tests."""
    shutil.copy(TESTS / "conftest.py", pytester.path)
    pytester.makepyfile(test_sample=SAMPLE)
    pytester.makeini("[pytest]\nmarkers =\n  slow\n  long")
    return pytester


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        ([], QUICK),
        (["--all"], QUICK | SLOW),
        (["--long"], QUICK | SLOW | {"test_long"}),
        (["test_sample.py::test_long"], {"test_long"}),
        (["-m", "slow"], SLOW),
        (["-m", "not slow and not long"], QUICK),
        (["--all", "-k", "some"], {"test_some[a]", "test_some[b]"}),
        (["-k", "slow"], set()),
        (["test_sample.py"], QUICK),
        (["test_sample.py::test_slow"], {"test_slow"}),
        (["test_sample.py::test_some"], {"test_some[a]", "test_some[b]"}),
        (["test_sample.py::test_some[b]"], {"test_some[b]"}),
        (["test_sample.py::test_quick"], {"test_quick"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_slow_tests_run_when_asked_for(words: list[str], ran: set[str], sample: pytest.Pytester) -> None:
    assert collected(sample.runpytest_inprocess(*WORDS, "-v", *words)) == ran


def test_workers_run_the_tier_of_their_session(sample: pytest.Pytester) -> None:
    """Options and node ids reach the workers of pytest-xdist."""
    assert collected(sample.runpytest_subprocess(*WORDS, "-v", "-n1", "--all", "test_sample.py")) == QUICK | SLOW


def collected(result: pytest.RunResult) -> set[str]:
    """Return the tests that passed, from the lines of `pytest -v`."""
    passed = [line.split() for line in result.outlines if "PASSED" in line]
    return {word.partition("::")[2] for words in passed for word in words if "::" in word}


def test_this_session_holds_its_tier(request: pytest.FixtureRequest) -> None:
    """No hook or option of this repository drops slow tests from `--all`, or lets one into the default tier."""
    config, items = request.config, request.session.items
    narrowed = (
        config.option.keyword or config.option.markexpr or config.option.deselect or any("::" in word for word in config.args)
    )
    if narrowed:
        pytest.skip("a part of a tier was asked for")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    texts = {item.path: item.path.read_text(encoding="utf-8") for item in items if item.path != Path(__file__)}
    marked = {path for path, text in texts.items() if any(mark in text for mark in MARKS)}
    assert slow == (marked if config.option.all or config.option.long else set())


def test_no_file_leaves_the_default_tier_unnoticed() -> None:
    """Every file keeps a test in the default tier, but those listed."""
    wholly = {
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("test_*.py")
        if "device" not in path.relative_to(TESTS).parts
        if (functions := list(_functions(path))) and all(_is_slow(function) for function in functions)
    }
    assert wholly == WHOLLY_SLOW


def _functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def _is_slow(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "pytest.mark.slow" for decorator in function.decorator_list)
