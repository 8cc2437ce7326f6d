"""`gptoughts generate`: text from a checkpoint, printed as it is written."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def generate(
    checkpoint: str, prompt: Sequence[str], tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> int:
    """Continue each prompt; `-` stands for what comes on standard input, no prompt for an empty one."""
    from gptoughts.errors import CheckpointError
    from gptoughts.generate.autoregressive import generate as write
    from gptoughts.loading import load, reading
    from gptoughts.models.gpt import GPT

    loaded = load(checkpoint)
    if not isinstance(loaded.model, GPT):
        raise CheckpointError(f"{loaded.folder} holds a {loaded.recipe.model.family} model; generate writes with gpt models")
    model = loaded.model
    prompts = [sys.stdin.read() if text == "-" else text for text in prompt] or [""]
    shown = -1

    def on_text(index: int, piece: str) -> None:
        nonlocal shown
        if index != shown:
            if shown >= 0:
                print("\n" + "-" * 40)
            print(prompts[index], end="")
            shown = index
        print(piece, end="", flush=True)

    with reading(loaded):
        write(model, loaded.tokenizer, prompts, tokens, temperature, top_k, top_p, seed, on_text=on_text)
    print()
    return 0
