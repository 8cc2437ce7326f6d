"""Tokenizers: bytes, characters, BPE, tokenizer.json."""
