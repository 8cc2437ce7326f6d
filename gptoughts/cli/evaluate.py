"""`gptoughts eval`: perplexity over a split, comparison of two models, likelihood bound of masked diffusion, SQuAD metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoughts.config.tasks import task_of
from gptoughts.console import print_result
from gptoughts.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from gptoughts.data.corpus import TextCorpus
    from gptoughts.inference.load import LoadedModel

LONGEST_WINDOW = 1024
"""Maximum default context in tokens for a folder without a training recipe."""


def perplexity(
    checkpoint: str, data: str | None, split: str, batch: int, length: int | None, as_json: bool, remote_code: str | None = None
) -> int:
    """Print nats per token, perplexity, bits per token and bits per byte over every label of the split."""
    from gptoughts.data.batches import eval_batches
    from gptoughts.inference.eval import perplexity as measures
    from gptoughts.inference.eval.text_bytes import bits_per_byte, label_bytes
    from gptoughts.inference.load import load

    loaded = load(checkpoint, remote_code=remote_code)
    if loaded.recipe.objective != "next-token":
        other = task_of(loaded.recipe).evaluation
        raise ConfigError(
            f"{loaded.folder}: perplexity needs a next-token model",
            found=loaded.recipe.objective,
            fix=f"gptoughts eval {other}" if other else "",
        )
    most = loaded.recipe.data.sequence_length
    if length is not None and length > most:
        raise ConfigError(
            f"--length {length}: exceeds the context of {loaded.folder}", found=f"{most} tokens", fix=f"--length {most}"
        )
    # The maximum context of an exported folder can be so long that its logits exceed the memory.
    sequence_length = length or (most if loaded.step is not None else min(most, LONGEST_WINDOW))
    corpus = corpus_of(loaded, data, split, sequence_length)
    loaded.engine.micro_batch = batch
    stream = corpus.shards.split(split)
    batches = eval_batches(stream, sequence_length, batch, vocab_size=loaded.parts.rows)
    loss, labels = measures.mean_loss(loaded.engine, batches)
    unigram = corpus.shards.index.splits[split].unigram_entropy
    text_bytes = label_bytes(loaded.tokenizer, stream.window(0, len(stream)))
    figures = {
        "loss": loss,
        "perplexity": measures.perplexity(loss),
        "bits_per_token": loss / math.log(2),
        "bits_per_byte": bits_per_byte(loss * labels, text_bytes),
        "labels": labels,
        "bytes": text_bytes,
        "unigram_entropy": unigram,
    }
    if as_json:
        print_result(
            json.dumps({"checkpoint": str(loaded.folder), "step": loaded.step, "split": split, **figures}, indent=1), raw=True
        )
        return 0
    print_result(f"{named(loaded)}, split {split} of {corpus.folder}: {labels:,} labels, {text_bytes:,} bytes")
    shown = {name: "n/a" if value is None else f"{value:.3f}" for name, value in figures.items()}
    print_result(
        f"loss {loss:.4f} nats per token, perplexity {shown['perplexity']}, {shown['bits_per_token']} bits per token, "
        f"{shown['bits_per_byte']} bits per byte; unigram entropy {unigram:.4f}"
    )
    return 0


def compare(
    checkpoint: str,
    other: str,
    data: str,
    batch: int,
    length: int | None,
    windows: int | None,
    as_json: bool,
    remote_code: str | None = None,
) -> int:
    """Print the loss of both models on the whole text and the difference, with a 95 % bootstrap interval over paired windows."""
    from gptoughts.data.batches import eval_batches
    from gptoughts.inference.eval.comparison import difference, window_losses
    from gptoughts.inference.load import load

    losses, hashes = [], []
    for name in (checkpoint, other):
        loaded = load(name, remote_code=remote_code if name == checkpoint else None)
        if loaded.recipe.objective != "next-token":
            raise ConfigError(f"{loaded.folder}: comparison needs a next-token model", found=loaded.recipe.objective)
        size = length or min(loaded.recipe.data.sequence_length, LONGEST_WINDOW)
        stream = corpus_of(loaded, data, "train", size, {"val_fraction": 0.0}).shards.split("train")
        limit = None if windows is None else -(-windows // batch)
        losses.append(
            window_losses(loaded.engine, eval_batches(stream, size, batch, limit=limit, vocab_size=loaded.parts.rows))
        )
        hashes.append(loaded.tokenizer.hash)
    if hashes[0] != hashes[1] or len(losses[0]) != len(losses[1]):
        raise DataError(
            f"{checkpoint} and {other}: different tokenizers or windows", fix="models of one tokenizer, with --length N"
        )
    found = difference(losses[0], losses[1])
    if as_json:
        print_result(json.dumps({"first": losses[0].mean(), "second": losses[1].mean(), **vars(found)}, indent=1), raw=True)
        return 0
    print_result(f"{checkpoint}  {losses[0].mean():.4f} nats per token over {found.windows:,} windows of {data}")
    print_result(f"{other}  {losses[1].mean():.4f}")
    print_result(f"difference  {found.mean:+.4f}, 95 % bootstrap interval {found.low:+.4f} to {found.high:+.4f}")
    return 0


def named(loaded: LoadedModel) -> str:
    """Return the checkpoint's folder, with its step if known."""
    return f"{loaded.folder}, step {loaded.step}" if loaded.step is not None else str(loaded.folder)


