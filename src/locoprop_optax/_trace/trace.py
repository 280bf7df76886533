"""A loss, traced once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.extend import core

from locoprop_optax._records.layers import Cut
from locoprop_optax._records.paths import paths_of
from locoprop_optax._trace.graph import Graph
from locoprop_optax._trace.loss import find_cut
from locoprop_optax._trace.uses import Reading, read_parameters
from locoprop_optax._utils.sharding import check_not_varying
from locoprop_optax.losses._transfers import Transfer


class Trace:
    """A loss as equations; it holds no arrays.

    Attributes:
      closed: the equations. Their inputs are the parameters' leaves, then the arrays
        that the loss is closed over, then those that it is called with; their results
        are the loss, then the leaves of what the loss function returned.
      paths: of the parameters.
      returned: the structure of what the loss function returned.
    """

    def __init__(
        self, closed: core.ClosedJaxpr, paths: Sequence[str], returned: Any
    ) -> None:
        self.closed, self.paths, self.returned = closed, tuple(paths), returned

    @cached_property
    def graph(self) -> Graph:
        """The equations, flat."""
        return Graph.of(self.closed)

    @cached_property
    def reading(self) -> Reading:
        """How the loss reads its parameters."""
        return read_parameters(self.graph, len(self.paths))

    def cut(self, matched: Mapping[int, Transfer] | None = None) -> Cut:
        """Where the loss is cut, as `find_cut` finds it."""
        return find_cut(self.graph, self.reading, len(self.paths), matched or {})


def trace(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    params: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Trace, list[Any]]:
    """Traces a loss; also returns the arrays to run it with.

    Raises:
      TypeError: if there is no scalar loss in what `loss_fn` returns.
      ValueError: if the type of an array tells over which shards it varies.
    """
    leaves, structure = jax.tree.flatten(params)
    given, rest = jax.tree.flatten((tuple(args), kwargs))
    places = [at for at, leaf in enumerate(given) if isinstance(leaf, jax.Array)]
    returned: list[Any] = []

    def flat(leaves, arrays):
        filled = list(given)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        args, kwargs = jax.tree.unflatten(rest, filled)
        result = loss_fn(jax.tree.unflatten(structure, leaves), *args, **kwargs)
        loss = loss_in(result, has_aux)
        results, structure_of_result = jax.tree.flatten(result)
        returned.append(structure_of_result)
        return [loss, *results]

    arrays = [given[place] for place in places]
    closed = jax.make_jaxpr(flat)(leaves, arrays)
    for array in (*leaves, *closed.consts, *arrays):
        check_not_varying(array)
    jaxpr, count = closed.jaxpr, len(leaves)
    invars = [*jaxpr.invars[:count], *jaxpr.constvars, *jaxpr.invars[count:]]
    opened = core.ClosedJaxpr(jaxpr.replace(constvars=[], invars=invars), [])
    traced = Trace(opened, paths_of(params), returned[-1])
    return traced, [*leaves, *closed.consts, *arrays]


def loss_in(result: Any, has_aux: bool) -> Any:
    """The loss in what a loss function returned."""
    if isinstance(result, tuple) and not has_aux:
        raise TypeError(
            f"loss_fn returned a tuple of {len(result)}, expected the loss alone. If "
            "it is (loss, aux), pass has_aux=True."
        )
    loss = result[0] if has_aux else result
    if np.shape(loss) != ():
        raise TypeError(
            f"loss_fn returned a loss of shape {np.shape(loss)}, expected a scalar. "
            "Take its mean or its sum."
        )
    return loss
