"""Ratchets: sizes, names, imports and silence. What a test here forbids has cost somebody an afternoon elsewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from gptoughts.cli.main import build_cli
from gptoughts.layers import CATALOG
from tests.support.golden_files import ROOT, compare

PACKAGE = ROOT / "gptoughts"
FILES = sorted(PACKAGE.rglob("*.py"))
SIZED = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py"))]
VENDORS = (
    "transformer_engine",
    "flash_attn",
    "flash_attn_interface",
    "deepspeed",
    "wandb",
    "mpi4py",
    "torchao",
    "bitsandbytes",
    "liger_kernel",
)
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
MOST_LINES_OF_A_FILE = 330
LONGER_FILES: dict[str, int] = {}
"""Files that are longer, with their limits; these may only fall."""
MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_THE_TRAINER = 150
NEEDS_GPU_MARKS = 0
"""Lines that only a GPU can reach, marked `# needs GPU`; lower it when one is covered, think twice before raising it."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(node: ast.AST) -> list[str]:
    """Modules that one statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def test_the_trainer_is_short_and_knows_no_layer() -> None:
    text = (PACKAGE / "engine" / "trainer.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < MOST_LINES_OF_THE_TRAINER
    # Names such as `whole`, `keep` or `single` are English words too, so only those that stand as strings count for them.
    distinct = [
        name for name in CATALOG if not re.fullmatch("[a-z]+", name) or name in ("ddp", "sdpa", "expandable", "prefetch")
    ]
    assert [name for name in distinct if re.search(rf"\b{re.escape(name)}\b", text)] == []
    assert [
        node.value
        for node in ast.walk(tree(PACKAGE / "engine" / "trainer.py"))
        if isinstance(node, ast.Constant) and node.value in CATALOG
    ] == []


def test_sizes() -> None:
    lengths = {str(path.relative_to(ROOT)): lines_of(path) for path in SIZED}
    assert {name: count for name, count in lengths.items() if count > LONGER_FILES.get(name, MOST_LINES_OF_A_FILE)} == {}
    assert [name for name in LONGER_FILES if lengths.get(name, 0) <= MOST_LINES_OF_A_FILE] == [], "short now: take it out"
    sizes = {place(path, node): (node.end_lineno or 0) - node.lineno + 1 for path in SIZED for node in functions(path)}
    assert {where: size for where, size in sizes.items() if size > MOST_LINES_OF_A_FUNCTION} == {}


def test_no_file_is_named_after_nothing() -> None:
    named = [path for folder in ("gptoughts", "tests", "launch") for path in (ROOT / folder).rglob("*")]
    assert [str(path) for path in named if path.stem in FORBIDDEN_NAMES] == []


def test_vendor_packages_are_imported_in_one_file_and_inside_functions() -> None:
    for vendor in VENDORS:
        found: dict[Path, list[ast.AST]] = {}
        for path in FILES:
            nodes = [node for node in ast.walk(tree(path)) if any(name.split(".")[0] == vendor for name in imported(node))]
            if nodes:
                found[path] = nodes
        assert len(found) <= 1, f"{vendor}: {[str(path) for path in found]}"
        for path, nodes in found.items():
            inside = {id(node) for function in functions(path) for node in ast.walk(function)}
            assert [place(path, node) for node in nodes if id(node) not in inside] == []


def test_layers_do_not_import_torch_when_loaded_nor_each_other() -> None:
    for path in sorted((PACKAGE / "layers").glob("*.py")):
        for node in tree(path).body:
            names = imported(node)
            assert not [name for name in names if name.split(".")[0] in ("torch", "numpy")], place(path, node)
            if path.stem not in ("__init__", "plugins"):
                assert not [
                    name
                    for name in names
                    if name.startswith("gptoughts.layers") and not name.startswith("gptoughts.layers.support")
                ], place(path, node)


def test_no_error_is_swallowed() -> None:
    """A bare or broad handler must do something other than go on: raise, record, or return what it caught."""
    silent = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            kinds = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"BaseException"}
            broad = bool(kinds & {"Exception", "BaseException"})
            uses_error = node.name is not None and any(
                isinstance(name, ast.Name) and name.id == node.name for part in node.body for name in ast.walk(part)
            )
            raises = any(isinstance(part, ast.Raise) for body in node.body for part in ast.walk(body))
            if broad and not (uses_error or raises):
                silent.append(place(path, node))
    assert silent == []


def test_everything_is_printed_by_the_console_which_escapes_it() -> None:
    """A name or text of a file must not send commands to the terminal."""
    found = []
    for path in FILES:
        if path == PACKAGE / "console.py":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer.write",
            ):  # fmt: skip
                found.append(place(path, node))
    assert found == []


def test_no_pickle() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if any(name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib") for name in imported(node)):
                found.append(place(path, node))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                found += [place(path, node)] if node.attr in ("load", "save") else []
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", None) is not False:
                found.append(place(path, node))
    assert found == []


def test_everything_public_has_a_docstring() -> None:
    without = []
    for path in FILES:
        module = tree(path)
        if module.body and not ast.get_docstring(module) and path.name != "__init__.py":
            without.append(str(path.relative_to(ROOT)))
        for node in module.body:
            is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if is_public and not ast.get_docstring(node) and "overload" not in map(ast.unparse, node.decorator_list):
                without.append(f"{place(path, node)} {node.name}")
    assert without == []


def test_marks_of_what_only_a_gpu_reaches() -> None:
    marks = [
        f"{path.relative_to(ROOT)}"
        for path in FILES
        for line in path.read_text(encoding="utf-8").splitlines()
        if "# needs GPU" in line
    ]
    assert len(marks) <= NEEDS_GPU_MARKS, marks


def flag_lines(command: click.Command, name: str) -> Iterator[str]:
    """Every verb, argument and flag with what it takes, without their help."""
    context = click.Context(command, info_name=name)
    if isinstance(command, click.Group):
        for one in command.list_commands(context):
            yield from flag_lines(command.commands[one], f"{name} {one}")
        return
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Argument):
            yield f"{name} {parameter.human_readable_name}"
        elif isinstance(parameter, click.Option):
            takes = "" if parameter.is_flag else f" {parameter.make_metavar(context)}"
            yield f"{name} {' '.join(parameter.opts)}{takes}"


def test_flags() -> None:
    """Flags are a promise: a new, renamed or vanished one is a change that somebody accepts."""
    compare(ROOT / "tests" / "golden" / "flags.txt", "\n".join(flag_lines(build_cli(), "gptoughts")) + "\n")


@pytest.mark.parametrize("path", sorted((ROOT / "gptoughts" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_say_nothing_about_speed(path: Path) -> None:
    words = [name for name in CATALOG if not CATALOG[name].baseline]
    code = "\n".join(
        line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("note")
    )
    assert [word for word in words if f'"{word}"' in code] == []


MAX_POSITIONAL = 6
LONGER_SIGNATURES = {
    "gptoughts/models/hf/attention.py": "transformers calls these by position",
}
"""Files with functions of more positional parameters, and why. Callbacks of click in cli/ get theirs by name."""


def test_functions_take_at_most_six_positional_parameters() -> None:
    longer = []
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for node in functions(path):
            count = len([one for one in (*node.args.posonlyargs, *node.args.args) if one.arg not in ("self", "cls")])
            if count > MAX_POSITIONAL and name not in LONGER_SIGNATURES and not name.startswith("gptoughts/cli/"):
                longer.append(f"{place(path, node)} {node.name}")
    assert longer == []
