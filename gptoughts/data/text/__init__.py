"""Tokenize text files into shards, and read shards."""
