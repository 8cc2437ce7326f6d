"""From text to batches: sources, tokenizers, shards, chat and SQuAD rows, order, prefetch."""
