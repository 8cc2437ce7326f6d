"""Log-likelihoods of continuations given a context: exact for autoregressive models, a Monte Carlo estimate for masked diffusion.

Texts are split into context and continuation as lm-evaluation-harness does with a transformers tokenizer, so that both score the same
tokens: the whole text is encoded, trailing spaces of the context belong to the continuation, and the ids after those of the context
are scored. Special tokens that a text spells out are encoded as text, unlike there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptoughts.config.loader import Recipe
from gptoughts.config.model_path import resolve_model_folder
from gptoughts.data.chat.template import read_json
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer, Tokenizer
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import IGNORED
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.eval.likelihood import DRAWS, bound
from gptoughts.models.eager import eager_inference

Report = Callable[[int, int], None]
"""Called with the number of continuations done and their total."""


class Pair(NamedTuple):
    """Ids of a context and of its continuation; neither is empty."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the special ids that transformers puts around a text."""

    tokenizer: Tokenizer
    start: tuple[int, ...]
    """Ids before every text, such as Llama's begin-of-text; none for GPT-2."""
    prefix: int
    """Id that stands for an empty context: begin-of-text, else end-of-text."""
    end: int
    """End-of-text."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, with `start`."""
        return [[*self.start, *ids.tolist()] for ids in self.tokenizer.encode_batch(texts)]

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Return the ids of each (context, continuation). Raises DataError where one of them has no token of its own."""
        stripped = [context.rstrip() for context, _ in texts]
        wholes = self.ids([context + continuation for context, continuation in texts])
        distinct = list(dict.fromkeys(stripped))
        lengths = dict(zip(distinct, map(len, self.ids(distinct)), strict=True))
        cuts = [lengths[context] for context in stripped]
        pairs = [Pair(ids[:cut], ids[cut:]) for ids, cut in zip(wholes, cuts, strict=True)]
        for pair, (_, continuation) in zip(pairs, texts, strict=True):
            if not pair.context or not pair.continuation:
                raise DataError("tokenizer: no token separates a context from its continuation", found=repr(continuation[:80]))
        return pairs


def tokenizer_settings(recipe: Recipe, checkpoint: Path | None = None) -> Path | None:
    """Return the folder that may hold a model's tokenizer_config.json: of its checkpoint, or of the weights that it started from."""
    if checkpoint is not None and (checkpoint / "base").is_dir():
        return checkpoint / "base"
    return resolve_model_folder(recipe.model.path) if recipe.model.path else None


def encoder_of(tokenizer: Tokenizer, folder: Path | None) -> Encoder:
    """Return the encoder of a model. `folder` may hold its tokenizer_config.json, which names begin and end of a text."""
    if not isinstance(tokenizer, JsonTokenizer):
        return Encoder(tokenizer, (), tokenizer.eot_id, tokenizer.eot_id)
    file = folder / "tokenizer_config.json" if folder else None
    config = read_json(file) if file and file.is_file() else {}
    begin, end = (_special(tokenizer, config.get(key)) for key in ("bos_token", "eos_token"))
    end = tokenizer.eot_id if end is None else end
    start = _added_before(tokenizer)
    if not start and config.get("add_bos_token") and begin is not None:
        start = (begin,)
    return Encoder(tokenizer, start, end if begin is None else begin, end)


