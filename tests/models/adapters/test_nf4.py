"""NF4: rounding as published, gradients through packed weights, and no saved unpacked weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gptoughts.config.recipe import AdapterConfig
from gptoughts.errors import ConfigError
from gptoughts.models.adapters.adapter import adapted
from gptoughts.models.adapters.nf4 import BLOCK, NF4Linear, pack, quantize, unpack
from gptoughts.models.family import FAMILIES
from tests.models.adapters.adapters import adapted_engine
from tests.support.engines import random_batches, recipe_of, steps

pytest.importorskip("bitsandbytes")
LEVELS = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip


def reference(weight: torch.Tensor) -> torch.Tensor:
    """Return the nearest of the 16 published levels times the largest magnitude of each 64 values."""
    flat = weight.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    most = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / most.clamp(min=1e-38))[..., None].sub(LEVELS).abs().argmin(dim=-1)
    return (LEVELS[nearest] * most).flatten()[: len(flat)].view(weight.shape)


def packed_linear(linear: nn.Linear) -> NF4Linear:
    with torch.device("meta"):
        holder = nn.ModuleDict({"x": nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)})
    quantize(holder, ["x"])
    made = holder["x"]
    assert isinstance(made, NF4Linear)
    made.packed, made.absmax = (nn.Parameter(part, requires_grad=False) for part in pack(linear.weight.detach()))
    made.bias = linear.bias
    return made


@given(st.integers(1, 40), st.integers(1, 80), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_values_are_the_nearest_of_sixteen(outer: int, half: int, seed: int) -> None:
    weight = torch.randn(outer, 2 * half, generator=torch.Generator().manual_seed(seed))
    got = unpack(*pack(weight), (outer, 2 * half), torch.float32)
    # Neighboring levels are at most 0.3039 of the largest magnitude apart; near ties may round either way.
    away = (got - reference(weight)).abs() > 1e-4 * weight.abs().max()
    assert away.float().mean() < 0.01
    assert bool(((got - weight).abs() <= 0.1520 * weight.abs().max() + 1e-6).all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_products_and_gradients_are_those_of_the_unpacked_weight_which_is_not_kept(bias: bool, autocast: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 192, bias=bias)
    packed = packed_linear(linear)
    linear.weight.data = packed.weight
    results, kept = [], []
    for module in (linear, packed):
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
        sizes: list[int] = []

        def note(tensor: torch.Tensor, into: list[int] = sizes) -> torch.Tensor:
            into.append(tensor.numel() if tensor.is_floating_point() else 0)
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            y = module(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad))
        kept.append(max(sizes))
    assert results[0][0].dtype == results[1][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=2e-2 if autocast else 1e-5, atol=1e-5)
    assert kept[0] >= 128 * 192 and kept[1] <= 128 * 192 / BLOCK


def test_weights_take_a_seventh_and_learn_nearly_as_well() -> None:
    batch = next(random_batches(recipe_of()))
    losses, sizes = {}, {}
    for base in ("full", "nf4"):
        adapter = AdapterConfig(kind="lora", rank=4, alpha=8.0, base=base)
        with adapted_engine(adapter, batches=iter([batch] * 15)) as engine:
            frozen = [(n, p) for n, p in engine.bare.blocks.named_parameters() if not p.requires_grad and "norm" not in n]
            sizes[base] = sum(parameter.numel() * parameter.element_size() for _, parameter in frozen)
            losses[base] = steps(engine, 15)
    assert sizes["full"] / sizes["nf4"] == pytest.approx(32 / 4.5)
    # Rounding moves the base by a few per cent of each weight: the losses of these initialized weights differ by less than 2 %.
    assert losses["nf4"][-1] == pytest.approx(losses["full"][-1], rel=0.02)


def test_an_odd_number_and_a_missing_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        holder = nn.ModuleDict({"x": nn.Linear(5, 3)})
    with pytest.raises(ConfigError, match=r"even number of weights in x. Found 15"):
        quantize(holder, ["x"])
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    family = adapted(FAMILIES["gpt"], AdapterConfig(kind="lora", base="nf4"))
    with pytest.raises(ConfigError, match="bitsandbytes: package not installed"), torch.device("meta"):
        family.build(recipe_of().model, 128, 32)
