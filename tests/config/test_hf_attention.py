"""What a model's attention does beyond a function that can be replaced, read from transformers' source."""

from __future__ import annotations

import pytest

from gptoughts.config.hf_attention import attention_needs


@pytest.mark.parametrize(
    ("content", "needs"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "qwen3"}, None),
        ({"model_type": "deepseek_v3"}, None),
        ({"model_type": "qwen3_next"}, None),
        ({"model_type": "gpt_oss"}, "attention sinks"),
        ({"model_type": "gemma2"}, "a cap on attention scores"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "a cap on attention scores"),
        ({"model_type": "gemma2", "attn_logit_softcapping": None, "attention_softcap": None}, None),
        ({"model_type": "doge"}, "a mask that it computes from its input"),
        ({"model_type": "bloom"}, "code of its own, without transformers' attention interface"),
        ({"model_type": "no-such-type"}, None),
        ({"model_type": "../../etc"}, None),
        ({}, None),
    ],
)
def test_needs_of_attention(content: dict[str, object], needs: str | None) -> None:
    assert attention_needs(content) == needs
