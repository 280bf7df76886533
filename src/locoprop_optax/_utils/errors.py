"""Errors that are told with the name of a layer."""


class LayerError(ValueError):
    """What is wrong with a layer, to be told with its name."""
