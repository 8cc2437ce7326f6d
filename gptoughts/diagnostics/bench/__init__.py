"""Benchmarks: layers, loss parity, matrix products. Variants run interleaved in child processes."""
