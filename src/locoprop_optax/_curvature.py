"""The Gauss-Newton model of a loss that is known by its trace alone.

A loss that is the matching loss of a model's last layers is parted there: into a
function from the parameters to these layers' pre-activations, the outputs, and one from
outputs to the loss, convex in them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import eval_jaxpr
from jax.extend import core

from locoprop_optax._dtypes import at_least_float32
from locoprop_optax._gauss_newton import Linearization
from locoprop_optax._graph import Equation, Graph, layers_in, run, tap_p
from locoprop_optax._layers import is_masked, layers_of, visible, with_layers
from locoprop_optax._transfers import Transfer

Layers = Mapping[str, Mapping[str, Any]]
CallOf = tuple[str, int]  # a layer's path, and which of its calls


class Curvature(NamedTuple):
    """The Gauss-Newton model of a loss near the parameters, as a tree of arrays.

    Attributes:
      value: the loss.
      gradient: of the loss in all parameters, by layer and name.
      loss_gradient: of the loss in the model's outputs.
      push: from a change of the parameters, by layer and name, to that of the model's
        outputs.
      curve: from a change of the outputs to that of the loss's gradient in them.
      after: from a change of the parameters to the loss after it.
    """

    value: jax.Array
    gradient: Layers
    loss_gradient: Any
    push: Callable[[Layers], Any]
    curve: Callable[[Any], Any]
    after: Callable[[Layers], jax.Array]

    def at(self, params: Any) -> Linearization:
        """The same for changes in the form of `params`, of which some may be masked."""

        def by_layer(change):
            moved = layers_of(change)
            return {
                path: {
                    name: _as(moved.get(path, {}).get(name), leaf)
                    for name, leaf in leaves.items()
                }
                for path, leaves in self.gradient.items()
            }

        def push(change):
            return self.push(by_layer(change))

        seen = {
            path: {name: self.gradient[path][name] for name in leaves}
            for path, leaves in visible(layers_of(params)).items()
        }
        gradient = with_layers(params, seen)
        return Linearization(
            self.value,
            self.loss_gradient,
            push,
            lambda cotangents: jax.linear_transpose(push, params)(cotangents)[0],
            self.curve,
            lambda change: self.after(by_layer(change)),
            gradient,
        )


def _as(change: Any, leaf: jax.Array) -> jax.Array:
    if change is None or is_masked(change):
        return jnp.zeros_like(leaf)
    return change.astype(leaf.dtype)


def join_curvatures(parts: Sequence[Curvature]) -> Curvature:
    """The curvature of the mean of some losses."""
    share = 1 / len(parts)

    def mean(*leaves):
        return share * sum(leaves)

    values, gradients, loss_gradients, pushes, curves, afters = zip(*parts, strict=True)
    return Curvature(
        value=jnp.asarray(mean(*values)),
        gradient=jax.tree.map(mean, *gradients),
        loss_gradient=jax.tree.map(lambda leaf: share * leaf, list(loss_gradients)),
        push=jax.tree_util.Partial(_push_all, list(pushes)),
        curve=jax.tree_util.Partial(_curve_all, list(curves)),
        after=jax.tree_util.Partial(_mean_after, list(afters)),
    )


def _push_all(pushes: Sequence[Callable[[Any], Any]], change: Any) -> list[Any]:
    return [push(change) for push in pushes]


def _curve_all(curves: Sequence[Callable[[Any], Any]], changes: list[Any]) -> list[Any]:
    curved = [curve(change) for curve, change in zip(curves, changes, strict=True)]
    return jax.tree.map(lambda leaf: leaf / len(curves), curved)


def _mean_after(afters: Sequence[Callable[[Any], Any]], change: Any) -> jax.Array:
    return jnp.mean(jnp.stack([after(change) for after in afters]))


class PartedLoss(NamedTuple):
    """A loss in two parts, for one batch.

    Attributes:
      outputs_of: from parameters, by layer and name, to the outputs of each last call.
      loss_of: from these and parameters, by layer and name, to the loss.
      total: from parameters, by layer and name, to the loss.
      transfers: the function of which the loss is the matching loss, for each.
      held: the arrays that the loss is closed over, the batch among them.
      penalized: the parameters that the loss reads beside the outputs, by layer.
    """

    outputs_of: Callable[[Layers], dict[CallOf, jax.Array]]
    loss_of: Callable[[dict[CallOf, jax.Array], Layers], jax.Array]
    total: Callable[[Layers], jax.Array]
    transfers: Mapping[CallOf, Transfer]
    held: Sequence[Any]
    penalized: Mapping[str, Collection[str]]


def part(
    closed: core.ClosedJaxpr,
    transfers: Mapping[CallOf, Transfer],
    arguments: Callable[[Layers], list[Any]],
    layers: Layers,
    penalized: Mapping[str, Collection[str]],
) -> PartedLoss:
    """Parts a traced loss at its last calls.

    Args:
      closed: the trace, a tap at each call of a layer.
      transfers: the last calls, and the functions of which the loss is the matching
        loss.
      arguments: from parameters to what the trace is called with.
      layers: the parameters, by layer and name.
      penalized: those of captured layers that the loss reads past all calls.

    Raises:
      ValueError: if there is no last call, or others have a share in the loss.
    """
    graph = Graph.of(closed)
    taps = {
        (e.params["layer"], e.params["number"]): e
        for e in graph.equations
        if e.primitive is tap_p
    }
    ends = {call: taps[call].outputs[0] for call in transfers}
    avals = {call: graph.avals[end] for call, end in ends.items()}
    loss: Any = graph.results[0]
    given: set[Any] = {*graph.inputs, *graph.held}
    tail = graph.leading_to([loss], given | set(ends.values()))
    head = graph.leading_to(ends.values(), given)
    whole = graph.leading_to([loss], given)
    _check_only_last(tail)

    def values_of(layers):
        return {**graph.held, **dict(zip(graph.inputs, arguments(layers), strict=True))}

    def outputs_of(layers):
        known = run(head, values_of(layers))
        return {call: known[end] for call, end in ends.items()}

    def loss_of(outputs, layers):
        at_ends = {ends[c]: a.astype(avals[c].dtype) for c, a in outputs.items()}
        return run(tail, {**values_of(layers), **at_ends})[loss]

    def total(layers):
        return run(whole, values_of(layers))[loss]

    held = list(graph.held.values())
    return PartedLoss(outputs_of, loss_of, total, transfers, held, penalized)


def _check_only_last(tail: Sequence[Equation]) -> None:
    """Raises a `ValueError` if a layer reaches the loss not by the last calls alone."""
    apart = sorted(set().union(*(layers_in(e.source) for e in tail)))
    if apart:
        raise ValueError(
            "curvature=True needs a loss that is a squared error, or a sigmoid or "
            "softmax cross-entropy, of the outputs of layers. It depends in another "
            f"way on {', '.join(map(repr, apart))}; linen.tabulate and nnx.tabulate "
            "show what was found. locoprop_momentum needs no curvature, and "
            "scale_by_quadratic_model takes a model and its loss by hand."
        )


def curvature_at(parted: PartedLoss, layers: Layers, gradient: Layers) -> Curvature:
    """The Gauss-Newton model of a parted loss.

    Parameters that the loss reads beside the outputs count as outputs, too, so that the
    model has the curvature of penalties.
    """

    def outputs_of(layers):
        read = {
            path: {name: layers[path][name] for name in names}
            for path, names in parted.penalized.items()
        }
        calls = at_least_float32(parted.outputs_of(layers))
        return (calls, at_least_float32(read)) if read else calls

    def loss_of(outputs):
        calls, read = outputs if parted.penalized else (outputs, {})
        own = {path: {**layers[path], **leaves} for path, leaves in read.items()}
        return parted.loss_of(calls, {**layers, **own})

    outputs, push = jax.linearize(outputs_of, layers)
    loss_gradient, curve = jax.linearize(jax.grad(loss_of), outputs)

    def reached(change: Any) -> jax.Array:
        moved: Any = optax.apply_updates(layers, change)
        return parted.total(moved)

    traced = jax.make_jaxpr(reached)(layers)
    after = jax.tree_util.Partial(partial(_loss_after, traced.jaxpr), traced.consts)
    value = parted.total(layers)  # computed as `after` computes it
    return Curvature(value, gradient, loss_gradient, push, curve, after)


def _loss_after(jaxpr: core.Jaxpr, consts: Sequence[Any], change: Layers) -> jax.Array:
    return eval_jaxpr(jaxpr, consts, *jax.tree.leaves(change))[0]


def sampled_at_outputs(parted: PartedLoss, layers: Layers) -> dict[CallOf, jax.Array]:
    r"""Cotangents of the outputs with the second moment of those for sampled labels.

    Where the loss has the gradient :math:`w (f(a) - y)`, they are :math:`w r` with
    random signs in :math:`r`, of which :math:`\operatorname{E}[r r^\top]` is the
    Jacobian of :math:`f`, as it is of :math:`f(a) - y` for labels :math:`y` drawn from
    the likelihood. The signs are drawn anew for each batch, from its bits.
    """
    key = jax.random.key(_bits_of(parted.held))
    outputs = at_least_float32(parted.outputs_of(layers))
    probing = {call: _alternating(a) for call, a in outputs.items()}
    middle = jax.tree.map(lambda a: jnp.full_like(a, 0.5), outputs)
    slope = jax.grad(lambda outputs: parted.loss_of(outputs, layers))
    _, curved = jax.jvp(slope, (middle,), (probing,))
    sampled = {}
    for number, (call, a) in enumerate(outputs.items()):
        transfer, signs = parted.transfers[call], probing[call]
        f = transfer.function
        _, sloped = jax.jvp(f, (middle[call],), (signs,))
        own_key = jax.random.fold_in(key, number)
        random = jax.random.rademacher(own_key, a.shape, a.dtype)
        if transfer.over_last_axis:
            weights = _rowwise(signs, curved[call]) / _rowwise(signs, sloped)
            root = jnp.sqrt(f(a))
            residual = root * random - f(a) * _rowwise(root, random)
        else:
            weights = curved[call] / sloped
            slope = jax.jvp(f, (a,), (jnp.ones_like(a),))[1]
            residual = jnp.sqrt(slope) * random
        sampled[call] = (weights * residual).astype(a.dtype)
    return sampled


def _bits_of(arrays: Sequence[Any]) -> jax.Array:
    """A number that depends on what arrays hold, and not on the order of the sum."""
    total = jnp.zeros((), jnp.uint32)
    for array in arrays:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        if jnp.issubdtype(array.dtype, jnp.inexact):
            array = array.astype(jnp.float32)
            array = jax.lax.bitcast_convert_type(array, jnp.uint32)
        total += jnp.sum(jnp.asarray(array).astype(jnp.uint32))
    return total


def _alternating(a: jax.Array) -> jax.Array:
    """Signs that alternate along the last axis."""
    signs = 1 - 2 * (jnp.arange(a.shape[-1]) % 2)
    return jnp.broadcast_to(signs, a.shape).astype(a.dtype)


def _rowwise(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.sum(first * second, axis=-1, keepdims=True)
