"""Arrays whose sharding over a mesh is a part of their type.

An axis of a mesh is explicit if each operation says, by its types, how its result is
sharded along it; then a product that sums over a sharded axis is refused. The products
of a local problem leave that to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    get_abstract_mesh,
    use_abstract_mesh,
)


def typed(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype, and the sharding where it is a part of the type.

    Raises:
      ValueError: if the type also tells over which shards the array varies.
    """
    aval = _type_of(x)
    manual = getattr(aval, "manual_axis_type", None)
    if varying := getattr(manual, "varying", None):
        raise ValueError(
            "Layers are captured inside jax.shard_map only with check_vma=False; it is "
            f"on, and a layer's array is typed as varying over {sorted(varying)}."
        )
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=explicit_sharding(x))


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding that an array's type tells; None if no axis is explicit."""
    sharding = _type_of(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _type_of(x: Any) -> Any:
    """The type of an array, or the type itself, as a trace has it."""
    return x if isinstance(x, core.ShapedArray) else jax.typeof(x)


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


def among_shards() -> bool:
    """Whether this is the body of a `shard_map`."""
    return AxisType.Manual in get_abstract_mesh().axis_types


def was_among_shards(var: Any) -> bool:
    """Whether a variable of a trace stands in the body of a `shard_map`."""
    return AxisType.Manual in var.aval.sharding.mesh.axis_types


def outside_shards() -> AbstractContextManager[Any]:
    """Lets arrays be computed with, as elsewhere, inside the body of a `shard_map`."""
    if not among_shards():
        return nullcontext()
    return use_abstract_mesh(AbstractMesh((), ()))


def check_axis(axis_name: str) -> None:
    """Raises a ValueError if the mesh has no such axis."""
    axes = get_abstract_mesh().shape
    if axis_name not in axes:
        raise ValueError(
            f"stack_layers={axis_name!r} names no axis of the mesh, which has "
            f"{', '.join(map(repr, axes)) or 'none'}. Call the step under "
            "jax.set_mesh(mesh), for a mesh with that axis."
        )


def spread(stacked: Any, axis_name: str) -> Any:
    """Gives each device along a mesh axis its share of stacked layers.

    Arrays whose first axis the mesh axis does not divide stay as they are.
    """
    devices = get_abstract_mesh().shape[axis_name]

    def place(leaf):
        if leaf.shape[0] % devices:
            return leaf
        rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(axis_name, *rest))

    return jax.tree.map(place, stacked)
