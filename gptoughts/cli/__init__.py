"""Command line: one file per command, option building, error printing."""
