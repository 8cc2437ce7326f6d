"""`gptoughts generate`: text from a checkpoint, an exported folder or an adapter, printed as it is written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any


def generate(
    checkpoint: str,
    prompt: Sequence[str],
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    chat: bool,
    base: str | None,
    steps: int | None,
    block_length: int | None,
    remasking: str | None,
    guidance: float | None,
    memory: float | None,
    offload: str | None,
) -> int:
    """Continue each prompt; `-` stands for what comes on standard input, no prompt for an empty one."""
    from gptoughts.loading import load, reading
    from gptoughts.writing import write

    given = {"steps": steps, "block_length": block_length, "remasking": remasking, "guidance": guidance}
    diffusion = {key: value for key, value in given.items() if value is not None}
    stack = ExitStack()
    if memory is not None or offload is not None:
        model, tokenizer, recipe, folder, mask_id = offloaded(checkpoint, memory, offload)
    else:
        loaded = load(checkpoint, base=base)
        model, tokenizer, recipe, folder, mask_id = (
            loaded.model, loaded.tokenizer, loaded.recipe, loaded.folder, loaded.mask_id,
        )  # fmt: skip
        stack.enter_context(reading(loaded))
    sample = {"tokens": tokens, "temperature": temperature, "top_k": top_k}
    recipe = asked(recipe, sample, diffusion, mask_id)
    texts = [sys.stdin.read() if text == "-" else text for text in prompt] or [""]
    prompts: Any = [turn(folder, recipe, text) for text in texts] if chat else texts
    shown = -1

    def on_text(index: int, piece: str) -> None:
        nonlocal shown
        if index != shown:
            if shown >= 0:
                print("\n" + "-" * 40)
            print(f"> {texts[index]}\n" if chat else texts[index], end="")
            shown = index
        print(piece, end="", flush=True)

    with stack:
        write(model, tokenizer, prompts, recipe, mask_id, top_p, seed, on_text)
    print()
    return 0


def offloaded(name: str, memory_gib: float | None, offload: str | None) -> tuple[Any, Any, Any, Path, None]:
    """Model, tokenizer, recipe, folder and no mask of a model that is spread over memories. Raises CheckpointError, ConfigError."""
    from gptoughts.data.tokenizer import bpe_from_files
    from gptoughts.errors import CheckpointError
    from gptoughts.generate.offloaded import opened
    from gptoughts.hub import folder_of
    from gptoughts.loading import exported_recipe

    folder = folder_of(name)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: only folders in transformers' layout are offloaded\n  try: gptoughts export {name} --to DIR"
        )
    recipe = exported_recipe(folder, None)
    return opened(folder, memory_gib, offload), bpe_from_files(recipe.data.tokenizer), recipe, folder, None


def turn(folder: Path, recipe: Any, text: str) -> list[int]:
    """The ids of a user's turn in the tokenizer's chat template, up to where the answer begins. Raises DataError."""
    from gptoughts.data.chat_tokenizer import ChatTokenizer

    places = (folder / "tokenizer", folder / "base")
    kept = next((place for place in places if (place / "chat_template.jinja").is_file()), None)
    chat = ChatTokenizer.open(kept or next((place for place in places[1:] if place.is_dir()), recipe.data.tokenizer))
    ids: list[int] = chat.prompt([{"role": "user", "content": text}]).tolist()
    return ids


def asked(recipe: Any, sample: dict[str, Any], diffusion: dict[str, Any], mask_id: int | None) -> Any:
    """The recipe with the sampling that was asked for. Raises ConfigError for denoising by a model that does not."""
    from gptoughts.errors import ConfigError

    if diffusion and mask_id is None:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in diffusion)
        raise ConfigError(f"{flags}: only masked-diffusion models denoise; this one writes token by token")
    tables = {"sample": recipe.sample.model_copy(update=sample), "diffusion": recipe.diffusion.model_copy(update=diffusion)}
    return recipe.model_copy(update=tables)
