"""The records of a traced loss's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from locoprop_optax._records.intermediates import LayerIntermediates
from locoprop_optax._records.layers import Layer, Layers
from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._trace.find import layer_of, own_uses
from locoprop_optax._trace.interpreter import (
    Places,
    Record,
    Seeds,
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


def run_recorded(
    traced: Trace, uses: Uses, arrays: Sequence[Any], seeds: Places | None = None
) -> tuple[list[Any], list[Any], Places, Places]:
    """Runs a loss forward and backward.

    Returns:
      What the loss function returned, its gradients, the records of all uses, and
      their cotangents.
    """
    count = len(traced.paths)
    everything = [use for own in uses.values() for use in own]
    places = places_of({use.position: use for use in everything})

    def run(leaves, perturbations):
        (loss, *result), records = interpret(
            traced.closed, places, [*leaves, *arrays[count:]], perturbations, seeds
        )
        return loss, (result, records)

    differentiate = jax.value_and_grad(run, (0, 1), has_aux=True)
    (_, (result, records)), (grads, cotangents) = differentiate(
        list(arrays[:count]), no_perturbations(everything)
    )
    return result, grads, records, cotangents


def cotangents_of(
    traced: Trace, layers: Layers, arrays: Sequence[Any], seeds: Mapping[int, Any]
) -> dict[str, jax.Array]:
    """The cotangents of all layers if others go back from some values of the graph."""
    by_position: dict[tuple[int, ...], Seeds] = {}
    for number, seed in seeds.items():
        position, result = traced.graph.place_of(number)
        known = by_position.setdefault(position, Seeds({}))
        known.of_results[result] = seed.astype(traced.graph.avals[number].dtype)
    uses = uses_of(traced, layers)
    *_, cotangents = run_recorded(traced, uses, arrays, places_of(by_position))
    return {
        layer.path: joined_cotangents(layer, uses[layer.path], cotangents)
        for layer in layers
    }


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
