"""Counters that stay at their end."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int


def increased(counter: Int[Array, ""], by: Any) -> Int[Array, ""]:
    """A counter moved on, that stays where it is rather than overflow."""
    return jnp.maximum(counter, counter + jnp.asarray(by, counter.dtype))
