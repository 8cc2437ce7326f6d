"""One training step and what it needs: engine, loop, objectives, optimizers, checkpoints, ranks."""
