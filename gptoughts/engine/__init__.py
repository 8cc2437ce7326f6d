"""One training step: engine, loop, objectives, optimizers, checkpoints, ranks."""
