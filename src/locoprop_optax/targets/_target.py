"""What a target is, and the state that targets keep for a layer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._records.intermediates import LayerIntermediates
from locoprop_optax._records.layers import Layer
from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._utils.average import Average
from locoprop_optax.losses import Loss


class Displacement(NamedTuple):
    r"""How far a layer is asked to move.

    Attributes:
      outputs: :math:`\delta`, shaped as the pre-activations.
      gradient: the gradient of the local loss before the first step, by parameter
        name, which is the layer's vector-Jacobian product with `outputs`. None if
        it does not follow from the backprop gradient and has to be computed.
    """

    outputs: Float[Array, "*n d_out"]
    gradient: Mapping[str, Array] | None = None


def _as_it_is(layer: LayerIntermediates, loss: Loss, state: Any, count: Array) -> Any:
    del layer, loss, count
    return state


class Target(NamedTuple):
    """A target for one layer, as pure functions.

    Attributes:
      init: from a layer, and its parameters by name, to the target's state for it, a
        pytree of arrays, those of stacked layers stacked in front.
      displace: from (intermediates, local loss, state, count) to the displacement, for
        one layer of a stack.
      refresh: from (intermediates, local loss, state, count) to the state with what is
        known of the curvature made anew, before `displace`, but not at every step.
        Default: nothing is.
      samples: whether `refresh` wants sampled cotangents in the intermediates.
    """

    init: Callable[[Layer, LayerParams], Any]
    displace: Callable[[LayerIntermediates, Loss, Any, Array], Displacement]
    refresh: Callable[[LayerIntermediates, Loss, Any, Array], Any] = _as_it_is
    samples: bool = False


def zeros_for(layer: Layer, params: LayerParams, *shape: int) -> Array:
    """State for a layer, with room for each layer of a stack."""
    dtype = jnp.promote_types(params["kernel"].dtype, "float32")
    return jnp.zeros((*layer.stack, *shape), dtype)


def no_average(layer: Layer, params: LayerParams, *shape: int) -> Average:
    """An average for a layer, one for each layer of a stack."""
    total, weight = zeros_for(layer, params, *shape), zeros_for(layer, params)
    return Average(total, weight)