def corpus_of(
    loaded: LoadedModel, data: str | None, split: str, length: int | None, more: Mapping[str, Any] | None = None
) -> TextCorpus:
    """Open the text for an evaluation, tokenized with the checkpoint's tokenizer. Raises DataError, ConfigError."""
    from gptoughts.data.corpus import open_text_corpus

    settings = loaded.recipe.data
    if data is None and (loaded.step is None or settings.format != "text"):
        raise ConfigError(f"{loaded.folder}: has no training text to evaluate on", fix="--data FILE")
    if data is not None:
        settings = settings.model_copy(update={"path": data, "format": "text", **(more or {})})
        if settings.tokenizer != "gpt2" and loaded.step is not None:
            # Tokenize new text with the tokenizer of the checkpoint.
            settings = settings.model_copy(update={"tokenizer": str(loaded.folder / "tokenizer")})
    if length is not None:
        settings = settings.model_copy(update={"sequence_length": length})
    corpus = open_text_corpus(settings)
    if corpus.tokenizer.hash != loaded.tokenizer.hash:
        raise DataError(
            f"{corpus.folder}: tokenized with another tokenizer than {loaded.folder}", fix="--data with the original text"
        )
    if split not in corpus.shards.index.splits:
        known = list(corpus.shards.index.splits)
        raise DataError(f"--split {split!r}: not in {corpus.folder}{nearest(split, known)}", found=", ".join(known))
    return corpus


def likelihood(
    checkpoint: str,
    data: str | None,
    split: str,
    batch: int,
    length: int | None,
    draws: int,
    windows: int | None,
    as_json: bool,
    remote_code: str | None = None,
) -> int:
    """Print an upper bound on the nats per token of the split under a masked-diffusion model, with its standard error."""
    from gptoughts.inference.eval.likelihood import text_bound
    from gptoughts.inference.load import inference_mode, load

    loaded = load(checkpoint, remote_code=remote_code)
    if loaded.mask_id is None:
        raise ConfigError(
            f"{loaded.folder}: likelihood needs a masked-diffusion model",
            found=loaded.recipe.objective,
            fix="gptoughts eval perplexity",
        )
    corpus = corpus_of(loaded, data, split, length)
    stream = corpus.shards.split(split)
    ids = stream.window(0, len(stream))
    with inference_mode(loaded):
        found = text_bound(
            loaded.model,
            ids,  # type: ignore[arg-type]
            loaded.mask_id,
            draws=draws,
            seed=loaded.recipe.seed,
            window=length,
            limit=windows,
            rows=batch,
        )
    nats, error = found.per(found.tokens)
    unigram = corpus.shards.index.splits[split].unigram_entropy
    figures = {
        "nats_per_token": nats,
        "standard_error": error,
        "tokens": found.tokens,
        "draws": draws,
        "unigram_entropy": unigram,
    }
    if as_json:
        print_result(
            json.dumps({"checkpoint": str(loaded.folder), "step": loaded.step, "split": split, **figures}, indent=1), raw=True
        )
        return 0
    print_result(f"{named(loaded)}, split {split} of {corpus.folder}: {found.tokens:,} tokens, {draws} maskings per window")
    print_result(f"upper bound {nats:.4f} +- {error:.4f} nats per token; unigram entropy {unigram:.4f}")
    return 0


def squad(
    checkpoint: str,
    data: str | None,
    threshold: float | None,
    batch: int,
    out: str | None,
    as_json: bool,
    remote_code: str | None = None,
) -> int:
    """Print exact match and F1 as computed by the official script; with `out`, write predictions in its format."""
    from gptoughts.data.squad.examples import prepare_squad
    from gptoughts.inference.eval.squad import evaluate
    from gptoughts.inference.load import load

    loaded = load(checkpoint, remote_code=remote_code)
    if task_of(loaded.recipe).evaluation != "squad":
        raise ConfigError(f"{loaded.folder}: eval squad needs a question-answering model", found=loaded.recipe.objective)
    settings = loaded.recipe.data
    if loaded.step is not None:
        settings = settings.model_copy(update={"tokenizer": str(loaded.folder / "tokenizer")})
    elif data is None:
        raise ConfigError(f"{loaded.folder}: has no validation questions", fix="--data FILE")
    if data is not None:
        settings = settings.model_copy(update={"path": data, "val_path": None, "val_fraction": 0.0})
    tables, questions = prepare_squad(settings, settings.tokenizer)
    split = "train" if data is not None else "val"
    if split not in tables:
        raise ConfigError(f"{loaded.folder}: trained without validation questions", fix="--data FILE")
    loaded.engine.micro_batch = batch
    figures = evaluate(loaded.engine, tables[split], questions[split], threshold=threshold, out=out)
    if as_json:
        print_result(json.dumps({"checkpoint": str(loaded.folder), "step": loaded.step, **figures}, indent=1), raw=True)
        return 0
    print_result(f"{named(loaded)}: {len(questions[split].asked):,} questions of {data or settings.val_path or settings.path}")
    print_result("  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    if out is not None:
        print_result(f"predictions in {Path(out) / 'predictions.json'}")
    return 0
