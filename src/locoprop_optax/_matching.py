"""Brings intermediates and parameters together, or says why they do not fit."""

from typing import Any

import jax
import jax.numpy as jnp

from locoprop_optax._intermediates import Intermediates, LayerIntermediates
from locoprop_optax._layers import (
    LayerParams,
    LayerSelection,
    is_hidden,
    is_masked,
    layers_of,
    visible,
)


def check_params(local: Any) -> None:
    """Raises a `ValueError` for a layer that cannot have a local problem."""
    for path, leaves in layers_of(local).items():
        shown = {n: leaf for n, leaf in leaves.items() if not is_masked(leaf)}
        if shown and "kernel" in leaves and "kernel" not in shown:
            raise ValueError(
                f"Layer {path!r}: its kernel is masked by an outer transformation, its "
                f"{', '.join(shown)} is not. Mask the whole layer, or name it in "
                "`exclude=`."
            )
        for name, leaf in shown.items():
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"Layer {path!r}: {name} has dtype {leaf.dtype}, expected a "
                    "floating-point dtype. Cast it, or name the layer in `exclude=`."
                )


def match_layers(
    intermediates: Intermediates | None, params: Any, selection: LayerSelection
) -> dict[str, LayerIntermediates]:
    """The intermediates of each local layer, in the order of the parameters.

    Records of layers that the user excluded, or that an outer Optax transformation
    masks, are left out. Everything else that does not fit is an error.
    """
    if intermediates is None:
        raise TypeError(
            "LocoProp's update needs `intermediates=`, each layer's inputs and "
            "cotangents. Get them with the loss and the gradients from "
            "locoprop_optax.linen.value_and_grad(loss_fn)(params, ...) and call "
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
            "locoprop_optax.linen.value_and_grad(loss_fn)(params, ...)."
        )
    everything = layers_of(params)
    for path in intermediates.layers:
        if not is_hidden(path, everything):
            _check_known(path, everything, selection)
    local = visible(layers_of(selection.mask(params)))
    for path, layer_params in local.items():
        if path not in intermediates.layers:
            raise ValueError(
                f"Layer {path!r} owns a kernel, but the intermediates hold no record "
                "of it: it took no part in the loss, or its kind cannot be captured. "
                "Name it in the optimizer's `exclude=` to leave it to the fallback."
            )
        _check_shapes(path, intermediates.layers[path], layer_params)
    return {path: intermediates.layers[path] for path in local}


def _check_known(path: str, everything: Any, selection: LayerSelection) -> None:
    if path not in everything:
        raise ValueError(
            f"The intermediates hold a record of layer {path!r}, which is not in the "
            f"parameters. Layers there: {', '.join(map(repr, everything))}. "
            "Were the parameters renamed or flattened, as by optax.flatten?"
        )
    excluded = LayerSelection(include="*", exclude=selection.exclude)
    if not excluded.is_local(path, everything[path]):
        return
    if not selection.is_local(path, everything[path]):
        raise ValueError(
            f"The intermediates hold a record of layer {path!r}, which is not local: "
            f"it owns {', '.join(everything[path])}, but no kernel. Name it in the "
            "optimizer's `include=` or `exclude=`."
        )


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
        if not jnp.issubdtype(dtype, jnp.floating):
            refuse(f"the dtype of its {what}", dtype, "a floating-point dtype")
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
