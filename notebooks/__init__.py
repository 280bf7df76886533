"""Notebooks for Colab."""
