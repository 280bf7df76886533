"""How much of a step is taken: it is halved until the loss does not rise."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Scalar: TypeAlias = Float[Array, ""]

MOST_HALVINGS = 10
GROWTH = 1.5  # of the share from one step to the next, up to the whole
ROUNDING = 1e-3  # of the loss, by which it may rise


def grown(share: Scalar) -> Scalar:
    """The share of a step that is tried first after one of which `share` was taken."""
    return jnp.minimum(1.0, GROWTH * share)


def taken(
    change_after: Callable[[Scalar], Scalar],
    share: Scalar,
    value: Scalar,
    *,
    looks: Bool[Array, ""],
    halvings: int,
) -> tuple[Scalar, Scalar]:
    """The share of a step that is taken, and the change of the loss after it.

    Args:
      change_after: from a share to the loss's change, one pass forward.
      share: what is tried first, and halved while the loss rises by more than rounding
        can cause, or is not finite.
      value: the loss before.
      looks: whether the loss is computed at all. If not, the share is that tried first
        and the change zero.
      halvings: the most there may be; 0 to compute the change alone.
    """

    def goes_on(tried):
        count, _, change = tried
        rises = ~(change <= ROUNDING * jnp.abs(value))
        return looks & ((count == 0) | ((count <= halvings) & rises))

    def attempt(tried):
        count, share, _ = tried
        share = jnp.where(count == 0, share, share / 2)
        return count + 1, share, change_after(share).astype(value.dtype)

    start = (jnp.zeros((), jnp.int32), share, jnp.zeros_like(value))
    _, share, change = jax.lax.while_loop(goes_on, attempt, start)
    return share, change
