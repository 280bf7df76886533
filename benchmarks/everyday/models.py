"""Small models as users of Flax write them."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nn.Module):
    """Dense layers, of flattened inputs.

    Attributes:
      widths: of the layers, outputs included.
      transfer: between them.
    """

    widths: Sequence[int]
    transfer: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From inputs to outputs."""
        x = x.reshape(len(x), -1)
        for width in self.widths[:-1]:
            x = self.transfer(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class PairNetwork(nn.Module):
    """Two embedded numbers, side by side, and a hidden layer.

    Attributes:
      numbers: how many there are.
    """

    numbers: int

    @nn.compact
    def __call__(self, pairs: jax.Array) -> jax.Array:
        """From pairs to the logits of a number."""
        x = nn.Embed(self.numbers, 32)(pairs).reshape(len(pairs), -1)
        return nn.Dense(self.numbers)(nn.relu(nn.Dense(128)(x)))


class ConvNet(nn.Module):
    """Two convolutions with batch norms, then a layer of all that is left."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """From images to logits."""
        for channels in (8, 16):
            x = nn.Conv(channels, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x)))


class ResNet(nn.Module):
    """Residual blocks whose last norm starts at a scale of zero, as Flax's own do.

    Attributes:
      channels: of the first block; later ones have twice as many.
    """

    channels: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """From images to logits."""
        norm = partial(nn.BatchNorm, not train, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(self.channels, (3, 3), use_bias=False)(x)))
        for growth, stride in ((1, 1), (2, 2), (2, 1)):
            conv = partial(nn.Conv, growth * self.channels, use_bias=False)
            y = nn.relu(norm()(conv((3, 3), stride)(x)))
            y = norm(scale_init=nn.initializers.zeros)(conv((3, 3))(y))
            if x.shape != y.shape:
                x = norm()(conv((1, 1), stride)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class GPT(nn.Module):
    """Causal attention and dense layers, each on a normalized residual stream.

    Attributes:
      characters: how many there are.
      width: of the stream.
      blocks: how many follow each other.
      tied: whether the logits are products with the embedding.
    """

    characters: int
    width: int = 48
    blocks: int = 2
    tied: bool = False

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """From characters to the logits of those that follow."""
        embed = nn.Embed(self.characters, self.width)
        x = embed(text)
        shape = (text.shape[-1], self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), shape)
        mask = nn.make_causal_mask(text)
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        x = nn.LayerNorm()(x)
        return embed.attend(x) if self.tied else nn.Dense(self.characters)(x)


class DilatedText(nn.Module):
    """Causal convolutions of a text, each twice as far apart as the one before.

    Attributes:
      characters: how many there are.
    """

    characters: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """From characters to the logits of those that follow."""
        x = nn.Embed(self.characters, 32)(text)
        for power in range(4):
            y = nn.LayerNorm()(x)
            y = nn.Conv(32, (2,), kernel_dilation=2**power, padding="CAUSAL")(y)
            x = x + nn.gelu(y)
        return nn.Dense(self.characters)(nn.LayerNorm()(x))


class ConvAutoencoder(nn.Module):
    """Images through a code of 16 numbers and back, by convolutions with strides."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From images to the logits of their pixels."""
        x = nn.tanh(nn.Conv(8, (3, 3), 2)(x)).reshape(len(x), -1)
        x = nn.tanh(nn.Dense(128)(nn.Dense(16)(x))).reshape(-1, 4, 4, 8)
        return nn.ConvTranspose(1, (3, 3), (2, 2))(x)


class RowReader(nn.Module):
    """An LSTM over the rows of images, and a layer of where it ends."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """From images to logits."""
        rows = images.reshape(*images.shape[:2], -1)
        return nn.Dense(10)(nn.RNN(nn.LSTMCell(32))(rows)[:, -1])


class VAE(nn.Module):
    """Images through a random code of 4 numbers and back; new noise in each step."""

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """From images to the logits of their pixels, and the code's moments."""
        steps = self.variable("noise", "steps", jnp.zeros, (), jnp.int32)
        if self.is_mutable_collection("noise") and not self.is_initializing():
            steps.value += 1
        key = jax.random.fold_in(jax.random.key(0), steps.value)
        h = nn.relu(nn.Dense(64)(images.reshape(len(images), -1)))
        mean, log_variance = nn.Dense(4)(h), nn.Dense(4)(h)
        noise = jax.random.normal(key, mean.shape)
        code = mean + jnp.exp(0.5 * log_variance) * noise
        logits = nn.Dense(64)(nn.relu(nn.Dense(64)(code)))
        return logits.reshape(images.shape), mean, log_variance


class Poisson(nn.Module):
    r"""A network for :math:`-\Delta u = f` on a square, where u is zero around it."""

    @nn.compact
    def __call__(self, points: jax.Array) -> tuple[jax.Array, jax.Array]:
        """From points inside and on the boundary to what is wrong there."""
        inside, boundary = points[:, 0], points[:, 1]
        network = MLP((32, 32, 1), nn.tanh)
        at_boundary = network(boundary)
        alone, variables = network.unbind()

        def u(point):
            return alone.apply(variables, point[None])[0, 0]

        laplacian = jax.vmap(lambda point: jnp.trace(jax.hessian(u)(point)))(inside)
        force = 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * inside), axis=-1)
        return laplacian + force, at_boundary


