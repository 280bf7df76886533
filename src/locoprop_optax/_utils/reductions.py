"""Sums over the arrays of trees, in few operations.

A reduction is an operation to compile and to start, on a CPU even several for a vector.
Models have many small arrays, biases and scales, which are joined first.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Bool, Float

from locoprop_optax._utils.dtypes import at_least_float32

SMALL = 4096  # numbers


def joined(tree: Any) -> list[Array]:
    """The arrays of a tree, all small ones in one vector.

    On a mesh they stay apart, since those that are sharded would have to be gathered.
    """
    leaves = jax.tree.leaves(tree)
    if not get_abstract_mesh().empty:
        return leaves
    small = [jnp.ravel(leaf) for leaf in leaves if jnp.size(leaf) < SMALL]
    large = [leaf for leaf in leaves if jnp.size(leaf) >= SMALL]
    return [*large, jnp.concatenate(small)] if small else large


def inner(first: Any, second: Any) -> Float[Array, ""]:
    """The inner product of two trees of the same shapes, in float32 at least."""
    pairs = zip(*(joined(at_least_float32(t)) for t in (first, second)), strict=True)
    return jnp.asarray(sum((jnp.sum(a * b) for a, b in pairs), start=0.0))


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers of a tree are finite: no other less itself is zero."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]
    return jnp.asarray(sum(jnp.sum(leaf - leaf) for leaf in joined(numbers)) == 0)


def norms(arrays: Sequence[Array]) -> Float[Array, " n"]:
    """The norm of each array, in float32 at least."""
    arrays = [jnp.ravel(array) for array in at_least_float32(list(arrays))]
    most = SMALL if get_abstract_mesh().empty else 0
    small = [at for at, array in enumerate(arrays) if array.size < most]
    large = [at for at, array in enumerate(arrays) if array.size >= most]
    squares = [jnp.vdot(arrays[at], arrays[at])[None] for at in large]
    if small:
        longest = max(arrays[at].size for at in small)
        rows = [jnp.pad(arrays[at], (0, longest - arrays[at].size)) for at in small]
        squares.append(jnp.sum(jnp.square(jnp.stack(rows)), axis=1))
    return jnp.sqrt(jnp.concatenate(squares))[np.argsort([*large, *small])]


def is_float(leaf: Any) -> bool:
    """Whether a leaf holds numbers that can be other than finite."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
