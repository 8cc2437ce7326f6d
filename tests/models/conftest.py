"""Small models for the tests of this folder."""

from collections.abc import Callable
from typing import Any

import pytest

from gptoughts.config.loader import ModelConfig
from gptoughts.models.family import family_of, initialize
from gptoughts.models.gpt.gpt import GPT

GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True}
MODERN = {"kv_heads": 2}

MakeModel = Callable[..., GPT]


@pytest.fixture
def make_model() -> MakeModel:
    """make_model(rows=96, sequence_length=16, seed=0, **config) -> an initialized GPT, in evaluation mode."""

    def make(rows: int = 96, sequence_length: int = 16, seed: int = 0, **words: Any) -> GPT:
        config = ModelConfig(**{"depth": 2, "width": 32, "heads": 4, **words})
        model = GPT(config, rows, sequence_length)
        initialize(model, family_of("gpt"), config, seed)
        return model.eval()

    return make


@pytest.fixture(params=[GPT2, MODERN], ids=["gpt2", "modern"])
def form(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Config options of each of the two forms."""
    return dict(request.param)
