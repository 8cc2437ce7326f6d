"""Checkpoints: files on disk, and the training state inside them."""
