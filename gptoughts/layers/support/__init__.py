"""Torch code that several layers share."""
