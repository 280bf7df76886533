"""Newton steps on a quadratic above the local problem, and the exact solution."""

from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from locoprop_optax._problems.gram import (
    DiagonalGram,
    DiagonalInverse,
    Gram,
    Inverse,
)
from locoprop_optax._problems.problem import SQUARED_LOSS, LocalProblem
from locoprop_optax._records.layers import Layer
from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._utils.average import Average
from locoprop_optax._utils.counters import increased
from locoprop_optax._utils.dtypes import at_least_float32
from locoprop_optax._utils.errors import LayerError
from locoprop_optax._utils.hyperparams import (
    ScalarOrSchedule,
    at,
    check_count,
    check_not_negative,
    check_share,
    check_static,
)
from locoprop_optax.solvers._solver import Solver, repeat

T = TypeVar("T")


def majorized_newton(
    num_steps: int = 2,
    damping: ScalarOrSchedule = 0.1,
    *,
    ema: float = 0.0,
    stride: int = 1,
) -> Solver:
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
      ema: how much of the curvature :math:`x^\top x` is kept from batch to batch, in
        [0, 1): a running average of it over the rows, corrected for its bias, stands
        for the batch's own. Its state is one matrix a layer, of the kernel's rows. It
        does not lie above this batch's problem, so that `num_steps` must be 1. Default:
        0, each batch by itself and no state.
      stride: the curvature is that of every `stride`-th example, scaled to all; of more
        where it would have fewer rows than columns. It makes the step cheaper where
        rows are many, as a convolution's, which has one for each position. No step
        then raises the objective only as far as the examples are alike. Default: 1,
        all examples.

    Returns:
      The solver. Biases are solved for as one more row of the kernel, with an input
      of ones. A regularizer adds its own curvature to the Hessian. Where rounding
      leaves that not definite, the trace of the curvature stands for it, so that the
      steps still descend; how often is `optax.tree.get(state, "raised_damping")`.

    Raises:
      TypeError: if `num_steps` or `stride` is no Python int.
      ValueError: if `num_steps` or `stride` is below 1, `damping` negative, `ema` not
        in [0, 1) or given for more than one step; when a step is traced, if the loss or
        the regularizer has no bounded curvature; with `stride`, if the first axis of a
        layer's inputs does not count examples. The message names the layer.

    Example:
      >>> import locoprop_optax as loco
      >>> solver = loco.solvers.majorized_newton(num_steps=2, damping=0.1)
    """
    check_count("num_steps", num_steps)
    check_count("stride", stride)
    check_not_negative("damping", damping)
    check_static("ema", ema)
    check_share("ema", ema)
    if ema and num_steps > 1:
        raise ValueError(
            f"ema={ema} needs num_steps=1, got {num_steps}: curvature that is averaged "
            "over batches does not bound this batch's, so that further steps diverge."
        )

    def init(params, layers):
        shapes = {p: _shapes(layers[p], part) for p, part in params.items()}
        grams = {path: gram for path, (gram, _) in shapes.items()}
        factors = {path: factor for path, (_, factor) in shapes.items()}
        return MajorizedNewtonState(
            curvature=Average.empty(grams) if ema else (),
            factors=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), factors),
            raised_damping=jnp.zeros((), jnp.int32),
        )

    def refresh(problems, state, count):
        layers, average = problems.grouped, ()
        grams = layers.map(partial(LocalProblem.to_gram, stride=stride))
        if ema:
            means = grams.map(lambda gram: gram._replace(rows=None)).to_layers()
            average = state.curvature.moved(means, ema)
            averaged = layers.like(average.value())
            grams = averaged.map(lambda a, g: a._replace(rows=g.rows), grams)
        factorize = partial(_factorize, damping=at(damping, count))
        factors, definite = layers.map(factorize, grams).unzip()
        raised = sum(jnp.sum(~each) for each in definite.values)
        total = increased(state.raised_damping, raised)
        return MajorizedNewtonState(average, factors.to_layers(), total)

    def solve(problems, state, count):
        del count
        layers = problems.with_gram(num_steps - 1).grouped
        factors = layers.like(state.factors)
        step = layers.map(partial(_steps, num_steps=num_steps), factors)
        return step.to_layers(), state

    return Solver(init, solve, refresh)


def exact(
    damping: ScalarOrSchedule = 0.0, *, ema: float = 0.0, stride: int = 1
) -> Solver:
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
      ema: how much of the curvature is kept from batch to batch, as in
        `majorized_newton`.
      stride: the curvature is that of every `stride`-th example, as there.

    Returns:
      The solver.

    Raises:
      TypeError: if `stride` is no Python int.
      ValueError: if `damping` is negative, `ema` not in [0, 1) or `stride` below 1;
        when a step is traced, if the local loss is not `losses.squared_loss()`, or as
        `majorized_newton`.

    Example:
      As the options of `scale_by_locoprop(layers, **foof)`:

      >>> import locoprop_optax as loco
      >>> foof = dict(
      ...     loss=loco.losses.squared_loss(),
      ...     target=loco.targets.gradient_descent(1.0),
      ...     solver=loco.solvers.exact(damping=0.1))

    References:
      Benzing, `Gradient Descent on Neurons and its Link to Approximate Second-Order
      Optimization <https://arxiv.org/abs/2201.12250>`_, 2022.
    """
    one_step = majorized_newton(1, damping, ema=ema, stride=stride)

    def check(problem):
        if problem.loss != SQUARED_LOSS:
            raise LayerError(
                f"exact solves the squared loss, not {_named(problem.loss)}. Use it "
                "with losses.squared_loss(), or use solvers.majorized_newton."
            )

    def solve(problems, state, count):
        problems.each(check)
        return one_step.solve(problems, state, count)

    return one_step._replace(solve=solve)


