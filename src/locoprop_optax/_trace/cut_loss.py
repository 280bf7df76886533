"""A traced loss in two parts: what leads to its cut, and what is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from locoprop_optax._records.layers import Cut, Layers
from locoprop_optax._trace.graph import Graph, is_number, run
from locoprop_optax._trace.loss import tail_of
from locoprop_optax._trace.trace import Trace
from locoprop_optax._utils.dtypes import at_least_float32
from locoprop_optax._utils.sharding import placed_like


def cut_of(traced: Trace, layers: Layers) -> Cut:
    """Where a loss is cut: where it was when its layers were found."""
    known = layers.cut
    same = known.equations == len(traced.graph.equations)
    return known if same else traced.cut()


@dataclass(frozen=True)
class CutLoss:
    """A loss in two parts, for one batch.

    Attributes:
      graph: the loss.
      cut: where it is cut.
      rest: all arrays that it takes beside its parameters.
    """

    graph: Graph
    cut: Cut
    rest: Sequence[Any]

    def _given(self, leaves: Sequence[Any]) -> dict[int, Any]:
        return dict(zip(self.graph.inputs, [*leaves, *self.rest], strict=True))

    @property
    def numbers(self) -> list[int]:
        """The numbers of the values at the cut."""
        return [self.graph.places[place] for place in self.cut.values]

    def values(self, leaves: Sequence[Any], loss: Any, at_cut: Any) -> list[Any]:
        """The values at the cut, and the parameters that are read behind it.

        Where there are no such values, the loss, in which it is linear.

        Args:
          leaves: of the parameters.
          loss: at these.
          at_cut: the values at the cut.
        """
        params = [leaves[at] for at in self.cut.params]
        return at_least_float32([*(at_cut if self.cut.values else [loss]), *params])

    def values_at(self, leaves: Sequence[Any]) -> list[Any]:
        """The same for other parameters, by another pass."""
        given = self._given(leaves)
        given.update(self.graph.held)
        numbers: Any = self.numbers if self.cut.values else self.graph.results[:1]
        known = run(self.graph.leading_to(numbers, set(given)), given)
        found = [known[n] for n in numbers]
        return self.values(leaves, found[0], found)

    def behind(self, values: Sequence[Any]) -> Any:
        """The loss for values at the cut."""
        graph, cut = self.graph, self.cut
        if not cut.values:
            return values[0]
        numbers = [*self.numbers, *(graph.inputs[at] for at in cut.params)]
        count = len(graph.inputs) - len(self.rest)
        given: dict[int, Any] = dict(zip(graph.inputs[count:], self.rest, strict=True))
        given.update(graph.held)
        for number, value in zip(numbers, values, strict=True):
            given[number] = value.astype(graph.avals[number].dtype)
        (loss,) = graph.results[:1]
        assert is_number(loss)
        return at_least_float32(run(tail_of(graph, numbers), given)[loss])

    def sample(self, values: Sequence[Any], key: Any) -> list[jax.Array]:
        r"""Cotangents of the values with the loss's Hessian as their second moment.

        Where the loss has the gradient :math:`w (f(a) - y)`, they are
        :math:`\sqrt w\, r` with random signs in :math:`r`, of which
        :math:`\operatorname{E}[r r^\top]` is the Jacobian of :math:`f`, as it is of
        :math:`f(a) - y` for labels :math:`y` drawn from the likelihood. Elsewhere their
        squares have the expectation of the Hessian's diagonal. Without a key the signs
        are drawn from the batch's bits.
        """
        key = jax.random.key(self._bits()) if key is None else key
        count = len(self.cut.values)
        signs = [_alternating(a) for a in values[:count]]
        still = [jnp.zeros_like(a) for a in values[count:]]

        def hvp(at):
            gradient = jax.grad(self.behind)
            return jax.jvp(gradient, (at,), ([*signs, *still],))[1]

        transfers = self.cut.transfers
        # Behind a barrier, since XLA would fold the loss at a constant as it compiles.
        halves = [jnp.full_like(a, 0.5) for a in values[:count]]
        middle = [*jax.lax.optimization_barrier(halves), *values[count:]]
        curved = hvp(middle) if any(transfers) else []
        own = hvp(values) if None in transfers else []
        sampled = []
        for at, transfer in enumerate(transfers):
            a = values[at]
            drawn = jax.random.rademacher(jax.random.fold_in(key, at), a.shape, a.dtype)
            random = placed_like(drawn, a)
            if transfer is None:
                diagonal = jnp.maximum(signs[at] * own[at], 0)
                sampled.append(jnp.sqrt(diagonal) * random)
                continue
            f = transfer.function
            _, sloped = jax.jvp(f, (middle[at],), (signs[at],))
            if transfer.over_last_axis:
                weights = _rowwise(signs[at], curved[at]) / _rowwise(signs[at], sloped)
                root = jnp.sqrt(f(a))
                residual = root * random - f(a) * _rowwise(root, random)
            else:
                weights = curved[at] / sloped
                slope = jax.jvp(f, (a,), (jnp.ones_like(a),))[1]
                residual = jnp.sqrt(slope) * random
            root = jnp.sqrt(jnp.maximum(weights, 0))
            sampled.append((root * residual).astype(a.dtype))
        return sampled

    def _bits(self) -> jax.Array:
        """A number that depends on what the batch holds, whatever its order."""
        count = len(self.graph.inputs) - len(self.rest)
        read = zip(self.graph.inputs[count:], self.rest, strict=True)
        used = [array for number, array in read if number in self.graph.consumers]
        total = jnp.zeros((), jnp.uint32)
        for array in used:
            if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                array = jax.random.key_data(array)
            if jnp.issubdtype(array.dtype, jnp.inexact):
                array = array.astype(jnp.float32)
                array = jax.lax.bitcast_convert_type(array, jnp.uint32)
            total += jnp.sum(jnp.asarray(array).astype(jnp.uint32))
        return total


def _alternating(a: jax.Array) -> jax.Array:
    """Signs that alternate along the last axis."""
    signs = 1 - 2 * (jnp.arange(a.shape[-1] if a.ndim else 1) % 2)
    everywhere = jnp.broadcast_to(signs, a.shape or (1,)).reshape(a.shape)
    return placed_like(everywhere.astype(a.dtype), a)


def _rowwise(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.sum(first * second, axis=-1, keepdims=True)
