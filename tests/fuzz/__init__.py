"""Fuzzing of the readers of files: valid files are changed, and each reader must return or raise an error of ours within limits."""
