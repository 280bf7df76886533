"""What a target is, and the state that targets keep for a layer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._records.intermediates import LayerIntermediates
from locoprop_optax._records.layers import Layer
from locoprop_optax._records.linear_maps import LayerParams
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


class Target(NamedTuple):
    """A target for one layer, as a pair of pure functions.

    Attributes:
      init: from a layer, and its parameters by name, to the target's state for it, a
        pytree of arrays, those of stacked layers stacked in front.
      update: from (intermediates, local loss, state, count) to (displacement, new
        state), for one layer of a stack.
      samples: whether it wants sampled cotangents in the intermediates.
    """

    init: Callable[[Layer, LayerParams], Any]
    update: Callable[[LayerIntermediates, Loss, Any, Array], tuple[Displacement, Any]]
    samples: bool = False


def zeros_for(layer: Layer, params: LayerParams, *shape: int) -> Array:
    """State for a layer, with room for each layer of a stack."""
    dtype = jnp.promote_types(params["kernel"].dtype, "float32")
    return jnp.zeros((*layer.stack, *shape), dtype)


def average_in(
    state: Array, now: Array, decay: float, count: Array
) -> tuple[Array, Array]:
    """A running average, and its unbiased value."""
    state = decay * state + (1 - decay) * now.astype(state.dtype)
    return state, state / (1 - decay ** (count + 1.0)).astype(state.dtype)
