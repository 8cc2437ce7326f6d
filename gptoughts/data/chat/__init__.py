"""Conversations as tables of rows with labeled answers."""
