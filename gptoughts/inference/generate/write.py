"""Generate text with any trained model: autoregressive for next-token models, denoising for masked diffusion."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from gptoughts.config.loader import Recipe
from gptoughts.errors import ConfigError
from gptoughts.inference.generate import autoregressive, diffusion
from gptoughts.inference.generate.autoregressive import OnText, Tokenizer


def generate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: list[str] | list[list[int]],
    recipe: Recipe,
    mask_id: int | None,
    *,
    top_p: float = 1.0,
    seed: int | None = None,
    on_text: OnText | None = None,
    stops: Collection[int] = (),
) -> list[str]:
    """Return the continuation of each prompt as text, by the recipe's [sample] and, for masked diffusion, [diffusion] tables.

    seed      default: the recipe's
    on_text   receives text as it is generated; denoised text as a whole
    stops     token ids that end a text, in addition to end-of-text
    """
    sample, seed = recipe.sample, recipe.seed if seed is None else seed
    inputs: list[Any] = list(prompts)
    if mask_id is None:
        continued = autoregressive.generate(
            model, tokenizer, inputs, sample.tokens, temperature=sample.temperature, top_k=sample.top_k, top_p=top_p, seed=seed,
            on_text=on_text, stops=stops,
        )  # fmt: skip
        return _texts(tokenizer, inputs, continued)
    denoising = recipe.diffusion
    denoised = diffusion.generate(
        model, tokenizer, inputs, mask_id, sample.tokens, denoising.steps, block_length=denoising.block_length,
        remasking=denoising.remasking, temperature=sample.temperature, guidance=denoising.guidance, seed=seed, stops=stops,
    )  # fmt: skip
    texts = _texts(tokenizer, inputs, denoised)
    if on_text is not None:
        for index, text in enumerate(texts):
            on_text(index, text)
    return texts


def _texts(tokenizer: Tokenizer, prompts: Sequence[Any], continuations: Sequence[Any]) -> list[str]:
    return [
        new if isinstance(new, str) else autoregressive.continuation(tokenizer, before, new)
        for before, new in zip(prompts, continuations, strict=True)
    ]


def room(model: Any, recipe: Recipe, mask_id: int | None) -> int:
    """Return the maximum prompt length in tokens; negative if the new tokens of denoising alone exceed the context."""
    if mask_id is None:
        return autoregressive.reader_of(model).sequence_length
    return int(model.sequence_length) - recipe.sample.tokens


def require_context(tokens: int, sequence_length: int, flag: str) -> None:
    """Raise ConfigError, naming `flag`, if denoising would generate more tokens than the context holds."""
    if tokens > sequence_length:
        raise ConfigError(
            f"{flag}: must be at most the model's sequence_length {sequence_length}",
            found=tokens,
            fix=f"{flag} {sequence_length}",
        )


def check_sampling(recipe: Recipe) -> None:
    """Raise ConfigError if [sample] and [diffusion] have steps or blocks that do not divide, or exceed the context."""
    sample, denoising = recipe.sample, recipe.diffusion
    require_context(sample.tokens, recipe.data.sequence_length, "--sample.tokens")
    diffusion.check(
        sample.tokens,
        denoising.steps,
        denoising.block_length,
        remasking=denoising.remasking,
        temperature=sample.temperature,
        guidance=denoising.guidance,
        sequence_length=recipe.data.sequence_length,
    )
