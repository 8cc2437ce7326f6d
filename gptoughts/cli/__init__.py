"""Command line: one file per verb, option building, error printing."""
