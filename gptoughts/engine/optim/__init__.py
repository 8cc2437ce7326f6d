"""Optimizers, parameter groups, learning-rate schedule."""
