"""Architectures: native GPT and LLaDA, Hugging Face models, adapters, kernels."""
