"""Arrays whose sharding over a mesh is a part of their type.

An axis of a mesh is explicit if each operation says, by its types, how its result is
sharded along it; then a product that sums over a sharded axis is refused. The products
of a local problem leave that to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
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

_averaging = ContextVar("averaging", default=False)


@contextmanager
def averaging() -> Iterator[None]:
    """Says that what each shard does on its own is averaged, or meant to part."""
    token = _averaging.set(True)
    try:
        yield
    finally:
        _averaging.reset(token)


def check_replicas() -> None:
    """Raises a `ValueError` where the replicas of parameters would part."""
    axes = get_abstract_mesh().manual_axes
    if axes and not _averaging.get():
        raise ValueError(
            f"A step inside a shard, over {', '.join(map(repr, axes))}: each would "
            "solve problems of its own, and the replicas of the parameters would part. "
            f"Use locoprop_optax.averaged(optimizer, {axes[0]!r}), or averaged("
            "optimizer, ()) for replicas that are meant to part."
        )


def check_not_varying(x: Any) -> None:
    """Raises a `ValueError` if an array's type tells over which shards it varies."""
    manual = getattr(jax.typeof(x), "manual_axis_type", None)
    if varying := getattr(manual, "varying", None):
        raise ValueError(
            "Layers are captured inside jax.shard_map only with check_vma=False; it is "
            f"on, and an array is typed as varying over {sorted(varying)}."
        )


def typed(aval: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a value in a trace, and the sharding where its type has it."""
    sharding = explicit_sharding(aval)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)


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


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """An array of the same shape, sharded as the type of another tells."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


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


def on_typed_mesh() -> bool:
    """Whether types tell here where arrays are: on explicit axes, or in a shard."""
    return _is_typed(get_abstract_mesh())


def was_on_typed_mesh(var: Any) -> bool:
    """Whether the type of a variable of a trace tells where it is."""
    return _is_typed(var.aval.sharding.mesh)


def _is_typed(mesh: Any) -> bool:
    return not {AxisType.Manual, AxisType.Explicit}.isdisjoint(mesh.axis_types)


def off_mesh() -> AbstractContextManager[Any]:
    """Lets arrays be computed with whose types do not tell where they are."""
    return use_abstract_mesh(AbstractMesh((), ())) if on_typed_mesh() else nullcontext()


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
