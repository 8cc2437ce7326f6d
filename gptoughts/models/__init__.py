"""Model architectures: native GPT and LLaDA, Hugging Face models, adapters, fused kernels."""
