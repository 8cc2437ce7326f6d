"""Developer benchmarks, outside the wheel: `python -m benchmarks.step`, `.data`, `.start`."""
