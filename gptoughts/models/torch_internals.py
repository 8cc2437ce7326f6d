"""Every private attribute of torch and transformers that the package reads, one function each. peft: none is read.

Each docstring names the versions that it was checked on; torch 2.11 (GPU image): not checked. A missing attribute raises GptoughtsError
with the package and its version. Loads neither torch nor transformers by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from gptoughts.errors import GptoughtsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CHECKED = {"torch": "2.13.0", "transformers": "5.24.0"}
"""The versions that the tests of this module ran on."""

MODULE_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
RECOMPUTE_SWITCH = "skip_fwd_side_effects_in_bwd_under_checkpoint"


def _missing(name: str, package: str) -> GptoughtsError:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        version = "not installed"
    return GptoughtsError(
        f"{package}: private attribute {name} is missing", found=version, fix=f"pip install {package}=={CHECKED[package]}"
    )


def _read(owner: Any, name: str, package: str = "torch") -> Any:
    """Return `owner.name`. Raises GptoughtsError where it is missing."""
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__qualname__
        raise _missing(f"{kind}.{name}", package) from None


def _module(name: str) -> Any:
    """Import a private module. Raises GptoughtsError where it is missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise _missing(name, name.partition(".")[0]) from None


# --- torch.nn.Module


def parameter_table(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's own parameters by name; writing to the table replaces them. Checked on torch 2.13.0."""
    table: dict[str, nn.Parameter | None] = _read(module, "_parameters")
    return table


def buffer_table(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own buffers by name; writing to the table replaces them. Checked on torch 2.13.0."""
    table: dict[str, Tensor | None] = _read(module, "_buffers")
    return table


def child_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the module's children by name; writing to the table replaces them. Checked on torch 2.13.0."""
    table: dict[str, nn.Module | None] = _read(module, "_modules")
    return table


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Return the names of the module's non-persistent buffers. Checked on torch 2.13.0."""
    names: set[str] = _read(module, "_non_persistent_buffers_set")
    return names


def share_tables(target: nn.Module, source: nn.Module) -> None:
    """Make `target` hold the parameter, buffer and child tables of `source` themselves, not copies. Checked on torch 2.13.0."""
    for name in MODULE_TABLES:
        object.__setattr__(target, name, _read(source, name))


def share_parameters(target: nn.Module, source: nn.Module) -> None:
    """Make `target` hold the parameter table of `source` itself, not a copy. Checked on torch 2.13.0."""
    object.__setattr__(target, "_parameters", parameter_table(source))


def set_parts(module: nn.Module, parameters: dict[str, nn.Parameter | None], children: dict[str, nn.Module | None]) -> None:
    """Give the module new parameter and child tables; the old tables stay as they are. Checked on torch 2.13.0."""
    for name, table in (("_parameters", parameters), ("_modules", children)):
        _read(module, name)
        object.__setattr__(module, name, table)


def convert_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Apply `function` to every tensor in place, as `Module.to` does; refreshes RNN weights. Checked on torch 2.13.0."""
    _read(module, "_apply")(function)


def is_compiled(module: nn.Module) -> bool:
    """Return whether `module.compile()` has been called. Checked on torch 2.13.0."""
    return _read(module, "_compiled_call_impl") is not None


def undo_compile(module: nn.Module) -> None:
    """Undo `module.compile()`. Checked on torch 2.13.0."""
    _read(module, "_compiled_call_impl")
    module._compiled_call_impl = None


def convolution_type() -> type[nn.Module]:
    """Return the base class of torch's convolutions. Checked on torch 2.13.0."""
    kind: type[nn.Module] = _read(_module("torch.nn.modules.conv"), "_ConvNd")
    return kind


def dropout_type() -> type[nn.Module]:
    """Return the base class of torch's dropout modules. Checked on torch 2.13.0."""
    kind: type[nn.Module] = _read(_module("torch.nn.modules.dropout"), "_DropoutNd")
    return kind


# --- tensors and operators


def version_of(tensor: Tensor) -> int:
    """Return the counter that autograd raises with each in-place write. Checked on torch 2.13.0."""
    version: int = _read(tensor, "_version")
    return version


def scale_all(tensors: Sequence[Tensor], factor: Any) -> None:
    """Multiply all tensors in place by a number or scalar tensor, in as few kernels as possible. Checked on torch 2.13.0."""
    import torch

    _read(torch, "_foreach_mul_")(tensors, factor)


def scaled_matmul() -> Callable[..., Tensor]:
    """Return torch's FP8 matmul with scales, `torch._scaled_mm`. Checked on torch 2.13.0."""
    import torch

    function: Callable[..., Tensor] = _read(torch, "_scaled_mm")
    return function


def dispatch_mode() -> type[Any]:
    """Return TorchDispatchMode, whose subclasses see every operator. Checked on torch 2.13.0."""
    kind: type[Any] = _read(_module("torch.utils._python_dispatch"), "TorchDispatchMode")
    return kind


@contextmanager
def allocation_history(device: torch.device) -> Iterator[None]:
    """Record the Python stack of each CUDA allocation. Checked on torch 2.13.0, with a replaced allocator call."""
    record = _read(_module("torch.cuda.memory"), "_record_memory_history")
    record(enabled="state", context="state", stacks="python", device=device)
    try:
        yield
    finally:
        record(enabled=None, device=device)


# --- torch.compile


def recompile_limit() -> int:
    """Return the most graphs that Dynamo makes of one function. Checked on torch 2.13.0."""
    limit: int = _read(_module("torch._dynamo.config"), "recompile_limit")
    return limit


def recompile_limit_error() -> type[Exception]:
    """Return the exception of fullgraph code that reached the recompile limit. Checked on torch 2.13.0."""
    kind: type[Exception] = _read(_module("torch._dynamo.exc"), "FailOnRecompileLimitHit")
    return kind


def compiler_error() -> type[Exception]:
    """Return the base class of Dynamo's exceptions. Checked on torch 2.13.0."""
    kind: type[Exception] = _read(_module("torch._dynamo.exc"), "TorchDynamoException")
    return kind


def compilation_metrics() -> list[Any]:
    """Return Dynamo's records of the latest compilations, oldest first. Checked on torch 2.13.0."""
    metrics: list[Any] = _read(_module("torch._dynamo.utils"), "get_compilation_metrics")()
    return metrics


def compilation_metrics_limit() -> int | None:
    """Return how many of those records Dynamo keeps; None where it keeps all. Checked on torch 2.13.0."""
    limit: int | None = _read(_module("torch._dynamo.utils"), "_compilation_metrics").maxlen
    return limit


def set_compilation_metrics_limit(limit: int) -> None:
    """Set how many of those records Dynamo keeps. Checked on torch 2.13.0."""
    _read(_module("torch._dynamo.utils"), "set_compilation_metrics_limit")(limit)


def inductor_counters() -> dict[str, int]:
    """Return a copy of Inductor's counters since the start of the process, such as cache hits. Checked on torch 2.13.0."""
    return dict(_read(_module("torch._dynamo.utils"), "counters")["inductor"])


def compile_seconds() -> dict[str, float]:
    """Return seconds in each of the compiler's phases since the start of the process. Checked on torch 2.13.0."""
    names, seconds = _read(_module("torch._dynamo.utils"), "compile_times")(repr="csv", aggregate=True)
    return {str(name): float(value) for name, value in zip(names, seconds, strict=True)}


def is_tracing() -> bool:
    """Return whether Dynamo is compiling in this thread. Checked on torch 2.13.0."""
    return _read(_module("torch._guards"), "CompileContext").try_get() is not None


def is_compiling() -> bool:
    """Return whether torch.compile works on a graph in this thread. Checked on torch 2.13.0."""
    return _read(_module("torch._guards"), "CompileContext").try_get() is not None


def constant_when_traced(function: Callable[..., Any]) -> None:
    """Make Dynamo call `function` once while it traces and keep the result as a constant in the graph.

    Sets the mark of `torch._dynamo.assume_constant_result`, and does not load the compiler. Checked on torch 2.13.0.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def set_side_effects_once(value: bool) -> bool | None:
    """Set whether a checkpoint inside compiled code repeats the forward's side effects when the backward recomputes it.

    Returns the setting before, or None where this torch has no such switch: it then refuses to compile such code. Checked on torch 2.13.0.
    """
    config = _module("torch._dynamo.config")
    before: bool | None = getattr(config, RECOMPUTE_SWITCH, None)
    if before is not None:
        setattr(config, RECOMPUTE_SWITCH, value)
    return before


def caches_disabled() -> bool:
    """Return whether Inductor's caches are off. Checked on torch 2.13.0."""
    return bool(_read(_module("torch._inductor.config"), "force_disable_caches"))


def disable_caches(value: bool) -> None:
    """Turn Inductor's caches off or on. Checked on torch 2.13.0."""
    config = _module("torch._inductor.config")
    _read(config, "force_disable_caches")
    config.force_disable_caches = value


def default_graph_cache() -> str:
    """Return the folder that Inductor keeps graphs in by default. Checked on torch 2.13.0."""
    folder: str = _read(_module("torch._inductor.runtime.cache_dir_utils"), "default_cache_dir")()
    return folder


# --- transformers


def weight_initializer(model: nn.Module) -> Callable[[nn.Module], None]:
    """Return the model's method that initializes the parameters and buffers of one module. Checked on transformers 5.24.0."""
    function: Callable[[nn.Module], None] = _read(model, "_init_weights", "transformers")
    return function


@contextmanager
def initialized(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Mark parameters as initialized, so that transformers' initialization leaves them alone. Checked on transformers 5.24.0."""
    mark = "_is_hf_initialized"
    marked = [parameter for parameter in parameters if not getattr(parameter, mark, False)]
    for parameter in marked:
        setattr(parameter, mark, True)
    try:
        yield
    finally:
        for parameter in marked:
            delattr(parameter, mark)


def takes_attention_functions(model: nn.Module) -> bool:
    """Return whether the model calls registered attention functions. Checked on transformers 5.24.0."""
    return bool(_read(model, "_can_set_attn_implementation", "transformers")())


def attention_implementation(config: Any) -> Any:
    """Return the name of the attention function that a config selects. Checked on transformers 5.24.0."""
    return _read(config, "_attn_implementation", "transformers")


def experts_implementation(config: Any) -> str | None:
    """Return the name of the experts function that a config selects; None where it has none. Checked on transformers 5.24.0."""
    return getattr(config, "_experts_implementation", None)


def ignored_on_load(model: nn.Module) -> list[str]:
    """Return regular expressions of checkpoint tensors that the model does not load. Checked on transformers 5.24.0."""
    return list(_read(model, "_keys_to_ignore_on_load_unexpected", "transformers") or ())


# --- torch.distributed


def default_store() -> Any:
    """Return the store of the process group. Checked on torch 2.13.0."""
    return _read(_module("torch.distributed.distributed_c10d"), "_get_default_store")()
