"""Conversations to rows with labeled answers."""
