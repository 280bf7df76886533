"""A running average of a tree of arrays, corrected for its start at zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Average(NamedTuple):
    r"""An exponential average, whose weight is that of what it has seen.

    .. math::
      T \leftarrow \beta T + (1 - \beta)\, x, \quad
      w \leftarrow \beta w + (1 - \beta), \qquad \hat x = T / w

    Attributes:
      total: T.
      weight: w.
    """

    total: Any
    weight: Float[Array, ""]

    @classmethod
    def empty(cls, like: Any) -> Average:
        """That of nothing, for arrays of these shapes."""
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(zeros)]
        return cls(zeros, jnp.zeros((), dtypes[0] if dtypes else jnp.float32))

    def moved(self, now: Any, decay: float | Float[Array, ""]) -> Average:
        """The average with something new."""

        def mean(old, new):
            mixed = decay * old + (1 - decay) * jnp.asarray(new, old.dtype)
            return mixed.astype(old.dtype)

        return Average(
            jax.tree.map(mean, self.total, now),
            mean(self.weight, jnp.ones_like(self.weight)),
        )

    def value(self) -> Any:
        """What it says, once it has seen something."""
        return jax.tree.map(lambda leaf: leaf / self.weight, self.total)
