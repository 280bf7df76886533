r"""Solvers: how the local problems are made small.

A solver takes all layers' local problems and returns the step
:math:`\Delta = \theta - \theta_0` of each.
"""

from locoprop_optax.solvers._conjugate_gradient import conjugate_gradient
from locoprop_optax.solvers._first_order import OptimizerFromRate, first_order
from locoprop_optax.solvers._mirror_descent import mirror_descent
from locoprop_optax.solvers._newton import exact, majorized_newton
from locoprop_optax.solvers._solver import Solver

__all__ = [
    "OptimizerFromRate",
    "Solver",
    "conjugate_gradient",
    "exact",
    "first_order",
    "majorized_newton",
    "mirror_descent",
]
