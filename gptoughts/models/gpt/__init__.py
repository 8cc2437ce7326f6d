"""The native GPT, its attention functions, and its checkpoint layouts."""
