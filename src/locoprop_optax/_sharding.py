"""Arrays whose sharding over a mesh is a part of their type.

An axis of a mesh is explicit if each operation says, by its types, how its result is
sharded along it; then a product that sums over a sharded axis is refused. The products
of a local problem leave that to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes


def typed(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, and the sharding where it is a part of the type."""
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=explicit_sharding(x))


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding that an array's type tells; None if no axis is explicit."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def zeros(like: jax.ShapeDtypeStruct, stack: tuple[int, ...] = ()) -> jax.Array:
    """Zeros of a type, stacked along further leading axes."""
    sharding = like.sharding
    if sharding is not None:
        spec = PartitionSpec(*[None] * len(stack), *sharding.spec)
        sharding = NamedSharding(sharding.mesh, spec)
    return jnp.zeros(stack + like.shape, like.dtype, device=sharding)


def sharded_by_compiler(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """A function whose inner shardings are the compiler's choice.

    Args:
      function: of trees of arrays.
      like: a tree of the form of its result, whose shardings that will have.
    """
    typed_leaves = [s for s in map(explicit_sharding, jax.tree.leaves(like)) if s]
    if not typed_leaves:
        return function
    whole = NamedSharding(typed_leaves[0].mesh, PartitionSpec())
    shardings = jax.tree.map(lambda leaf: explicit_sharding(leaf) or whole, like)
    return auto_axes(function, out_sharding=shardings)
