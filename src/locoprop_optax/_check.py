"""Are the intermediates those of the gradients?"""

from typing import Any

import jax
import numpy as np

from locoprop_optax._dtypes import at_least_float32
from locoprop_optax._intermediates import Intermediates, LayerIntermediates
from locoprop_optax._layers import LayerParams, LayerSelection, layers_of
from locoprop_optax._matching import match_layers


def check_intermediates(
    params: Any,
    grads: Any,
    intermediates: Intermediates,
    tolerance: float | None = None,
) -> dict[str, float]:
    r"""Checks that each layer's gradient follows from its intermediates.

    The pull-back of the cotangents through a layer alone, :math:`x^\top g` for a Dense
    layer, must be the gradient of its parameters. It is not where the loss has another
    term in the weights, such as a penalty.

    Args:
      params: the parameters.
      grads: the gradients.
      intermediates: the intermediates that came with them.
      tolerance: how large an error may be, relative to the layer's gradient. Default:
        1e-3, or 0.05 for a layer that computes in less than 32 bits.

    Returns:
      The relative error of each captured layer.

    Raises:
      ValueError: if an error is above `tolerance`; the message names the layer.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> _, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, x)
      >>> errors = loco.check_intermediates(params, grads, intermediates)
      >>> errors["params"] < 1e-6
      True
    """
    everything, gradients = layers_of(params), layers_of(grads)
    captured = LayerSelection(
        include=tuple(intermediates.layers),
        exclude=lambda path: path not in intermediates.layers,
    )
    errors = {}
    for path, layer in match_layers(intermediates, params, captured).items():
        found = at_least_float32(_pull_back(layer, everything[path]))
        difference = [found[n] - gradients[path][n] for n in found]
        scale = _norm([gradients[path][n] for n in found])
        errors[path] = _norm(difference) / max(scale, 1e-30)
        small = layer.preactivations.dtype.itemsize < 4
        allowed = (0.05 if small else 1e-3) if tolerance is None else tolerance
        if not errors[path] <= allowed:
            raise ValueError(
                f"Layer {path!r}: the gradient that follows from its intermediates is "
                f"off by {errors[path]:.2g} of its norm, expected at most {allowed}. "
                "Does its kernel enter the loss in another way as well, as in a "
                "penalty, or through a method other than __call__?"
            )
    return errors


def _pull_back(layer: LayerIntermediates, params: LayerParams) -> LayerParams:
    def pull_back(params, inputs, cotangents):
        preactivations, pull = jax.vjp(lambda p: layer.linear_map(p, inputs), params)
        return pull(cotangents.astype(preactivations.dtype))[0]

    for _ in range(layer.stack_dims):
        pull_back = jax.vmap(pull_back)
    return pull_back(dict(params), layer.inputs, layer.cotangents)


def _norm(arrays: list[jax.Array]) -> float:
    squares = [np.sum(np.square(np.asarray(a, np.float64))) for a in arrays]
    return float(np.sqrt(sum(squares)))
