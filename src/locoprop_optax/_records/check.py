"""Are the intermediates those of the gradients?"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from locoprop_optax._records.fits import match_layers
from locoprop_optax._records.intermediates import Intermediates, LayerIntermediates
from locoprop_optax._records.layers import Layers
from locoprop_optax._utils.dtypes import at_least_float32


def check_intermediates(
    layers: Layers,
    params: Any,
    grads: Any,
    intermediates: Intermediates,
    tolerance: float | None = None,
) -> dict[str, float]:
    r"""Checks that each layer's gradient follows from its intermediates.

    The pull-back of the cotangents through a layer alone, :math:`x^\top g` for a Dense
    layer, must be the gradient of its parameters, but for that of penalties on them.

    Args:
      layers: what `layers(loss_fn)` found.
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
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, x)
      >>> errors = loco.check_intermediates(layers, params, grads, intermediates)
      >>> errors["params/kernel"] < 1e-6
      True
    """
    own, gradients = layers.split(params), layers.split(grads)
    errors = {}
    for path, layer in match_layers(intermediates, params, layers).items():
        layer = replace(layer, gradient=layer.pull_back(own[path]))
        found = at_least_float32(dict(layer.whole_gradient()))
        error = _norm([found[n] - gradients[path][n] for n in found])
        scale = _norm([gradients[path][n] for n in found])
        errors[path] = error / max(scale, 1e-30)
        small = layer.preactivations.dtype.itemsize < 4
        allowed = (0.05 if small else 1e-3) if tolerance is None else tolerance
        if not error <= max(allowed * scale, _rounding(layer)):
            raise ValueError(
                f"Layer {path!r}: the gradient that follows from its intermediates is "
                f"off by {errors[path]:.2g} of its norm, expected at most {allowed}. "
                "Are these the gradients and intermediates of one call?"
            )
    return errors


def _rounding(layer: LayerIntermediates) -> float:
    """What rounding may leave of a gradient whose rows cancel."""
    eps = float(jnp.finfo(layer.preactivations.dtype).eps)
    return 8 * eps * _norm([layer.inputs]) * _norm([layer.cotangents])


def _norm(arrays: list[jax.Array]) -> float:
    squares = [np.sum(np.square(np.asarray(a, np.float64))) for a in arrays]
    return float(np.sqrt(sum(squares)))
