r"""Targets: where each layer's output is asked to go.

A target turns a layer's cotangents :math:`g = \partial L / \partial a` into a
displacement :math:`\delta`; the local problem's target is then
:math:`t = f(a_0) - \delta` in the space that the local loss compares.
"""

from locoprop_optax.targets._gradient import gradient_descent, normalized
from locoprop_optax.targets._natural import gauss_newton, natural_gradient
from locoprop_optax.targets._target import Displacement, Target
from locoprop_optax.targets._wrappers import clipped, momentum

__all__ = [
    "Displacement",
    "Target",
    "clipped",
    "gauss_newton",
    "gradient_descent",
    "momentum",
    "natural_gradient",
    "normalized",
]
