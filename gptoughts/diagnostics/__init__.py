"""Measure and inspect: benchmarks, doctor, traces. A training run imports nothing from here."""
