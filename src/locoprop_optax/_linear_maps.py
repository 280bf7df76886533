"""How a layer's pre-activation depends on its parameters: always linearly.

A linear map is all that a local problem knows about the kind of its layer.
"""

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._layers import LayerParams


class LinearMap(Protocol):
    """A layer, linear in its parameters; hashable, so that equal layers are found."""

    def __call__(self, params: LayerParams, inputs: Array) -> Array:
        """The pre-activation that the parameters give."""
        ...

    def design(self, inputs: Array) -> Float[Array, "n d_in"]:
        """The matrix whose product with the kernel, as a matrix, gives each row."""
        ...


@dataclass(frozen=True)
class Dense:
    """A product with the kernel over the last axis, plus a bias if there is one."""

    def __call__(
        self, params: LayerParams, inputs: Float[Array, "*n d_in"]
    ) -> Float[Array, "*n d_out"]:
        """Computes :math:`xW + b`; a parameter that is not given counts as zero."""
        preactivations = inputs @ params["kernel"]
        return preactivations + params["bias"] if "bias" in params else preactivations

    def design(self, inputs: Float[Array, "*n d_in"]) -> Float[Array, "n d_in"]:
        """The inputs, all their leading axes made one."""
        return jnp.reshape(inputs, (-1, inputs.shape[-1]))


DENSE = Dense()
