r"""Solvers: how the local problems are made small.

A solver takes all layers' local problems and returns the step
:math:`\Delta = \theta - \theta_0` of each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_optax._hyperparams import (
    ScalarOrSchedule,
    at,
    check_count,
    check_not_negative,
    check_positive,
)
from locoprop_optax._inverse import inverse
from locoprop_optax._layers import LayerParams
from locoprop_optax._local_problem import LocalProblem, LocalProblems, at_least_float32
from locoprop_optax._transfers import IDENTITY
from locoprop_optax.losses import MatchingLoss

OptimizerFromRate: TypeAlias = Callable[[Any], optax.GradientTransformation]


class Solver(NamedTuple):
    """A solver, as a pair of pure functions.

    Attributes:
      init: from the tree of local parameters to the solver's state, in which any
        tree of one value per parameter has the structure of that tree.
      solve: from (problems, state, count) to (tree of steps, new state).
    """

    init: Callable[[Any], Any]
    solve: Callable[[LocalProblems, Any, Array], tuple[Any, Any]]


def first_order(
    optimizer: optax.GradientTransformation | OptimizerFromRate,
    num_steps: int = 10,
    decay_floor: float = 0.25,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    reset: bool = False,
) -> Solver:
    r"""A few steps of any Optax optimizer, as in the paper.

    The k-th of T steps, k from 0, has the step size

    .. math::
      \eta_k = \eta \max(1 - k / T,\ \text{decay\_floor}) .

    The gradient of the first is already known from backprop, so T steps cost T - 1
    passes forward and back through each layer by itself.

    Args:
      optimizer: an Optax transformation, whose update is multiplied by
        :math:`\eta_k / \eta`; or a function from a learning rate to one, such as
        `optax.adam`, into which :math:`\eta_k` goes. They differ where the state
        holds steps that are already scaled, as the momentum of `optax.rmsprop` does.
      num_steps: T, at least 1.
      decay_floor: in [0, 1]; 1.0 keeps the step size constant.
      learning_rate: :math:`\eta`, a float or a schedule over batches. To be given
        if, and only if, `optimizer` is a function from a learning rate.
      reset: whether to forget the optimizer's state between batches. Default False:
        momentum and second moments live on.

    Returns:
      The solver.

    Raises:
      TypeError: if `num_steps` is no Python int, or `learning_rate` does not go with
        `optimizer`.
      ValueError: if `num_steps` is below 1 or `decay_floor` not in [0, 1].

    Example:
      >>> import optax
      >>> import locoprop_optax as loco
      >>> solver = loco.solvers.first_order(optax.sgd(0.1), num_steps=5)
      >>> solver = loco.solvers.first_order(optax.adam, learning_rate=1e-3)

    References:
      Amid, Anil, Warmuth, 2022, algorithm 1, and the authors' published notebook.
    """
    check_count("num_steps (the number of local steps)", num_steps)
    if not 0 <= decay_floor <= 1:
        raise ValueError(f"decay_floor must be in [0, 1], got {decay_floor}.")
    takes_rate = not isinstance(optimizer, optax.GradientTransformation)
    if takes_rate and learning_rate is None:
        raise TypeError("A function from a learning rate needs `learning_rate=`.")
    if not takes_rate and learning_rate is not None:
        raise TypeError(
            "`learning_rate=` goes with a function from a learning rate, such as "
            "optax.sgd; this optimizer is a finished transformation."
        )

    def optimizer_at(count, decay) -> tuple[optax.GradientTransformation, Any]:
        if isinstance(optimizer, optax.GradientTransformation):
            return optimizer, decay
        return optimizer(decay * at(learning_rate, count)), 1.0  # pyright: ignore

    def init(params):
        now, _ = optimizer_at(jnp.zeros((), jnp.int32), 1.0)
        return now.init(at_least_float32(params))

    def solve(problems, state, count):
        params = problems.params()

        def advance(k, gradient, step, state):
            decay = jnp.maximum(1 - k / num_steps, decay_floor)
            now, factor = optimizer_at(count, decay)
            updates, state = now.update(gradient, state, _add(params, step))
            scaled = jax.tree.map(lambda u: (factor * u).astype(u.dtype), updates)
            return _add(step, scaled), state

        def later_step(carry, k):
            step, state = carry
            return advance(k, problems.gradient(step), step, state), None

        start = init(params) if reset else state
        carry = advance(0, problems.gradient_at_start(), problems.no_step(), start)
        (step, end), _ = jax.lax.scan(later_step, carry, jnp.arange(1, num_steps))
        return step, state if reset else end

    return Solver(init, solve)


def majorized_newton(num_steps: int = 2, damping: ScalarOrSchedule = 0.1) -> Solver:
    r"""Newton steps on a quadratic that lies above the local problem.

    Since :math:`f' \le c`, the local problem lies under a quadratic with the Hessian
    :math:`c\, x^\top x + \lambda I`, whichever the outputs. One inverse per layer and
    batch serves all steps:

    .. math::
      \Delta \leftarrow \Delta - (c\, x^\top x + \lambda I)^{-1}
      \big[ x^\top (f(a_0 + x \Delta) - t) + \lambda \Delta \big]

    No step raises the local objective, and there is neither a learning rate nor a
    state. The gradient of the first step is already known from backprop.

    Args:
      num_steps: at least 1.
      damping: :math:`\lambda` relative to c times the mean eigenvalue of
        :math:`x^\top x`, at least 0; a float or a schedule. With 0 the steps
        minimize the loss and the regularizer alone, which together must then be
        definite.

    Returns:
      The solver. Biases are solved for as one more row of the kernel, with an input
      of ones. A regularizer adds its own curvature to the Hessian.

    Raises:
      TypeError: if `num_steps` is no Python int.
      ValueError: if `num_steps` is below 1 or `damping` negative; when a step is
        traced, if the loss or the regularizer has no bounded curvature.

    Example:
      >>> import locoprop_optax as loco
      >>> solver = loco.solvers.majorized_newton(num_steps=2, damping=0.1)
    """
    check_count("num_steps", num_steps)
    check_not_negative("damping", damping)

    def solve(problems, state, count):
        relative = at(damping, count)
        step = problems.map(lambda p: _solve_layer(p, num_steps, relative))
        return step, state

    return Solver(lambda params: (), solve)


def exact(damping: ScalarOrSchedule = 0.0) -> Solver:
    r"""The solution of the squared loss, in closed form.

    .. math::
      \Delta = -(x^\top x + \lambda I)^{-1} x^\top \delta

    with the displacement :math:`\delta`, which is the natural gradient of the layer's
    inputs (FOOF; the input-side factor of K-FAC). It is one step of
    `majorized_newton`, whose bound is the squared loss itself.

    Args:
      damping: :math:`\lambda` relative to the mean eigenvalue of :math:`x^\top x`, at
        least 0; a float or a schedule. With 0 the regularizer has to make the problem
        definite.

    Returns:
      The solver.

    Raises:
      ValueError: if `damping` is negative; when a step is traced, if the local loss is
        not `losses.squared_loss()`.

    Example:
      >>> import locoprop_optax as loco
      >>> foof = loco.scale_by_locoprop(
      ...     loss=loco.losses.squared_loss(),
      ...     target=loco.targets.gradient_descent(1.0),
      ...     solver=loco.solvers.exact(damping=0.1))

    References:
      Benzing, `Gradient Descent on Neurons and its Link to Approximate Second-Order
      Optimization <https://arxiv.org/abs/2201.12250>`_, 2022.
    """
    one_step = majorized_newton(1, damping)

    def solve(problems, state, count):
        for problem in problems.grouped.values:
            if problem.loss != MatchingLoss(IDENTITY):
                raise ValueError(
                    f"exact solves the squared loss, not {problem.loss}. Use it with "
                    "losses.squared_loss(), or use solvers.majorized_newton."
                )
        return one_step.solve(problems, state, count)

    return Solver(one_step.init, solve)


def limited(solver: Solver, max_relative_step: ScalarOrSchedule) -> Solver:
    r"""Another solver's steps, none longer than a share of the layer's parameters.

    .. math::
      \Delta \leftarrow \min\!\left(1,\
      \rho \frac{\lVert \theta_0 \rVert}{\lVert \Delta \rVert}\right) \Delta

    Args:
      solver: the other solver.
      max_relative_step: :math:`\rho > 0`, a float or a schedule.

    Returns:
      The solver. A layer whose parameters are all zero is not limited.

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
            within = (length <= share * size) | (size == 0)
            factor = jnp.where(within, 1.0, share * size / length)
            return {name: factor.astype(s.dtype) * s for name, s in step.items()}

        step, state = solver.solve(problems, state, count)
        return problems.map(limit, step), state

    return Solver(solver.init, solve)


