"""Checkpoints: files on disk, and the training state in them."""
