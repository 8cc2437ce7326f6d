"""No file outside gptoughts/layers/ uses a layer by its name: others ask the fields of `Layer`, so a plugin is treated like a shipped layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoughts.layers import CATALOG

PACKAGE = Path(__file__).parents[2] / "gptoughts"
OTHER_MEANINGS: dict[str, dict[str, str]] = {
    "gptoughts/api.py": {"auto": "the profile that matches the machine"},
    "gptoughts/cli/": {
        "auto": "the profile that matches the machine, or a choice of an option",
        "whole": "key of a bench result",
    },
    "gptoughts/config/aliases.py": dict.fromkeys(("fp16", "bf16", "tf32"), "an option name of another trainer"),
    "gptoughts/config/deepspeed_json.py": dict.fromkeys(("fp16", "bf16", "auto"), "a key or value of DeepSpeed"),
    "gptoughts/config/recipe.py": {"auto": "a choice of a key"},
    "gptoughts/data/": {
        "system": "role of a chat message",
        "plain": "name of a chat template",
        "prefetch": "name of a thread",
        "auto": "a choice of an option",
    },
    "gptoughts/diagnostics/": {
        "auto": "the profile that matches the machine",
        "whole": "key of a bench result",
        "threads": "key of a machine's figures",
        "liger": "extra of the package",
        "system": "label of a line",
        **dict.fromkeys(("fp32", "tf32", "bf16", "fp16"), "dtype of a matmul"),
    },
    "gptoughts/engine/": {
        "auto": "collectives by the device",
        "fused": "argument of torch's AdamW, and an implementation",
        "plain": "implementation of an optimizer",
        "whole": "attribute of a low-bit optimizer",
    },
    "gptoughts/hardware/": {
        "single": "launcher of one process",
        "threads": "key of a machine's figures",
        **dict.fromkeys(("tf32", "bf16", "fp16"), "dtype of a matmul, or an instruction set"),
    },
    "gptoughts/inference/": {
        "eager": "attn_implementation of transformers",
        "fused": "an attention of `load`",
        "auto": "a choice of an option",
    },
    "gptoughts/models/": {
        "eager": "attn_implementation of transformers",
        **dict.fromkeys(("fa2", "fa3", "fa4", "varlen"), "version of FlashAttention"),
    },
    "gptoughts/planning/kernel_names.py": {
        "sdpa": "part of a kernel's name",
        **dict.fromkeys(("flex", "fa2", "fa3", "fa4"), "implementation of a kernel"),
    },
    "gptoughts/planning/plan.py": {"fp32": "dtype of a matmul"},
    "gptoughts/planning/": {"auto": "the profile that matches the machine"},
    "gptoughts/run/": {"auto": "the profile that matches the machine", "threads": "key of a machine's figures"},
}
"""File or folder -> strings that equal a layer's name there and mean something else, with the meaning."""
BENCHMARKS = tuple(f"gptoughts/diagnostics/bench/{name}.py" for name in ("outside", "parity", "start", "step"))
"""Benchmarks that list the layers they are about."""
ASKS = ("layer", "layers", "catalog", "takes", "wishes", "chosen", "choice", "choices")
"""Names around a string by which it is a layer's, whatever it may mean elsewhere in the file."""


def uses(text: str, place: str) -> Iterator[str]:
    """Lines of `text` that use a layer's name; `place` is the file's path, for its other meanings."""
    allowed = {name for where, names in OTHER_MEANINGS.items() if place.startswith(where) for name in names}
    tree = ast.parse(text)
    for node in ast.walk(tree):
        asked = {part.value for one in _asking(node) for part in ast.walk(one) if isinstance(part, ast.Constant)}
        yield from (f"{place}:{node.lineno}: asks for the layer {name!r}" for name in sorted(_names(asked)))  # type: ignore[attr-defined]
        if isinstance(node, ast.Constant) and node.value in _names({node.value}) - allowed:
            yield f"{place}:{node.lineno}: {node.value!r}"


def _names(values: set[object]) -> set[str]:
    return {value for value in values if isinstance(value, str) and value in CATALOG}


def _asking(node: ast.AST) -> list[ast.AST]:
    """Parts of a comparison, call or subscript that are compared with, passed to or looked up in something about layers."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return sides if any(_is_about_layers(side) for side in sides) else []
    if isinstance(node, ast.Match):
        return [node] if _is_about_layers(node.subject) else []
    if isinstance(node, ast.Subscript):
        return [node.slice] if _is_about_layers(node.value) else []
    if isinstance(node, ast.Call):
        return [*node.args] if isinstance(node.func, ast.Attribute) and _last(node.func) in ("takes",) else []
    return []


def _is_about_layers(node: ast.AST) -> bool:
    """Whether an expression is `x.layer`, `layers["slot"]`, `catalog`, `layer.name` and the like."""
    while isinstance(node, ast.Subscript | ast.Call):
        node = node.value if isinstance(node, ast.Subscript) else node.func
        if isinstance(node, ast.Attribute) and node.attr in ("get", "choice"):
            node = node.value
    last = _last(node)
    if last == "name":
        return isinstance(node, ast.Attribute) and _last(node.value) in ("layer", "one", "choice")
    return last in ASKS


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def test_no_file_outside_uses_a_layers_name() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = str(path.relative_to(PACKAGE.parent))
        if path.relative_to(PACKAGE).parts[0] not in ("layers", "recipes", "profiles") and place not in BENCHMARKS:
            found += list(uses(path.read_text(encoding="utf-8"), place))
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        'if choice.layer == "bf16": pass',
        'if plan.layers["precision"] in ("bf16", "fp16"): pass',
        'if plan.layers.get("precision", "") != "fp32": pass',
        'if plan.choice("precision").layer == "bf16": pass',
        'if layer.name == "auto": pass',
        'if case.takes("precision", "bf16"): pass',
        'if case.wishes.get("compile") == "eager": pass',
        'tolerance = catalog["bf16"].tolerance',
        'match choice.layer:\n    case "threads": pass',
    ],
)
@pytest.mark.parametrize("place", ["gptoughts/diagnostics/trace.py", "gptoughts/run/run.py", "gptoughts/engine/engine.py"])
def test_a_layer_that_is_asked_for_by_name_is_found(line: str, place: str) -> None:
    """Also in files where the same word means something else."""
    assert any("asks for the layer" in use for use in uses(line, place))


@pytest.mark.parametrize("name", sorted(set(CATALOG) - {"auto"}))
def test_every_name_is_found_where_it_has_no_other_meaning(name: str) -> None:
    assert list(uses(f"x = {name!r}", "gptoughts/nowhere.py")) == [f"gptoughts/nowhere.py:1: {name!r}"]
