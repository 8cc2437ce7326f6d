"""Writing text with a model: `sampling` chooses one token, `autoregressive` strings them together."""
