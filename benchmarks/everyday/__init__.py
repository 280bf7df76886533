"""Everyday problems: ordinary models on small data, with nothing set."""
