r"""Regularizers: what holds a layer's parameters near where they were.

A regularizer is a function :math:`R` of the step :math:`\Delta = \theta - \theta_0`
and of :math:`\theta_0`, added to the local loss.
"""

from locoprop_optax.regularizers._bregman import (
    Bregman,
    Mirror,
    bregman,
    relative_entropy,
    signed_entropy,
)
from locoprop_optax.regularizers._regularizer import (
    NoRegularizer,
    Regularizer,
    SquaredL2,
    none,
    squared_l2,
)

__all__ = [
    "Bregman",
    "Mirror",
    "NoRegularizer",
    "Regularizer",
    "SquaredL2",
    "bregman",
    "none",
    "relative_entropy",
    "signed_entropy",
    "squared_l2",
]
