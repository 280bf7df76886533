"""A guard around an optimizer: no step to where a parameter is not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class KeepFiniteState(NamedTuple):
    """State of `keep_finite`.

    Attributes:
      inner_state: the state of the optimizer within.
      skipped_steps: how many of its steps were not taken, for either reason.
    """

    inner_state: Any
    skipped_steps: Int[Array, ""]


def keep_finite(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Skips steps from a gradient, or to a parameter, that is not finite.

    A batch with a NaN in it, a gradient whose squares overflow, or a step that does,
    then changes neither the parameters nor the optimizer's state, and is counted. So is
    a step within that `scale_by_quadratic_model` refuses, because the loss would rise
    after it. All ready optimizers of this package stand behind this guard. It looks at
    what the optimizer returns, too, where `optax.apply_if_finite` looks at the gradient
    that goes in. It does not read the state, which can be large: what makes that not
    finite has to make the step so.

    Args:
      optimizer: what is guarded, the whole chain: what follows it is not.

    Returns:
      A transformation whose `update` takes `params` and what `optimizer` takes. How
      many steps were skipped is `optax.tree.get(state, "skipped_steps")`.

    Raises:
      TypeError: from `update`, if `params` is missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import locoprop_optax as loco
      >>> tx = loco.keep_finite(optax.adam(0.1))
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([1.0, jnp.nan]), state, params)
      >>> updates, int(optax.tree.get(state, "skipped_steps"))
      (Array([0., 0.], dtype=float32), 1)
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        return KeepFiniteState(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise TypeError(
                "update needs `params`: call tx.update(grads, state, params, ...)."
            )
        step, moved = optimizer.update(updates, state.inner_state, params, **extra_args)
        reached = optax.apply_updates(params, step)
        squares = jax.tree.map(jnp.square, updates)
        finite = all_finite((squares, reached))
        nothing = jax.tree.map(jnp.zeros_like, step)
        # A branch, not a selection, which each array's computation would repeat.
        step, kept = jax.lax.cond(
            finite, lambda: (step, moved), lambda: (nothing, state.inner_state)
        )
        skipped = increased(state.skipped_steps, ~finite | _refused(moved))
        return step, KeepFiniteState(kept, skipped)

    return optax.GradientTransformationExtraArgs(init, update)


def _refused(state: Any) -> Array:
    """Whether a `scale_by_quadratic_model` within did not take its step."""
    found = optax.tree.get_all_with_path(state, "refused")
    return jnp.any(jnp.asarray([refused for _, refused in found]))


def increased(counter: Int[Array, ""], by: Any) -> Int[Array, ""]:
    """A counter moved on, that stays where it is rather than overflow."""
    return jnp.maximum(counter, counter + jnp.asarray(by, counter.dtype))


def all_finite(tree: Any) -> Array:
    """Whether all numbers of a tree are finite: no other less itself is zero."""
    left = [jnp.sum(leaf - leaf) for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    return jnp.asarray(sum(left) == 0)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