def bounds(problem: LocalProblem, solver: str) -> tuple[float, float | Array]:
    """The bounds on the curvature of the loss and of the regularizer.

    Raises:
      LayerError: if there is none; it says which solver needs it.
    """
    bound, penalty = problem.loss.curvature, problem.regularizer.curvature
    if bound is None or penalty is None:
        lacking = problem.loss if bound is None else problem.regularizer
        raise LayerError(
            f"{solver} needs a bound on the curvature of {_named(lacking)}, which has "
            "none. Use solvers.first_order, a Transfer with derivative_bound, or "
            "transfers={path: 'identity'} in locoprop_optax.layers."
        )
    return bound, penalty


def _named(loss: Any) -> str:
    transfer = getattr(loss, "transfer", None)
    return f"the loss of {transfer.name!r}" if transfer else str(loss)


class MajorizedNewtonState(NamedTuple):
    """State of `majorized_newton` and `exact`.

    Attributes:
      curvature: the averaged curvature of each layer; () without `ema`.
      factors: what the steps need of the curvature of each layer, inverted.
      raised_damping: how often rounding spoiled an inverse, so that the trace of the
        curvature stood for it.
    """

    curvature: Any
    factors: Any
    raised_damping: Int[Array, ""]


class _Factor(NamedTuple):
    """What a layer's steps need of its curvature.

    Attributes:
      inverse: the damped curvature, inverted.
      strength: what of its diagonal is damping.
    """

    inverse: Inverse | DiagonalInverse
    strength: Float[Array, "g 1 1"]


def _shapes(layer: Layer, params: LayerParams) -> tuple[Gram | DiagonalGram, _Factor]:
    """The shapes of the average of a layer's Gram matrices, and of what it is made."""

    def of(params):
        matrix = layer.linear_map.to_matrix(at_least_float32(dict(params)))
        groups, columns, _ = matrix.shape
        if layer.linear_map.is_diagonal:
            gram = DiagonalGram(jnp.zeros((groups, columns, 1), matrix.dtype), None)
        else:
            gram = Gram(jnp.zeros((groups, columns, columns), matrix.dtype), None)
        strength = gram.mean_eigenvalue()
        inverse, _ = gram.inverse(1.0, strength)
        return gram, _Factor(inverse, strength)

    for _ in layer.stack:
        of = jax.vmap(of)
    return jax.eval_shape(of, dict(params))


def _factorize(
    problem: LocalProblem, gram: Gram | DiagonalGram, *, damping: Any
) -> tuple[_Factor, Bool[Array, ""]]:
    """Damps and inverts what bounds a layer's Hessian: n c times the mean Gram matrix.

    Returns:
      The factor, and whether rounding left the curvature definite.
    """
    bound, penalty = bounds(problem, "majorized_newton")
    whole = (gram.rows * jnp.asarray(bound)).astype(gram.inner.dtype)
    penalty = jnp.asarray(penalty, gram.inner.dtype)
    mean_eigenvalue = whole * gram.mean_eigenvalue()
    # Without any input there is nothing to solve; the identity keeps the step at zero.
    empty = (mean_eigenvalue == 0) & (penalty == 0)
    strength = damping * mean_eigenvalue
    inverse, definite = gram.inverse(whole, strength + penalty + empty)
    factor = _Factor(inverse, strength.astype(gram.inner.dtype))
    return factor, definite | ~jnp.all(jnp.isfinite(mean_eigenvalue))


def _steps(problem: LocalProblem, factor: _Factor, *, num_steps: int) -> LayerParams:
    """The steps of `majorized_newton` for one layer."""
    inverse, strength = factor
    linear_map = problem.linear_map

    def to_params(matrix):
        return linear_map.from_matrix(matrix, like=problem.params)

    def later_step(step, _):
        gradient = linear_map.to_matrix(problem.gradient(step))
        damped = gradient + strength * linear_map.to_matrix(step)
        return optax.tree.sub(step, to_params(inverse @ damped))

    factors = problem.factors_at_start()
    if factors is None:
        solved = inverse @ linear_map.to_matrix(problem.gradient_at_start())
    else:
        columns, residual = factors
        solved = (inverse @ columns) @ residual
    return repeat(later_step, to_params(-solved), range(1, num_steps), problem)
