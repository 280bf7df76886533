"""Everyday problems, with nothing set."""
