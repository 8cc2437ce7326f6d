"""APOLLO: AdamW's step sizes per channel, estimated from a randomly projected gradient, with a fraction of AdamW's memory.

Zhu et al. 2024, "APOLLO: SGD-like Memory, AdamW-level Performance". Projections are a function of (seed, parameter name, number of
renewals) and use no torch generator, so they are the same on every rank and after a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

GROWTH = 1.01
"""Limit on the growth of an update's norm from one step to the next (Fira, Chen et al. 2024)."""

SMALL = 1e-8
"""Avoids division by zero for a channel without gradient."""


class Apollo(torch.optim.Optimizer):
    """APOLLO over matrices; `rank` 1 with `per` tensor is APOLLO-Mini.

    params   name -> matrix
    rank     rank of the projected gradient, at most the matrix's smaller side
    scale    updates are multiplied by its square root to compensate for a low rank: 1 for channels, 128 for APOLLO-Mini
    per      one step size per channel of the longer side, or one per tensor
    gap      updates between new projections
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        rank: int,
        scale: float,
        per: Literal["channel", "tensor"],
        gap: int,
        seed: int,
    ) -> None:
        self._names = {id(parameter): name for name, parameter in params.items()}
        self._seed = seed
        settings = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "scale": scale, "per": per, "gap": gap,
        }  # fmt: skip
        super().__init__(list(params.values()), settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Run one update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, wide = self.state[parameter], gradient.shape[0] < gradient.shape[1]
        renewals, within = divmod(state.get("step", 0), group["gap"])
        if within == 0:
            state["projection"] = self._projection(parameter, renewals, group["rank"])
        state["step"] = state.get("step", 0) + 1
        projection = state["projection"]  # smaller side, rank
        low = projection.T @ gradient if wide else gradient @ projection
        adapted = _adam(low, state, group)
        if group["per"] == "tensor":
            factor = adapted.norm() / (low.norm() + SMALL)
        else:
            along = 0 if wide else 1
            factor = adapted.norm(dim=along, keepdim=True) / (low.norm(dim=along, keepdim=True) + SMALL)
        update = _limit_growth(gradient * factor, state)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * math.sqrt(group["scale"]))

    def _projection(self, parameter: nn.Parameter, renewals: int, rank: int) -> Tensor:
        """Draw normal values with variance 1 / rank, in float64 on the CPU: float32 normals differ between processors."""
        digest = hashlib.sha256(f"{self._seed}:{self._names[id(parameter)]}:{renewals}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        side = min(parameter.shape)
        rank = min(rank, side)
        normal = torch.randn(side, rank, generator=generator, dtype=torch.float64, device="cpu")
        return normal.div_(math.sqrt(rank)).to(parameter.device, parameter.dtype)


def _adam(low: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return Adam's update of the projected gradient."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
    (beta1, beta2), step = group["betas"], state["step"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(low, 1 - beta1)
    square.mul_(beta2).addcmul_(low, low, value=1 - beta2)
    return (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + group["eps"])


def _limit_growth(update: Tensor, state: dict[str, Any]) -> Tensor:
    """Scale `update` to at most GROWTH times the norm of the one before.

    After a zero update (an adapter's first, an expert without tokens) any norm is allowed.
    """
    norm = update.norm()
    if "norm" in state:
        most = state["norm"] * GROWTH
        shorter = torch.where((most > 0) & (norm > most), most / norm, torch.ones_like(norm))
        update, norm = update * shorter, norm * shorter
    state["norm"] = norm
    return update
