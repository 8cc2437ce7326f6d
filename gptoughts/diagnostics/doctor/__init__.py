"""Checks of this machine: each finding names its cost and the command that fixes it."""
