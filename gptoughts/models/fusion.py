"""Where a block can be fused: which norm precedes which projections. Layers that bring fused modules ask here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from gptoughts.models.gpt import GPT, NORM_EPSILON, Block, SwiGLU


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


def gpt_sites(model: nn.Module) -> list[Site]:
    """The three places of each block of the native GPT, largest first."""
    assert isinstance(model, GPT)
    normalization = "RMSNorm" if model.config.norm == "rmsnorm" else "LayerNorm"
    sites = []
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        name, attention, mlp = f"blocks.{index}", block.attention, block.mlp
        up, activation = (mlp.gate_up, "swiglu") if isinstance(mlp, SwiGLU) else (mlp.up, "gelu")
        norm = partial(Site, normalization=normalization, epsilon=NORM_EPSILON)
        sites.append(norm("norm-mlp", f"{name}.mlp", mlp, (up, mlp.down), block.norm2, activation=activation))
        sites.append(norm("norm-linear", f"{name}.attention.qkv", attention.qkv, (attention.qkv,), block.norm1))
        sites.append(Site("linear", f"{name}.attention.out", attention.out, (attention.out,)))
    return sites
