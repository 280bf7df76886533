"""Conjugate gradients, for layers too wide for a matrix of their inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from locoprop_optax._problems.problem import LocalProblem
from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._utils.hyperparams import (
    ScalarOrSchedule,
    at,
    check_count,
    check_not_negative,
)
from locoprop_optax.solvers._newton import bounds
from locoprop_optax.solvers._solver import Solver, repeat


def conjugate_gradient(
    num_iterations: int = 10,
    damping: ScalarOrSchedule = 0.1,
    *,
    num_steps: int = 1,
    tolerance: float = 0.0,
) -> Solver:
    r"""`majorized_newton` without its matrices: steps by conjugate gradients.

    Each step solves, as far as its iterations go,

    .. math::
      (c\, x^\top x + \lambda I)\, d =
      -\big[ x^\top (f(a_0 + x \Delta) - t) + \lambda \Delta \big], \qquad
      \Delta \leftarrow \Delta + d

    with products by :math:`x` alone, :math:`4 n\, d_\text{in} d_\text{out}` operations
    each. Started at zero, conjugate gradients lower the quadratic above the local
    problem in every iteration, so that no step raises the local objective. For the
    squared loss the quadratic is the local problem.

    Args:
      num_iterations: of conjugate gradients in a step, at least 1.
      damping: :math:`\lambda` relative to c times the mean eigenvalue of
        :math:`x^\top x`, at least 0; a float or a schedule. If it is not 0.0, a
        convolution's design matrix is formed once, for that eigenvalue.
      num_steps: at least 1.
      tolerance: stops a step's iterations once the residual is below this share of the
        right-hand side. Default 0: once it is below what rounding leaves of it.

    Returns:
      The solver. A regularizer adds its own curvature to the matrix. Its
      iterations are a loop, in which convolutions are slow on a CPU.

    Raises:
      TypeError: if a count is no Python int.
      ValueError: if a count is below 1, `damping` is negative or `tolerance`
        negative; when a step is traced, if the loss or the regularizer has no bounded
        curvature. The message names the layer.

    Example:
      As the options of `scale_by_locoprop(layers, **proxprop)`:

      >>> import locoprop_optax as loco
      >>> proxprop = dict(
      ...     loss=loco.losses.squared_loss(),
      ...     target=loco.targets.gradient_descent(1.0),
      ...     regularizer=loco.regularizers.squared_l2(0.5),
      ...     solver=loco.solvers.conjugate_gradient(5, damping=0.0))

    References:
      Frerix, Möllenhoff, Moeller, Cremers, `Proximal Backpropagation
      <https://arxiv.org/abs/1706.04638>`_, 2018, section 4.
    """
    check_count("num_iterations", num_iterations)
    check_count("num_steps", num_steps)
    check_not_negative("damping", damping)
    check_not_negative("tolerance", tolerance)

    def solve_layer(problem: LocalProblem, relative: Any) -> LayerParams:
        bound, penalty = bounds(problem, "conjugate_gradient")
        is_zero = isinstance(relative, int | float) and relative == 0
        eigenvalue = 0.0 if is_zero else _mean_eigenvalue(problem)
        strength = relative * bound * eigenvalue

        smallest = 10 * jnp.finfo(jnp.result_type(*problem.params.values())).eps
        stop_at: Any = jnp.maximum(tolerance, smallest)

        def product(step):
            apply = lambda s: problem.linear_map(s, problem.inputs)  # noqa: E731
            change, pull_back = jax.vjp(apply, step)
            (curved,) = pull_back(change)
            ridge = strength + penalty
            return {
                n: (bound * curved[n] + ridge * s).astype(s.dtype)
                for n, s in step.items()
            }

        def advance(step, gradient):
            damped = {n: -(gradient[n] + strength * s) for n, s in step.items()}
            change, _ = jax.scipy.sparse.linalg.cg(
                product,
                {n: d.astype(step[n].dtype) for n, d in damped.items()},
                maxiter=num_iterations,
                tol=stop_at,
            )
            return optax.tree.add(step, change)

        def later_step(step, _):
            return advance(step, problem.gradient(step))

        first = advance(problem.no_step(), problem.gradient_at_start())
        return repeat(later_step, first, range(1, num_steps), problem)

    def solve(problems, state, count):
        relative = at(damping, count)
        return problems.map(lambda problem: solve_layer(problem, relative)), state

    return Solver(lambda params, layers: (), solve)


def _mean_eigenvalue(problem: LocalProblem) -> jax.Array:
    r"""Of :math:`x^\top x`, with a column of ones if there is a bias."""
    squares = problem.linear_map.squares(problem.params, problem.inputs)
    return jnp.mean(squares.astype(problem.preactivations.dtype))
