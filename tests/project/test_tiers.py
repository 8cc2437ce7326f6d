"""The two tiers of tests: which tests run when, and which files may be slow as a whole."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.golden_files import ROOT

TESTS = ROOT / "tests"
SAMPLE = """
import pytest

def test_quick(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.parametrize("x", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_some(x): pass
"""
QUICK, SLOW = {"test_quick", "test_some[a]"}, {"test_slow", "test_some[b]"}
WHOLLY_SLOW = {"project/test_wheel.py"}
"""Files without a test in the default tier."""


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A folder with one file of tests, and the conftest.py of these tests."""
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_sample.py").write_text(SAMPLE, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        ([], QUICK),
        (["--all"], QUICK | SLOW),
        (["-m", "slow"], SLOW),
        (["-m", "not slow"], QUICK),
        (["--all", "-k", "some"], {"test_some[a]", "test_some[b]"}),
        (["-k", "slow"], set()),
        (["test_sample.py"], QUICK),
        (["test_sample.py::test_slow"], {"test_slow"}),
        (["test_sample.py::test_some"], {"test_some[a]", "test_some[b]"}),
        (["test_sample.py::test_some[b]"], {"test_some[b]"}),
        (["test_sample.py::test_quick"], {"test_quick"}),
        (["test_sample.py::test_slow", "-n1"], {"test_slow"}),
    ],
    ids=" ".join,
)
def test_the_default_tier_leaves_slow_tests_out(words: list[str], ran: set[str], sample: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=sample, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if "PASSED" in line]
    assert {word.partition("::")[2] for line in lines for word in line.split() if "::" in word} == ran, done.stdout


def test_this_session_runs_what_its_tier_holds(request: pytest.FixtureRequest) -> None:
    """No other hook of this repository leaves out a slow test under `--all`, or lets one into the default tier."""
    config = request.config
    held = [item for item in request.session.items if item.get_closest_marker("slow")]
    if config.option.all and not (config.option.keyword or config.option.markexpr or config.option.deselect or any("::" in one for one in config.args)):
        modules = {item.path for item in request.session.items}
        collected = {path for path in modules if any(True for _ in _slow_marks(path))}
        assert collected <= {item.path for item in held}
    elif not (config.option.all or config.option.markexpr or any("::" in one for one in config.args)):
        assert held == []


def test_no_file_leaves_the_default_tier_unnoticed() -> None:
    """Every file keeps a test in the default tier; a test of several parameters that is wholly slow is in `_functions` too."""
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


def _slow_marks(path: Path) -> Iterator[ast.AST]:
    """Yield places of a file that apply the mark to a test or to a parameter."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.slow":
            yield node
