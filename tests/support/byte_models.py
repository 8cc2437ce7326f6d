"""What the tests of generation share: a tokenizer of bytes and two forms of the native model."""

from __future__ import annotations

from collections.abc import Iterable

FORMS = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True},
    "modern": {"kv_heads": 2},
}


class Bytes:
    """UTF-8 bytes and an end-of-text id."""

    vocab_size = 257
    eot_id: int | None = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(index for index in ids if index < 256).decode(errors="replace")
