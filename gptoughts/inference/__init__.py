"""Inference with a trained model: load, generate, evaluate, export."""
