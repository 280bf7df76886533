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
    """The arrays of a tree, all small ones in one vector."""
    leaves = jax.tree.leaves(tree)
    large, small = _by_size(leaves)
    parts = [leaves[at] for at in large]
    if small:
        parts.append(jnp.concatenate([jnp.ravel(leaves[at]) for at in small]))
    return parts


def inner(first: Any, second: Any) -> Float[Array, ""]:
    """The inner product of two trees of the same shapes, in float32 at least."""
    pairs = zip(*(joined(at_least_float32(t)) for t in (first, second)), strict=True)
    return jnp.asarray(sum((jnp.sum(a * b) for a, b in pairs), start=0.0))


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers of a tree are finite: no other less itself is zero."""
    numbers = [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]
    return jnp.asarray(sum(jnp.sum(leaf - leaf) for leaf in joined(numbers)) == 0)


def squares_are_finite(tree: Any) -> Bool[Array, ""]:
    """Whether the squares of all numbers of a tree are finite."""
    return all_finite(jax.tree.map(jnp.square, tree))


def norms(arrays: Sequence[Array]) -> Float[Array, " n"]:
    """The norm of each array, in float32 at least."""
    arrays = [jnp.ravel(array) for array in at_least_float32(list(arrays))]
    large, small = _by_size(arrays)
    squares = [jnp.vdot(arrays[at], arrays[at])[None] for at in large]
    if small:
        longest = max(arrays[at].size for at in small)
        rows = [jnp.pad(arrays[at], (0, longest - arrays[at].size)) for at in small]
        squares.append(jnp.sum(jnp.square(jnp.stack(rows)), axis=1))
    return jnp.sqrt(jnp.concatenate(squares))[np.argsort([*large, *small])]


def _by_size(arrays: Sequence[Array]) -> tuple[list[int], list[int]]:
    """The places of large arrays, and of small ones.

    On a mesh none is small, since those that are sharded would have to be gathered.
    """
    most = SMALL if get_abstract_mesh().empty else 0
    places = range(len(arrays))
    return (
        [at for at in places if jnp.size(arrays[at]) >= most],
        [at for at in places if jnp.size(arrays[at]) < most],
    )


def is_float(leaf: Any) -> bool:
    """Whether a leaf holds numbers that can be other than finite."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
