"""How much of a step is taken: it is halved until the loss does not rise."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Scalar: TypeAlias = Float[Array, ""]

LEAST = 1 / 64  # of a step
GROWTH = 1.5  # of the share from one step to the next, up to the whole
ROUNDING = 1e-3  # of the loss, by which it may rise
RISEN = 2.0  # the loss over that of the last batch, which differs from it anyway


def first_share(last: Scalar) -> Scalar:
    """What is tried first of a step after one of which the share `last` was taken."""
    return jnp.minimum(1.0, GROWTH * last)


def in_doubt(
    share: Scalar, value: Scalar, last: Scalar, slope: Scalar
) -> Bool[Array, ""]:
    """Whether a step has to be looked at.

    It has to if the last was shortened, if the loss rose, or if the slope along the
    step promises a fall by more than the whole loss, as it does where curvature or loss
    vanish.
    """
    return (share < 1) | (value > RISEN * last) | (-slope > value)


def rises(change: Scalar, value: Scalar) -> Bool[Array, ""]:
    """Whether the loss rises by more than rounding can cause, or is not finite."""
    return ~(change <= ROUNDING * jnp.abs(value))


def backtrack(
    change_after: Callable[[Scalar], Scalar],
    share: Scalar,
    value: Scalar,
    *,
    least: float | Scalar = LEAST,
    looks: Bool[Array, ""],
    halves: bool,
) -> tuple[Scalar, Scalar]:
    """The share of a step that is taken, and the change of the loss after it.

    Args:
      change_after: from a share to the loss's change, one pass forward.
      share: what is tried first.
      value: the loss before.
      least: what the share is not halved below.
      looks: whether the loss is computed at all. If not, the share is that tried first
        and the change zero.
      halves: whether the share is halved while the loss rises.
    """

    def goes_on(tried):
        looked, share, change = tried
        again = halves & rises(change, value) & (share > least)
        return looks & (~looked | again)

    def attempt(tried):
        looked, share, _ = tried
        share = jnp.where(looked, jnp.maximum(share / 2, least), share)
        return jnp.asarray(True), share, change_after(share).astype(value.dtype)

    start = (jnp.asarray(False), share, jnp.zeros_like(value))
    _, share, change = jax.lax.while_loop(goes_on, attempt, start)
    return share, change
