"""Recipes and model specs: typed, validated. Imports no torch."""
