"""Find modules that compute exactly what Liger's kernels compute, by running them instead of matching model names.

Norms, gated MLPs and rotary functions of any library are run on small inputs. Only those that agree with the kernel (epsilon,
offset, rounding) are replaced.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoughts.models.gpt.attention import rotate_both
from gptoughts.models.gpt.gpt import GPT, Attention, RMSNorm, SwiGLU
from gptoughts.models.torch_internals import child_table, parameter_table, set_parts

Part = Literal["norm", "rope", "mlp"]
PARTS: tuple[Part, ...] = ("norm", "rope", "mlp")

ROTARY = "apply_rotary_pos_emb"
PATCHED = "_liger"
"""Attribute that marks a replaced function."""


@dataclass(frozen=True)
class Place:
    """Module that a kernel can replace, and the parameters of the kernel."""

    part: Part
    name: str
    module: nn.Module
    casts: str = ""
    """norm: "llama" rounds before multiplying by the weight, "gemma" after it."""
    offset: float = 0.0
    epsilon: float = 0.0

    def taken(self) -> bool:
        """Return whether the module is patched now."""
        forward = self.module.rotate if isinstance(self.module, Attention) else self.module.__dict__.get("forward")
        return hasattr(getattr(forward, "__func__", forward), PATCHED)


def places(model: nn.Module, parts: Iterable[Part]) -> tuple[list[Place], list[str]]:
    """Return modules that kernels of `parts` can replace, and names of similar modules that compute something else."""
    wanted, found, left = set(parts), [], []
    learned = isinstance(model, GPT) and model.config.positions == "learned"
    inside = [name for name, module in model.named_modules() if not isinstance(module, Attention) and _is_attention(module)]
    for name, module in model.named_modules():
        if "norm" in wanted and _is_norm(module):
            place = _norm(name, module, any(name.startswith(f"{one}.") for one in inside))
        elif "mlp" in wanted and _is_gated(module):
            place = Place("mlp", name, module) if _is_swiglu(module) else None
        elif "rope" in wanted and _is_rotary(module) and not learned:
            place = Place("rope", name, module) if _is_standard_rotary(module) else None
        else:
            continue
        found += [place] if place else []
        left += [] if place else [name]
    return found, left


def counted(found: list[Place]) -> Iterator[tuple[Part, int, int]]:
    """Yield (part, number of places, number of patched ones) for each part with places."""
    for part in PARTS:
        of_part = [place for place in found if place.part == part]
        if of_part:
            yield part, len(of_part), sum(place.taken() for place in of_part)


def _is_norm(module: nn.Module) -> bool:
    weight = parameter_table(module).get("weight")
    return (
        type(module).__name__.endswith("RMSNorm")
        and weight is not None
        and weight.dim() == 1
        and len(parameter_table(module)) == 1
    )


def _is_gated(module: nn.Module) -> bool:
    return isinstance(module, SwiGLU) or {"gate_proj", "up_proj", "down_proj"} <= child_table(module).keys()


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and bool(child_table(module))


def _is_rotary(module: nn.Module) -> bool:
    return isinstance(module, Attention) or any(name.startswith(ROTARY) for name in _global_names(type(module)))


def _global_names(kind: type[nn.Module]) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)  # transformers decorates it to rename arguments
    return code.co_names if code is not None else ()


def _norm(name: str, module: nn.Module, inside_attention: bool) -> Place | None:
    if isinstance(module, RMSNorm):
        return Place("norm", name, module, "gemma", 0.0, float(module.eps or torch.finfo(torch.float32).eps))
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float):
        return None
    for casts in ("llama", "gemma"):
        for offset in (0.0, 1.0):
            if _computes_norm(module, casts, offset, epsilon):
                # In attention a half-precision input meets a float32 weight: the module widens its output, the kernel does not.
                return None if casts == "llama" and inside_attention else Place("norm", name, module, casts, offset, epsilon)
    return None


def _width(module: nn.Module) -> int:
    weight = parameter_table(module)["weight"]
    assert weight is not None
    return len(weight)


def _computes_norm(module: nn.Module, casts: str, offset: float, epsilon: float) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        weight = torch.randn(_width(module), generator=generator)
        x = 3 * torch.randn(5, len(weight), generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            actual = _with(module, weight=nn.Parameter(weight.to(dtype)))(x.to(dtype))
            scaled = x.to(dtype).float() * torch.rsqrt(x.to(dtype).float().pow(2).mean(-1, keepdim=True) + epsilon)
            if casts == "llama":
                expected = (offset + weight.to(dtype)) * scaled.to(dtype)
            else:
                expected = ((offset + weight.to(dtype).float()) * scaled).to(dtype)
            if actual.dtype != expected.dtype or not torch.allclose(actual, expected, rtol=1e-5, atol=1e-6):
                return False
    return True


def _with(module: nn.Module, **parts: Any) -> nn.Module:
    """Return a shallow copy with other parameters or modules and the class's own forward."""
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    set_parts(
        twin,
        {name: parts.get(name, value) for name, value in parameter_table(module).items()},
        {name: parts.get(name, value) for name, value in child_table(module).items()},
    )
    return twin


def _is_swiglu(module: nn.Module) -> bool:
    if isinstance(module, SwiGLU):
        return True
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        linears = {name: nn.Linear(8, 8, bias=False) for name in ("gate_proj", "up_proj", "down_proj")}
        for linear in linears.values():
            linear.weight.copy_(torch.randn(8, 8, generator=generator))
        x = torch.randn(3, 8, generator=generator)
        expected = linears["down_proj"](F.silu(linears["gate_proj"](x)) * linears["up_proj"](x))
        try:
            actual = _with(module, **linears)(x)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # needs more inputs or other widths
            return False
    return isinstance(actual, Tensor) and torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


def _is_standard_rotary(module: nn.Module) -> bool:
    if isinstance(module, Attention):
        return True
    kind = type(module)
    if [name for name in _global_names(kind) if name.startswith(ROTARY)] != [ROTARY]:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    query, key = (torch.randn(2, heads, 5, 8, generator=generator, device="cpu") for heads in (4, 2))
    angle = torch.randn(2, 5, 4, generator=generator, device="cpu")
    cos, sin = angle.cos(), angle.sin()
    doubled = (torch.cat((table, table), dim=-1) for table in (cos, sin))
    try:
        actual = inspect.unwrap(kind.forward).__globals__[ROTARY](query, key, *doubled)
    except (RuntimeError, TypeError, ValueError):  # takes other tables
        return False
    expected = rotate_both(query, key, cos[:, None], sin[:, None])
    return all(torch.allclose(one, other, atol=1e-5) for one, other in zip(actual, expected, strict=True))
