"""Developer benchmarks and generators, outside the wheel: `python -m benchmarks.step`, `.data`, `.start`, `.profile_cards`."""
