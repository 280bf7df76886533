r"""Targets: where each layer's output is asked to go.

A target turns a layer's cotangents :math:`g = \partial L / \partial a` into a
displacement :math:`\delta`; the local problem's target is then
:math:`t = f(a_0) - \delta` in the space that the local loss compares.
"""

from locoprop_optax.targets._gradient import gradient_descent, normalized
from locoprop_optax.targets._natural import natural_gradient
from locoprop_optax.targets._target import Displacement, Target

__all__ = [
    "Displacement",
    "Target",
    "gradient_descent",
    "natural_gradient",
    "normalized",
]
