"""Hugging Face transformers models under their own parameter names."""
