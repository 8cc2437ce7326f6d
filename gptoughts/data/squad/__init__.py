"""SQuAD questions to rows of overlapping windows."""
