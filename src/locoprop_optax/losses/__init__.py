r"""Local losses: what a layer's pre-activation is held against.

Every transfer function :math:`f = \nabla F` brings a loss of its own, the Bregman
divergence of its potential :math:`F`, called the matching loss:

.. math::
  D(a, t) = F(a) - \langle a, t \rangle + F^*(t), \qquad
  \nabla_a D(a, t) = f(a) - t .

It is convex in the pre-activation :math:`a` wherever :math:`f` is monotone, is never
negative, and is zero exactly where :math:`f(a) = t`.

References:
  Amid, Anil, Warmuth, `LocoProp: Enhancing BackProp via Local Loss Optimization
  <https://arxiv.org/abs/2106.06199>`_, 2022, section 3.
"""

from locoprop_optax.losses._loss import (
    Loss,
    LossFactory,
    MatchingLoss,
    SquaredLossAfterActivation,
    matching_loss,
    squared_loss,
)
from locoprop_optax.losses._transfers import (
    Transfer,
    as_transfer,
    elu,
    known_transfers,
    leaky_relu,
    register_transfer,
)

__all__ = [
    "Loss",
    "LossFactory",
    "MatchingLoss",
    "SquaredLossAfterActivation",
    "Transfer",
    "as_transfer",
    "elu",
    "known_transfers",
    "leaky_relu",
    "matching_loss",
    "register_transfer",
    "squared_loss",
]
