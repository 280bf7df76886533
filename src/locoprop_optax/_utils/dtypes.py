"""The precision that sums over examples are made in."""

from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(tree: Any) -> Any:
    """Casts arrays of fewer bits to float32."""

    def widen(leaf):
        dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
        return jnp.asarray(leaf, dtype)

    return jax.tree.map(widen, tree)
