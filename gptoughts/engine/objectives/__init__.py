"""Objectives: each returns a loss sum and its weight."""
