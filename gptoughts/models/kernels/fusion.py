"""Where a block can be fused or quantized: which norm precedes which projections, and which projections there are at all."""

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
    """One place that a fused module can take over.

    norm-linear   `linears` = (projection,): norm then projection
    norm-mlp      `linears` = (up, down): norm, up, activation, down; a gated up holds gate then up
    linear        `linears` = (projection,)
    `at` is the module whose forward the fused one replaces, `norm` the one that then passes its input through.
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
        """Every width of every projection, in and out."""
        return tuple(width for linear in self.linears for width in (linear.in_features, linear.out_features))

    def divisible(self, by: int) -> bool:
        """Whether every width is a multiple of `by`."""
        return not any(width % by for width in self.widths)


@dataclass(frozen=True)
class Projections:
    """The nn.Linear of a model's repeated blocks by name, and what inside the blocks multiplies and is none of them."""

    linears: dict[str, nn.Linear]
    left_out: Counter[str] = field(default_factory=Counter)
    """"routers", "experts" (a stacked tensor or one expert's projection counts one), "adapter parts"."""

    def split(self, by: int) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
        """Those whose widths are multiples of `by`, and the others."""
        fitting = {name: one for name, one in self.linears.items() if not (one.in_features % by or one.out_features % by)}
        return fitting, {name: one for name, one in self.linears.items() if name not in fitting}


def gpt_sites(model: nn.Module) -> list[Site]:
    """The places of each block of the native GPT, largest first: three, or with a layer norm that has no bias one per projection.

    Fused modules of layer norm and projection have a bias in the norm, and a bias that is not the model's own could not be trained with it.
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
            sites += [Site("linear", f"{name}.{where}", linear, (linear,)) for where, linear in plain.items()]
            continue
        norm = partial(Site, normalization=normalization, epsilon=NORM_EPSILON)
        sites.append(norm("norm-mlp", f"{name}.mlp", mlp, (up, mlp.down), block.norm2, activation=activation))
        sites.append(norm("norm-linear", f"{name}.attention.qkv", attention.qkv, (attention.qkv,), block.norm1))
        sites.append(Site("linear", f"{name}.attention.out", attention.out, (attention.out,)))
    return sites


def linear_sites(found: Projections) -> list[Site]:
    """One place per projection, for models of which no more is known than where their projections are."""
    return [Site("linear", name, linear, (linear,)) for name, linear in found.linears.items()]


def projections(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Projections:
    """Projections inside `blocks` (name in `model` -> block). Embedding and head lie outside of them.

    Left out are routers, whose choice of experts small errors turn over; experts, whose number of tokens differs from step to step; and the
    low-rank parts of an adapter.
    """
    mixtures = routers(model)
    beside = {name.rpartition(".")[0] for name in mixtures}
    linears: dict[str, nn.Linear] = {}
    left_out: Counter[str] = Counter()
    for at, block in blocks.items():
        for inner, module in block.named_modules():
            name = f"{at}.{inner}" if inner else at
            left_out["experts"] += sum(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
            if _within(name, mixtures):
                left_out["routers"] += name in mixtures
            elif isinstance(module, nn.Linear):
                kind = _no_projection(name, model, beside)
                if kind:
                    left_out[kind] += 1
                else:
                    linears[name] = module
    return Projections(linears, +left_out)


def _no_projection(name: str, model: nn.Module, beside: set[str]) -> str:
    if ADAPTER_PART in name:
        return "adapter parts"
    lists = (parent for parent in _parents(name) if isinstance(model.get_submodule(parent), nn.ModuleList))
    return "experts" if any(parent.rpartition(".")[0] in beside for parent in lists) else ""


def _within(name: str, of: Mapping[str, object]) -> bool:
    return name in of or any(parent in of for parent in _parents(name))


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
