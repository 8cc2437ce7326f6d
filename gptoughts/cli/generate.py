"""`gptoughts generate`: stream text from a checkpoint, an exported folder or an adapter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any

from gptoughts.console import print_line, print_result
from gptoughts.errors import CheckpointError, ConfigError, DataError

TOKENS = 200
"""Default number of new tokens of a next-token model."""


def generate(
    checkpoint: str,
    prompt: Sequence[str],
    tokens: int | None,
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
    remote_code: str | None = None,
) -> int:
    """Continue each prompt; `-` reads standard input. Without prompts, continue an empty one."""
    from gptoughts.inference.generate.write import generate_text
    from gptoughts.inference.load import inference_mode, load

    given = {"steps": steps, "block_length": block_length, "remasking": remasking, "guidance": guidance}
    diffusion, stack = {key: value for key, value in given.items() if value is not None}, ExitStack()
    if memory is not None or offload is not None:
        if remote_code is not None:
            raise ConfigError("--remote-code: not supported with --memory or --offload", fix="omit both")
        if base is not None:
            raise ConfigError("--base: not supported with --memory or --offload", fix=f"gptoughts export {checkpoint} --to DIR")
        model, tokenizer, recipe, folder, mask_id = offloaded(checkpoint, memory, offload)
    else:
        loaded = load(checkpoint, base=base, remote_code=remote_code)
        model, tokenizer, recipe = loaded.model, loaded.tokenizer, loaded.recipe
        folder, mask_id = loaded.folder, loaded.mask_id
        stack.enter_context(inference_mode(loaded))
    sample = {"temperature": temperature, "top_k": top_k} | ({} if tokens is None else {"tokens": tokens})
    recipe = asked(recipe, sample, diffusion, mask_id)
    texts = [_standard_input() if text == "-" else text for text in prompt] or [""]
    if chat:
        prompts, stops = chat_prompts(checkpoint, folder, recipe, texts)
    else:
        prompts, stops = begun(tokenizer, recipe, texts), set()
    stops |= noted_ends(tokenizer_folders(folder, recipe))
    check_room(model, recipe, mask_id, prompts, chat)
    shown = -1

    def on_text(index: int, piece: str) -> None:
        nonlocal shown
        if index != shown:
            if shown >= 0:
                print_result("\n" + "-" * 40, raw=True)
            print_result(f"> {texts[index]}\n" if chat else texts[index], end="", raw=True)
            shown = index
        print_result(piece, end="", raw=True)

    with stack:
        generate_text(model, tokenizer, prompts, recipe, mask_id, top_p=top_p, seed=seed, on_text=on_text, stops=stops)
    print_result("", raw=True)
    return 0


def _standard_input() -> str:
    """Return the text of standard input. Raises ConfigError for bytes that are not UTF-8."""
    try:
        return sys.stdin.read().encode().decode()  # Python may keep foreign bytes as surrogates
    except UnicodeError as error:
        raise ConfigError(
            "--prompt -: standard input is not UTF-8", found=getattr(error, "reason", None), fix="a text file"
        ) from None


def offloaded(name: str, memory_gib: float | None, offload: str | None) -> tuple[Any, Any, Any, Path, None]:
    """Load a model offloaded to CPU memory and disk: (model, tokenizer, recipe, folder, no mask id). Raises CheckpointError, ConfigError."""
    from gptoughts.config.model_path import resolve_model_folder
    from gptoughts.data.tokenizers.tokenizer import load_tokenizer
    from gptoughts.inference.generate.offloaded import opened
    from gptoughts.inference.load import exported_recipe, find

    place, run = Path(name).expanduser(), Path("checkpoints") / name
    ours = (run.is_dir() and not place.exists()) or any(place.glob("step-*")) or (place / "state.json").is_file()
    folder = find(name) if ours else place
    if ours or (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: offloading needs a whole model in transformers' layout", fix=f"gptoughts export {name} --to DIR"
        )
    folder = resolve_model_folder(name)
    recipe = exported_recipe(folder, None)
    if recipe.model.family != "hf" or recipe.objective != "next-token":
        raise ConfigError(f"{folder}: offloading needs a next-token model of transformers", fix="omit --memory and --offload")
    return opened(folder, memory_gib, offload), load_tokenizer(recipe.data.tokenizer), recipe, folder, None


def tokenizer_folders(folder: Path, recipe: Any) -> list[Path]:
    """Return the folders that can hold tokenizer and config files: tokenizer/ and base/ of a checkpoint, or a model folder itself."""
    names = (recipe.model.path, recipe.data.tokenizer)
    named = [Path(name).expanduser() for name in names if name and name not in ("bytes", "chars", "gpt2", "bpe")]
    return [folder / "tokenizer", folder / "base", folder, *(path.parent if path.is_file() else path for path in named)]


def chat_prompts(name: str, folder: Path, recipe: Any, texts: list[str]) -> tuple[list[list[int]], set[int]]:
    """Return user turns in the model's chat template as ids, up to the start of the answer, and the ids that end an answer.

    Raises ConfigError for a model without a template, DataError for damaged files.
    """
    from gptoughts.data.chat.answers import prompt, stops
    from gptoughts.data.chat.template import templates_in
    from gptoughts.data.chat.tokenizer import ChatTokenizer

    for place in tokenizer_folders(folder, recipe):
        written = place / "chat_template.jinja"
        if (place / "tokenizer.json").is_file() and templates_in(place):
            chat = ChatTokenizer.open(place)
        elif written.is_file():
            chat = ChatTokenizer.open(recipe.data.tokenizer, str(written))
        else:
            continue
        return [prompt(chat, [{"role": "user", "content": text}]).tolist() for text in texts], stops(chat)
    raise ConfigError(f"--chat: {name} has no chat template", fix="omit --chat, or train with --data.format chat")


def begun(tokenizer: Any, recipe: Any, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts, preceded by the begin-of-text token if a Hugging Face model's tokenizer adds one.

    Our own training adds none; models trained with one generate worse or unusable text without it.
    """
    from gptoughts.data.tokenizers.tokenizer import JsonTokenizer

    opening: list[int] = []
    if recipe.model.family == "hf" and isinstance(tokenizer, JsonTokenizer):
        encoding = tokenizer.library.encode("a", add_special_tokens=True)
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        opening = [index for index, _ in takewhile(lambda pair: pair[1], pairs)]
    return [[*opening, *tokenizer.encode(text).tolist()] for text in texts]


