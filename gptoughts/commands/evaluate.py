"""`gptoughts eval perplexity`: loss and perplexity of a checkpoint over a whole split."""

from __future__ import annotations

import json
import math


def perplexity(checkpoint: str, data: str | None, split: str, batch: int, as_json: bool) -> int:
    """Print nats per token, perplexity and bits per token over every label of the split."""
    from gptoughts.data.batches import eval_batches
    from gptoughts.data.shards import Shards
    from gptoughts.data.tokenize import prepare
    from gptoughts.errors import DataError, nearest
    from gptoughts.evals.perplexity import mean_loss
    from gptoughts.loading import load

    loaded = load(checkpoint)
    recipe = loaded.recipe
    settings = recipe.data if data is None else recipe.data.model_copy(update={"path": data})
    if data is not None and settings.tokenizer != "gpt2":
        # New text is cut into tokens as the checkpoint was, whatever its own vocabulary would have been.
        settings = settings.model_copy(update={"tokenizer": str(loaded.folder / "tokenizer")})
    shards = Shards.open(prepare(settings))
    if shards.tokenizer().hash != loaded.tokenizer.hash:
        raise DataError(
            f"{shards.folder} was cut by another tokenizer than {loaded.folder}\n  try: --data with the text itself"
        )
    if split not in shards.index.splits:
        known = list(shards.index.splits)
        raise DataError(f"--split {split!r}: not in {shards.folder}{nearest(split, known)}; there are {', '.join(known)}")
    stream = shards.split(split)
    loaded.engine.micro_batch = batch
    vocabulary = loaded.engine.bare.vocab_size if hasattr(loaded.engine.bare, "vocab_size") else None
    batches = eval_batches(stream, recipe.data.sequence_length, batch, vocab_size=vocabulary)  # type: ignore[arg-type]
    loss, labels = mean_loss(loaded.engine, batches)
    unigram = shards.index.splits[split].unigram_entropy
    if as_json:
        figures = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_token": loss / math.log(2),
            "labels": labels,
            "unigram_entropy": unigram,
        }
        print(json.dumps({"checkpoint": str(loaded.folder), "step": loaded.step, "split": split, **figures}, indent=1))
        return 0
    print(f"{loaded.folder}, step {loaded.step}, split {split} of {shards.folder}: {labels:,} labels")
    print(
        f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}, {loss / math.log(2):.3f} bits per token; "
        f"unigram entropy {unigram:.4f}"
    )
    return 0
