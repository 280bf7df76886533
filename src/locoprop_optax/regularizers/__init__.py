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
    Sum,
    none,
    squared_l2,
    sum_of,
    weight_decay,
)

__all__ = [
    "Bregman",
    "Mirror",
    "NoRegularizer",
    "Regularizer",
    "SquaredL2",
    "Sum",
    "bregman",
    "none",
    "relative_entropy",
    "signed_entropy",
    "squared_l2",
    "sum_of",
    "weight_decay",
]