class GraphConvolutions(nn.Module):
    """Two layers, each followed by a mean over the neighbours of a graph's nodes."""

    @nn.compact
    def __call__(self, graphs: jax.Array) -> jax.Array:
        """From adjacency and, beside it, features of nodes to their logits."""
        nodes = graphs.shape[1]
        means, x = graphs[..., :nodes], graphs[..., nodes:]
        x = nn.relu(means @ nn.Dense(16)(x))
        return means @ nn.Dense(2)(x)


class JudgedActor(nn.Module):
    """A policy, and the value of its actions by a critic that stays as it is."""

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        """From states to values."""
        actions = nn.tanh(MLP((64, 64, 2))(states))
        keys = jax.random.split(jax.random.key(0), 2)
        x = jnp.concatenate([states, actions], axis=-1)
        hidden = jnp.tanh(x @ jax.random.normal(keys[0], (x.shape[-1], 32)))
        return jnp.tanh(hidden @ jax.random.normal(keys[1], (32,)) / 32**0.5)


class Encoder(nn.Module):
    """Codes of length one."""

    @nn.compact
    def __call__(self, views: jax.Array) -> jax.Array:
        """From images to codes."""
        x = nn.Dense(16)(nn.relu(nn.Dense(64)(views)))
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def patches_of(images: jax.Array, side: int = 2) -> jax.Array:
    """Images as sequences of patches."""
    n, height, width, channels = images.shape
    x = images.reshape(n, height // side, side, width // side, side, channels)
    return jnp.swapaxes(x, 2, 3).reshape(n, -1, side * side * channels)


class ViT(nnx.Module):
    """Patches, attention among them, and the mean of what comes out."""

    def __init__(self, rngs: nnx.Rngs, width: int = 32, blocks: int = 2):
        self.embed = nnx.Linear(4, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs(), (16, width)))
        self.blocks = nnx.List([ViTBlock(rngs, width) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """From images to logits."""
        x = self.embed(patches_of(images)) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


class ViTBlock(nnx.Module):
    """Attention and dense layers on a normalized residual stream."""

    def __init__(self, rngs: nnx.Rngs, width: int):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From a sequence to another."""
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Mixer(nnx.Module):
    """Patches, mixed with one another and each within itself, by dense layers."""

    def __init__(self, rngs: nnx.Rngs, width: int = 32, blocks: int = 2):
        self.embed = nnx.Linear(4, width, rngs=rngs)
        self.blocks = nnx.List([MixerBlock(rngs, 16, width) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """From images to logits."""
        x = self.embed(patches_of(images))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


class MixerBlock(nnx.Module):
    """Two dense layers over the tokens, then two over their entries."""

    def __init__(self, rngs: nnx.Rngs, tokens: int, width: int):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.token_up = nnx.Linear(tokens, 2 * tokens, rngs=rngs)
        self.token_down = nnx.Linear(2 * tokens, tokens, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From a sequence to another."""
        y = jnp.swapaxes(self.norms[0](x), 1, 2)
        y = self.token_down(nnx.gelu(self.token_up(y)))
        x = x + jnp.swapaxes(y, 1, 2)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))
