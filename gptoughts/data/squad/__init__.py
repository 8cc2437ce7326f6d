"""SQuAD data as tables of overlapping windows."""
