"""How much of a step is taken: it is halved until the loss falls as promised."""

from collections.abc import Callable
from typing import Any, TypeAlias

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
    promised: Callable[[Scalar], Scalar],
    share: Scalar,
    *,
    value: Scalar,
    least_ratio: Any,
    looks: Bool[Array, ""],
    halvings: int,
) -> tuple[Scalar, Scalar]:
    r"""The share of a step that is taken, and the change of the loss after it.

    From :math:`\alpha` on it is halved while the loss changes by more than
    :math:`r q(\alpha)`, and by more than rounding can cause.

    Args:
      change_after: from a share to the loss's change, one pass forward.
      promised: from a share to the model's change, :math:`q(\alpha)`.
      share: :math:`\alpha`, tried first.
      value: the loss.
      least_ratio: :math:`r`.
      looks: whether the loss is computed at all. If not, the share is that tried first
        and the change zero.
      halvings: the most there may be; 0 to compute the change alone.
    """

    def disappoints(share, change):
        return ~(change <= least_ratio * promised(share) + ROUNDING * jnp.abs(value))

    def goes_on(tried):
        count, share, change = tried
        first = count == 0
        return looks & (first | ((count <= halvings) & disappoints(share, change)))

    def attempt(tried):
        count, share, _ = tried
        share = jnp.where(count == 0, share, share / 2)
        return count + 1, share, change_after(share).astype(nothing.dtype)

    nothing = jnp.zeros_like(promised(share))
    start = (jnp.zeros((), jnp.int32), share, nothing)
    _, share, change = jax.lax.while_loop(goes_on, attempt, start)
    return share, change
