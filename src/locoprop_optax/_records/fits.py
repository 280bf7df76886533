"""Brings intermediates and parameters together, or says why they do not fit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from locoprop_optax._records.intermediates import Intermediates, LayerIntermediates
from locoprop_optax._records.layers import Layers
from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._records.paths import by_path, is_masked


def check_layers(layers: Any) -> None:
    """Raises a `TypeError` unless layers are what `layers` finds."""
    if not isinstance(layers, Layers):
        raise TypeError(
            "`layers` must be the layers of the loss, as "
            "locoprop_optax.layers(loss_fn)(params, ...) finds them, got "
            f"{type(layers).__name__}."
        )


def check_params(params: Any, layers: Layers) -> None:
    """Raises a `ValueError` for a layer that these parameters do not have."""
    held = by_path(params)
    if not held:
        raise TypeError(
            "There are no parameters. optax.tree.map_params cannot be used: what is "
            "kept for layers is no tree like the parameters. Map over the state "
            "itself, or let jax.jit(tx.init) shard it."
        )
    for layer in layers:
        shown = {}
        for name, path in layer.paths.items():
            leaf = _held(held, path)
            if leaf is None:
                raise ValueError(
                    f"Layer {layer.path!r}: the parameters hold no {path!r}. They hold "
                    f"{', '.join(map(repr, held))}. Were they renamed or flattened, as "
                    "by optax.flatten?"
                )
            if is_masked(leaf):
                continue
            shown[name] = leaf
            expected = layer.forms[name].shape
            if leaf.shape != expected:
                raise ValueError(
                    f"Layer {layer.path!r}: {path!r} has the shape {leaf.shape}, "
                    f"expected {expected}. Are these the parameters of this loss?"
                )
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"Layer {layer.path!r}: {path!r} has dtype {leaf.dtype}, expected "
                    "a floating-point dtype. Cast it, or name it in `exclude=`."
                )
        if shown and "kernel" not in shown:
            raise ValueError(
                f"Layer {layer.path!r}: an outer transformation masks it, but not its "
                f"bias {layer.bias!r}. Mask both, or name the layer in `exclude=`."
            )


def _held(held: dict[str, Any], path: str) -> Any:
    """What stands at a path, or for what it is in."""
    if path in held:
        return held[path]
    keys = path.split("/")
    above = ("/".join(keys[:count]) for count in range(len(keys)))
    return next((held[p] for p in above if is_masked(held.get(p))), None)


def match_layers(
    intermediates: Intermediates | None, params: Any, layers: Layers
) -> dict[str, LayerIntermediates]:
    """The intermediates of each layer that no outer Optax transformation masks."""
    if intermediates is None:
        raise TypeError(
            "LocoProp's update needs `intermediates=`, each layer's inputs and "
            "cotangents. Get them with the loss and the gradients from "
            "locoprop_optax.value_and_grad(loss_fn, layers)(params, ...) and call "
            "tx.update(grads, state, params, intermediates=intermediates). Flax's "
            "TrainState drops them; locoprop_optax.linen.TrainState and nnx.Optimizer "
            "take them. If that was done, a transformation around LocoProp drops its "
            "extra arguments: make it an optax.GradientTransformationExtraArgs, or put "
            "LocoProp outside it."
        )
    if not isinstance(intermediates, Intermediates):
        raise TypeError(
            "`intermediates` must be locoprop_optax.Intermediates, got "
            f"{type(intermediates).__name__}. They are the third result of "
            "locoprop_optax.value_and_grad(loss_fn, layers)(params, ...)."
        )
    check_params(params, layers)
    local = layers.split(params)
    for path in intermediates.layers:
        if all(layer.path != path for layer in layers):
            raise ValueError(
                f"The intermediates hold a record of layer {path!r}, which is none of "
                "the optimizer's layers. Give the same layers to the optimizer and to "
                "value_and_grad."
            )
    for path, layer_params in local.items():
        if path not in intermediates.layers:
            raise ValueError(
                f"The intermediates hold no record of layer {path!r}. Give the same "
                "layers to the optimizer and to value_and_grad."
            )
        _check_shapes(path, intermediates.layers[path], layer_params)
    return {path: intermediates.layers[path] for path in local}


def _check_shapes(path: str, layer: LayerIntermediates, params: LayerParams) -> None:
    def refuse(what: str, found: Any, expected: Any) -> None:
        raise ValueError(
            f"Layer {path!r}: {what} is {found}, expected {expected}. Were the "
            "intermediates captured with these parameters?"
        )

    for what in ("inputs", "preactivations", "cotangents"):
        array = getattr(layer, what)
        if not hasattr(array, "dtype"):
            refuse(f"its {what}", array, "an array")
        dtype = array.dtype
        kind = layer.linear_map.reads if what == "inputs" else jnp.floating
        if not jnp.issubdtype(dtype, kind):
            expected = "integers" if kind == jnp.integer else "a floating-point dtype"
            refuse(f"the dtype of its {what}", dtype, expected)
    shape = layer.preactivations.shape
    if layer.cotangents.shape != shape:
        refuse("the shape of its cotangents", layer.cotangents.shape, shape)
    if layer.targets is not None and layer.targets.shape != shape:
        refuse("the shape of its targets", layer.targets.shape, shape)
    sampled = layer.sampled_cotangents
    if sampled is not None and sampled.shape[-1:] != shape[-1:]:
        refuse("the shape of its sampled cotangents", sampled.shape, shape)
    for name, param in params.items():
        if name not in layer.gradient:
            refuse("its gradient", f"without {name}", f"one for {', '.join(params)}")
        found = getattr(layer.gradient[name], "shape", None)
        if found != param.shape:
            refuse(f"the shape of its gradient for {name}", found, param.shape)
    forward = layer.linear_map
    for _ in range(layer.stack_dims):
        forward = jax.vmap(forward)
    shapes = {name: p.shape for name, p in params.items()}
    try:
        fits = jax.eval_shape(forward, dict(params), layer.inputs).shape
    except (TypeError, ValueError):
        refuse("the shape of its inputs", layer.inputs.shape, f"one for {shapes}")
    else:
        if fits != shape:
            refuse("the shape of its preactivations", shape, fits)
