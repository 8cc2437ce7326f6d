"""`gptoughts tokenize SOURCE --to DIR`: tokenize text into shards for `train`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gptoughts.console import print_result
from gptoughts.errors import DataError
from gptoughts.hardware.world import world_from_environment

SHARD_TOKENS = 100_000_000


def tokenize(
    source: str,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    train_bpe: int | None = None,
    val_fraction: float = 0.05,
    val_from: str = "auto",
    text_key: str = "text",
    bad_rows: str = "error",
    shard_tokens: int = SHARD_TOKENS,
    processes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Tokenize `source` into the folder `out`; print sizes, speed and the command to train on it.

    The tasks of `srun` divide the work, and the first one prints.
    The default tokenizer is GPT-2's; `train_bpe` trains a BPE of this vocabulary size on the text. Raises DataError.
    """
    from gptoughts.data.text.shards import INDEX
    from gptoughts.data.text.tokenize import tokenize

    if train_bpe is not None and tokenizer not in (None, "bpe"):
        raise DataError(f"--tokenizer {tokenizer} and --train-bpe {train_bpe}: only one of them is allowed")
    name = "bpe" if train_bpe is not None else tokenizer or "gpt2"
    folder = Path(out)
    done = (folder / INDEX).exists() and not overwrite
    begun = time.monotonic()
    world = world_from_environment(os.environ)
    index = tokenize(
        source, name, folder, train_bpe=train_bpe, val_fraction=val_fraction,
        val_from=val_from, shard_tokens=shard_tokens, processes=processes, text_key=text_key, bad_rows=bad_rows, overwrite=overwrite,
        progress="none" if world.rank else "console", world=world,
    )  # fmt: skip
    if world.rank:
        return
    seconds = time.monotonic() - begun
    read = index.source
    size = f", {read['bytes'] / 1e6:.1f} MB" if read["bytes"] is not None else ""
    skipped = f", {read['empty_rows']} empty rows skipped" if read["empty_rows"] else ""
    skipped += f", {read['bad_rows']:,} bad rows skipped" if read.get("bad_rows") else ""
    print_result(f"source     {read['spec']}  ({read['files']} files{size}{skipped})")
    print_result(
        f"tokenizer  {index.tokenizer['kind']}  {index.vocab_size} ids, {index.dtype}, engine {index.tokenizer['engine']}"
    )
    total = sum(split.tokens for split in index.splits.values())
    for name, split in index.splits.items():
        shards = f"{len(split.shards)} shard{'s' if len(split.shards) != 1 else ''}"
        print_result(
            f"{name:<10} {split.tokens:,} tokens, {split.documents:,} documents, {shards}, "
            f"unigram entropy {split.unigram_entropy:.3f} nats per token"
        )
    print_result(f"time       {'already tokenized' if done else f'{seconds:.1f} s, {total / seconds / 1e6:.2f} Mtok/s'}")
    print_result(f"folder     {folder}")
    print_result(f"next       gptoughts train RECIPE --data.path {folder}")
