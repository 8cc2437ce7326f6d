"""Models on meta: no initialization runs, and torch's compiler is not imported."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from gptoughts.models.meta import on_meta

BUILDS = """
import sys
from gptoughts.models.sources import meta_model
from gptoughts.config.loader import load
from gptoughts.models.family import FAMILIES
recipe = load("shakespeare-char").recipe
model = meta_model(recipe, FAMILIES["gpt"], 64)
assert all(parameter.is_meta for parameter in model.parameters())
assert "torch._dynamo" not in sys.modules
"""


def test_a_model_is_built_without_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", BUILDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_what_lies_on_meta_is_left_alone() -> None:
    with on_meta():
        inner = nn.Linear(3, 4)
        real = nn.init.normal_(torch.zeros(5, device="cpu"))
        kept = torch.zeros(5, device="cpu").uniform_(1.0, 2.0)
        named = nn.init.ones_(tensor=torch.empty(2))
    assert inner.weight.is_meta and named.is_meta
    assert real.abs().sum() > 0 and bool((kept >= 1).all())
    assert nn.Linear(3, 4).weight.abs().sum() > 0
