"""Import contracts hold, and what plans and helps loads neither torch nor numpy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.golden_files import ROOT

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "matplotlib", "rich")


def test_import_contracts(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


ROOT_MODULES = {"__init__", "__main__", "api", "console", "errors", "files", "processes"}
FOLDERS = {
    "cli", "config", "data", "diagnostics", "engine", "hardware", "inference", "layers", "models", "planning", "recipes", "run",
}  # fmt: skip


def test_the_package_root_is_frozen() -> None:
    """New code goes into a folder: the root holds the folders and a fixed set of modules."""
    root = ROOT / "gptoughts"
    assert {path.stem for path in root.glob("*.py")} <= ROOT_MODULES
    assert {path.name for path in root.iterdir() if path.is_dir() and path.name != "__pycache__"} == FOLDERS


def test_every_folder_has_a_rung() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    placed = {name.strip() for row in contracts[0]["layers"] for name in row.split("|")}
    there = {f"gptoughts.{path.stem}" for path in (ROOT / "gptoughts").glob("*.py") if not path.stem.startswith("__")}
    there |= {f"gptoughts.{path.parent.name}" for path in (ROOT / "gptoughts").glob("*/__init__.py")}
    assert there == placed
    assert len(contracts[0]["layers"]) == 10


CHILD = """
import contextlib, io, json, sys
from gptoughts.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    try:
        main(json.loads(sys.argv[1]))
    except SystemExit as left:
        assert not left.code, left.code
heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
print(json.dumps([heavy, len(out.getvalue())]))
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["plan", "gpt2-124m", "--profile", "auto", "--machine", "tests/machines/h100x8.json"],
        ["plan", "gpt-1b", "--profile", "h100-fp8", "--machine", "tests/machines/h100.json", "--json"],
        ["layers"],
        ["profiles"],
        ["recipes", "quickstart"],
    ],
    ids=" ".join,
)
def test_floor_0_verbs_load_nothing_heavy(words: list[str]) -> None:
    command = [sys.executable, "-c", CHILD, json.dumps(words), json.dumps(HEAVY)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    heavy, printed = json.loads(done.stdout)
    assert heavy == [] and printed > 100


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports when loaded or under TYPE_CHECKING; imports inside functions are left out."""
    found: set[str] = set()
    pending: list[ast.stmt] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If | ast.Try):
            pending += [*node.body, *node.orelse]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module for name in names} & modules
    return found


def test_no_import_circle_not_even_for_types() -> None:
    files = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
        for folder in ("gptoughts", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    graph = {name: imports_of(path, set(files)) for name, path in files.items()}
    assert sum(map(len, graph.values())) > 500
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
