"""A guard around an optimizer: no step to where a parameter is not finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from locoprop_optax._utils.counters import increased
from locoprop_optax._utils.reductions import all_finite, squares_are_finite


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
    finite has to make the step so. The matrices of `scale_by_locoprop` it leaves as
    they are, since to keep two copies costs more than the step; they are of finite
    gradients, and finite, by themselves.

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
        finite = squares_are_finite(updates) & all_finite(reached)
        nothing = jax.tree.map(jnp.zeros_like, step)
        guarded, rest = _parted(moved)
        _, before = _parted(state.inner_state)
        # A branch, not a selection, which each array's computation would repeat.
        step, rest = jax.lax.cond(
            finite, lambda: (step, rest), lambda: (nothing, before)
        )
        skipped = increased(state.skipped_steps, ~finite | _refused(moved))
        return step, KeepFiniteState(_joined(guarded, rest), skipped)

    return optax.GradientTransformationExtraArgs(init, update)


def _guards_itself(part: Any) -> bool:
    return getattr(part, "stays_finite", False)


def _parted(state: Any) -> tuple[Any, Any]:
    """The parts of a state that guard themselves, and all others; None for the rest."""

    def only(kept):
        return jax.tree.map(
            lambda part: part if _guards_itself(part) == kept else None,
            state,
            is_leaf=_guards_itself,
        )

    return only(True), only(False)


def _joined(guarded: Any, rest: Any) -> Any:
    """The state that these are the parts of."""
    return jax.tree.map(
        lambda part, other: other if part is None else part,
        guarded,
        rest,
        is_leaf=lambda part: part is None or _guards_itself(part),
    )


def _refused(state: Any) -> Array:
    """Whether a `scale_by_quadratic_model` within did not take its step."""
    found = optax.tree.get_all_with_path(state, "refused")
    return jnp.any(jnp.asarray([refused for _, refused in found]))