def _solve_layer(problem: LocalProblem, num_steps: int, damping: Any) -> LayerParams:
    """The steps of `majorized_newton` for one layer."""
    bound, penalty = problem.loss.curvature, problem.regularizer.curvature
    if bound is None or penalty is None:
        lacking = problem.loss if bound is None else problem.regularizer
        transfer = getattr(lacking, "transfer", None)
        name = f"the matching loss of {transfer.name!r}" if transfer else lacking
        raise ValueError(
            f"majorized_newton needs a bound on the curvature of {name}, which has "
            "none. Use solvers.first_order, a Transfer with derivative_bound, or "
            "transfers={path: 'identity'} where the layer is captured."
        )
    gram = _gram(problem)
    size = gram.shape[-1]
    mean_eigenvalue = jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None] / size
    strength = damping * bound * mean_eigenvalue
    # Without any input there is nothing to solve; the identity keeps the step at zero.
    empty = (mean_eigenvalue == 0) & (jnp.asarray(penalty) == 0)
    diagonal = strength + penalty + empty
    hessian = bound * gram + diagonal * jnp.eye(size, dtype=gram.dtype)
    newton = jax.vmap(inverse)(hessian)
    to_matrix = problem.linear_map.to_matrix

    def advance(step, gradient):
        damped = to_matrix(gradient) + strength * to_matrix(step)
        change = problem.linear_map.from_matrix(newton @ damped, like=step)
        return {name: step[name] - change[name] for name in step}

    def later_step(step, _):
        return advance(step, problem.gradient(step)), None

    first = advance(problem.no_step(), problem.gradient_at_start())
    step, _ = jax.lax.scan(later_step, first, length=num_steps - 1)
    return step


def _gram(problem: LocalProblem) -> Float[Array, "g rows rows"]:
    """The Gram matrices of the design, with a column of ones if there is a bias."""
    x = at_least_float32(problem.linear_map.design(problem.params, problem.inputs))
    gram = jnp.einsum("gni,gnj->gij", x, x)
    if "bias" not in problem.params:
        return gram
    sums = jnp.sum(x, axis=1)[..., None]
    ones = jnp.full((x.shape[0], 1, 1), x.shape[1], gram.dtype)
    return jnp.block([[gram, sums], [jnp.swapaxes(sums, 1, 2), ones]])


def _add(tree: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, tree, other)
