"""Architectures. `family` is the port that each of them offers; `gpt` is the native one."""
