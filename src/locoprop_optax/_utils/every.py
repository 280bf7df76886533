"""What is done at some steps only: at the first each, later at intervals."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

T = TypeVar("T")
FRACTION = 8


def interval(most: int, count: Int[Array, ""]) -> Int[Array, ""]:
    """The steps from one turn to the next: a power of two, up to `most`.

    It is at most an eighth of the steps so far, since much changes when training
    begins.
    """
    longer = 2 ** np.arange(1, most.bit_length())
    doublings = jnp.sum(FRACTION * longer <= count, dtype=count.dtype)
    return jnp.left_shift(1, doublings)


def is_due(most: int, count: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether it is the turn of what is done at intervals up to `most`."""
    return count % interval(most, count) == 0


def every(
    most: int,
    count: Int[Array, ""],
    make: Callable[[], T],
    otherwise: Callable[[], T],
) -> T:
    """What is made at its turns, and costs nothing in between.

    Args:
      most: the longest interval.
      count: the number of steps before this one.
      make: what is run at its turns.
      otherwise: what is run at all other steps.
    """
    if most == 1:
        return make()
    return jax.lax.cond(is_due(most, count), make, otherwise)
