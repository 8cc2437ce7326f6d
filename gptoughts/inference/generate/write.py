"""Text from any trained model: token by token where it predicts the next one, by denoising where it fills masks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from gptoughts.config.loader import Recipe
from gptoughts.errors import ConfigError
from gptoughts.inference.generate import autoregressive, diffusion
from gptoughts.inference.generate.autoregressive import OnText, Tokenizer


def write(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[str] | list[list[int]],
    recipe: Recipe,
    mask_id: int | None,
    top_p: float = 1.0,
    seed: int | None = None,
    on_text: OnText | None = None,
    stops: Collection[int] = (),
) -> list[str]:
    """A continuation, as text, of each prompt, a text or ids, by the recipe's [sample] table, for masked diffusion by [diffusion] as well.

    `seed` is the recipe's where it is not given. `on_text` receives text as it is written; denoised text comes as a whole. Ids in
    `stops` end a text, as end-of-text does.
    """
    ask, draw = recipe.sample, recipe.seed if seed is None else seed
    if mask_id is None:
        continued: list[Any] = autoregressive.generate(
            model, tokenizer, prompts, ask.tokens, ask.temperature, ask.top_k, top_p, draw, on_text=on_text, stops=stops
        )
        return _texts(tokenizer, prompts, continued)
    noise = recipe.diffusion
    denoised: list[Any] = diffusion.generate(
        model,
        tokenizer,
        prompts,
        mask_id,
        max_new_tokens=ask.tokens,
        steps=noise.steps,
        block_length=noise.block_length,
        remasking=noise.remasking,
        temperature=ask.temperature,
        guidance=noise.guidance,
        seed=draw,
        stops=stops,
    )
    written = _texts(tokenizer, prompts, denoised)
    for index, text in enumerate(written):
        if on_text is not None:
            on_text(index, text)
    return written


def _texts(tokenizer: Tokenizer, prompts: Sequence[Any], written: Sequence[Any]) -> list[str]:
    return [
        new if isinstance(new, str) else autoregressive.continuation(tokenizer, before, new)
        for before, new in zip(prompts, written, strict=True)
    ]


def room(model: Any, recipe: Recipe, mask_id: int | None) -> int:
    """How many tokens of a prompt the model reads; below 0 where even the new tokens of denoising exceed its context."""
    if mask_id is None:
        return autoregressive.reader_of(model).sequence_length
    return int(model.sequence_length) - recipe.sample.tokens


def require_context(tokens: int, sequence_length: int, flag: str) -> None:
    """Raise ConfigError, which names `flag`, where denoising is to write more tokens than the model has places for."""
    if tokens > sequence_length:
        raise ConfigError(
            f"{tokens} new tokens are more than the model's sequence_length of {sequence_length}\n"
            f"  try: {flag} {sequence_length}, or fewer"
        )


def check_sampling(recipe: Recipe) -> None:
    """Raise ConfigError where [sample] and [diffusion] ask for steps or blocks that do not divide, or do not fit the context."""
    ask, noise = recipe.sample, recipe.diffusion
    require_context(ask.tokens, recipe.data.sequence_length, "--sample.tokens")
    diffusion.check(
        ask.tokens,
        noise.steps,
        noise.block_length,
        noise.remasking,
        ask.temperature,
        noise.guidance,
        recipe.data.sequence_length,
    )
