"""Fused kernels and the places in a model where they apply."""
