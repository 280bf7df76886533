"""What a target is, and the state that targets keep for a layer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._intermediates import LayerIntermediates
from locoprop_optax._layers import LayerError
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
      init: from a layer's kernel to the target's state for it, a pytree of arrays.
      update: from (intermediates, local loss, state, count) to (displacement, new
        state).
    """

    init: Callable[[Array], Any]
    update: Callable[[LayerIntermediates, Loss, Any, Array], tuple[Displacement, Any]]


def zeros_for(kernel: Array, *shape: int) -> Array:
    """State for a layer, with room for each layer of a scanned stack."""
    dtype = jnp.promote_types(kernel.dtype, "float32")
    return jnp.zeros(kernel.shape[:-2] + shape, dtype)


def average_in(
    state: Array, now: Array, decay: float, count: Array
) -> tuple[Array, Array]:
    """A running average, and its unbiased value, shaped as `now`."""
    state = decay * state + (1 - decay) * now.astype(state.dtype)
    average = state.reshape(-1, *now.shape)[0]
    return state, average / (1 - decay ** (count + 1.0)).astype(state.dtype)


def check_units(known: int, layer: LayerIntermediates, what: str) -> None:
    """Raises a `LayerError` unless the output has as many units as are known."""
    units = layer.cotangents.shape[-1]
    if known != units:
        raise LayerError(
            f"{what} keeps something for each unit: the kernel's last axis counts "
            f"{known}, but the layer's output has {units} units. Use another target, "
            "or name the layer in `exclude=`."
        )
