"""The paper's solver: a few steps of any Optax optimizer."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from locoprop_optax._problems.problem import LocalProblems
from locoprop_optax._utils.dtypes import at_least_float32
from locoprop_optax._utils.hyperparams import (
    ScalarOrSchedule,
    at,
    check_count,
    check_positive,
)
from locoprop_optax.solvers._solver import Solver, repeat

OptimizerFromRate: TypeAlias = Callable[[Any], optax.GradientTransformation]


def first_order(
    optimizer: optax.GradientTransformation | OptimizerFromRate,
    num_steps: int = 10,
    decay_floor: float = 0.25,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    reset: bool = False,
    tolerance: float | None = None,
    local_batch_size: int | None = None,
) -> Solver:
    r"""A few steps of any Optax optimizer, as in the paper.

    The k-th of T steps, k from 0, has the step size

    .. math::
      \eta_k = \eta \max(1 - k / T,\ \text{decay\_floor}) .

    The gradient of the first is already known from backprop, so T steps cost T - 1
    passes forward and back through each layer by itself. With the squared loss, the
    later ones use :math:`x^\top x` instead of the examples where that takes fewer
    operations.

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
      tolerance: stops a batch's steps early, before one for which no layer's gradient
        is longer than this share of its first. Convolutions are slow in the loop that
        it needs on a CPU. Default None: all T steps.
      local_batch_size: how many examples each step but the first sees, a slice of
        its own; T steps of an n-th of the batch cost as little as one of the whole
        for T = n. Examples beyond the last whole slice are left out. Default None:
        all examples.

    Returns:
      The solver.

    Raises:
      TypeError: if `num_steps` or `local_batch_size` is no Python int, or
        `learning_rate` does not go with `optimizer`.
      ValueError: if `num_steps` or `local_batch_size` is below 1, `tolerance` is not
        positive or `decay_floor` not in [0, 1]; when a step is traced, if a layer has
        fewer examples than `local_batch_size`.

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
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    if local_batch_size is not None:
        check_count("local_batch_size", local_batch_size)
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
        assert learning_rate is not None
        return optimizer(decay * at(learning_rate, count)), 1.0

    def fresh(params):
        now, _ = optimizer_at(jnp.zeros((), jnp.int32), 1.0)
        return now.init(at_least_float32(params))

    def solve(problems, state, count):
        params = problems.params()

        def advance(k, gradient, step, state):
            decay = jnp.maximum(1 - k * (1 / num_steps), decay_floor)
            now, factor = optimizer_at(count, decay)
            updates, new_state = now.update(
                _cast(gradient, step), state, optax.tree.add(params, step)
            )
            moved = jax.tree.map(lambda s, u: s + factor * u, step, updates)
            return _cast(moved, step), _cast(new_state, state)

        def gradient(problem, step, number):
            if local_batch_size is None:
                return problem.gradient(step)
            return problem.of_examples(number, local_batch_size).gradient(step)

        def gradient_of_step(k, step):
            return problems.map(lambda layer, part: gradient(layer, part, k - 1), step)

        def later_step(carry, k):
            step, state = carry
            return advance(k, gradient_of_step(k, step), step, state)

        if local_batch_size is None:
            problems = problems.with_gram(num_steps - 1)
        first = problems.gradient_at_start()
        start = fresh(params) if reset else state
        carry = advance(0, first, problems.no_step(), start)
        if tolerance is None:
            numbers = range(1, num_steps)
            step, end = repeat(later_step, carry, numbers, *problems.grouped.values)
        else:
            longest = _lengths(problems, first, tolerance)

            def unfinished(carry):
                k, _, done = carry
                return (k < num_steps) & ~done

            def step_unless_done(carry):
                k, (step, state), _ = carry
                now = gradient_of_step(k, step)
                lengths = _lengths(problems, now)
                done = jnp.all(lengths <= longest)
                moved = advance(k, now, step, state)
                kept = optax.tree.where(done, (step, state), moved)
                return k + 1, kept, done

            begin = (jnp.asarray(1), carry, jnp.asarray(False))
            _, (step, end), _ = jax.lax.while_loop(unfinished, step_unless_done, begin)
        return step, state if reset else end

    return Solver(lambda params, layers: fresh(params), solve, scales_gradient=True)


def _lengths(problems: LocalProblems, tree: Any, scale: float = 1.0) -> Array:
    """The norms of all layers' parts of a tree, in one array."""
    norms = problems.each(lambda _, part: scale * optax.tree.norm(part), tree)
    return jnp.concatenate([jnp.ravel(norm) for norm in norms.values])


def _cast(tree: Any, like: Any) -> Any:
    """Keeps dtypes, whatever the rates and schedules that enter have."""
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), tree, like)
