"""Which layers are solved together: equal ones, stacked, under one `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from locoprop_optax._utils.errors import LayerError
from locoprop_optax._utils.sharding import spread

T = TypeVar("T")
S = TypeVar("S")


class _Group(NamedTuple):
    """Equal layers: their paths, and how many axes of each count stacked layers."""

    paths: tuple[str, ...]
    stack_dims: int


class Grouped(Generic[T]):
    """One value per layer, the values of equal layers stacked.

    Groups of one layer carry no extra axis, so that unequal layers cost nothing.
    """

    def __init__(
        self,
        groups: tuple[_Group, ...],
        values: tuple[T, ...],
        mesh_axis: str | None = None,
    ):
        self._groups = groups
        self._values = values
        self._mesh_axis = mesh_axis

    @property
    def values(self) -> tuple[T, ...]:
        """The value of each group, as it is stacked."""
        return self._values

    @classmethod
    def of(
        cls,
        layers: Mapping[str, T],
        stack_dims: Mapping[str, int],
        alone: Collection[str] = (),
        mesh_axis: str | None = None,
    ) -> Grouped[T]:
        """Groups layers whose values are equal in structure, shapes and dtypes.

        Args:
          layers: the values by path.
          stack_dims: how many leading axes of each value count stacked layers.
          alone: the layers that are not to be stacked with others.
          mesh_axis: the axis of the mesh over which stacked layers are spread, if any.
        """
        alike: dict[Any, list[str]] = {}
        for path, value in layers.items():
            leaves, structure = jax.tree.flatten(value)
            avals = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
            apart = path if path in alone else None
            key = (structure, avals, stack_dims[path], apart)
            alike.setdefault(key, []).append(path)
        groups = tuple(
            _Group(tuple(paths), stack_dims[paths[0]]) for paths in alike.values()
        )
        return cls(groups, (), mesh_axis).like(layers)

    def like(self, layers: Mapping[str, S]) -> Grouped[S]:
        """Groups other values of the same layers in the same way."""
        stacked = tuple(
            _stack([layers[p] for p in g.paths], self._mesh_axis) for g in self._groups
        )
        return self._with(stacked)

    def _with(self, values: tuple[S, ...]) -> Grouped[S]:
        return Grouped(self._groups, values, self._mesh_axis)

    def map(self, function: Callable[..., S], *others: Grouped[Any]) -> Grouped[S]:
        """Applies a function of single layers' values to every layer.

        Raises:
          ValueError: for a `LayerError` of the function, with the layers' names.
        """
        results = []
        for group, *values in zip(
            self._groups, self._values, *(g._values for g in others), strict=True
        ):
            mapped = function
            for _ in range(group.stack_dims + (len(group.paths) > 1)):
                mapped = jax.vmap(mapped)
            try:
                results.append(mapped(*values))
            except LayerError as error:
                names = ", ".join(map(repr, group.paths))
                raise ValueError(f"Layer {names}: {error}") from error
        return self._with(tuple(results))

    def unzip(self) -> tuple[Grouped[Any], ...]:
        """Parts values that are tuples into one `Grouped` for each element."""
        values: tuple[Any, ...] = self._values
        return tuple(map(self._with, zip(*values, strict=True)))

    def to_layers(self) -> dict[str, T]:
        """The values by layer path."""
        layers: dict[str, T] = {}
        for group, value in zip(self._groups, self._values, strict=True):
            members = _unstack(value, len(group.paths))
            layers.update(zip(group.paths, members, strict=True))
        return layers


def _stack(values: list[T], mesh_axis: str | None) -> T:
    """Stacks, and keeps XLA from stacking anew in each use of a member."""
    if len(values) == 1:
        return values[0]
    stacked = jax.lax.optimization_barrier(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
    )
    return stacked if mesh_axis is None else spread(stacked, mesh_axis)


def _unstack(value: T, count: int) -> list[T]:
    if count == 1:
        return [value]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], value) for i in range(count)]
