"""Sites in a model's blocks for fused or quantized modules: norms with their projections, and single projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import nn

from gptoughts.models.gpt.gpt import GPT, NORM_EPSILON, Block, SwiGLU
from gptoughts.models.hf.experts import routers

ADAPTER_PART = ".lora_"


@dataclass(frozen=True)
class Site:
    """Site that a fused module can replace.

    norm-linear   `linears` = (projection,): norm, projection
    norm-mlp      `linears` = (up, down): norm, up, activation, down; a gated up contains gate, then up
    linear        `linears` = (projection,)
    `at` is the module whose forward is replaced; `norm` becomes the identity.
    """

    kind: Literal["norm-linear", "norm-mlp", "linear"]
    name: str
    at: nn.Module
    linears: tuple[nn.Linear, ...]
    norm: nn.Module | None = None
    normalization: str = ""
    activation: str = ""
    epsilon: float = 1e-5

    @property
    def widths(self) -> tuple[int, ...]:
        """Return input and output width of every projection."""
        return tuple(width for linear in self.linears for width in (linear.in_features, linear.out_features))

    def divisible(self, by: int) -> bool:
        """Return whether every width is a multiple of `by`."""
        return not any(width % by for width in self.widths)


@dataclass(frozen=True)
class Projections:
    """nn.Linear modules of a model's repeated blocks by name, and counts of the excluded ones."""

    linears: dict[str, nn.Linear]
    left_out: Counter[str] = field(default_factory=Counter)
    """Keys: "routers", "experts" (a stacked tensor or one expert's projection counts as one), "adapter parts"."""

    def split(self, by: int) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
        """Return (projections whose widths are multiples of `by`, the others)."""
        divisible = {name: one for name, one in self.linears.items() if not (one.in_features % by or one.out_features % by)}
        return divisible, {name: one for name, one in self.linears.items() if name not in divisible}


def gpt_sites(model: nn.Module) -> list[Site]:
    """Return the sites of each block of the native GPT, largest first: three, or one per projection for a layer norm without bias.

    Fused layer-norm modules have a bias in the norm; if the model has none, that bias would be trained outside of the model.
    """
    assert isinstance(model, GPT)
    normalization = "RMSNorm" if model.config.norm == "rmsnorm" else "LayerNorm"
    sites = []
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        name, attention, mlp = f"blocks.{index}", block.attention, block.mlp
        up, activation = (mlp.gate_up, "swiglu") if isinstance(mlp, SwiGLU) else (mlp.up, "gelu")
        if normalization == "LayerNorm" and getattr(block.norm1, "bias", None) is None:
            plain = {"attention.qkv": attention.qkv, "attention.out": attention.out, "mlp.up": up, "mlp.down": mlp.down}
            sites += [Site("linear", f"{name}.{path}", linear, (linear,)) for path, linear in plain.items()]
            continue
        norm = partial(Site, normalization=normalization, epsilon=NORM_EPSILON)
        sites.append(norm("norm-mlp", f"{name}.mlp", mlp, (up, mlp.down), block.norm2, activation=activation))
        sites.append(norm("norm-linear", f"{name}.attention.qkv", attention.qkv, (attention.qkv,), block.norm1))
        sites.append(Site("linear", f"{name}.attention.out", attention.out, (attention.out,)))
    return sites


def linear_sites(found: Projections) -> list[Site]:
    """Return one site per projection, for models whose norms are not known."""
    return [Site("linear", name, linear, (linear,)) for name, linear in found.linears.items()]


def projections(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Projections:
    """Return the projections inside `blocks` (name in `model` -> block), without embedding and head.

    Excluded are routers, where small errors change the chosen experts; experts, whose token counts differ per step; and the low-rank
    parts of an adapter.
    """
    mixtures = routers(model)
    moe_blocks = {name.rpartition(".")[0] for name in mixtures}
    linears: dict[str, nn.Linear] = {}
    left_out: Counter[str] = Counter()
    for block_name, block in blocks.items():
        for inner, module in block.named_modules():
            name = f"{block_name}.{inner}" if inner else block_name
            left_out["experts"] += sum(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
            if _within(name, mixtures):
                left_out["routers"] += name in mixtures
            elif isinstance(module, nn.Linear):
                kind = _excluded(name, model, moe_blocks)
                if kind:
                    left_out[kind] += 1
                else:
                    linears[name] = module
    return Projections(linears, +left_out)


def _excluded(name: str, model: nn.Module, moe_blocks: set[str]) -> str:
    if ADAPTER_PART in name:
        return "adapter parts"
    lists = (parent for parent in _parents(name) if isinstance(model.get_submodule(parent), nn.ModuleList))
    return "experts" if any(parent.rpartition(".")[0] in moe_blocks for parent in lists) else ""


def _within(name: str, modules: Mapping[str, object]) -> bool:
    return name in modules or any(parent in modules for parent in _parents(name))


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
