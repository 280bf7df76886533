"""Solvers around solvers: steps that are not too long."""

import jax
import jax.numpy as jnp
import optax

from locoprop_optax._utils.hyperparams import (
    ScalarOrSchedule,
    at,
    check_count,
    check_positive,
)
from locoprop_optax.solvers._solver import Solver


def limited(solver: Solver, max_relative_step: ScalarOrSchedule) -> Solver:
    r"""Another solver's steps, none longer than a share of the layer's parameters.

    .. math::
      \Delta \leftarrow \min\!\left(1,\
      \rho \frac{\max(\lVert \theta_0 \rVert, \sqrt{d_\text{out}})}
      {\lVert \Delta \rVert}\right) \Delta

    A layer that starts at zero is measured by what it is to become: that with outputs
    as large as its inputs.

    Args:
      solver: the other solver.
      max_relative_step: :math:`\rho > 0`, a float or a schedule.

    Returns:
      The solver.

    Raises:
      ValueError: if `max_relative_step` is not positive.

    Example:
      >>> import locoprop_optax as loco
      >>> solver = loco.solvers.limited(loco.solvers.majorized_newton(), 0.1)
    """
    check_positive("max_relative_step", max_relative_step)

    def solve(problems, state, count):
        share = at(max_relative_step, count)

        def limit(problem, step):
            size, length = optax.tree.norm(problem.params), optax.tree.norm(step)
            longest = share * jnp.maximum(size, problem.preactivations.shape[-1] ** 0.5)
            factor = jnp.where(length <= longest, 1.0, longest / length)
            return {name: factor.astype(s.dtype) * s for name, s in step.items()}

        step, state = solver.solve(problems, state, count)
        return problems.map(limit, step), state

    return solver._replace(solve=solve)


def line_searched(solver: Solver, num_halvings: int = 8) -> Solver:
    r"""Another solver's steps, each as long as the local objective likes best.

    Of the lengths :math:`s \in \{1, \tfrac12, \dots, 2^{-m}, 0\}` each layer takes

    .. math::
      \Delta \leftarrow \hat s\, \Delta, \qquad
      \hat s = \arg\min_s\ \ell(a_0 + s\, A \Delta, t) + R(s \Delta) .

    No step then raises the local objective, whatever the solver and the loss. A layer
    is linear, so that all lengths share one pass through it.

    Args:
      solver: the other solver.
      num_halvings: m, at least 1.

    Returns:
      The solver.

    Raises:
      TypeError: if `num_halvings` is no Python int.
      ValueError: if `num_halvings` is below 1; when a step is traced, if a layer's loss
        has no value, because its transfer function has no `potential`.

    Example:
      >>> import optax
      >>> import locoprop_optax as loco
      >>> solver = loco.solvers.line_searched(
      ...     loco.solvers.first_order(optax.sgd(1.0), num_steps=5))
    """
    check_count("num_halvings", num_halvings)
    lengths = [2.0**-k for k in range(num_halvings + 1)] + [0.0]

    def search(problem, step):
        change = problem.linear_map(step, problem.inputs)

        def shorten(length, array):  # also of an array that is not finite
            return jnp.where(length > 0, length.astype(array.dtype) * array, 0)

        def objective(length):
            shorter = {name: shorten(length, s) for name, s in step.items()}
            return problem.value_after(shorten(length, change), shorter)

        values = jax.lax.map(objective, jnp.asarray(lengths, change.dtype))
        best = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
        chosen = jnp.asarray(lengths)[best]
        return {name: shorten(chosen, s) for name, s in step.items()}

    def solve(problems, state, count):
        step, state = solver.solve(problems, state, count)
        return problems.map(search, step), state

    return solver._replace(solve=solve)
