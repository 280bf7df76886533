"""The models of the benchmarks, and their losses.

They need flax and optax alone, so that a peer's environment can have them, too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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


class TransformerBlock(nn.Module):
    """Causal attention, then two dense layers, each added to its input.

    Attributes:
      heads: of the attention.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From a sequence of vectors to another."""
        width = x.shape[-1]

        def split(y):
            return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

        y = nn.LayerNorm()(x)
        q, k, v = (split(nn.Dense(width, name=name)(y)) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.Dense(width, name="out")(attended.reshape(x.shape))
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(y)


class Transformer(nn.Module):
    """A language model of characters.

    Attributes:
      characters: how many there are.
      width: of the vectors.
      blocks: how many follow each other.
      heads: of each attention.
    """

    characters: int
    width: int = 128
    blocks: int = 3
    heads: int = 4

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """From characters to the logits of those that follow."""
        x = nn.Embed(self.characters, self.width)(text)
        x = x + self.param(
            "positions", nn.initializers.normal(0.02), (text.shape[-1], self.width)
        )
        for _ in range(self.blocks):
            x = TransformerBlock(self.heads)(x)
        return nn.Dense(self.characters)(nn.LayerNorm()(x))


class ResidualBlock(nn.Module):
    """Two convolutions, added to their input.

    Attributes:
      channels: of the output.
      stride: of the first convolution.
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From an image to another."""
        conv = partial(nn.Conv, self.channels, (3, 3), use_bias=False)
        norm = partial(nn.GroupNorm, num_groups=8)
        y = conv(strides=self.stride)(nn.relu(norm()(x)))
        y = conv()(nn.relu(norm()(y)))
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False)(x)
        return x + y


class ResidualNetwork(nn.Module):
    """From images to the logits of their classes.

    Attributes:
      channels: of the first stage; the second has twice as many.
      classes: how many there are.
    """

    channels: int = 16
    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """From rows of pixels."""
        x = images.reshape(-1, 28, 28, 1)
        x = nn.Conv(self.channels, (3, 3), use_bias=False)(x)
        for channels, stride in ((1, 1), (1, 1), (2, 2), (2, 1)):
            x = ResidualBlock(channels * self.channels, stride)(x)
        x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


def sigmoid_cross_entropy(logits: Any, images: jax.Array) -> jax.Array:
    """Binary cross-entropy, summed over pixels and averaged over images."""
    losses = optax.sigmoid_binary_cross_entropy(logits, images)
    return jnp.mean(jnp.sum(losses, axis=-1))


def softmax_cross_entropy(logits: Any, labels: Any) -> jax.Array:
    """Cross-entropy of classes, the mean over all labels."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def reconstruction_loss(model: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    """The cross-entropy of a model's reconstructions."""
    return sigmoid_cross_entropy(model.apply({"params": params}, images), images)


def described(model: nn.Module) -> dict[str, Any]:
    """A model of this file as something that JSON can hold; see `from_description`."""
    names = [field.name for field in dataclasses.fields(model)]
    values = {n: getattr(model, n) for n in names if n not in ("parent", "name")}
    return {"class": type(model).__name__, **values}


def from_description(description: Mapping[str, Any]) -> nn.Module:
    """The model that `described` told of."""
    values = dict(description)
    return MODELS[values.pop("class")](**values)


MODELS: dict[str, Callable[..., nn.Module]] = {
    model.__name__: model for model in (Autoencoder, Transformer, ResidualNetwork)
}
