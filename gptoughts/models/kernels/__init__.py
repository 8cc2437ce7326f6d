"""Fused kernels and the modules of a model that they replace."""
