"""Machine probe: GPUs, CPU, memory, packages, peak rates. Imports no torch."""
