"""Data: text sources, tokenizers, shards, chat and SQuAD rows, sample order, batches, prefetching."""
