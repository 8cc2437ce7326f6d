"""`gptoughts` with every kernel in its deterministic form: `python -m tests.device.still train ...`, the plan's variables set before."""

from __future__ import annotations

import sys

import torch

from gptoughts.cli.main import main

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main(sys.argv[1:])
