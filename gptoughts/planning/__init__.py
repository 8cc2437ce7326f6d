"""Resolve profile, machine and recipe to a plan. Imports no torch."""