def noted_ends(places: list[Path]) -> set[int]:
    """Return the end-of-text ids in the first generation_config.json in these folders. Raises DataError."""
    from gptoughts.data.chat.template import read_json

    path = next((place / "generation_config.json" for place in places if (place / "generation_config.json").is_file()), None)
    noted = None if path is None else read_json(path).get("eos_token_id")
    ids = noted if isinstance(noted, list) else [] if noted is None else [noted]
    if not all(isinstance(index, int) for index in ids):
        raise DataError(f"{path}: eos_token_id must be a number or a list of numbers", found=repr(noted))
    return set(ids)


def check_room(model: Any, recipe: Any, mask_id: int | None, prompts: list[list[int]], chat: bool) -> None:
    """Print to standard error which prompts are truncated at the start.

    Raises DataError for a chat prompt that is too long, since truncation would cut its template, and ConfigError if denoising shall write
    more tokens than the model's context.
    """
    from gptoughts.inference.generate.write import require_context, room

    if mask_id is not None:
        require_context(recipe.sample.tokens, int(model.sequence_length), "--tokens")
    free = room(model, recipe, mask_id)
    new = "" if mask_id is None else f" besides {recipe.sample.tokens:,} new tokens"
    for number, ids in enumerate(prompts, 1):
        if len(ids) <= free:
            continue
        problem = f"prompt {number}: {len(ids):,} tokens exceed the context of {free:,}{new}"
        if chat:
            raise DataError(problem, fix=f"a shorter prompt{', or fewer --tokens' if new else ''}")
        print_line(f"note: {problem}; its beginning is dropped", sys.stderr)


def asked(recipe: Any, sample: dict[str, Any], diffusion: dict[str, Any], mask_id: int | None) -> Any:
    """Return the recipe with the given sampling options. Raises ConfigError for diffusion options with a next-token model."""

    if diffusion and mask_id is None:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in diffusion)
        raise ConfigError(f"{flags}: only for masked-diffusion models", found=recipe.objective)
    if "tokens" not in sample:
        sample = sample | {"tokens": TOKENS if mask_id is None else fitting(recipe)}
    tables = {"sample": recipe.sample.model_copy(update=sample), "diffusion": recipe.diffusion.model_copy(update=diffusion)}
    return recipe.model_copy(update=tables)


def fitting(recipe: Any) -> int:
    """Return the default number of new tokens of a masked-diffusion model: that of its samples, at most half its context."""
    context: int = recipe.data.sequence_length
    wanted: int = recipe.sample.tokens
    return wanted if wanted <= context else max(1, context // 2)