def _special(tokenizer: JsonTokenizer, entry: Any) -> int | None:
    """Return the id of a special token that tokenizer_config.json names, as a string or as an object."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    found: int | None = tokenizer.library.token_to_id(name) if isinstance(name, str) else None
    return found


def _added_before(tokenizer: JsonTokenizer) -> tuple[int, ...]:
    """Return the ids that the post-processor of tokenizer.json puts before a text."""
    plain, whole = (tokenizer.library.encode("a", add_special_tokens=added).ids for added in (False, True))
    places = range(len(whole) - len(plain) + 1)
    return tuple(whole[: next((place for place in places if whole[place : place + len(plain)] == plain), 0)])


def truncated(pairs: Sequence[Pair], length: int) -> int:
    """Return how many pairs lose the start of their context in a model of `length` tokens.

    Raises ConfigError where a continuation alone does not fit.
    """
    longest = max((len(pair.continuation) for pair in pairs), default=0)
    if longest > length:
        raise ConfigError(
            f"data.sequence_length {length}: shorter than a continuation to score",
            found=f"{longest} tokens",
            fix=f"a model with a context of at least {longest} tokens",
        )
    return sum(len(pair.context) + len(pair.continuation) > length + 1 for pair in pairs)


def log_likelihoods(
    engine: Engine,
    pairs: Sequence[Pair],
    *,
    batch: int,
    mask_id: int | None = None,
    draws: int = DRAWS,
    report: Report = lambda done, total: None,
) -> np.ndarray:
    """Return log p(continuation | context) in nats: float64 (pairs,), the same on every rank. Restores the model's mode.

    batch    sequences per forward
    mask_id  mask token of a masked-diffusion model, whose value is minus the bound of `eval.likelihood` from `draws` maskings, as the
             evaluation of LLaDA estimates it (Nie et al. 2025); None for an autoregressive model

    Contexts that are too long lose their start. Ranks share the work and run equal numbers of forwards, because with sharded
    weights each forward is a collective.
    """
    results = torch.zeros(len(pairs), dtype=torch.float64)
    scored = _scored(engine, pairs, batch) if mask_id is None else _estimated(engine, pairs, batch, mask_id, draws)
    done = 0
    for indices, values in scored:
        engine.report("evaluation")
        results[indices] = values
        done = min(len(pairs), done + len(values) * engine.ranks.size)
        report(done, len(pairs))
    return engine.ranks.sum(results.to(engine.device)).cpu().numpy()


def _scored(engine: Engine, pairs: Sequence[Pair], size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield indices and log-likelihoods of this rank's batches; the last may be empty."""
    chunks = buckets(pairs, size)
    with eager_inference(engine.bare), engine.eval_context():
        for begin in range(0, len(chunks), engine.ranks.size):
            mine = begin + engine.ranks.world.rank
            chunk = chunks[min(mine, len(chunks) - 1)]
            inputs, labels = padded([pairs[index] for index in chunk], engine.recipe.data.sequence_length)
            sums = engine.bare(inputs.to(engine.device), labels=labels.to(engine.device), reduction="rows")
            yield (chunk, -sums.double().cpu()) if mine < len(chunks) else ([], torch.zeros(0, dtype=torch.float64))


def _estimated(
    engine: Engine, pairs: Sequence[Pair], size: int, mask_id: int, draws: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the index and the estimate of this rank's pairs, one by one; the last may be empty."""
    length, ranks = engine.recipe.data.sequence_length, engine.ranks
    for begin in range(0, len(pairs), ranks.size):
        mine = begin + ranks.world.rank
        index = min(mine, len(pairs) - 1)
        context, continuation = pairs[index]
        prompt = context[max(0, len(context) + len(continuation) - length) :]
        # `bound` masks a single token once, which is exact; ranks repeat it to run as many forwards as the others.
        repeats = -(-draws // size) if ranks.size > 1 and len(continuation) == 1 else 1
        for _ in range(repeats):
            with engine.eval_context():
                found = bound(
                    engine.bare, continuation, mask_id, prompt=prompt, draws=draws, seed=engine.recipe.seed, rows=size
                )
        yield ([index], torch.tensor([-found.nats]).double()) if mine < len(pairs) else ([], torch.zeros(0).double())


def buckets(pairs: Sequence[Pair], size: int) -> list[list[int]]:
    """Return indices in batches of `size` with similar lengths, longest first, so that padding is short."""
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].context) - len(pairs[index].continuation))
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(pairs: Sequence[Pair], length: int) -> tuple[Tensor, Tensor]:
    """Return inputs B T and labels B T, shifted, -100 but for continuations, T at most `length`. Padding is at the end."""
    rows = [[*pair.context, *pair.continuation][-length - 1 :] for pair in pairs]
    width = max(map(len, rows)) - 1
    inputs, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), IGNORED)
    for row, (ids, pair) in enumerate(zip(rows, pairs, strict=True)):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, len(ids) - 1 - len(pair.continuation) : len(ids) - 1] = torch.tensor(pair.continuation)
    return inputs, labels
