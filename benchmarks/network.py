"""The deep autoencoders of the benchmarks, and their loss."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

HIDDEN = (1000, 500, 250, 30, 250, 500, 1000)
NETWORKS: dict[str, tuple[int, ...]] = {
    "paper": HIDDEN,
    "deeper": (1000, 500, 500, 500, 250, 30, 250, 500, 500, 500, 1000),
    "wider": (2000, 1000, 500, 60, 500, 1000, 2000),
    "curves": (400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400),
}
TRANSFERS = {"tanh": nn.tanh, "relu": nn.relu}


class Autoencoder(nn.Module):
    """Dense layers with a transfer function between them, but for a linear code layer.

    Attributes:
      hidden: the widths of the hidden layers, the middle one the code.
      pixels: the width of input and output.
      transfer: a key of `TRANSFERS`.
    """

    hidden: Sequence[int] = HIDDEN
    pixels: int = 784
    transfer: str = "tanh"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From pixels to the logits of their reconstruction."""
        code = len(self.hidden) // 2
        for i, width in enumerate((*self.hidden, self.pixels)):
            x = nn.Dense(width, kernel_init=nn.initializers.glorot_uniform())(x)
            if i not in (code, len(self.hidden)):
                x = TRANSFERS[self.transfer](x)
        return x


def cross_entropy(logits: Any, images: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy, summed over pixels and averaged over images."""
    losses = optax.sigmoid_binary_cross_entropy(logits, images)
    return jnp.mean(jnp.sum(losses, axis=-1))


def reconstruction_loss(model: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    """The cross-entropy of a model's reconstructions."""
    return cross_entropy(model.apply({"params": params}, images), images)
