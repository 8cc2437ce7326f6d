"""Evaluations: perplexity, likelihood bounds, SQuAD, paired comparison."""
