"""Private attributes of torch, transformers and peft are read in one module, and each of its functions works on the installed versions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gptoughts.errors import GptoughtsError
from gptoughts.models import torch_internals as internals
from tests.support.golden_files import ROOT

OWNER = "gptoughts/models/torch_internals.py"
LIBRARIES = ("torch", "transformers", "peft")
ALLOWED = {
    ("gptoughts/data/text/workers.py", "_exit"),  # os._exit, which is documented
    ("gptoughts/engine/distributed/watch.py", "_exit"),
    ("gptoughts/processes.py", "_exit"),
    ("gptoughts/cli/ending.py", "_exit"),
    ("gptoughts/data/tokenizers/bpe.py", "_mergeable_ranks"),  # tiktoken
    ("gptoughts/engine/optim/low_bit.py", "_new_buffer"),  # torchao, whose class is extended there
    ("gptoughts/console.py", "torch.utils._pytree"),  # the name of a logger
}
BY_NAME = ("getattr", "setattr", "hasattr", "delattr", "attrgetter", "__setattr__", "__delattr__", "get", "pop")
DOTTED = re.compile(rf"({'|'.join(LIBRARIES)})(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*")


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def own_names(module: ast.Module) -> set[str]:
    """Private names that the classes of a file define: methods, fields, and attributes that they assign to self."""
    found: set[str] = set()
    for kind in (node for node in ast.walk(module) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(kind):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Constant) and node in set_by_name(kind):
                found.add(node.value)
    return found


def set_by_name(kind: ast.ClassDef) -> list[ast.AST]:
    """The names in `object.__setattr__(self, "name", ...)`."""
    return [
        node.args[1]
        for node in ast.walk(kind)
        if isinstance(node, ast.Call) and called(node) == "__setattr__" and len(node.args) == 3 and is_self(node.args[0])
    ]


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""


def constants(module: ast.Module) -> dict[str, str]:
    return {
        target.id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def reads(source: str) -> Iterator[str]:
    """Private names that a file reads from something that is not its own."""
    module = ast.parse(source)
    own, words = own_names(module), constants(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if DOTTED.fullmatch(alias.name))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            yield from (name for alias in node.names if DOTTED.fullmatch(name := f"{node.module}.{alias.name}"))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if not (is_self(node.value) and node.attr in own):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED.fullmatch(node.value):
            yield node.value
        elif isinstance(node, ast.Call) and called(node) in BY_NAME:
            for given in node.args:
                text = words.get(given.id) if isinstance(given, ast.Name) else getattr(given, "value", None)
                if isinstance(text, str) and private(text) and text not in own:
                    yield text
        elif isinstance(node, ast.Subscript) and "__dict__" in ast.unparse(node.value):
            name = getattr(node.slice, "value", None)
            yield from [name] if isinstance(name, str) and private(name) else []


def test_private_attributes_are_read_in_one_module() -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in sorted((ROOT / "gptoughts").rglob("*.py"))
        if str(path.relative_to(ROOT)) != OWNER
        for name in reads(path.read_text(encoding="utf-8"))
        if name != "_liger"  # the package's own mark on its functions
    }
    assert found - ALLOWED == set(), f"move these reads to {OWNER}"
    assert ALLOWED - found == set(), "read no longer: take it out"


@pytest.mark.parametrize(
    "source",
    [
        "from torch._dynamo import config",
        "from torch import _dynamo",
        "import torch._inductor.config as config",
        "def f():\n    from transformers.utils import _is_package_available",
        "import torch\ntorch._foreach_mul_([], 1)",
        "module._forward_hooks.clear()",
        "getattr(model, '_init_weights')",
        "MARK = '_is_hf_initialized'\nsetattr(weight, MARK, True)",
        "object.__setattr__(new, '_parameters', old)",
        "class Mine(nn.Module):\n    def f(self):\n        return self._parameters",
        "module.__dict__['_buffers']",
        "importlib.import_module('torch._guards')",
        "model._modules['head'] = head",
    ],
)
def test_a_private_read_is_found(source: str) -> None:
    assert list(reads(source))


@pytest.mark.parametrize(
    "source",
    [
        "from torch.nn import functional",
        "class Mine:\n    def __init__(self):\n        self._kept = 1\n    def f(self):\n        return self._kept",
        "module.__dict__['forward'] = forward",
        "import torch\ntorch.__version__",
    ],
)
def test_own_and_public_names_are_not(source: str) -> None:
    assert list(reads(source)) == []


def test_loading_it_loads_no_torch() -> None:
    code = f"import sys, {internals.__name__}; print([name for name in {LIBRARIES!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_what_is_missing_names_package_and_version() -> None:
    for act in (
        lambda: internals._read(nn.Linear(1, 1), "_gone"),
        lambda: internals._read(torch, "_gone"),
        lambda: internals._module("torch._gone"),
    ):
        with pytest.raises(
            GptoughtsError, match=rf"torch: private attribute \S*_gone is missing. Found {re.escape(version('torch'))}"
        ):
            act()
    with pytest.raises(GptoughtsError, match=r"transformers: private attribute Linear._gone is missing(.|\n)*transformers=="):
        internals._read(nn.Linear(1, 1), "_gone", "transformers")


def version(package: str) -> str:
    from importlib import metadata

    return metadata.version(package)


def test_the_versions_in_docstrings_are_those_checked() -> None:
    for name, function in vars(internals).items():
        if callable(function) and getattr(function, "__module__", "") == internals.__name__ and not name.startswith("_"):
            assert any(
                f"hecked on {package} {number}" in (function.__doc__ or "") for package, number in internals.CHECKED.items()
            ), name


# --- torch.nn.Module


def test_tables() -> None:
    module = nn.BatchNorm1d(3)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    holder = nn.Sequential(module)
    assert list(internals.parameter_table(module)) == ["weight", "bias"]
    assert list(internals.buffer_table(module)) == ["running_mean", "running_var", "num_batches_tracked", "scratch"]
    assert internals.unsaved_buffers(module) == {"scratch"}
    assert internals.child_table(holder) == {"0": module}
    internals.child_table(holder)["0"] = other = nn.Linear(2, 2)
    internals.parameter_table(other)["bias"] = bias = nn.Parameter(torch.ones(2))
    assert holder[0] is other and other.bias is bias


def test_shared_tables() -> None:
    source, all_of, parameters = nn.Linear(2, 2), nn.Module(), nn.Linear(2, 2)
    internals.share_tables(all_of, source)
    internals.share_parameters(parameters, source)
    source.weight = weight = nn.Parameter(torch.ones(2, 2))
    source.inner = inner = nn.ReLU()
    assert all_of.weight is weight and all_of.inner is inner and parameters.weight is weight
    assert not hasattr(parameters, "inner")


def test_new_parts() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    old = internals.child_table(module)
    internals.set_parts(module, {"extra": None}, {"0": nn.ReLU()})
    assert isinstance(module[0], nn.ReLU) and isinstance(old["0"], nn.Linear)
    assert list(internals.parameter_table(module)) == ["extra"]


def test_tensors_are_converted_in_place() -> None:
    module = nn.Linear(2, 2)
    weight = module.weight
    internals.convert_tensors(module, lambda tensor: tensor.double())
    assert module.weight is weight and weight.dtype == torch.float64


def test_compile_and_its_undo() -> None:
    module = nn.Linear(2, 2)
    assert not internals.is_compiled(module)
    module.compile(backend="eager")
    assert internals.is_compiled(module)
    internals.undo_compile(module)
    assert not internals.is_compiled(module)


def test_kinds_of_modules() -> None:
    assert isinstance(nn.Conv2d(1, 1, 1), internals.convolution_type())
    assert isinstance(nn.Dropout(), internals.dropout_type()) and not isinstance(nn.ReLU(), internals.dropout_type())


# --- tensors and operators


def test_the_version_of_a_tensor_rises_with_writes() -> None:
    tensor = torch.zeros(2)
    before = internals.version_of(tensor)
    tensor.add_(1)
    assert internals.version_of(tensor) == before + 1


def test_many_tensors_are_scaled_at_once() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    internals.scale_all(tensors, 0.5)
    assert all(bool((tensor == 0.5).all()) for tensor in tensors)


def test_matmul_with_scales() -> None:
    left = torch.ones(16, 16).to(torch.float8_e4m3fn)
    right = torch.ones(16, 16).to(torch.float8_e4m3fn).t()
    one = torch.ones(())
    try:
        made = internals.scaled_matmul()(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"no FP8 product on this machine: {error}")
    assert made.shape == (16, 16) and float(made[0, 0]) == 16


def test_a_dispatch_mode_sees_operators() -> None:
    seen = []

    class Watch(internals.dispatch_mode()):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2).add(1)
    assert "aten::add.Tensor" in seen


def test_allocation_history(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    import torch.cuda.memory as memory

    assert {"enabled", "context", "stacks", "device"} <= set(inspect.signature(memory._record_memory_history).parameters)
    calls: list[Any] = []
    monkeypatch.setattr(memory, "_record_memory_history", lambda **given: calls.append(given["enabled"]))
    with internals.allocation_history(torch.device("cuda")):
        assert calls == ["state"]
    assert calls == ["state", None]


# --- torch.compile


@pytest.fixture
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_limits_errors_and_metrics(fresh: None) -> None:
    assert internals.recompile_limit() > 0
    assert issubclass(internals.recompile_limit_error(), Exception)
    limit = internals.compilation_metrics_limit()
    assert limit is None or limit > 0
    internals.set_compilation_metrics_limit(1000)
    try:
        assert internals.compilation_metrics_limit() == 1000
        before = len(internals.compilation_metrics())
        torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(2))
        made = internals.compilation_metrics()[before:]
        assert made and made[-1].co_name == "<lambda>" and made[-1].recompile_reason is None
    finally:
        internals.set_compilation_metrics_limit(limit or 64)
    assert all(isinstance(value, float) for value in internals.compile_seconds().values()) and internals.compile_seconds()
    assert all(isinstance(value, int) for value in internals.inductor_counters().values())


def test_errors_of_the_compiler(fresh: None) -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(internals.compiler_error()):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))
    compiled = torch.compile(lambda x, n: x + n, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(internals.recompile_limit_error()):
        for number in range(3):
            compiled(torch.ones(2), number)


def test_tracing_is_noticed_and_constants_are_kept(fresh: None) -> None:
    seen = []

    def noted() -> bool:
        seen.append(internals.is_tracing())
        return True

    internals.constant_when_traced(noted)
    compiled = torch.compile(lambda x: x + 1 if noted() else x, backend="eager", fullgraph=True)
    compiled(torch.ones(2))
    compiled(torch.ones(2))
    assert seen == [True]
    noted()
    assert seen == [True, False]


def test_side_effects_under_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    before = internals.set_side_effects_once(True)
    assert before is not None and internals.set_side_effects_once(before) is True
    monkeypatch.setattr(internals, "RECOMPUTE_SWITCH", "no_such_switch")
    assert internals.set_side_effects_once(True) is None


def test_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = internals.caches_disabled()
    internals.disable_caches(True)
    try:
        assert internals.caches_disabled()
    finally:
        internals.disable_caches(before)
    assert internals.caches_disabled() == before
    assert Path(internals.default_graph_cache()).is_absolute()


# --- transformers


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def test_a_model_initializes_its_modules_but_for_those_marked(model: Any) -> None:
    head = model.lm_head
    with torch.no_grad():
        head.weight.fill_(7.0)
        with internals.initialized([head.weight]):
            internals.weight_initializer(model)(head)
        assert bool((head.weight == 7.0).all())
        internals.weight_initializer(model)(head)
        assert not bool((head.weight == 7.0).all())


def test_a_mark_that_was_there_stays(model: Any) -> None:
    weight = model.lm_head.weight
    weight._is_hf_initialized = True
    with internals.initialized([weight]):
        pass
    assert weight._is_hf_initialized
    del weight._is_hf_initialized


def test_attention_and_experts(model: Any) -> None:
    from transformers import Qwen3MoeConfig

    assert internals.takes_attention_functions(model)
    assert internals.attention_implementation(model.config) == "eager"
    assert internals.experts_implementation(Qwen3MoeConfig(experts_implementation="grouped_mm")) == "grouped_mm"
    assert internals.experts_implementation(SimpleNamespace()) is None


def test_tensors_that_are_not_loaded(model: Any) -> None:
    from transformers import DeepseekV3ForCausalLM

    assert internals.ignored_on_load(model) == []
    assert internals.ignored_on_load(DeepseekV3ForCausalLM) != []  # type: ignore[arg-type]


# --- torch.distributed


def test_the_store_of_the_process_group(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        store = internals.default_store().clone()
        store.set("key", "value")
        assert internals.default_store().get("key") == b"value"
    finally:
        dist.destroy_process_group()
