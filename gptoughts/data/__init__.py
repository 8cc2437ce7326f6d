"""Text becomes shards, shards become batches: sources, tokenizers, tokenising, memory-mapped shards, and an order with a cursor."""
