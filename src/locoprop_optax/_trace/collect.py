"""The records of a traced loss's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from locoprop_optax._records.intermediates import LayerIntermediates
from locoprop_optax._records.layers import Layer, Layers
from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._trace.find import layer_of, own_uses
from locoprop_optax._trace.graph import Position
from locoprop_optax._trace.interpreter import (
    Places,
    Record,
    Wanted,
    interpret,
    no_perturbations,
    places_of,
    value_at,
)
from locoprop_optax._trace.trace import Trace
from locoprop_optax._trace.uses import Use

Uses = Mapping[str, Sequence[Use]]
Penalties = Mapping[str, jax.Array] | None


def uses_of(traced: Trace, layers: Layers) -> Uses:
    """The uses of each layer in a trace.

    Raises:
      ValueError: if they are not what `layers` says.
    """
    known = {layer.path for layer in layers}
    biases = {layer.bias for layer in layers}
    chosen = own_uses(traced, lambda path: path not in known | biases)
    found = {
        traced.paths[weight]: uses
        for weight, uses in chosen.items()
        if traced.paths[weight] in known
    }
    differences = [
        f"- {layer.path}: {_in_words(layer)} there, {_in_words(other)} here"
        for layer in layers
        if not layer.is_like(other := _found(traced.paths, found.get(layer.path)))
    ]
    if differences:
        raise ValueError(
            "The loss does not do what `layers` says:\n"
            + "\n".join(differences)
            + "\nFind the layers anew, with locoprop_optax.layers(loss_fn)(params, "
            "...), for this loss, and make the optimizer of them."
        )
    return {layer.path: found[layer.path] for layer in layers}


def _found(paths: Sequence[str], uses: Sequence[Use] | None) -> Layer | None:
    return None if uses is None else layer_of(paths, uses)


def _in_words(layer: Layer | None) -> str:
    if layer is None:
        return "no layer"
    kernel = layer.forms["kernel"].shape
    bias = "no bias" if layer.bias is None else f"bias {layer.bias}"
    return f"a {layer.linear_map} with a kernel of shape {kernel} and {bias}"


class Forward(NamedTuple):
    """A pass forward through a loss, and its derivative.

    Attributes:
      loss: the scalar.
      result: what the loss function returned.
      records: of all uses.
      values: those that were asked for, in order.
      jvp: from changes of the parameters' leaves and of the results of all uses to
        those of the loss and of the values.
    """

    loss: Any
    result: list[Any]
    records: Places
    values: list[Any]
    jvp: Callable[..., Any]


def run_forward(
    traced: Trace,
    uses: Uses,
    arrays: Sequence[Any],
    wanted: Sequence[tuple[Position, int]],
) -> Forward:
    """Runs a loss forward.

    Args:
      traced: the loss.
      uses: of its layers.
      arrays: what it takes.
      wanted: the values that are asked for: where the equations that make them stand,
        and which of the results they are.
    """
    count = len(traced.paths)
    results: dict[Position, tuple[int, ...]] = {}
    for position, result in wanted:
        results[position] = (*results.get(position, ()), result)
    marks = places_of({position: Wanted(some) for position, some in results.items()})
    places = places_of({use.position: use for own in uses.values() for use in own})

    def run(leaves, perturbations):
        operands = [*leaves, *arrays[count:]]
        (loss, *result), records, found = interpret(
            traced.closed, places, operands, perturbations, marks
        )
        values = [value_at(found, position)[at] for position, at in wanted]
        return (loss, values), (result, records)

    (loss, values), jvp, (result, records) = jax.linearize(
        run, list(arrays[:count]), not_perturbed(uses), has_aux=True
    )
    return Forward(loss, result, records, values, jvp)


def go_back(
    jvp: Callable[..., Any], leaves: Sequence[Any], uses: Uses, *cotangents: Any
) -> tuple[list[Any], Places]:
    """The cotangents of the parameters' leaves and of the results of all uses.

    Args:
      jvp: from `run_forward`.
      leaves: of the parameters.
      uses: of the layers.
      *cotangents: of the loss, and of the values that were asked for.
    """
    transposed = jax.linear_transpose(jvp, list(leaves), not_perturbed(uses))
    return transposed(cotangents)


def not_perturbed(uses: Uses) -> Places:
    """No change of the results of all uses."""
    return no_perturbations(use for own in uses.values() for use in own)


def joined_cotangents(
    layer: Layer, uses: Sequence[Use], cotangents: Places
) -> jax.Array:
    """The cotangents of all uses of a layer."""
    parts = [use.outputs(value_at(cotangents, use.position)) for use in uses]
    return _joined(uses[0].linear.linear_map.join_outputs, parts, len(layer.stack))


def collect(
    traced: Trace,
    layers: Layers,
    uses: Uses,
    params: Any,
    grads: Any,
    penalties: Callable[[], Penalties],
    records: Places,
    cotangents: Places,
) -> dict[str, LayerIntermediates]:
    """The intermediates of all layers.

    Args:
      traced: the loss.
      layers: its layers.
      uses: of each layer.
      params: the parameters.
      grads: the gradients of the loss in them.
      penalties: the gradients of what the loss has in parameters behind its cut; None
        if there is no cut, so that all that is not of a layer is taken for a penalty.
      records: of all uses.
      cotangents: of all uses.
    """
    own, gradients = layers.split(params), layers.split(grads)
    read_elsewhere = _read_elsewhere(traced, uses)
    penalized = None if read_elsewhere.isdisjoint(layers.paths) else penalties()
    collected = {}
    for layer in layers:
        found = uses[layer.path]
        x, a = _inputs_and_preactivations(layer, found, records, own[layer.path])
        record = LayerIntermediates(
            inputs=x,
            preactivations=a,
            cotangents=joined_cotangents(layer, found, cotangents),
            gradient=gradients[layer.path],
            transfer=layer.transfer,
            linear_map=found[0].linear.linear_map,
            stack_dims=len(layer.stack),
        )
        if not read_elsewhere.isdisjoint(layer.paths.values()):
            record = _told_apart(record, layer, own[layer.path], penalized)
        collected[layer.path] = record
    return collected


def _told_apart(
    record: LayerIntermediates, layer: Layer, params: LayerParams, penalized: Penalties
) -> LayerIntermediates:
    """The gradient through the layer, the rest of the model, and penalties."""
    whole, through = record.gradient, record.pull_back(params)
    if penalized is None:
        penalty = {name: whole[name] - g for name, g in through.items()}
        return replace(record, gradient=through, penalty=penalty)
    penalty = {
        name: layer.forms[name](penalized[path])
        if path in penalized
        else jnp.zeros_like(through[name])
        for name, path in layer.paths.items()
    }
    elsewhere = {
        name: _without_rounding(whole[name], g, penalty[name])
        for name, g in through.items()
    }
    return replace(record, gradient=through, elsewhere=elsewhere, penalty=penalty)


def _without_rounding(
    whole: jax.Array, through: jax.Array, penalty: jax.Array
) -> jax.Array:
    """What two parts leave of a gradient, where it is more than their rounding."""
    rest = whole - through - penalty
    size = jnp.maximum(jnp.abs(through), jnp.abs(penalty))
    return jnp.where(jnp.abs(rest) > 16 * jnp.finfo(rest.dtype).eps * size, rest, 0)


def _read_elsewhere(traced: Trace, uses: Uses) -> set[str]:
    """The parameters that the loss also reads in another way than by their layer."""
    reading = traced.reading
    elsewhere = set(reading.otherwise)
    # What is added as the bias of a product has the product's pre-activation.
    own = {
        (id(use.graph), use.preactivation) for found in uses.values() for use in found
    }
    for use in reading.uses:
        if (id(use.graph), use.preactivation) not in own:
            bias = [] if use.linear.bias is None else [use.linear.bias[0]]
            elsewhere.update([use.linear.weight, *bias])
    return {traced.paths[number] for number in elsewhere}


def _inputs_and_preactivations(
    layer: Layer,
    uses: Sequence[Use],
    records: Places,
    params: Mapping[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    linear_map, stack_dims = uses[0].linear.linear_map, len(layer.stack)
    found: list[tuple[Use, Record]] = [
        (use, value_at(records, use.position)) for use in uses
    ]
    inputs = [use.inputs(record.inputs) for use, record in found]
    outputs = [use.outputs(record.outputs) for use, record in found]
    x = _joined(linear_map.join_inputs, inputs, stack_dims)
    a = _joined(linear_map.join_outputs, outputs, stack_dims)
    if "bias" in params:
        bias = params["bias"].astype(a.dtype)
        rows = [1] * (a.ndim - bias.ndim)
        a = a + bias.reshape(*layer.stack, *rows, *bias.shape[stack_dims:])
    return x, a


def _joined(join: Any, parts: Sequence[jax.Array], stack_dims: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else join(parts, stack_dims)
